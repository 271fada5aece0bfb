"""Rules by which the gate drops neurons: the op reads all gates first, and up and down rows only where one passes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from checks import same_on_any_number_of_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from moyu_kernels.gated import SparseGatedFFN
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from predictors import FAMILIES
from test_cpu_ops import DTYPES, ODD, assert_same, cut, ffn_arguments, run_python, terms_of
from torch import Tensor, nn

RULES = naive.ON_GATE
PREDICTABLE = [rule for rule in RULES if rule not in naive.WHOLE_ROW]


def rule_arguments(
    rows: int,
    dtype: torch.dtype,
    rule: str,
    sizes: tuple[int, int, int] = ODD,
    family: str | None = None,
    act: str = "silu",
    density: float = 0.3,
) -> list:
    """Arguments of gated_ffn under a rule whose threshold lets about `density` of the gates pass."""
    arguments = [*ffn_arguments(rows, dtype, sizes, act, family=family or "lowrank"), rule]
    g = arguments[0].float() @ arguments[1].float().T
    if rule == "gate_threshold":
        g = naive.ACTIVATIONS[act](g).abs()
    elif rule in naive.WHOLE_ROW:
        g = (g - g.mean(-1, keepdim=True)) / g.std(-1, keepdim=True)
    arguments[4] = torch.full_like(arguments[4], cut(g, 1 - density))
    if family is None:
        arguments[6] = []
    elif rule != "relu2":  # the scores have moved with the gate, and ReLU makes many of them alike
        arguments[6][-1] += 0.05 * torch.randn(sizes[1])
    return arguments


def passes(arguments: list) -> tuple[Tensor, Tensor]:
    """Neurons whose gate passes, and of them the kept ones, bool `[N, F]`, each rule spelt out once more."""
    x, gate, up, _, threshold, act, _, rule = arguments
    g, u = x.float() @ gate.float().T, x.float() @ up.float().T
    level = g.mean(-1, keepdim=True) + threshold * g.var(-1, keepdim=True).sqrt()
    passed = {
        "gate_threshold": naive.ACTIVATIONS[act](g).abs() >= threshold,
        "relu": g > threshold,
        "drelu": g > threshold,
        "fatrelu": (g > 0) & (g >= threshold),
        "relu2": g > 0,
        "statistical_topk": g > level,
        "statistical_topk_soft": g > level,
    }[rule]
    return passed, passed & (u > 0) if rule == "drelu" else passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("rule", RULES)
def test_equals_naive(rule: str, rows: int, dtype: torch.dtype) -> None:
    for sizes in (ODD, (64, 128, 16), (3, 5, 1), (160, 300, 40)):
        arguments = rule_arguments(rows, dtype, rule, sizes)
        found = cpu.gated_ffn(*arguments)
        assert_same(found, naive.gated_ffn(*arguments))
    arguments = rule_arguments(rows, dtype, rule)
    passed, kept = passes(arguments)
    assert torch.equal(cpu.gated_ffn(*arguments)[1], torch.stack([passed.sum(-1), kept.sum(-1)], -1).int())
    assert 0.1 < kept.float().mean() < 0.6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", PREDICTABLE)
def test_predicted_equals_naive(rule: str, family: str) -> None:
    for rows, dtype in ((1, torch.bfloat16), (3, torch.float32), (8, torch.float16)):
        arguments = rule_arguments(rows, dtype, rule, family=family)
        found = cpu.gated_ffn(*arguments)
        assert_same(found, naive.gated_ffn(*arguments))
        selected, kept = found[1].sum(0).tolist()
        assert 0 < kept < selected < rows * ODD[1]


@pytest.mark.parametrize("act", naive.ACTIVATIONS)
@pytest.mark.parametrize("rule", ["gate_threshold", "statistical_topk", "statistical_topk_soft"])
def test_rules_on_the_stock_activation_take_any(rule: str, act: str) -> None:
    arguments = rule_arguments(3, torch.float32, rule, act=act)
    assert_same(cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_rows_equal_batch_of_one_bitwise(rule: str, dtype: torch.dtype) -> None:
    for rows in range(2, 9):
        arguments = rule_arguments(rows, dtype, rule)
        y, counts = cpu.gated_ffn(*arguments)
        for n in range(rows):
            y_one, counts_one = cpu.gated_ffn(arguments[0][n : n + 1], *arguments[1:])
            assert torch.equal(y_one[0], y[n])
            assert torch.equal(counts_one[0], counts[n])


@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_threads_bitwise(rule: str) -> None:
    arguments = rule_arguments(2, torch.bfloat16, rule, (160, 1000, 40))
    same_on_any_number_of_threads(cpu.gated_ffn, arguments)


PROTECTED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from checks import reads_only
from moyu_kernels.ops import cpu
from test_gate_rules import RULES, passes, rule_arguments
for rule in RULES:
    arguments = rule_arguments(2, torch.float32, rule, (1024, 40, 4))
    passed, kept = (mask.any(0) for mask in passes(arguments))
    assert 0 < kept.sum() <= passed.sum() < 40
    reads_only(cpu.gated_ffn, arguments, {{2: passed, 3: kept}})
"""


