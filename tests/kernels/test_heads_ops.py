"""Attention heads that are off: their query rows, and keys and values that no head needs, are not read."""

import pytest
import torch
from checks import same_on_any_number_of_threads
from moyu_kernels.ops import cpu
from moyu_kernels.ops.linear import naive
from test_cpu_ops import DTYPES, TOLERANCE
from torch import Tensor

SIZES = ((9, 64, 576), (3, 5, 65), (1, 1, 1), (4, 8, 300))  # units, rows of each, D


def arguments(rows: int, dtype: torch.dtype, sizes: tuple[int, int, int] = SIZES[1], bias: bool = True) -> list:
    torch.manual_seed(rows)
    units, size, d = sizes
    weight = torch.randn(units * size, d).to(dtype)
    router = torch.randint(-127, 128, (units, d), dtype=torch.int8)
    b = torch.randn(units * size).to(dtype) if bias else None
    return [torch.randn(rows, d).to(dtype), weight, b, router, torch.rand(units) / 100, torch.randn(units)]


def close(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9)
    return found.dtype == expected.dtype and bool(error < TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_naive_and_what_it_says(bias: bool, rows: int, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        args, units = arguments(rows, dtype, sizes, bias), sizes[0]
        x, weight, b, router, scale, offset = args
        for keep in {1, (units + 1) // 2, units}:
            y = cpu.head_linear(*args, keep)
            assert close(y, naive.head_linear(*args, keep))
            scores = (x.float() @ router.float().T) * scale + offset
            dense = naive.linear(x, weight, b).unflatten(1, (units, -1))
            for n in range(rows):
                best = scores[n].topk(keep).indices.tolist()
                for unit, part in enumerate(y[n].unflatten(0, (units, -1))):
                    assert close(part, dense[n, unit]) if unit in best else not part.any()


def test_of_equals_the_first_are_chosen() -> None:
    x, weight, b, router, scale, offset = arguments(2, torch.float32, SIZES[0])
    for run in (cpu.head_linear, naive.head_linear):
        y = run(x, weight, b, torch.zeros_like(router), scale, torch.zeros_like(offset), 4)
        assert y.unflatten(1, (9, -1)).any(-1).tolist() == [[True] * 4 + [False] * 5] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_and_unchosen_weights_are_not_read(dtype: torch.dtype) -> None:
    for rows in range(1, 9):
        x, weight, *rest = arguments(rows, dtype, (9, 6, 130))
        y = cpu.head_linear(x, weight, *rest, 2)
        for n in range(rows):
            assert torch.equal(cpu.head_linear(x[n : n + 1], weight, *rest, 2)[0], y[n])
        chosen = y.unflatten(1, (9, -1)).any(-1).any(0)
        poisoned = torch.where(chosen.repeat_interleave(6)[:, None], weight, float("nan"))
        assert torch.equal(cpu.head_linear(x, poisoned, *rest, 2), y)
    same_on_any_number_of_threads(lambda *args: (cpu.head_linear(*args, 2),), arguments(2, dtype, SIZES[0]))


@pytest.mark.parametrize("run", [cpu.attend, naive.attend])
def test_attend_skips_heads_whose_query_is_zero(run: object) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, 1, 8)
    q[0, [0, 1, 4]] = 0.0  # a whole group of the first row, and half of its last
    q[1, 3] = 0.0
    k, v = (torch.randn(2, 3, 20, 8) for _ in range(2))
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    plain = run(q, k, v, mask, 0.3)
    off = (q == 0).all(-1)[:, :, 0]
    assert plain[:, 0][off].abs().amax(-1).min() > 0.01  # without the flag a zero query gives the mean of the values
    k[0, 0] = v[0, 0] = float("nan")
    y = run(q, k, v, mask, 0.3, skip_zero=True)
    assert torch.equal(y[:, 0][~off], plain[:, 0][~off])
    assert not y[:, 0][off].any()


def test_bad_arguments_are_refused_and_opcheck() -> None:
    x, weight, b, router, scale, offset = arguments(1, torch.float32)
    for changed, message in [
        ((x, weight, b, router, scale, offset, 0), "keep is 0, expected 1 to the 3 units of the router"),
        ((x, weight, b, router, scale, offset, 4), "keep is 4"),
        ((x, weight[:-1], b, router, scale, offset, 1), r"weight has shape \[14, 65\] and router \[3, 65\]"),
        ((x, weight, b, router.float(), scale, offset, 1), "router is float32, expected int8"),
        ((x, weight, b[:-1], router, scale, offset, 1), r"bias has shape \[14\]"),
        ((x, weight, b, router, scale.half(), offset, 1), "scale is float16, expected float32"),
        ((x[:, :-1], weight, b, router, scale, offset, 1), r"weight has shape \[15, 65\], expected \[15, 64\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.head_linear(*changed)
    torch.library.opcheck(torch.ops.moyu.head_linear.default, (x, weight, b, router, scale, offset, 2))
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 6, 8)
    mask = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.library.opcheck(torch.ops.moyu.attend.default, (q, k, k.clone(), mask, 0.5, True))
