"""Int8 rows in Triton against their naive twin, where `on_device` says."""

from typing import Any

import pytest
import torch
from moyu_kernels.ops.ffn import naive
from moyu_kernels.quantised import Int8GatedFFN, Int8PlainFFN
from on_device import DEVICE, agree, check_op, computed, run_interpreted, run_on_device
from predictors import KINDS
from test_cpu_ops import ffn_arguments
from test_int8_op import cases, in_int8, projections
from test_int8_plain import cases as plain_cases
from test_int8_plain import in_int8 as plain_in_int8
from test_plain_ffn import module
from test_plain_op import plain_arguments
from test_topk import topk_arguments
from test_triton_ffn import poisoned  # noqa: F401 (a fixture)
from torch import Tensor


def run(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    from moyu_kernels.ops.ffn import triton

    return run_on_device(triton.gated_ffn if len(arguments) == 11 else triton.plain_ffn, *arguments)


def check(arguments: list[Any]) -> tuple[Tensor, Tensor]:
    """Runs the kernel, compares with the naive twin in fp32 and returns what the kernel returned."""
    found = run(arguments)
    wide = [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments]
    twin = naive.gated_ffn if len(arguments) == 11 else naive.plain_ffn
    agree(found, twin(*wide), arguments[0].dtype, 2e-5)
    return found


def test_under_the_interpreter() -> None:
    run_interpreted(__file__)


@pytest.mark.slow
def test_the_rest_under_the_interpreter() -> None:
    run_interpreted(__file__, "slow")


@computed
@pytest.mark.parametrize(
    ("rows", "dtype", "sizes"),
    [
        pytest.param(rows, dtype, sizes, marks=[pytest.mark.slow] if rows == 8 and sizes[0] > 3 else [])
        for rows, dtype in ((1, torch.bfloat16), (3, torch.float16), (8, torch.float32))
        for sizes in ((65, 193, 17), (600, 40, 8), (3, 5, 1))
    ],
)
def test_equals_naive(rows: int, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    known = [case for case in cases(rows, dtype, sizes) if case[7] in ("threshold", "topk")]
    assert len(known) == 2 + len(KINDS)
    plain = plain_cases(rows, dtype, sizes, ("threshold", "topk")) if sizes[0] == 65 else ()
    for case in (*known, *plain):
        check(case)


@computed
def test_down_rows_of_zeros_count_as_kept() -> None:
    for arguments in (
        in_int8([*ffn_arguments(2, torch.float32)[:6], []]),
        in_int8(topk_arguments(2, torch.float32, 50)),
    ):
        _, counts = check(arguments)
        arguments[3][::2] = 0
        arguments[9][2, ::2] = 0
        assert torch.equal(check(arguments)[1], counts)


@computed
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "onebit" else []) for kind in KINDS]
)
def test_a_row_is_that_of_its_batch_of_one_and_calls_repeat(kind: str) -> None:
    rule = "topk" if kind == KINDS[0] else "threshold"
    for arguments in (
        in_int8(ffn_arguments(8, torch.float32, (65, 97, 17), family=kind)),
        plain_in_int8(plain_arguments(8, torch.float32, rule, sizes=(65, 97, 17))),
    ):
        x, *rest = arguments
        y, counts = run([x, *rest])
        assert torch.equal(run([x, *rest])[0], y)
        for row in (0, 6):
            alone, alone_counts = run([x[row : row + 1], *rest])
            assert torch.equal(alone[0], y[row])
            assert torch.equal(alone_counts[0], counts[row])


@computed
def test_scales_of_rows_that_are_not_needed_are_not_used() -> None:
    arguments = in_int8(ffn_arguments(3, torch.bfloat16, family="lowrank"))
    y, _ = run(arguments)
    act = naive.ACTIVATIONS[arguments[5]]
    selected = (naive.predictor_scores(arguments[0].float(), arguments[6], act) > 0).any(0)
    assert 0 < selected.sum() < len(selected)
    arguments[9][:, ~selected] = torch.nan
    assert torch.equal(run(arguments)[0], y)


@computed
def test_a_block_decodes_as_on_the_reference() -> None:
    block = Int8GatedFFN(projections(), "silu", torch.full((192,), 0.01), [], "rule", "triton").to(DEVICE)
    x = torch.randn(2, 64, device=DEVICE)
    torch.testing.assert_close(block(x), block.set_mode("rule", "reference")(x), rtol=1e-5, atol=1e-6)
    plain = module(plain_arguments(2, torch.float32), cls=Int8PlainFFN, backend="triton").to(DEVICE)
    plain.passed_on.to(DEVICE)
    x = torch.randn(2, 65, device=DEVICE)
    torch.testing.assert_close(plain(x), plain.set_mode("rule", "reference")(x), rtol=1e-5, atol=1e-6)


@computed
def test_library_checks() -> None:
    from moyu_kernels.ops.ffn import triton

    arguments = in_int8([*ffn_arguments(2, torch.float32, (16, 32, 4))[:6], []])
    check_op(triton.gated_ffn, arguments)
    check_op(triton.plain_ffn, plain_in_int8(plain_arguments(2, torch.float32, sizes=(16, 32, 4))))


def test_refuses() -> None:
    x, gate, up, down, *rest, scales, columns = in_int8([*ffn_arguments(1, torch.float32)[:6], []])
    for weights, vectors, message in (
        ((gate, up, down), (None, None), r"gate is torch\.int8: int8 weights go with scales"),
        ((gate.float(), up, down), (scales, columns), "int8 weights go with scales"),
        ((gate, up.float(), down), (scales, columns), r"up is torch\.float32 .* expected torch\.int8"),
        ((gate, up, down), (scales[:2], columns), r"scales is .* \[2, 193\]: expected torch\.float32 \[3, 193\]"),
        ((gate, up, down), (scales, columns.half()), r"columns is torch\.float16 \[65\]: expected torch\.float32"),
        ((gate, up, down), (scales, None), "int8 weights go with scales"),
    ):
        with pytest.raises(ValueError, match=message):
            run([x, *weights, *rest, *vectors])
    *rest, _, columns = plain_in_int8(plain_arguments(1, torch.float32))
    with pytest.raises(ValueError, match=r"up is torch\.int8: int8 weights go with scales \[2, F\]"):
        run([*rest, None, None])
    with pytest.raises(ValueError, match=r"scales is .* \[3, 193\]: expected torch\.float32 \[2, 193\]"):
        run([*rest, torch.ones(3, 193), columns])
