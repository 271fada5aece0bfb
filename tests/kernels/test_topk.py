"""The rule "topk": the op reads all gate and up rows, and of down those of the K strongest neurons of each row."""

from pathlib import Path

import pytest
import torch
from checks import same_on_any_number_of_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from moyu_kernels import SparseGatedFFN
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from moyu_kernels.rules import Rule
from predictors import random_predictor
from test_cpu_ops import DTYPES, ODD, assert_same, ffn_arguments, run_python, terms_of
from torch import nn


def topk_arguments(
    rows: int, dtype: torch.dtype, keep: int = 50, sizes: tuple[int, int, int] = ODD, act: str = "silu"
) -> list:
    x, gate, up, down, *_ = ffn_arguments(rows, dtype, sizes)
    threshold = torch.rand(sizes[1], generator=torch.Generator().manual_seed(rows)) + 0.5
    return [x, gate, up, down, threshold, act, [], "topk", keep]


def ranked(arguments: list) -> torch.Tensor:
    x, gate, up, _, threshold, act, *_ = arguments
    return (naive.ACTIVATIONS[act](x.float() @ gate.float().T) * (x.float() @ up.float().T)).abs() / threshold


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_equals_naive(rows: int, dtype: torch.dtype) -> None:
    for sizes, keep in ((ODD, 50), ((64, 128, 16), 1), ((3, 5, 1), 2), ((160, 300, 40), 299), (ODD, ODD[1])):
        arguments = topk_arguments(rows, dtype, keep, sizes)
        found = cpu.gated_ffn(*arguments)
        assert_same(found, naive.gated_ffn(*arguments))
        assert found[1].tolist() == [[sizes[1], keep]] * rows


@pytest.mark.parametrize("act", naive.ACTIVATIONS)
def test_activations_and_the_strongest_by_a_sort(act: str) -> None:
    arguments = topk_arguments(2, torch.float32, 20, act=act)
    x, gate, up, down, threshold = arguments[:5]
    strongest = ranked(arguments).sort(descending=True).indices[:, :20]
    a = naive.ACTIVATIONS[act](x @ gate.T) * (x @ up.T)
    expected = torch.stack([a[n, best] @ down[best] for n, best in enumerate(strongest)])
    for op in (cpu.gated_ffn, naive.gated_ffn):
        torch.testing.assert_close(op(*arguments)[0], expected, rtol=1e-4, atol=1e-5)
    kept = Rule(threshold, keep="topk", share=20 / ODD[1]).mask(a)
    assert kept.sum(-1).tolist() == [20, 20]
    torch.testing.assert_close(torch.where(kept, a, 0.0) @ down, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype) -> None:
    for rows in range(2, 9):
        x, *rest = topk_arguments(rows, dtype)
        y, counts = cpu.gated_ffn(x, *rest)
        for n in range(rows):
            alone = cpu.gated_ffn(x[n : n + 1], *rest)
            assert torch.equal(alone[0][0], y[n])
            assert torch.equal(alone[1][0], counts[n])


def test_any_number_of_threads_bitwise() -> None:
    arguments = topk_arguments(2, torch.bfloat16, 200, (160, 1000, 40))
    same_on_any_number_of_threads(cpu.gated_ffn, arguments)


