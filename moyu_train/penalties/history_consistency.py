"""History consistency: a token's soft mask should not depend on what stood long before, unless its meaning does.

A sequence's second half is seen twice: as it is, z, and after another text in place of its first half, z', in a forward
of its own without a gradient. A token costs `mean_i -(z'_i log z_i + (1 - z'_i) log(1 - z_i))` where the other text
changes what the model predicts next by less than `tolerance`, and 0 elsewhere: where the meaning changed, the mask may.
Two forwards without a gradient more a step; memory: z' of one micro-batch in bf16, and while they are compared both's
logits `[B, T, V]`.
"""

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from moyu_train.penalties.base import Peek, not_prepared
from moyu_train.penalties.prefixes import Prefixes
from moyu_train.penalties.soft import SoftOptions, SoftPenalty, cross_entropy

ROWS = 32  # tokens at a time whose log-probabilities are compared


class HistoryConsistencyOptions(SoftOptions):
    tolerance: float = Field(0.1, gt=0, description="KL between the next-token predictions, in nats, that is no change")


class HistoryConsistency(SoftPenalty):
    name = "history_consistency"
    Options: ClassVar[type[BaseModel]] = HistoryConsistencyOptions

    def begin(self, model: Any, windows: Tensor) -> None:
        self._prefixes = Prefixes(windows)
        self._other: dict[int, Tensor] = {}

    def prepare(self, ids: Tensor | None, real: Tensor | None, peek: Peek) -> None:
        self._other = {}
        if ids is None:
            return
        swapped, _, span = self._prefixes.swap(ids, real)
        own = peek(ids, real, lambda layer, a: None)
        other = peek(swapped, real, self._look)
        tolerance: float = self.options.tolerance  # type: ignore[attr-defined]
        self._compared = span & (kl(own, other) < tolerance)

    def _look(self, layer: int, a: Tensor) -> None:
        self._other[layer] = self.sequence(layer, a, None).bfloat16()

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        if layer not in self._other:
            raise not_prepared(self.name)
        return cross_entropy(self.sequence(layer, a, real), self._other[layer].float()) * self._compared


def kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of each token, in nats, fp32 `[B, T]`, from logits `[B, T, V]`."""
    found = []
    for p, q in zip(one.flatten(0, 1).split(ROWS), other.flatten(0, 1).split(ROWS), strict=True):
        log_p = p.float().log_softmax(-1)
        found.append((log_p.exp() * (log_p - q.float().log_softmax(-1))).sum(-1))
    return torch.cat(found).view(one.shape[:2])
