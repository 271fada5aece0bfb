import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from moyu_kernels.ops import cpu
from moyu_kernels.ops.cpu import build
from moyu_kernels.ops.ffn import naive
from predictors import KINDS, random_predictor
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ODD = (65, 193, 17)


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert cpu.load(), "these tests need the native kernels; the log says why they were not built"


def cut(values: Tensor, share: float) -> float:
    """A value that `share` of the values lie below, in the widest gap near there: rounding must not move any across."""
    ordered = values.flatten().sort().values
    middle = int(len(ordered) * share)
    window = ordered[max(middle - 20, 0) : middle + 20]
    gap = int((window[1:] - window[:-1]).argmax())
    return ((window[gap] + window[gap + 1]) / 2).item()


def ffn_arguments(
    rows: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int] = ODD,
    act: str = "silu",
    density: float = 0.4,
    drop: float = 0.3,
    family: str = "lowrank",
) -> list:
    """Arguments of gated_ffn, in which about `density` is selected and `drop` of that dropped by the rule."""
    torch.manual_seed(rows)
    d, f, r = sizes
    x = torch.randn(rows, d).to(dtype)
    gate, up, down = ((torch.randn(f, d) / d**0.5).to(dtype) for _ in range(3))
    predictor = random_predictor(family, d, f, r, seed=rows)
    predictor[-1] = torch.zeros(f)
    predictor[-1] -= cut(naive.predictor_scores(x, predictor, naive.ACTIVATIONS[act]), 1 - density)
    a = naive.ACTIVATIONS[act](x.float() @ gate.float().T) * (x.float() @ up.float().T)
    return [x, gate, up, down, torch.full((f,), cut(a.abs(), drop)), act, predictor]


def terms_of(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, threshold: Tensor, act: str, _: list, rule: str, keep: int = 0
) -> Tensor:
    """What a gated FFN would give if no terms of its sums cancelled, for `assert_same`."""
    g, u = x.float() @ gate.float().T, x.float() @ up.float().T
    return naive.ruled_activation(g, u, threshold, act, rule, keep)[0].abs() @ down.float().abs()


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], terms: Tensor | None = None) -> None:
    """terms: what y would be if nothing in its sums cancelled; rounding is of its size. Default y itself."""
    (y, counts), (y_naive, counts_naive) = found, expected
    assert y.dtype == y_naive.dtype
    assert torch.equal(counts, counts_naive)
    size = max(part.float().norm() for part in (y_naive, y_naive if terms is None else terms))
    error = (y.float() - y_naive.float()).norm() / size.clamp_min(1e-9)
    assert error < TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [ODD, (64, 128, 16), (3, 5, 1), (160, 300, 40)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("family", KINDS)
def test_equals_naive(family: str, rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = ffn_arguments(rows, dtype, sizes, family=family)
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))
    arguments[-1] = []
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))


@pytest.mark.parametrize("act", naive.ACTIVATIONS)
@pytest.mark.parametrize("family", KINDS)
def test_activations(family: str, act: str) -> None:
    arguments = ffn_arguments(3, torch.float32, act=act, family=family)
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*KINDS, None])
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype, family: str | None) -> None:
    for rows in range(1, 9):
        arguments = ffn_arguments(rows, dtype, family=family or "lowrank")
        rest = [*arguments[1:-1], arguments[-1] if family else []]
        y, counts = cpu.gated_ffn(arguments[0], *rest)
        for n in range(rows):
            y_one, counts_one = cpu.gated_ffn(arguments[0][n : n + 1], *rest)
            assert torch.equal(y_one[0], y[n])
            assert torch.equal(counts_one[0], counts[n])


@pytest.mark.parametrize("family", KINDS)
def test_any_number_of_threads_bitwise(family: str) -> None:
    arguments = ffn_arguments(2, torch.bfloat16, (160, 1000, 40), family=family)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            linear = cpu.linear(arguments[0], arguments[1])
            found.append([*cpu.gated_ffn(*arguments), *cpu.gated_ffn(*arguments[:-1], []), linear])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("family", KINDS)
