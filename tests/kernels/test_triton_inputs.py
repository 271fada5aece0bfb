"""Linear layers with sparse inputs in Triton against the naive twin, where `on_device` says."""

from typing import Any

import pytest
import torch
from moyu_kernels.ops.linear import naive
from on_device import agree, check_op, compiled, computed, run_interpreted, run_on_device
from test_sparse_linear import SIZES, arguments
from test_triton_ffn import poisoned  # noqa: F401 (a fixture)


def run(args: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from moyu_kernels.ops.linear import triton

    return run_on_device(triton.sparse_linear, *args)


def check(args: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, compares with the naive twin in fp32 and returns what the kernel returned."""
    found = run(args)
    expected = naive.sparse_linear(*(part if part is None else part.float() for part in args))
    agree(found, expected, args[0].dtype, 2e-5)
    return found


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@computed
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (8, torch.float32)])
def test_equals_naive(rows: int, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        check(arguments(rows, dtype, sizes, bias=rows != 3))


@computed
def test_nothing_and_everything_is_kept() -> None:
    x, weight, bias, threshold = arguments(3, torch.float32)
    y, counts = check([x, weight, bias, torch.full_like(threshold, torch.inf)])
    assert torch.equal(y, bias.expand_as(y))
    assert not counts.any()
    x[1, 5] = 0.0
    assert check([x, weight, bias, torch.zeros_like(threshold)])[1].tolist() == [65, 64, 65]


@computed
def test_an_input_on_its_threshold_is_kept() -> None:
    x, weight, bias, _ = arguments(1, torch.float32)
    y, counts = check([x, weight, bias, x[0].abs()])
    assert counts.tolist() == [x.count_nonzero().item()]
    assert not torch.equal(y, bias[None])


@computed
def test_a_row_is_that_of_its_batch_of_one_and_calls_repeat() -> None:
    x, *rest = arguments(8, torch.float32)
    y, counts = run([x, *rest])
    assert torch.equal(run([x, *rest])[0], y)
    for row in (0, 6):
        alone, alone_counts = run([x[row : row + 1], *rest])
        assert torch.equal(alone[0], y[row])
        assert torch.equal(alone_counts[0], counts[row])


@computed
def test_the_order_of_the_inputs_does_not_matter() -> None:
    x, weight, bias, threshold = arguments(2, torch.float32)
    y, counts = run([x, weight, bias, threshold])
    order = torch.randperm(65)
    moved = run([x[:, order].contiguous(), weight[order], bias, threshold[order]])
    torch.testing.assert_close(moved[0], y, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[1], counts)


@computed
def test_rows_that_are_not_needed_are_not_loaded() -> None:
    args = arguments(2, torch.bfloat16)
    y, _ = run(args)
    kept = (args[0].abs() >= args[3]).any(0)
    assert 0 < kept.sum() < 65
    args[1][~kept] = torch.nan
    assert torch.equal(run(args)[0], y)


@computed
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_no_number_is_not_kept(value: float) -> None:
    args = arguments(2, torch.float32)
    y, _ = run(args)
    args[0][1, 5] = value
    spoiled, spoiled_counts = run(args)
    assert torch.equal(spoiled[0], y[0])
    expected, expected_counts = naive.sparse_linear(*args)
    assert torch.equal(spoiled_counts, expected_counts)
    torch.testing.assert_close(spoiled, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@computed
def test_library_checks() -> None:
    from moyu_kernels.ops.linear import triton

    check_op(triton.sparse_linear, arguments(2, torch.float32, (16, 32)))
    check_op(triton.sparse_linear, arguments(2, torch.float32, (16, 32), bias=False))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(9, 65), "N 1 to 8"),
        (1, torch.zeros(64, 193), r"x is torch.float32 \[1, 65\] on cpu: expected torch.float32 \[1, 64\]"),
        (1, torch.zeros(193, 65).T, r"weight has strides \(1, 65\)"),
        (2, torch.zeros(192), r"bias is torch.float32 \[192\]"),
        (3, torch.zeros(65, dtype=torch.bfloat16), "threshold is torch.bfloat16"),
    ],
)
def test_refuses(place: int, value: Any, message: str) -> None:
    args = arguments(1, torch.float32)
    args[place] = value
    from moyu_kernels.ops.linear import triton

    with pytest.raises(ValueError, match=message):
        triton.sparse_linear(*args)


@compiled
def test_needs_a_gpu() -> None:
    from moyu_kernels.ops.linear import triton

    with pytest.raises(ValueError, match="needs a GPU"):
        triton.sparse_linear(*arguments(1, torch.float32))
