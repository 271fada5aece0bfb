"""Chunk sparsity of BlockFFN (arXiv 2507.08771): `mean_i(1 - prod_t(1 - z_ti))` over windows of consecutive tokens.

The expected share of neurons that at least one token of the window uses: what several tokens decoded at once read.
Every token carries its window's value, so that the mean over tokens is the mean over windows.
"""

import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor

from moyu_train.penalties.soft import SoftOptions, SoftPenalty

MOST = 1 - 1e-6  # of z, where the logarithm of 1 - z ends


class ChunkOptions(SoftOptions):
    window: int = Field(8, ge=2, description="tokens; windows start at the beginning of a sequence")


class Chunk(SoftPenalty):
    name = "chunk"
    Options = ChunkOptions

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        z = self.sequence(layer, a, real).clamp_max(MOST)
        batch, tokens, neurons = z.shape
        size: int = self.options.window  # type: ignore[attr-defined]
        off = functional.pad((1 - z).log(), (0, 0, 0, -tokens % size)).view(batch, -1, size, neurons).sum(2)
        union = (1 - off.exp()).mean(-1)  # [B, windows]
        return union.repeat_interleave(size, dim=1)[:, :tokens]
