"""Holds masks of attention heads on a live model during training: the router decides, as in the export that decodes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from moyu_kernels.heads import HeadRouters
from torch import Tensor

from moyu_train.models.heads import find_attention
from moyu_train.models.masking import Masking
from moyu_train.training.heads import most, scores


class HeadControl:
    """Of each token only the units that frozen routers name run, in every forward of the student, until `remove`.

    The mask is a constant to the gradient, and computed anew from the same input in a recompute. Nothing is counted.

    Args: model: the student, before adapters or an engine are put on; heads: routers by the paths of its attention
        modules.
    """

    def __init__(self, model: Any, heads: HeadRouters) -> None:
        attentions = [a for a in find_attention(model) if a.block.path in heads.routers]
        self.blocks = [attention.block for attention in attentions]
        self.routers, self.keep = [dict(heads.routers[block.path]) for block in self.blocks], heads.keep
        self._put_on()

    def _put_on(self) -> None:
        self._masking = Masking(self.blocks, self._keep, inputs=True)

    def _keep(self, layer: int, a: Tensor, expert: int | None) -> Tensor:
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):  # fp32, as in the export
            kept = most(scores(self._masking.input(layer), self.routers[layer]), self.keep)
        return kept.repeat_interleave(a.shape[-1] // kept.shape[-1], -1)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model with all its heads within."""
        self._masking.remove()
        try:
            yield
        finally:
            self._put_on()

    def remove(self) -> None:
        self._masking.remove()
