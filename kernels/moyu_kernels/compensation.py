"""A low-rank map of an FFN's input that stands for the neurons that are off: `down(masked a) + B (A x) + bias`.

What is off is small but not random: part of it is a linear function of the FFN's input. Low-rank corrections are known
from quantisation (LoRC in ZeroQuant-V2, arXiv 2303.08302) and from sparse inputs (R-Sparse, arXiv 2504.19449).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as functional
from safetensors.torch import load_file
from torch import Tensor, nn

from .seam import Seam

FILE = "moyu/compensation.safetensors"
ATTRIBUTE = "compensation"  # of the module that holds the FFN's projections
PARTS = ("a", "b", "bias")


class Compensation(nn.Module):
    """y `[..., D]` of an FFN's input x `[..., D]`.

    Args: a: `[R, D]`; b: `[D, R]`; bias: `[D]`.
    Raises: ValueError for shapes that do not fit.
    """

    def __init__(self, a: Tensor, b: Tensor, bias: Tensor) -> None:
        super().__init__()
        if a.ndim != 2 or b.shape != a.shape[::-1] or bias.shape != a.shape[1:]:
            raise ValueError(
                f"a {list(a.shape)}, b {list(b.shape)} and bias {list(bias.shape)} are no compensation, which has "
                "[R, D], [D, R] and [D]"
            )
        self.a, self.b, self.bias = nn.Parameter(a), nn.Parameter(b), nn.Parameter(bias)

    def forward(self, x: Tensor, linear: Callable[..., Tensor] = functional.linear) -> Tensor:
        """linear: what multiplies, with the arguments of `F.linear`."""
        return linear(linear(x, self.a, None), self.b, self.bias)


class Compensated:
    """Adds the compensation of a live block, where it has one, to what its down projection gives, until `remove`.

    Args: block: whose `compensation` is looked for on every call, so that it may come later, and peft may wrap it;
        front: name of the projection that takes the FFN's input; down: name of the down projection; on: whether it is
        added in the call under way.
    """

    def __init__(self, block: nn.Module, front: str, down: str, on: Callable[[], bool] = lambda: True) -> None:
        self._inputs: list[Tensor] = []

        def record(x: Tensor) -> Tensor:
            # Only where `add` takes it again: activation checkpointing ends a recompute before a down projection that
            # nothing comes after, and what stayed here would hold the layer's graph.
            if hasattr(block, ATTRIBUTE):
                self._inputs = [x]
            return x

        def add(_: tuple[Any, ...], y: Tensor) -> Tensor:
            if not hasattr(block, ATTRIBUTE):
                return y
            x = self._inputs.pop()
            return y + getattr(block, ATTRIBUTE)(x) if on() else y

        self._seams = [Seam(block, front, record), Seam(block, down, output=add)]

    def remove(self) -> None:
        """Undo: the block is as it was."""
        for seam in self._seams:
            seam.remove()
        self._inputs.clear()


def compensations(folder: Path, hidden: Sequence[int]) -> list[Compensation]:
    """What a folder holds, one a block.

    hidden: D of each block.

    Raises: KeyError where one lacks a tensor, ValueError where shapes do not fit.
    """
    tensors, found = load_file(folder / FILE), []
    for i, d in enumerate(hidden):
        found.append(Compensation(*(tensors[f"blocks.{i}.{part}"] for part in PARTS)))
        if len(found[i].bias) != d:
            raise ValueError(f"blocks.{i}.bias is [{len(found[i].bias)}], and the block's hidden size is {d}")
    return found
