"""Compensations on a live model's FFN blocks: weights of it that are stored beside the stock ones, never among them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from moyu_kernels.compensation import ATTRIBUTE, FILE, PARTS, Compensation, compensations
from safetensors.torch import save_file
from torch import nn

from moyu_train.files import reading
from moyu_train.models.blocks import FFNBlock, find_blocks


def attach(blocks: list[FFNBlock], added: list[Compensation]) -> None:
    """Put them on the blocks, in the blocks' dtype; whatever masks these then adds them."""
    for block, compensation in zip(blocks, added, strict=True):
        setattr(block.module, ATTRIBUTE, compensation.to(block.weights()[0]))


def attach_empty(model: nn.Module, rank: int) -> None:
    """Compensations that add nothing, for values to be put into."""
    blocks = find_blocks(model)
    shapes = ((rank, block.hidden) for block in blocks)
    attach(blocks, [Compensation(torch.zeros(r, d), torch.zeros(d, r), torch.zeros(d)) for r, d in shapes])


def attach_stored(model: nn.Module, folder: Path) -> None:
    """Those that a folder holds, if it holds any."""
    if (folder / FILE).is_file():
        blocks = find_blocks(model)
        with reading(folder / FILE):
            attach(blocks, compensations(folder, [block.hidden for block in blocks]))


def compensation_rank(model: nn.Module) -> int:
    """R; 0 without compensations."""
    return next((len(getattr(b.module, ATTRIBUTE).a) for b in find_blocks(model) if hasattr(b.module, ATTRIBUTE)), 0)


def compensation_bytes(block: FFNBlock, itemsize: int) -> int:
    """That a decode step reads of a block's compensation, which beside int8 rows is taken for fp32."""
    found: Compensation | None = getattr(block.module, ATTRIBUTE, None)
    return sum(p.numel() for p in found.parameters()) * (4 if itemsize == 1 else itemsize) if found else 0


@contextmanager
def taken_off(model: nn.Module) -> Iterator[list[Compensation]]:
    """The model without its compensations, for its state dict to be the stock one, and what was taken off."""
    blocks = find_blocks(model)
    taken: list[Compensation] = [getattr(b.module, ATTRIBUTE) for b in blocks if hasattr(b.module, ATTRIBUTE)]
    for block in blocks if taken else []:
        delattr(block.module, ATTRIBUTE)
    try:
        yield taken
    finally:
        attach(blocks if taken else [], taken)


def save(folder: Path, added: list[Compensation]) -> None:
    """Write them, at their dtype, into a model's folder; none is fine."""
    if added:
        (folder / FILE).parent.mkdir(exist_ok=True)
        parts = ((i, part, getattr(c, part).detach().contiguous()) for i, c in enumerate(added) for part in PARTS)
        save_file({f"blocks.{i}.{part}": tensor for i, part, tensor in parts}, folder / FILE)
