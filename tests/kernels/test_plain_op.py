"""The plain FFN: all up rows are read, or those that a predictor or mask selects, and down rows of kept neurons."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same_on_any_number_of_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from predictors import PLAIN_KINDS, random_predictor
from test_cpu_ops import DTYPES, ODD, assert_same, cut, run_python
from torch import Tensor

RULES = naive.PLAIN_RULES
PREDICTABLE = [rule for rule in RULES if rule not in naive.WHOLE_ROW]
SIZES = (ODD, (64, 128, 16), (3, 5, 1), (160, 300, 40))


def plain_arguments(
    rows: int,
    dtype: torch.dtype,
    rule: str = "threshold",
    sizes: tuple[int, int, int] = ODD,
    family: str | None = None,
    act: str = "gelu_tanh",
    biases: bool = True,
    density: float = 0.3,
) -> list[Any]:
    """Arguments of `plain_ffn` under a rule by which about `density` of the neurons are kept."""
    torch.manual_seed(rows)
    d, f, r = sizes
    x = torch.randn(rows, d).to(dtype)
    up, down = ((torch.randn(f, d) / d**0.5).to(dtype) for _ in range(2))
    up_bias, down_bias = ((0.5 * torch.randn(size)).to(dtype) if biases else None for size in (f, d))
    u = x.float() @ up.float().T + (0.0 if up_bias is None else up_bias.float())
    function = naive.ACTIVATIONS[act]
    level = {"threshold": function(u).abs(), "gate_threshold": function(u).abs()}.get(rule, u)
    if rule.startswith("statistical"):
        level = (u - u.mean(-1, keepdim=True)) / u.std(-1, keepdim=True)
    threshold = torch.full((f,), cut(level, 1 - density))
    if rule == "topk":
        threshold = torch.rand(f) + 0.5
    predictor = []
    if family:
        predictor = random_predictor(family, d, f, r, seed=rows)
        if family != "given":
            bias = 0.0 if up_bias is None else up_bias.float()
            predictor[-1] = 0.05 * torch.randn(f)
            predictor[-1] -= cut(naive.predictor_scores(x, predictor, lambda u: function(u + bias)), 0.5)
    keep = max(round(density * f), 1) if rule == "topk" else 0
    return [x, up, down, threshold, act, predictor, rule, keep, up_bias, down_bias]


def spelt_out(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """a `[N, F]` without a predictor, and which neurons are kept, each rule written once more; fp32."""
    x, up, _, threshold, act, _, rule, keep, up_bias, _ = arguments
    u = x.float() @ up.float().T + (0.0 if up_bias is None else up_bias.float())
    a = naive.ACTIVATIONS[act](u)
    level = u.mean(-1, keepdim=True) + threshold * u.var(-1, keepdim=True).sqrt()
    ranked = a.abs() / threshold
    value, kept = {
        "threshold": (a, a.abs() >= threshold),
        "gate_threshold": (a, a.abs() >= threshold),
        "relu": (u - threshold, u > threshold),
        "fatrelu": (u, (u > 0) & (u >= threshold)),
        "relu2": (u * u, u > 0),
        "statistical_topk": (a, u > level),
        "statistical_topk_soft": (naive.ACTIVATIONS[act](u - level), u > level),
        "topk": (a, ranked >= ranked.sort(descending=True).values[:, max(keep, 1) - 1 :][:, :1]),
    }[rule]
    return value, kept & (value != 0)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_the_naive_twin_computes_what_it_says(rule: str, biases: bool) -> None:
    arguments = plain_arguments(3, torch.float32, rule, biases=biases)
    a, kept = spelt_out(arguments)
    y, counts = naive.plain_ffn(*arguments)
    expected = torch.where(kept, a, 0.0) @ arguments[2]
    torch.testing.assert_close(y, expected + arguments[-1] if biases else expected, rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [[ODD[1], count] for count in kept.sum(-1).tolist()]
    assert 0.1 < kept.float().mean() < 0.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_equals_naive(rule: str, rows: int, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        arguments = plain_arguments(rows, dtype, rule, sizes, biases=sizes != SIZES[1])
        assert_same(cpu.plain_ffn(*arguments), naive.plain_ffn(*arguments))


@pytest.mark.parametrize("family", [*PLAIN_KINDS, "given"])
@pytest.mark.parametrize("rule", PREDICTABLE)
def test_predicted_equals_naive(rule: str, family: str) -> None:
    for rows, dtype in ((1, torch.bfloat16), (3, torch.float32), (8, torch.float16)):
        arguments = plain_arguments(rows, dtype, rule, family=family, biases=rows != 3)
        found = cpu.plain_ffn(*arguments)
        assert_same(found, naive.plain_ffn(*arguments))
        selected, kept = found[1].sum(0).tolist()
        assert 0 < kept < selected < rows * ODD[1]


def test_a_predictor_sees_the_bias_of_up() -> None:
    arguments = plain_arguments(2, torch.float32, family="lowbit_up")
    counts = cpu.plain_ffn(*arguments)[1]
    arguments[-2] = None
    assert not torch.equal(cpu.plain_ffn(*arguments)[1][:, 0], counts[:, 0])


@pytest.mark.parametrize("act", naive.ACTIVATIONS)
def test_activations(act: str) -> None:
    for rule, family in (("threshold", None), ("threshold", "lowbit_up"), ("statistical_topk_soft", None)):
        arguments = plain_arguments(3, torch.float32, rule, family=family, act=act)
        assert_same(cpu.plain_ffn(*arguments), naive.plain_ffn(*arguments))


def each_case(rows: int, dtype: torch.dtype) -> list[list[Any]]:
    """Arguments of every rule, and of every kind of predictor."""
    cases = [plain_arguments(rows, dtype, rule) for rule in RULES]
    return cases + [plain_arguments(rows, dtype, family=family) for family in (*PLAIN_KINDS, "given")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype) -> None:
    for rows in range(2, 9):
        for x, *rest in each_case(rows, dtype):
            y, counts = cpu.plain_ffn(x, *rest)
            for n in range(rows):
                alone = [*rest]
                if len(rest[4]) == 1:
                    alone[4] = [rest[4][0] >> n & 1]
                y_one, counts_one = cpu.plain_ffn(x[n : n + 1], *alone)
                assert torch.equal(y_one[0], y[n])
                assert torch.equal(counts_one[0], counts[n])


def test_any_number_of_threads_bitwise() -> None:
    for rule in RULES:
        arguments = plain_arguments(2, torch.bfloat16, rule, (160, 1000, 40))
        same_on_any_number_of_threads(cpu.plain_ffn, arguments)


PROTECTED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from checks import reads_only
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from test_plain_op import RULES, plain_arguments, spelt_out
for rule in RULES:
    arguments = plain_arguments(2, torch.float32, rule, (1024, 40, 4))
    kept = spelt_out(arguments)[1].any(0)
    assert 0 < kept.sum() < 40
    reads_only(cpu.plain_ffn, arguments, {{2: kept}})
arguments = plain_arguments(2, torch.float32, "threshold", (1024, 40, 4), "given")
selected = naive.unpack_mask(arguments[5][0], 2)
kept = (selected & spelt_out(arguments)[1]).any(0)
assert 0 < kept.sum() < selected.any(0).sum() < 40
reads_only(cpu.plain_ffn, arguments, {{1: selected.any(0), 2: kept}})
"""


