"""Activation locality of BlockFFN (arXiv 2507.08771): binary cross-entropy of a token's soft mask to the one before.

Rewards neighbouring tokens for using the same neurons. The first token of a sequence, and one after padding, cost 0.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from moyu_train.penalties.soft import SoftPenalty, cross_entropy


class Locality(SoftPenalty):
    name = "locality"

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        z = self.sequence(layer, a, real)
        value = cross_entropy(z[:, 1:], z[:, :-1])
        if real is not None:
            value = value * (real[:, 1:] & real[:, :-1])
        return functional.pad(value, (1, 0)) if value.numel() else torch.zeros_like(z[..., 0])