PROTECTED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from checks import reads_only
from moyu_kernels.ops import cpu
from test_topk import ranked, topk_arguments
arguments = topk_arguments(2, torch.float32, 7, (1024, 40, 4))
ranks = ranked(arguments)
kept = (ranks >= ranks.topk(7).values[:, -1:]).any(0)
assert 7 < kept.sum() <= 14
reads_only(cpu.gated_ffn, arguments, {{3: kept}})
"""


def test_down_rows_that_are_not_needed_are_not_read() -> None:
    process = run_python(PROTECTED)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_ties_are_kept_and_zeros_are_not() -> None:
    arguments = topk_arguments(3, torch.float32, 60, act="relu")
    arguments[:3] = [torch.randint(-1, 2, tensor.shape).float() for tensor in arguments[:3]]
    arguments[4] = torch.ones(ODD[1])
    ranks = ranked(arguments)
    expected = (ranks >= ranks.topk(60).values[:, -1:]).sum(-1)
    assert (expected > 60).any()
    for op in (cpu.gated_ffn, naive.gated_ffn):
        assert torch.equal(op(*arguments)[1][:, 1].long(), expected)
    arguments[-1] = ODD[1]
    for op in (cpu.gated_ffn, naive.gated_ffn):
        assert torch.equal(op(*arguments)[1][:, 1].long(), (ranks > 0).sum(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value: float) -> None:
    arguments = topk_arguments(3, torch.float32)
    before = cpu.gated_ffn(*arguments)
    spoiled = arguments[0].clone()
    spoiled[1, 5] = value
    found, expected = cpu.gated_ffn(spoiled, *arguments[1:]), naive.gated_ffn(spoiled, *arguments[1:])
    assert torch.equal(found[0][::2], before[0][::2])
    assert torch.equal(found[1], expected[1])
    arguments[2][7] = value  # the seventh neuron is dropped where it is no number, and first where it is infinite
    found, expected = cpu.gated_ffn(*arguments), naive.gated_ffn(*arguments)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert value == float("inf") or found[0].isfinite().all()


def test_bad_arguments_are_refused() -> None:
    arguments = topk_arguments(1, torch.float32)
    for op in (cpu.gated_ffn, naive.gated_ffn):
        for keep in (0, ODD[1] + 1):
            with pytest.raises((RuntimeError, ValueError), match=f"keep is {keep}, rule 'topk' takes 1 to F = 193"):
                op(*arguments[:-1], keep)
        with pytest.raises((RuntimeError, ValueError), match="a predictor has none to skip"):
            op(*arguments[:6], random_predictor("lowbit", 65, 193, 4), "topk", 5)
    with pytest.raises(ValueError, match="keep is 0, rule 'topk' takes"):
        module(0)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, topk_arguments(2, torch.bfloat16))


def module(keep: int) -> SparseGatedFFN:
    _, gate, up, down, threshold, act, predictor, rule, _ = topk_arguments(1, torch.float32)
    projections = {"gate": nn.Linear(65, 193), "up": nn.Linear(65, 193), "down": nn.Linear(193, 65)}
    for projection, weight in zip(projections.values(), (gate, up, down.T), strict=True):
        projection.weight, projection.bias = nn.Parameter(weight.clone(), requires_grad=False), None
    return SparseGatedFFN(projections, act, threshold, predictor, "rule", "cpu", rule, keep)


def test_prefill_equals_decoding_and_dense_keeps_all() -> None:
    ffn = module(30)
    x = torch.randn(20, 65)
    together = ffn(x)
    assert ffn.counts.tolist() == [20, 20 * 193, 20 * 30]
    torch.testing.assert_close(together, torch.cat([ffn(row[None]) for row in x]), rtol=1e-4, atol=1e-5)
    assert ffn.counts.tolist() == [40, 40 * 193, 40 * 30]
    ffn.set_mode("dense")
    assert not torch.allclose(ffn(x), together, atol=1e-2)
    assert ffn.counts[2] == 40 * 30 + 20 * 193


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8),
    st.tuples(st.integers(1, 80), st.integers(2, 300), st.just(4)),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
def test_properties(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    """Two runs are alike to the bit, a row is as it is alone, and the order of the neurons does not matter."""
    x, gate, up, down, threshold, *rest = topk_arguments(rows, dtype, 1 + seed % sizes[1], sizes)
    y, counts = cpu.gated_ffn(x, gate, up, down, threshold, *rest)
    again = cpu.gated_ffn(x, gate, up, down, threshold, *rest)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], counts)
    n = seed % rows
    alone = cpu.gated_ffn(x[n : n + 1], gate, up, down, threshold, *rest)
    assert torch.equal(alone[0][0], y[n])
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(seed))
    moved = cpu.gated_ffn(x, gate[order], up[order], down[order], threshold[order], *rest)
    assert_same(moved, (y, counts), terms_of(x, gate, up, down, threshold, *rest))
