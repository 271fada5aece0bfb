"""Int8 weight rows with a scale per neuron: rounding, the op under every rule and predictor, the block, the loader."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checks import same_on_any_number_of_threads
from moyu_kernels import SparseGatedFFN, from_pretrained
from moyu_kernels.checkpoint import CheckpointError
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from moyu_kernels.ops.ffn.int8 import dequantise_rows, quantise_down, quantise_rows
from moyu_kernels.quantised import Int8GatedFFN
from moyu_kernels.runner import Runner
from predictors import KINDS, random_predictor
from safetensors.torch import load_file
from test_cpu_ops import DTYPES, ODD, assert_same, cut, ffn_arguments
from test_gate_rules import PREDICTABLE, RULES, rule_arguments
from test_topk import topk_arguments
from torch import Tensor, nn

Factory = Callable[..., Path]
SIZES = (ODD, (64, 128, 16), (3, 5, 1), (160, 300, 40))


def in_int8(arguments: list) -> list:
    """The same arguments of gated_ffn with their weights rounded to int8."""
    x, gate, up, down, *rest = arguments
    *down_rows, columns = quantise_down(down)
    rows = [quantise_rows(gate), quantise_rows(up), down_rows]
    rest += ["threshold", 0][len(rest) - 3 :]
    return [x, *(codes for codes, _ in rows), *rest, torch.stack([scale for _, scale in rows]), columns]


def cases(rows: int, dtype: torch.dtype, sizes: tuple[int, int, int] = ODD) -> Iterator[list]:
    """Int8 arguments of every rule, without a predictor and with one of each kind where the rule takes one."""
    yield in_int8([*ffn_arguments(rows, dtype, sizes)[:6], []])
    yield in_int8(topk_arguments(rows, dtype, min(50, sizes[1] - 1), sizes))
    for kind in KINDS:
        yield in_int8(ffn_arguments(rows, dtype, sizes, family=kind))
    for rule in RULES:
        yield in_int8(rule_arguments(rows, dtype, rule, sizes))
    for rule in PREDICTABLE:
        yield in_int8(rule_arguments(rows, dtype, rule, sizes, family=KINDS[rows % len(KINDS)]))


def test_rounding() -> None:
    weight = torch.randn(50, 33) * torch.logspace(-30, 3, 50)[:, None]
    weight[7] = 0
    codes, scale = quantise_rows(weight)
    assert codes.dtype == torch.int8
    assert codes.abs().amax(-1).tolist() == [0 if row == 7 else 127 for row in range(50)]
    error = (dequantise_rows(codes, scale, torch.float32) - weight).abs()
    assert (error <= scale[:, None] * 0.50001).all()
    assert error.max() > 0
    assert torch.equal(quantise_rows(dequantise_rows(codes, scale, torch.float32))[0], codes)
    with pytest.raises(ValueError, match=r"weights \[2, 3\] hold values that are not finite"):
        quantise_rows(torch.tensor([[1.0, 2.0, 3.0], [1.0, float("inf"), 0.0]]))


def test_a_large_weight_of_one_row_does_not_coarsen_its_others() -> None:
    """As the neurons have that write an outlier of the residual stream."""
    weight = torch.randn(200, 64)
    weight[3, 5] = 60.0
    weight[9] = 0
    codes, scale, columns = quantise_down(weight)
    assert columns.argmax() == 5
    assert (columns >= 1).all()
    assert columns.median() < 1.2
    error = (dequantise_rows(codes, scale, torch.float32, columns) - weight)[3].square().mean().sqrt()
    plain = (dequantise_rows(*quantise_rows(weight), torch.float32) - weight)[3].square().mean().sqrt()
    assert error < plain / 2
    zeros = quantise_down(torch.zeros(4, 8))
    assert not dequantise_rows(*zeros[:2], torch.float32, zeros[2]).any()
    with pytest.raises(ValueError, match="not finite"):
        quantise_down(torch.tensor([[1.0, float("nan")], [1.0, 2.0]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_equals_naive(rows: int, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        for arguments in cases(rows, dtype, sizes):
            found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
            # Thresholds stand in gaps between the activations of the weights before rounding; a few may be closer now.
            moved = (found[1] - expected[1]).abs().sum()
            assert moved <= 1, arguments[5:8]
            if not moved:
                assert_same(found, expected)


def test_naive_is_the_op_on_what_the_rows_stand_for() -> None:
    for arguments in cases(3, torch.float32):
        *plain, scales, columns = arguments
        rows = zip(plain[1:4], scales, (None, None, columns), strict=True)
        plain[1:4] = (dequantise_rows(codes, scale, torch.float32, factors) for codes, scale, factors in rows)
        found, expected = naive.gated_ffn(*arguments), naive.gated_ffn(*plain)
        assert (found[1] - expected[1]).abs().sum() <= 1
        if torch.equal(found[1], expected[1]):
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype) -> None:
    for rows in (2, 5, 8):
        for arguments in cases(rows, dtype):
            y, counts = cpu.gated_ffn(*arguments)
            for n in range(rows):
                y_one, counts_one = cpu.gated_ffn(arguments[0][n : n + 1], *arguments[1:])
                assert torch.equal(y_one[0], y[n])
                assert torch.equal(counts_one[0], counts[n])


def test_any_number_of_threads_bitwise() -> None:
    for arguments in cases(2, torch.bfloat16, (160, 1000, 40)):
        same_on_any_number_of_threads(cpu.gated_ffn, arguments)


def test_rows_that_are_not_needed_are_not_read() -> None:
    """Other codes there, which would be another result, and other counts in gate and up."""
    for kind in KINDS:
        arguments = in_int8(ffn_arguments(3, torch.bfloat16, family=kind))
        x, gate, up, down, _, act, predictor, *_, scales, _ = arguments
        expected = cpu.gated_ffn(*arguments)
        selected = (naive.predictor_scores(x, predictor, naive.ACTIVATIONS[act]) > 0).any(0)
        assert (~selected).sum() > 0
        for codes in (gate, up, down):
            codes[~selected] = 127
        scales[:, ~selected] = float("nan")
        assert all(torch.equal(a, b) for a, b in zip(cpu.gated_ffn(*arguments), expected, strict=True))


def test_nothing_and_everything_active() -> None:
    arguments = in_int8([*ffn_arguments(3, torch.bfloat16)[:6], []])
    arguments[4] = torch.full_like(arguments[4], 1e9)
    y, counts = cpu.gated_ffn(*arguments)
    assert not y.any()
    assert counts.tolist() == [[ODD[1], 0]] * 3
    arguments[4] = torch.zeros_like(arguments[4])
    found = cpu.gated_ffn(*arguments)
    assert (found[1] == ODD[1]).all()
    assert_same(found, naive.gated_ffn(*arguments))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_spoils_its_own_row_only(value: float) -> None:
    for arguments in cases(3, torch.float32):
        before = cpu.gated_ffn(*arguments)
        arguments[0][1, 5] = value
        found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
        for n in (0, 2):
            assert torch.equal(found[0][n], before[0][n])
        if arguments[7] == "threshold" and not arguments[6]:
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    for d, outputs in ((65, 193), (7, 1), (256, 64)):
        x, (codes, scale) = torch.randn(8, d).to(dtype), quantise_rows(torch.randn(outputs, d))
        b = torch.randn(outputs).to(dtype) if bias else None
        y = cpu.linear(x, codes, b, scale)
        exact = x.float() @ dequantise_rows(codes, scale, torch.float32).T + (0 if b is None else b.float())
        assert (y.float() - exact).norm() / exact.norm() < {2: 8e-3, 4: 1e-5}[x.element_size()]
        torch.testing.assert_close(cpu.naive_linear.linear(x, codes, b, scale), y, rtol=1e-2, atol=1e-2)
        for rows in range(1, 8):
            assert torch.equal(cpu.linear(x[:rows], codes, b, scale), y[:rows])
        both = cpu.linears(x, [codes, codes], [] if b is None else [b, b], torch.cat([scale, 2 * scale]))
        assert torch.equal(both[:, :outputs], y)
        assert torch.equal(both[:, outputs:], cpu.linear(x, codes, b, 2 * scale))


def test_opcheck() -> None:
    for arguments in cases(2, torch.bfloat16):
        torch.library.opcheck(
            torch.ops.moyu.gated_ffn.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
    x, codes, *_, scales, _ = next(cases(2, torch.bfloat16))
    torch.library.opcheck(torch.ops.moyu.linear.default, (x, codes, None, scales[0]))
    torch.library.opcheck(torch.ops.moyu.linears.default, (x, [codes, codes], [], scales[:2].flatten()))


def test_bad_arguments_are_refused() -> None:
    x, gate, up, down, *rest, scales, columns = in_int8([*ffn_arguments(1, torch.float32)[:6], []])
    for weights, given, message in (
        ((gate, up, down), None, r"int8 weights go with scales \[3, F\].* and columns \[D\].*; pass both"),
        ((gate.float(), up, down), scales, "gate is float32, expected int8"),
        ((gate, up, down.float()), scales, "down is float32, expected int8"),
        ((gate, up, down), scales[:2], r"scales has shape \[2, 193\], expected \[3, 193\]"),
        ((gate, up, down), scales.half(), "scales is float16, expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.gated_ffn(x, *weights, *rest, given, None if given is None else columns)
    with pytest.raises(RuntimeError, match="int8 weights go with scales"):
        cpu.gated_ffn(x, gate, up, down, *rest, scales)
    with pytest.raises(RuntimeError, match=r"columns has shape \[64\], expected \[65\]"):
        cpu.gated_ffn(x, gate, up, down, *rest, scales, columns[1:])
    with pytest.raises(ValueError, match=r"gate is torch\.int8: int8 weights go with scales"):
        naive.gated_ffn(x, gate, up, down, *rest)
    with pytest.raises(RuntimeError, match="weight is int8, expected float32"):
        cpu.linear(x, gate)
    with pytest.raises(RuntimeError, match=r"scales has shape \[3, 193\], expected \[193\]"):
        cpu.linear(x, gate, None, scales)


def projections(dtype: torch.dtype = torch.float32) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    sizes = {"gate_proj": (64, 192), "up_proj": (64, 192), "down_proj": (192, 64)}
    return {name: nn.Linear(*size, bias=False).to(dtype).requires_grad_(False) for name, size in sizes.items()}


def rounded(stock: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Projections on what the int8 rows stand for."""
    result = projections(stock["gate_proj"].weight.dtype)
    for name, projection in stock.items():
        rows = projection.weight.T if name == "down_proj" else projection.weight
        codes, scale, *columns = quantise_down(rows) if name == "down_proj" else quantise_rows(rows)
        values = dequantise_rows(codes, scale, rows.dtype, *columns)
        result[name].weight.copy_(values.T if name == "down_proj" else values)
    return result