def test_rows_that_are_not_needed_are_not_read() -> None:
    """They lie in memory that may not be read, one row a page; NaN there would be dropped with its neuron unseen."""
    process = run_python(PROTECTED)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("rule", ["gate_threshold", "relu", "fatrelu"])
def test_a_gate_at_its_threshold(rule: str) -> None:
    arguments = rule_arguments(3, torch.float32, rule, act="relu")
    arguments[:2] = [torch.randint(-2, 3, tensor.shape).float() for tensor in arguments[:2]]
    arguments[4] = torch.full((ODD[1],), 3.0)
    g = arguments[0] @ arguments[1].T
    passed = (g > 3 if rule == "relu" else g >= 3).sum(-1)
    assert (g == 3).any(-1).all()
    for op in (cpu.gated_ffn, naive.gated_ffn):
        assert torch.equal(op(*arguments)[1][:, 0].long(), passed)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_and_everything_passes(rule: str) -> None:
    arguments = rule_arguments(3, torch.float32, rule)
    arguments[4] = torch.full_like(arguments[4], 1e9)
    y, counts = cpu.gated_ffn(*arguments)
    assert rule == "relu2" or not (y.any() or counts.any())
    arguments[4] = torch.full_like(arguments[4], 0.0 if rule in ("gate_threshold", "fatrelu") else -1e9)
    found = cpu.gated_ffn(*arguments)
    assert_same(found, naive.gated_ffn(*arguments))
    assert (found[1][:, 0] == ODD[1]).all() == (rule not in ("fatrelu", "relu2"))


@pytest.mark.parametrize("matrix", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_weights_that_are_not_finite(rule: str, value: float, matrix: int) -> None:
    arguments = rule_arguments(2, torch.float32, rule)
    arguments[matrix][7] = value
    found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-4, atol=1e-5)
    if value != value:
        assert found[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
def test_an_input_that_is_not_finite_spoils_its_own_row_only(rule: str, value: float) -> None:
    arguments = rule_arguments(3, torch.float32, rule)
    before = cpu.gated_ffn(*arguments)
    arguments[0][1, 5] = value
    found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
    assert torch.equal(found[0][::2], before[0][::2])
    assert torch.equal(found[1], expected[1])


def test_bad_arguments_are_refused() -> None:
    arguments = rule_arguments(1, torch.float32, "relu", family="lowbit")
    with pytest.raises(RuntimeError, match="rule 'selu' is unknown; use threshold, gate_threshold, relu"):
        cpu.gated_ffn(*arguments[:-1], "selu")
    for op in (cpu.gated_ffn, naive.gated_ffn):
        with pytest.raises((RuntimeError, ValueError), match="needs the gates of all neurons, so a predictor has none"):
            op(*arguments[:-1], "statistical_topk")


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str) -> None:
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, rule_arguments(2, torch.bfloat16, rule))


