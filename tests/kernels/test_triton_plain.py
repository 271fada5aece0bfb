"""The plain Triton FFN against its naive twin, where `on_device` says."""

from typing import Any

import pytest
import torch
from moyu_kernels.ops.ffn import naive
from on_device import agree, check_op, computed, run_interpreted, run_on_device
from predictors import PLAIN_KINDS, random_predictor
from test_plain_op import plain_arguments
from test_triton_ffn import poisoned  # noqa: F401 (a fixture)

SIZES = (65, 193, 17)


def run(arguments: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    from moyu_kernels.ops.ffn import triton

    return run_on_device(triton.plain_ffn, *arguments)


def check(arguments: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, compares with the naive twin in fp32 and returns what the kernel returned."""
    found = run(arguments)
    wide = [v.float() if isinstance(v, torch.Tensor) and i != 3 else v for i, v in enumerate(arguments)]
    agree(found, naive.plain_ffn(*wide), arguments[0].dtype, 4e-6)
    return found


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.slow
def test_the_rest_under_the_interpreter() -> None:
    run_interpreted(__file__, "slow")


@computed
@pytest.mark.parametrize(
    ("family", "n", "dtype"),
    [
        pytest.param(family, n, dtype, marks=[pytest.mark.slow] if n == 8 and family in PLAIN_KINDS else [])
        for family in (None, *PLAIN_KINDS, "given")
        for n, dtype in ((1, torch.bfloat16), (3, torch.float16), (8, torch.float32))
    ],
)
def test_equals_naive(family: str | None, n: int, dtype: torch.dtype) -> None:
    _, counts = check(plain_arguments(n, dtype, family=family, biases=n != 3))
    assert 0 < counts[:, 1].sum() < counts[:, 0].sum()


@computed
@pytest.mark.parametrize("act", naive.ACTIVATIONS)
def test_activations(act: str) -> None:
    check(plain_arguments(2, torch.float32, act=act, density=0.4))


@computed
@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (1, (1, 2, 1)),
        (2, (1030, 33, 130)),  # several steps over D, several tiles of columns
        (5, (64, 40, 16)),  # codes in words
    ],
)
@pytest.mark.parametrize("family", PLAIN_KINDS)
def test_sizes(family: str, n: int, sizes: tuple[int, int, int]) -> None:
    check(plain_arguments(n, torch.float32, sizes=sizes, family=family))


@computed
def test_nothing_and_everything_is_kept() -> None:
    arguments = plain_arguments(3, torch.float32)
    arguments[3] = torch.full((193,), torch.inf)
    y, counts = check(arguments)
    assert torch.equal(y, arguments[-1].expand_as(y))
    assert counts.tolist() == [[193, 0]] * 3
    arguments[3] = torch.zeros(193)
    assert check(arguments)[1].tolist() == [[193, 193]] * 3
    arguments[5] = random_predictor("lowrank", *SIZES)
    arguments[5][-1] -= 1e6
    y, counts = check(arguments)
    assert torch.equal(y, arguments[-1].expand_as(y))
    assert not counts.any()


@computed
@pytest.mark.parametrize("family", [None, "lowbit_up"])
def test_a_row_is_that_of_its_batch_of_one_and_calls_repeat(family: str | None) -> None:
    x, *rest = plain_arguments(8, torch.float32, sizes=(65, 97, 17), family=family)
    y, counts = run([x, *rest])
    assert torch.equal(run([x, *rest])[0], y)
    for row in (0, 6):
        alone, alone_counts = run([x[row : row + 1], *rest])
        assert torch.equal(alone[0], y[row])
        assert torch.equal(alone_counts[0], counts[row])


@computed
def test_the_order_of_the_neurons_does_not_matter() -> None:
    x, up, down, threshold, *rest, up_bias, down_bias = plain_arguments(2, torch.float32)
    y, counts = run([x, up, down, threshold, *rest, up_bias, down_bias])
    order = torch.randperm(193)
    moved = run([x, up[order], down[order], threshold[order], *rest, up_bias[order], down_bias])
    torch.testing.assert_close(moved[0], y, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved[1], counts)


@computed
def test_rows_that_are_not_needed_are_not_loaded() -> None:
    arguments = plain_arguments(3, torch.bfloat16, family="lowrank", density=0.2)
    y, _ = run(arguments)
    x, up, down, threshold, act, predictor, *_, up_bias, _ = arguments
    selected = (naive.predictor_scores(x, predictor, naive.ACTIVATIONS[act]) > 0).any(0)
    a = naive.ACTIVATIONS[act](x.float() @ up.float().T + up_bias.float())
    kept = selected & (a.abs() >= threshold).any(0)
    assert 0 < kept.sum() < selected.sum() < 193
    up[~selected], down[~kept] = torch.nan, torch.nan
    up_bias[~selected] = torch.nan
    assert torch.equal(run(arguments)[0], y)


@computed
@pytest.mark.parametrize("act", ["gelu_tanh", "relu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_selects_nothing(value: float, act: str) -> None:
    arguments = plain_arguments(2, torch.float32, family="lowbit_up", act=act)
    arguments[5][-1].fill_(1.0)  # the bias alone would select
    y, counts = run(arguments)
    arguments[0][1, 3] = value
    spoiled, spoiled_counts = run(arguments)
    assert torch.equal(spoiled[0], y[0])
    assert counts[1, 0] > spoiled_counts[1, 0] == 0


@computed
def test_library_checks() -> None:
    from moyu_kernels.ops.ffn import triton

    check_op(triton.plain_ffn, plain_arguments(2, torch.float32, sizes=(16, 32, 4)))
    arguments = plain_arguments(2, torch.float32, sizes=(16, 32, 4), family="lowbit_up", biases=False)
    check_op(triton.plain_ffn, arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (6, "relu", "rule 'relu' has no triton op yet"),
        (2, torch.zeros(65, 193), r"down is .* \[65, 193\]: expected .* \[193, 65\]"),
        (5, random_predictor("lowbit", *SIZES), "copies of gate and up, and this FFN has no gate"),
        (8, torch.zeros(192), r"up_bias is torch.float32 \[192\]: expected torch.float32 \[193\]"),
        (9, torch.zeros(65, dtype=torch.float16), "down_bias is torch.float16"),
        (9, torch.zeros(130)[::2], r"down_bias has strides \(2,\)"),
    ],
)
def test_refuses(place: int, value: Any, message: str) -> None:
    from moyu_kernels.ops.ffn import triton

    arguments = plain_arguments(1, torch.float32)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        triton.plain_ffn(*arguments)