@pytest.mark.parametrize("rule", ["threshold", "relu", "topk", "gate_threshold"])
@pytest.mark.parametrize("part", [2**22, 64 * 5])
def test_block_equals_a_block_on_the_rounded_weights(rule: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and prefill, also where that widens the rows in many parts."""
    monkeypatch.setattr("moyu_kernels.quantised.PART", part)
    threshold = torch.full((192,), 0.05)
    block = Int8GatedFFN(projections(), "silu", threshold, [], "rule", rule=rule, keep=70)
    plain = SparseGatedFFN(rounded(projections()), "silu", threshold, [], "rule", rule=rule, keep=70)
    for rows in (1, 8, 9, 40):
        x = torch.randn(2, rows, 64)[: 1 if rows == 8 else 2]
        torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)
    assert (block.counts - plain.counts).abs().max() <= 1
    assert 0.1 < block.counts[2] / block.counts[0] / 192 < 0.9
    block.set_mode("rule", "reference")
    torch.testing.assert_close(block(x[:, :4]), plain(x[:, :4]), rtol=1e-4, atol=1e-5)


def test_block_keeps_one_copy_and_a_stock_state_dict() -> None:
    stock = projections(torch.bfloat16)
    block = Int8GatedFFN(dict(stock), "silu", torch.zeros(192), [], "rule")
    state = block.state_dict()
    block = block.to(torch.float16)
    kept = [*block.parameters(), *block.buffers()]
    assert sum(t.numel() * t.element_size() for t in kept if t.numel() > 1000) == 3 * 64 * 192
    assert all(weight.dtype == torch.int8 and weight.is_contiguous() for weight in block.weights)
    assert block.scales.dtype == torch.float32
    assert state.keys() == {f"{name}.weight" for name in stock}
    for name, projection in rounded(stock).items():
        assert torch.equal(state[f"{name}.weight"], projection.weight)
        moved = block.state_dict()[f"{name}.weight"]
        torch.testing.assert_close(moved, projection.weight.half(), rtol=0.01, atol=1e-4)


def test_loading(checkpoint: Factory, tmp_path: Path) -> None:
    folder = checkpoint(threshold=0.1)
    ids = torch.randint(128, (1, 6))
    model = from_pretrained(folder, weights="int8")
    ffn = model.model.layers[1].mlp
    assert isinstance(ffn, Int8GatedFFN)
    stored = from_pretrained(folder)
    assert type(stored.model.layers[1].mlp) is SparseGatedFFN  # what the checkpoint says is the default
    error = (model(ids).logits - stored(ids).logits).norm() / stored(ids).logits.norm()
    assert 1e-4 < error < 0.1
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    codes, scale, columns = quantise_down(before[name].T)
    assert torch.equal(after[name], dequantise_rows(codes, scale, torch.bfloat16, columns).T)
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    with pytest.raises(ValueError, match="use one of stored, int8"):
        from_pretrained(folder, weights="int4")


def test_compiled_steps_equal_eager_ones(checkpoint: Factory) -> None:
    model = from_pretrained(checkpoint(threshold=0.1), weights="int8", dtype=torch.float32)
    ids = torch.randint(128, (1, 12))
    compiled = Runner(model, max_length=16)
    compiled.prefill(ids)
    found = [compiled.step(token) for token in (3, 5)]
    compiled.close()
    eager = Runner(model, max_length=16, compile=False)
    eager.prefill(ids)
    for step, token in zip(found, (3, 5), strict=True):
        torch.testing.assert_close(step, eager.step(token), rtol=1e-4, atol=1e-4)


def test_a_block_without_an_op_cannot_have_int8_weights(checkpoint: Factory) -> None:
    folder = checkpoint()
    from test_loading import reseal, rewrite

    rewrite(folder / "config.json", lambda data: data["moyu"]["blocks"][0].update(layout="experts"))
    reseal(folder)
    with pytest.raises(
        CheckpointError, match=r"mlp cannot have int8 weights, since layout 'experts' has no op; load it with"
    ):
        from_pretrained(folder, weights="int8")


def test_thresholds_of_the_block_at_their_cut() -> None:
    """A cut that moves with the scale would keep other neurons."""
    arguments = in_int8([*ffn_arguments(4, torch.float32)[:6], []])
    *_, scales, _ = arguments
    x, gate, up = arguments[:3]
    a = naive.ACTIVATIONS["silu"](x @ gate.float().T * scales[0]) * (x @ up.float().T * scales[1])
    arguments[4] = torch.full((ODD[1],), cut(a.abs(), 0.7))
    kept: Tensor = (a.abs() >= arguments[4]).sum(-1)
    assert torch.equal(cpu.gated_ffn(*arguments)[1][:, 1], kept.int())
    assert torch.equal(naive.gated_ffn(*arguments)[1][:, 1], kept.int())


def test_predictors_of_the_block(checkpoint: Factory) -> None:
    predictor = random_predictor("lowbit", 64, 192, 8)
    block = Int8GatedFFN(projections(), "silu", torch.full((192,), 0.01), predictor)
    plain = SparseGatedFFN(rounded(projections()), "silu", torch.full((192,), 0.01), predictor)
    x = torch.randn(3, 64)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(block.counts, plain.counts)
    assert 0 < block.counts[1] < 3 * 192