def test_rows_that_are_not_needed_are_not_read(family: str, dtype: torch.dtype, rows: int) -> None:
    arguments = ffn_arguments(rows, dtype, family=family)
    x, gate, up, down, threshold, act, predictor = arguments
    expected = cpu.gated_ffn(*arguments)
    selected = naive.predictor_scores(x, predictor, naive.ACTIVATIONS[act]) > 0
    a = naive.ACTIVATIONS[act](x.float() @ gate.float().T) * (x.float() @ up.float().T)
    kept = selected & (a.abs() >= threshold)
    assert not selected.any(0).all()
    gate, up, down = gate.clone(), up.clone(), down.clone()
    gate[~selected.any(0)] = up[~selected.any(0)] = down[~kept.any(0)] = float("nan")
    found = cpu.gated_ffn(x, gate, up, down, threshold, act, predictor)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    exact = arguments[3].clone()
    exact[~(a.abs() >= threshold).any(0)] = float("nan")
    assert cpu.gated_ffn(x, arguments[1], arguments[2], exact, threshold, act, [])[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KINDS)
def test_nothing_and_everything_active(family: str, dtype: torch.dtype) -> None:
    arguments = ffn_arguments(3, dtype, family=family)
    predictor = arguments[-1]
    predictor[-1] = torch.full_like(predictor[-1], -1e9)
    y, counts = cpu.gated_ffn(*arguments)
    assert not y.any()
    assert not counts.any()
    predictor[-1] = torch.full_like(predictor[-1], 1e9)
    arguments[4] = torch.zeros_like(arguments[4])
    found = cpu.gated_ffn(*arguments)
    assert (found[1] == ODD[1]).all()
    assert_same(found, naive.gated_ffn(*arguments))
    arguments[4] = torch.full_like(arguments[4], 1e9)
    y, counts = cpu.gated_ffn(*arguments)
    assert not y.any()
    assert counts.tolist() == [[ODD[1], 0]] * 3


def test_not_a_number_is_not_kept() -> None:
    arguments = ffn_arguments(2, torch.float32)
    arguments[1][7] = float("nan")
    arguments[-1] = []
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", KINDS)
def test_an_input_that_is_not_finite_spoils_its_own_row_only(family: str, value: float) -> None:
    arguments = ffn_arguments(3, torch.float32, family=family)
    before = cpu.gated_ffn(*arguments)
    arguments[0][1, 5] = value
    found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
    for n in (0, 2):
        assert torch.equal(found[0][n], before[0][n])
    if family == "lowbit":  # nothing is selected, by any backend
        assert found[1][1].tolist() == expected[1][1].tolist() == [0, 0]


def test_a_row_of_zeros_selects_by_its_bias() -> None:
    arguments = ffn_arguments(2, torch.float32, family="lowbit")
    arguments[0][1] = 0
    arguments[-1][-1][:10] = 0.5
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))
    assert cpu.gated_ffn(*arguments)[1][1, 0] == 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    for d, outputs in ((65, 193), (7, 1), (256, 64)):
        x, weight = torch.randn(8, d).to(dtype), torch.randn(outputs, d).to(dtype)
        b = torch.randn(outputs).to(dtype) if bias else None
        y = cpu.linear(x, weight, b)
        expected = functional.linear(x.float(), weight.float(), None if b is None else b.float())
        assert (y.float() - expected).norm() / expected.norm() < TOLERANCE[dtype]
        for rows in range(1, 8):
            assert torch.equal(cpu.linear(x[:rows], weight, b), y[:rows])


@pytest.mark.parametrize("bias", [True, False])
def test_linears_equal_linear_bitwise(bias: bool) -> None:
    x = torch.randn(3, 65, dtype=torch.bfloat16)
    weights = [torch.randn(outputs, 65, dtype=torch.bfloat16) for outputs in (40, 1, 200)]
    biases = [torch.randn(len(weight), dtype=torch.bfloat16) for weight in weights] if bias else []
    y = cpu.linears(x, weights, biases)
    alone = [cpu.linear(x, weight, biases[i] if bias else None) for i, weight in enumerate(weights)]
    assert torch.equal(y, torch.cat(alone, dim=1))
    torch.library.opcheck(torch.ops.moyu.linears.default, (x, weights, biases))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 3, 64, 200), (2, 4, 4, 37, 33), (3, 2, 1, 8, 5)])
