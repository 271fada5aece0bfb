"""Prefix contrast: a token's mask should be no nearer to the text before it than to any other text.

With x = z - p, phi(u, v) = `sum_i u_i v_i / sum_i p_i (1 - p_i)`, and the mean m of x over a sequence's first half,
each token t of the second half costs `relu(phi(x_t, m) - phi(x_t, m'))^2`: m' is the mean over another text in place
of the first half, from a forward of its own without a gradient. So what all texts share costs nothing. One forward over
half the tokens more a step.
"""

from typing import Any

import torch
from torch import Tensor

from moyu_train.penalties.base import Peek, not_prepared
from moyu_train.penalties.prefixes import Prefixes
from moyu_train.penalties.rates import RatePenalty


class PrefixContrast(RatePenalty):
    name = "prefix_contrast"

    def begin(self, model: Any, windows: Tensor) -> None:
        super().begin(model, windows)
        self._prefixes = Prefixes(windows)
        self._other: dict[int, Tensor] = {}

    def prepare(self, ids: Tensor | None, real: Tensor | None, peek: Peek) -> None:
        self._other = {}
        if ids is None:
            return
        swapped, self._first, self._second = self._prefixes.swap(ids, real)
        end = max(int(self._first.any(0).nonzero().max()) + 1, 1) if self._first.any() else 1
        first, part = self._first[:, :end], None if real is None else real[:, :end]

        def look(layer: int, a: Tensor) -> None:
            self._other[layer] = mean(self.sequence(layer, a, None) - self.rate(layer), first)

        peek(swapped[:, :end], part, look)

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        if layer not in self._other:
            raise not_prepared(self.name)
        x, p = self.centred(layer, a, real), self.rate(layer)
        nearer = mean(x, self._first) - self._other[layer]
        phi = (x * nearer[:, None]).sum(-1) / (p * (1 - p)).sum().clamp_min(1e-6)
        return torch.relu(phi).square() * self._second


def mean(x: Tensor, where: Tensor) -> Tensor:
    """Of x `[B, T, F]` over each sequence's tokens with `where` `[B, T]`: `[B, F]`, 0 where there is none."""
    return (x * where[..., None]).sum(1) / where.sum(1, keepdim=True).clamp_min(1)