shapes = st.tuples(st.integers(1, 80), st.integers(2, 300), st.just(4))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RULES), st.integers(1, 8), shapes, st.sampled_from(DTYPES), st.integers(0, 99))
def test_properties(rule: str, rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    """Two runs are alike to the bit, a row is as it is alone, and the order of the neurons does not matter."""
    x, gate, up, down, threshold, *rest = rule_arguments(rows, dtype, rule, sizes)
    y, counts = cpu.gated_ffn(x, gate, up, down, threshold, *rest)
    again = cpu.gated_ffn(x, gate, up, down, threshold, *rest)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], counts)
    n = seed % rows
    alone = cpu.gated_ffn(x[n : n + 1], gate, up, down, threshold, *rest)
    assert torch.equal(alone[0][0], y[n])
    assert torch.equal(alone[1][0], counts[n])
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    moved = cpu.gated_ffn(x, gate[order], up[order], down[order], threshold[order], *rest)
    assert_same(moved, (y, counts), terms_of(x, gate, up, down, threshold, *rest))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["gate_threshold", "statistical_topk"]), st.integers(1, 8), shapes)
def test_all_active_equals_dense(rule: str, rows: int, sizes: tuple[int, int, int]) -> None:
    arguments = rule_arguments(rows, torch.float32, rule, sizes)
    arguments[4] = torch.full_like(arguments[4], 0.0 if rule == "gate_threshold" else -1e9)
    assert_same(cpu.gated_ffn(*arguments), cpu.gated_ffn(*arguments[:4], torch.zeros(sizes[1]), *arguments[5:7]))


def module(arguments: list, mode: str = "rule", backend: str = "cpu") -> SparseGatedFFN:
    _, gate, up, down, threshold, act, predictor, rule = arguments
    projections = {"gate": nn.Linear(65, 193), "up": nn.Linear(65, 193), "down": nn.Linear(193, 65)}
    for projection, weight in zip(projections.values(), (gate, up, down.T), strict=True):
        projection.weight, projection.bias = nn.Parameter(weight.clone(), requires_grad=False), None
    return SparseGatedFFN(projections, act, threshold, predictor, mode, backend, rule)


@pytest.mark.parametrize("rule", RULES)
def test_prefill_equals_decoding(rule: str) -> None:
    ffn = module(rule_arguments(3, torch.float32, rule))
    x = torch.randn(20, 65)
    together = ffn(x)
    kept = ffn.counts[2].item()
    alone = torch.cat([ffn(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert ffn.counts[2] == 2 * kept
    assert ffn.counts[0] == 40


@pytest.mark.parametrize("rule", RULES)
def test_dense_mode_drops_masks_and_keeps_functions(rule: str) -> None:
    arguments = rule_arguments(3, torch.float32, rule)
    ffn = module(arguments)
    x, gate, up, down = arguments[:4]
    ruled = ffn(x)
    dense = ffn.set_mode("dense")(x)
    if rule in naive.SUBSTITUTES:
        assert torch.equal(dense, ruled)
    else:
        stock = (functional.silu(x @ gate.T) * (x @ up.T)) @ down
        torch.testing.assert_close(dense, stock, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(dense, ruled, atol=1e-2)


def test_what_a_rule_does_not_go_with_is_refused() -> None:
    with pytest.raises(ValueError, match="rule 'relu2' has no triton op yet"):
        module(rule_arguments(1, torch.float32, "relu2"), backend="triton")
    with pytest.raises(ValueError, match="rule 'selu' has no op in a gated FFN; use one of threshold"):
        module([*rule_arguments(1, torch.float32, "relu")[:-1], "selu"])
    arguments = rule_arguments(1, torch.float32, "statistical_topk", family="lowbit")
    with pytest.raises(ValueError, match="needs the gates of all neurons, so a predictor has none"):
        module(arguments)
