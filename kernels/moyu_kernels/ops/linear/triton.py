"""Linear layer with sparse inputs in Triton: the weight rows of inputs that are not kept are never loaded.

Two launches, nothing is read back by the host: the kept inputs are listed, and `down_kernel` of the FFN adds up their
rows, as it does those of a neuron (`ops/ffn/triton_kernels.py`).
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..aot import Launch
from ..ffn.triton import DTYPES, MAX_ROWS, run_on
from ..ffn.triton_lists import Lists, options_of


@triton.jit
def inputs_kernel(
    x_ptr, threshold_ptr, values_ptr, neurons_ptr, lengths_ptr, tallies_ptr, tickets_ptr, F, TILES,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists the inputs of one block that some row keeps.

    x `[N, F]`, threshold `[F]` fp32. Out: as of `gate_up_kernel`, all inputs selected.
    """
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    for tile in range(tl.program_id(0), TILES, blocks):
        tl.store(tickets_ptr + tile, 0)
    row = tl.arange(0, ROWS)
    f = block * BLOCK + tl.arange(0, BLOCK)
    inside = (row < N)[:, None] & (f < F)[None, :]
    place = row[:, None] * F + f[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + f, mask=f < F, other=0.0)
    keep = inside & (tl.abs(x) >= threshold[None, :]) & (x != 0)
    tl.store(values_ptr + place, tl.where(keep, x, 0.0), mask=inside)
    listed = tl.max(keep.to(tl.int32), 0)
    tl.store(neurons_ptr + block * BLOCK + tl.cumsum(listed, 0) - 1, f.to(tl.int32), mask=listed != 0)
    tl.store(lengths_ptr + block, tl.sum(listed, 0))
    tally_ptr = tallies_ptr + row * blocks + block
    tl.store(tally_ptr, tl.sum(inside.to(tl.int32), 1), mask=row < N)
    tl.store(tally_ptr + N * blocks, tl.sum(keep.to(tl.int32), 1), mask=row < N)


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, target: GPUTarget
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of one call with their scratch, and the outputs that they fill: y, counts `[N, 2]`, kept last."""
    lists, options = Lists.empty(len(x), weight), options_of(target)
    arguments = (x, threshold, *lists.tensors, len(weight), len(lists.tickets))
    first = Launch(inputs_kernel, (len(lists.lengths),), arguments, lists.constants, options)
    last, y, counts = lists.sum_rows(weight, bias, options, x.dtype)
    return [first, last], y, counts


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> None:
    if x.dim() != 2 or not 1 <= len(x) <= MAX_ROWS or x.dtype not in DTYPES:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)}: the triton backend takes bfloat16, float16 or float32 [N, D], N 1 "
            f"to {MAX_ROWS}; run larger batches and prefill as dense matmuls"
        )
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {list(weight.shape)}: expected [D, F]")
    inputs, outputs = weight.shape
    expected = {
        "x": (x, (len(x), inputs), x.dtype),
        "weight": (weight, (inputs, outputs), x.dtype),
        "threshold": (threshold, (inputs,), torch.float32),
    }
    expected |= {} if bias is None else {"bias": (bias, (outputs,), x.dtype)}
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected {dtype} {list(shape)} on "
                f"{x.device} (weights input-contiguous [D, F])"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}: pass it contiguous, a copy here would hide its cost"
            )


@torch.library.custom_op("moyu::sparse_linear_triton", mutates_args=())
def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`naive.sparse_linear` for 1 to 8 rows; 2 launches.

    Args: x `[N, D]` bf16, fp16 or fp32; weight `[D, F]` and bias `[F]` of x's dtype; threshold `[D]` fp32. All
        contiguous, on one device.
    Returns: y `[N, F]` of x's dtype, inputs kept `[N]` int32.
    """
    _check(x, weight, bias, threshold)
    y, counts = run_on(x, lambda target: plan(x, weight, bias, threshold, target))
    return y, counts[:, 1].clone()  # a view of one row would be no aligned tensor of its own


@sparse_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, threshold)
    return x.new_empty((len(x), weight.shape[1])), x.new_empty((len(x),), dtype=torch.int32)
