"""The rule "topk" in Triton against its naive twin, gated and plain, where `on_device` says."""

from typing import Any

import pytest
import torch
from moyu_kernels.ops.ffn import naive
from on_device import agree, check_op, computed, run_interpreted, run_on_device
from predictors import random_predictor
from test_plain_op import plain_arguments
from test_topk import topk_arguments
from test_triton_ffn import poisoned  # noqa: F401 (a fixture)


def run(arguments: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from moyu_kernels.ops.ffn import triton

    return run_on_device(triton.gated_ffn if len(arguments) == 9 else triton.plain_ffn, *arguments)


def check(arguments: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, compares with the naive twin in fp32 and returns what the kernel returned."""
    found = run(arguments)
    wide = [v.float() if isinstance(v, torch.Tensor) else v for v in arguments]
    expected = (naive.gated_ffn if len(arguments) == 9 else naive.plain_ffn)(*wide)
    agree(found, expected, arguments[0].dtype, 2e-5, equal_nan=True)
    return found


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@computed
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (8, torch.float32)])
def test_equals_naive(rows: int, dtype: torch.dtype) -> None:
    assert check(topk_arguments(rows, dtype, 50))[1].tolist() == [[193, 50]] * rows
    check(plain_arguments(rows, dtype, "topk"))


@computed
def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from moyu_kernels.ops.ffn import triton

    check(topk_arguments(2, torch.float32, 2, (3, 5, 1)))
    monkeypatch.setattr(triton, "RANKED", 64)  # more neurons than are ranked at once
    for keep in (1, 33, 193):
        assert check(topk_arguments(1, torch.float32, keep))[1].tolist() == [[193, keep]]


@computed
def test_ties_are_kept_and_zeros_are_not() -> None:
    arguments = topk_arguments(3, torch.float32, 60, act="relu")
    arguments[:3] = [torch.randint(-1, 2, tensor.shape).float() for tensor in arguments[:3]]
    arguments[4] = torch.ones(193)
    counts = check(arguments)[1]
    assert (counts[:, 1] > 60).any()
    arguments[-1] = 193
    assert (check(arguments)[1][:, 1] < 193).all()


@computed
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value: float) -> None:
    arguments = topk_arguments(2, torch.float32, 20)
    arguments[2][7] = value
    y, _ = check(arguments)
    assert value == float("inf") or y.isfinite().all()


@computed
def test_a_row_is_that_of_its_batch_of_one_and_calls_repeat() -> None:
    x, *rest = topk_arguments(4, torch.float32, 20, (65, 97, 17))
    y, counts = run([x, *rest])
    assert torch.equal(run([x, *rest])[0], y)
    for row in (0, 3):
        alone, alone_counts = run([x[row : row + 1], *rest])
        assert torch.equal(alone[0], y[row])
        assert torch.equal(alone_counts[0], counts[row])


@computed
def test_the_order_of_the_neurons_does_not_matter() -> None:
    x, *weights, act, predictor, rule, keep = topk_arguments(2, torch.float32, 20)
    y, counts = run([x, *weights, act, predictor, rule, keep])
    order = torch.randperm(193)
    moved = run([x, *(weight[order] for weight in weights), act, predictor, rule, keep])
    torch.testing.assert_close(moved[0], y, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[1], counts)


@computed
def test_down_rows_that_are_not_needed_are_not_loaded() -> None:
    arguments = topk_arguments(2, torch.float32, 20)
    y, _ = run(arguments)
    x, gate, up, down, threshold, act, *_ = arguments
    ranks = (naive.ACTIVATIONS[act](x @ gate.T) * (x @ up.T)).abs() / threshold
    kept = (ranks >= ranks.topk(20).values[:, -1:]).any(0)
    assert 20 <= kept.sum() <= 40
    down[~kept] = torch.nan
    assert torch.equal(run(arguments)[0], y)


@computed
def test_library_checks() -> None:
    from moyu_kernels.ops.ffn import triton

    check_op(triton.gated_ffn, topk_arguments(2, torch.float32, 5, (16, 32, 4)))


def test_refuses_and_launches_four() -> None:
    from moyu_kernels.ops.ffn import triton
    from triton.backends.compiler import GPUTarget

    arguments = topk_arguments(1, torch.float32, 0)
    with pytest.raises(ValueError, match="keep is 0, rule 'topk' takes 1 to F = 193"):
        run(arguments)
    arguments = topk_arguments(1, torch.float32, 5)
    arguments[6] = random_predictor("lowbit", 65, 193, 4)
    with pytest.raises(ValueError, match="needs the gates of all neurons, so a predictor has none"):
        run(arguments)
    torch.use_deterministic_algorithms(False)
    x, gate, up, *rest = topk_arguments(2, torch.float32, 5)
    launches, _, _ = triton.plan(x, (gate, up), *rest[:4], GPUTarget("cuda", 90, 32), keep=5)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["gate_up_kernel", "least_kernel", "list_kernel", "down_kernel"]