def test_attend(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    batch, heads, groups, d, length = shape
    q = torch.randn(batch, 1, heads, d).transpose(1, 2).to(dtype)
    k, v = (torch.randn(batch, groups, length, d).to(dtype) for _ in range(2))
    mask = torch.rand(batch, 1, 1, length) < 0.5
    mask[..., 2], mask[..., -2:] = True, False
    y = cpu.attend(q, k, v, mask, 0.2)
    expected = functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    assert (y.float() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    k[:, :, -2:] = v[:, :, -2:] = float("nan")
    assert torch.equal(cpu.attend(q, k, v, mask, 0.2), y)
    assert torch.equal(cpu.attend(q, k, v, mask[:1].expand(batch, 1, 1, length), 0.2)[:1], y[:1])
    for position in (2, int(mask[0].nonzero()[-1][-1])):  # in vectors and behind them
        spoiled = k.clone()
        spoiled[0, :, position, 1] = float("nan")
        found = cpu.attend(q, spoiled, v, mask, 0.2)
        assert found[0].isnan().all()
        assert torch.equal(found[1:], y[1:])


def test_bad_arguments_are_refused() -> None:
    x, gate, up, down, threshold, act, predictor = ffn_arguments(1, torch.float32)
    lowbit = random_predictor("lowbit", *ODD)
    for changed, message in [
        ((torch.randn(9, 65), gate, up, down, threshold, act, []), r"x has shape \[9, 65\].*N from 1 to 8"),
        ((x[0], gate, up, down, threshold, act, []), r"x has shape \[65\]"),
        ((x, gate, up[:-1], down, threshold, act, []), r"up has shape \[192, 65\], expected \[193, 65\]"),
        ((x, gate, up, down.T.contiguous(), threshold, act, []), r"down has shape \[65, 193\]"),
        ((x, gate, up, down.T.contiguous().T, threshold, act, []), "down .* has rows that are not contiguous"),
        ((x, gate[:1].expand(193, 65), up, down, threshold, act, []), "gate .* has rows that are not contiguous"),
        ((x, gate.half(), up, down, threshold, act, []), "gate is float16, expected float32"),
        ((x.double(), gate, up, down, threshold, act, []), "x is float64, supported are bfloat16"),
        ((x, gate, up, down, threshold.bfloat16(), act, []), "threshold is bfloat16, expected float32"),
        ((x, gate, up, down, threshold, "tanh", []), "activation 'tanh' is unknown; use silu"),
        ((x, gate, up, down, threshold, act, predictor[:3]), "predictor has 3 tensors"),
        ((x, gate, up, down, threshold, act, [predictor[0].float(), *predictor[1:]]), "w1 is float32, expected int8"),
        ((x, gate, up, down, threshold, act, [*predictor[:4], threshold[1:]]), r"bias has shape \[192\]"),
        ((x, gate, up, down, threshold, act, [lowbit[0][:, 1:], *lowbit[1:]]), r"gate_codes has shape \[193, 16\]"),
        ((x, gate, up, down, threshold, act, [lowbit[0].char(), *lowbit[1:]]), "gate_codes is int8, expected uint8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.gated_ffn(*changed)
    with pytest.raises(RuntimeError, match=r"weight has shape \[193, 65\], expected \[193, 64\]"):
        cpu.linear(x[:, :64], gate)
    with pytest.raises(RuntimeError, match="bias is bfloat16, expected float32"):
        cpu.linear(x, gate, threshold.bfloat16())
    with pytest.raises(RuntimeError, match="2 weights and 1 biases given"):
        cpu.linears(x, [gate, up], [threshold])
    with pytest.raises(RuntimeError, match=r"mask is float32 \[1, 1, 1, 5\], expected bool"):
        cpu.attend(torch.zeros(1, 2, 1, 4), *[torch.zeros(1, 2, 5, 4)] * 2, torch.ones(1, 1, 1, 5), 1.0)
    with pytest.raises(RuntimeError, match=r"expected \[B, H, 1, D\]"):
        cpu.attend(
            torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), torch.ones(1, 1, 1, 5), 1.0
        )


def test_opcheck() -> None:
    arguments = ffn_arguments(2, torch.bfloat16)
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, arguments)
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, ffn_arguments(2, torch.bfloat16, family="lowbit"))
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, [*arguments[:-1], []])
    torch.library.opcheck(torch.ops.moyu.linear.default, (arguments[0], arguments[1], None))
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.moyu.attend.default, (q, k, k.clone(), mask, 0.5))


