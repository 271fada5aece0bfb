"""Block anchor: each FFN block's output held near the dense parent's, `norm(y - y0)^2 / norm(y0)^2` a token.

The error is taken inside the block's forward, as penalties are, so that it is the same under activation checkpointing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks

SMALL = 1e-6


class BlockAnchor:
    """Hooks both models, until `remove`. The parent has to run first on the same tokens.

    Raises: MoyuError where the two have different blocks.
    """

    def __init__(self, student: Any, parent: nn.Module) -> None:
        blocks, dense = find_blocks(student), find_blocks(parent)
        if len(blocks) != len(dense):
            raise MoyuError(
                f"the student has {len(blocks)} FFN blocks and the parent {len(dense)}; give a parent like it"
            )
        self._targets: list[Tensor | None] = [None] * len(blocks)
        self._terms: list[Tensor] = []
        self._collecting, self._real = False, torch.ones(())
        self._handles = [b.module.register_forward_hook(self._keep(i)) for i, b in enumerate(dense)]
        self._handles += [b.module.register_forward_hook(self._compare(i)) for i, b in enumerate(blocks)]

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._targets[layer] = first_tensor(output).detach().clone()  # some layers add to it in place

        return hook

    def _compare(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            target = self._targets[layer]
            if target is None or not torch.is_grad_enabled():
                return
            y, y0 = first_tensor(output).float(), target.float()
            error = (y - y0).square().sum(-1) / (y0.square().sum(-1) + SMALL)
            term = (error.flatten() * self._real.flatten()).sum()
            if self._collecting:
                self._terms.append(term)

        return hook

    @contextmanager
    def armed(self, real: Tensor | None) -> Iterator[None]:
        """Around the student's training forward. real: `[B, T]`, not 0 where a token is no padding."""
        self._terms, self._collecting = [], True
        self._real = torch.ones(()) if real is None else real
        try:
            yield
        finally:
            self._collecting = False

    def take(self) -> Tensor:
        """Of the forward just armed: fp32 sum over real tokens, mean over blocks."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() / len(self._targets)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
