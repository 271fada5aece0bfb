"""Masks on a live model, put on at the seam: the value a block hands to whatever stands at its down projection."""

from collections.abc import Callable
from typing import Self

import torch
from moyu_kernels.ops.ffn.naive import predictor_scores
from moyu_kernels.seam import ExpertsSeam, Seam
from torch import Tensor

from moyu_train.models.blocks import FFNBlock

# keep(layer, a, expert) -> bool mask of a's shape, or None to leave `a` as it is. a is [..., F].
Keep = Callable[[int, Tensor, int | None], Tensor | None]


class Masking:
    """Sets the activations that `keep` rejects to zero, in every block, until `remove` (or the end of a `with`).

    Args:
        blocks: from `find_blocks`.
        keep: the rule; sees each block's activation `[..., F]` (tokens in front), and the expert's index for experts.
        inputs: also record the FFN's input, so that `keep` may read `self.input(layer)` `[..., D]`.
    """

    def __init__(self, blocks: list[FFNBlock], keep: Keep, inputs: bool = False) -> None:
        self._blocks, self._inputs = blocks, dict[int, Tensor]()
        self._seams: list[Seam | ExpertsSeam] = []
        for layer, block in enumerate(blocks):
            if inputs:
                self._seams.append(Seam(block.module, block.up, self._recorder(layer)))
            if block.layout == "experts":
                self._seams.append(ExpertsSeam(block.module, self._expert_mask(layer, keep)))
            else:
                self._seams.append(Seam(block.module, block.down, self._mask(layer, keep)))

    def input(self, layer: int) -> Tensor:
        return self._inputs[layer]

    def scores(self, layer: int, predictor: dict[str, Tensor]) -> Tensor:
        """A predictor's score of each neuron on the recorded input, fp32 `[..., F]`."""
        return predictor_scores(self._inputs[layer], list(predictor.values()), self._blocks[layer].activation())

    def _recorder(self, layer: int) -> Callable[[Tensor], Tensor]:
        def record(x: Tensor) -> Tensor:
            self._inputs[layer] = x.detach()
            return x

        return record

    @staticmethod
    def _mask(layer: int, keep: Keep) -> Callable[[Tensor], Tensor]:
        return lambda a: masked(a, keep(layer, a, None))

    @staticmethod
    def _expert_mask(layer: int, keep: Keep) -> Callable[[Tensor, int], Tensor]:
        return lambda a, expert: masked(a, keep(layer, a, expert))

    def remove(self) -> None:
        for seam in self._seams:
            seam.remove()
        self._seams.clear()
        self._inputs.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def masked(a: Tensor, keep: Tensor | None) -> Tensor:
    return a if keep is None else torch.where(keep, a, 0.0)