def test_read_bandwidth() -> None:
    buffer = torch.arange(2**16, dtype=torch.int32)
    assert cpu.read_bandwidth(buffer) > 0.1
    assert torch.ops.moyu.read_sum.default(buffer).item() == buffer.sum(dtype=torch.int32).item()


def run_python(code: str, **environment: str) -> subprocess.Popen:
    variables = os.environ | environment
    return subprocess.Popen([sys.executable, "-c", code], env=variables, text=True, stderr=subprocess.PIPE)


COMPARE = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from moyu_kernels.ops.cpu import build
build.MACHINE_FLAGS = GIVEN
import test_cpu_ops as tests
import test_gate_rules as gates
import test_int8_op as int8
import test_plain_op as plain
import test_topk as topk
assert tests.cpu.load()
for dtype in tests.DTYPES:
    for family in tests.KINDS:
        tests.test_equals_naive(family, 3, tests.ODD, dtype)
        tests.test_rows_equal_batch_of_one_bitwise(dtype, family)
    for rule in gates.RULES:
        gates.test_equals_naive(rule, 3, dtype)
        gates.test_rows_equal_batch_of_one_bitwise(rule, dtype)
    plain.test_rows_equal_batch_of_one_bitwise(dtype)
    for rule in plain.RULES:
        plain.test_equals_naive(rule, 3, dtype)
    topk.test_equals_naive(3, dtype)
    topk.test_rows_equal_batch_of_one_bitwise(dtype)
    int8.test_equals_naive(3, dtype)
    int8.test_rows_equal_batch_of_one_bitwise(dtype)
    int8.test_linear(dtype, True)
    tests.test_linear(dtype, True)
    tests.test_attend(dtype, (2, 4, 4, 37, 33))
"""


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("-mavx2", "-mfma", "-mf16c"), marks=pytest.mark.slow),
        pytest.param(("-march=native", "-DMOYU_WAITS"), marks=pytest.mark.slow),
        (),
    ],
    ids=["avx2", "waits", "plain"],
)
def test_other_instruction_sets(flags: tuple[str, ...], tmp_path: Path) -> None:
    process = run_python(COMPARE.replace("GIVEN", repr(flags)), MOYU_CACHE=str(tmp_path))
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_only_cores_that_gain_by_it_wait() -> None:
    amd, intel = {"vendor_id": "AuthenticAMD", "cpu family": "26"}, {"vendor_id": "GenuineIntel", "cpu family": "6"}
    assert "-DMOYU_WAITS" in build.machine_flags(amd)
    assert all(len(build.machine_flags(other)) == 1 for other in (intel, amd | {"cpu family": "25"}, {}))


def test_without_a_compiler_the_fallback_is_announced(tmp_path: Path) -> None:
    code = """
import torch
from moyu_kernels.ops import cpu
assert not cpu.load() and "plain PyTorch" in cpu.status()
x, w = torch.ones(1, 4), torch.ones(3, 4)
assert cpu.gated_ffn(x, w, w, w, torch.zeros(3), "relu", [])[0].tolist() == [[48.0] * 4]
assert cpu.linear(x, w).tolist() == [[4.0] * 3]
"""
    process = run_python(code, CXX="/no/such/compiler", MOYU_CACHE=str(tmp_path))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert errors.count("falls back to plain PyTorch") == 1


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("MOYU_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(build.BuildError, match=r"home directory\. set MOYU_CACHE to a writable folder"):
        build.build_library()


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = """
from moyu_kernels.ops.cpu import build
build.FLAGS = tuple(flag for flag in build.FLAGS if flag != "-O3")
from moyu_kernels.ops import cpu
assert cpu.load()
"""
    processes = [run_python(code, MOYU_CACHE=str(tmp_path)) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert len(list(tmp_path.iterdir())) == 1