def test_rows_that_are_not_needed_are_not_read() -> None:
    process = run_python(PROTECTED)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("rule", RULES)
def test_nothing_and_everything_is_kept(rule: str) -> None:
    arguments = plain_arguments(3, torch.float32, rule)
    if rule in ("topk", "relu2"):
        arguments[1], arguments[8] = torch.zeros_like(arguments[1]), torch.zeros_like(arguments[8])
    else:
        arguments[3] = torch.full_like(arguments[3], 1e9)
    y, counts = cpu.plain_ffn(*arguments)
    assert torch.equal(y, arguments[-1].expand_as(y)), "what is off adds nothing, the bias of down stays"
    assert counts.tolist() == [[ODD[1], 0]] * 3
    arguments = plain_arguments(3, torch.float32, rule, act="silu", density=1.0)
    if rule != "topk":
        arguments[3] = torch.full_like(arguments[3], 0.0 if "threshold" in rule else -1e9)
    found = cpu.plain_ffn(*arguments)
    assert_same(found, naive.plain_ffn(*arguments))
    assert (found[1][:, 1] == ODD[1]).all() == (rule not in ("fatrelu", "relu2"))


@pytest.mark.parametrize("what", ["x", "up", "up_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite(rule: str, value: float, what: str) -> None:
    arguments = plain_arguments(3, torch.float32, rule)
    before = cpu.plain_ffn(*arguments)
    if what == "x":
        arguments[0][1, 5] = value
    else:
        arguments[1 if what == "up" else 8][7] = value
    found, expected = cpu.plain_ffn(*arguments), naive.plain_ffn(*arguments)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-4, atol=1e-5)
    if what == "x":
        assert torch.equal(found[0][::2], before[0][::2]), "it spoils its own row only"
    elif value != value:
        assert found[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("act", "rule"), [("relu", "threshold"), ("relu2", "threshold"), ("silu", "fatrelu")])
def test_a_predictor_selects_nothing_where_x_is_not_finite(act: str, rule: str, value: float) -> None:
    """Though relu may make zero of NaN, and the bias alone would select."""
    arguments = plain_arguments(3, torch.float32, rule, family="lowbit_up", act=act)
    arguments[5][-1].fill_(1.0)
    before = cpu.plain_ffn(*arguments)
    arguments[0][1, 5] = value
    found, expected = cpu.plain_ffn(*arguments), naive.plain_ffn(*arguments)
    assert found[1][:, 0].tolist() == expected[1][:, 0].tolist() == [ODD[1], 0, ODD[1]]
    assert torch.equal(found[0][::2], before[0][::2])
    assert torch.equal(found[0][1], arguments[-1])


def test_ties_are_kept_and_zeros_are_not() -> None:
    arguments = plain_arguments(3, torch.float32, "topk", act="relu", density=0.3)
    arguments[:2] = [torch.randint(-1, 2, tensor.shape).float() for tensor in arguments[:2]]
    arguments[3], arguments[8] = torch.ones(ODD[1]), torch.ones(ODD[1])
    kept = spelt_out(arguments)[1].sum(-1)
    assert (kept > arguments[7]).any()
    for op in (cpu.plain_ffn, naive.plain_ffn):
        assert torch.equal(op(*arguments)[1][:, 1].long(), kept)
        assert op(*arguments[:7], ODD[1], *arguments[8:])[1][:, 1].max() < ODD[1]


def test_bad_arguments_are_refused() -> None:
    good = plain_arguments(1, torch.float32)
    for place, value, message in [
        (0, torch.randn(9, 65), r"x has shape \[9, 65\].*N from 1 to 8"),
        (1, good[1][:, 1:], r"up has shape \[193, 64\], expected \[193, 65\]"),
        (2, good[2].T.contiguous(), r"down has shape \[65, 193\]"),
        (2, good[2].half(), "down is float16, expected float32"),
        (3, good[3][1:], r"threshold has shape \[192\]"),
        (4, "tanh", "plain_ffn: activation 'tanh' is unknown"),
        (5, random_predictor("lowbit", *ODD), "predictor has 6 tensors, expected none"),
        (5, random_predictor("lowbit_up", 64, 193, 1), r"up_codes has shape \[193, 16\]"),
        (6, "selu", "plain_ffn: rule 'selu' is unknown"),
        (6, "drelu", "needs a gate"),
        (8, good[8][1:], r"up_bias has shape \[192\]"),
        (9, good[9].half(), "down_bias is float16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.plain_ffn(*good[:place], value, *good[place + 1 :])
    for op in (cpu.plain_ffn, naive.plain_ffn):
        with pytest.raises((RuntimeError, ValueError), match="keep is 0, rule 'topk' takes 1 to F = 193"):
            op(*good[:6], "topk", 0)
        with pytest.raises((RuntimeError, ValueError), match="needs the gates of all neurons"):
            op(*good[:5], random_predictor("lowbit_up", *ODD), "statistical_topk")
    with pytest.raises(ValueError, match="copies of gate and up, and this FFN has no gate"):
        naive.plain_ffn(*good[:5], random_predictor("lowbit", *ODD))
    gated = [*good[:2], good[1], *good[2:5]]
    with pytest.raises(ValueError, match="copies of up alone, and this FFN has a gate"):
        naive.gated_ffn(*gated, random_predictor("lowbit_up", *ODD))
    with pytest.raises(RuntimeError, match="predictor has 4 tensors, expected none"):
        cpu.gated_ffn(*gated, random_predictor("lowbit_up", *ODD))
    with pytest.raises(ValueError, match="rule 'drelu' has no op in a plain FFN"):
        naive.plain_ffn(*good[:6], "drelu")


@pytest.mark.parametrize("family", [None, *PLAIN_KINDS, "given"])
def test_opcheck(family: str | None) -> None:
    torch.library.opcheck(torch.ops.moyu.plain_ffn.default, plain_arguments(2, torch.bfloat16, family=family))
    torch.library.opcheck(torch.ops.moyu.plain_ffn.default, plain_arguments(2, torch.bfloat16, biases=False))


shapes = st.tuples(st.integers(1, 80), st.integers(2, 300), st.just(4))
kinds = st.sampled_from([*((rule, None) for rule in RULES), *(("threshold", kind) for kind in PLAIN_KINDS)])


@settings(max_examples=60, deadline=None)
@given(kinds, st.integers(1, 8), shapes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_properties(
    kind: tuple[str, str | None], rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    """Two runs are alike to the bit, a row is as it is alone, and the order of the neurons does not matter."""
    rule, family = kind
    arguments = plain_arguments(rows, dtype, rule, sizes, family)
    y, counts = cpu.plain_ffn(*arguments)
    again = cpu.plain_ffn(*arguments)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], counts)
    x, up, down, threshold, act, predictor, *rest, up_bias, down_bias = arguments
    n = seed % rows
    assert torch.equal(cpu.plain_ffn(x[n : n + 1], *arguments[1:])[0][0], y[n])
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    names = naive.PREDICTORS[naive.op_family(predictor)] if predictor else ()
    moved = [
        part if name in ("w1", "s1") else part[:, order] if name == "up_scales" else part[order]
        for name, part in zip(names, predictor, strict=True)
    ]
    by_neuron = [part[order] for part in (up, down, threshold)]
    terms, _ = cpu.plain_ffn(x, up, down.abs(), threshold, act, predictor, *rest, up_bias, down_bias.abs())
    assert_same(cpu.plain_ffn(x, *by_neuron, act, moved, *rest, up_bias[order], down_bias), (y, counts), terms)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), shapes, st.sampled_from(DTYPES))
def test_all_active_equals_dense(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = plain_arguments(rows, dtype, "threshold", sizes)
    arguments[3] = torch.zeros(sizes[1])
    x, up, down, *_, up_bias, down_bias = arguments
    a = naive.ACTIVATIONS["gelu_tanh"](x.float() @ up.float().T + up_bias.float())
    y, _ = cpu.plain_ffn(*arguments)
    expected = (a @ down.float() + down_bias.float()).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=1e-2)
