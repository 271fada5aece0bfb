"""Masks of attention heads on a stock model, named by routers or by the oracle, and the bytes that they leave.

Counts come from the very pass that is scored, so perplexity, density and bytes belong together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from moyu_kernels.heads import HeadRouters
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import line_bytes
from moyu_train.models.heads import Attention, contributions, find_attention
from moyu_train.models.masking import Masking
from moyu_train.models.state import stored_bytes
from moyu_train.training.heads import most, scores


@dataclass
class HeadCounts:
    """Of each layer, fp64 `[L]`: sums over tokens, but for `union` and `steps`, which are sums over decode steps."""

    tokens: Tensor
    steps: Tensor
    union: Tensor  # units that any sequence of the step keeps: their q and o rows are read
    groups: Tensor  # groups with a unit kept: their keys and values are read
    hits: Tensor  # units kept that the oracle keeps too
    mass_kept: Tensor  # squared contribution of the units kept
    mass_oracle: Tensor  # and of those that the oracle keeps

    @classmethod
    def zeros(cls, layers: int) -> "HeadCounts":
        return cls(*(torch.zeros(layers, dtype=torch.float64) for _ in range(7)))


class HeadMasks:
    """Sets the heads that are off to zero where they reach the output projection, and counts. Keys and values stay.

    Args:
        attentions: from `find_attention`; other layers keep all heads. None at all is fine.
        unit: "head" or "group".
        keep: units kept of each token.
        routers: one a layer, or None for the oracle: the units of largest contribution.
        batch: sequences that a decode step takes together; above 1 the model must see inputs `[batch, T, D]`.
    """

    def __init__(
        self,
        attentions: list[Attention],
        unit: str,
        keep: int,
        routers: Sequence[Mapping[str, Tensor]] | None,
        batch: int = 1,
    ) -> None:
        self.attentions, self.unit, self.keep = attentions, unit, keep
        self.routers, self.batch = routers, batch
        self.grams = [attention.grams(unit) for attention in attentions]
        self.counts = HeadCounts.zeros(len(attentions))
        self._masking = Masking([a.block for a in attentions], self._mask, inputs=routers is not None)

    @classmethod
    def of(cls, model: Any, heads: HeadRouters | None, oracle: bool = False) -> Self:
        """The masks of a checkpoint's routers on its stock model, or of the oracle at their density; none without.

        Raises: MoyuError where the model lacks a module that has a router.
        """
        if heads is None:
            return cls([], "head", 0, [])
        found = {attention.block.path: attention for attention in find_attention(model)}
        if missing := [path for path in heads.routers if path not in found]:
            raise MoyuError(f"there are routers for the heads of {missing[0]}, which the model lacks; export it again")
        attentions = [found[path] for path in heads.routers]
        return cls(attentions, heads.unit, heads.keep, None if oracle else list(heads.routers.values()))

    def _mask(self, layer: int, a: Tensor, expert: int | None) -> Tensor:
        contribution = contributions(a, self.grams[layer])
        oracle = most(contribution, self.keep)
        kept = oracle
        if self.routers:
            kept = most(scores(self._masking.input(layer), self.routers[layer]), self.keep)
        counts, square = self.counts, contribution.double().square()
        groups = kept.unflatten(-1, (self.attentions[layer].groups, -1)).any(-1)
        counts.tokens[layer] += kept[..., 0].numel()
        counts.steps[layer] += kept[..., 0].numel() / self.batch
        counts.union[layer] += (kept.any(0) if self.batch > 1 else kept).sum().item()
        counts.groups[layer] += groups.sum().item()
        counts.hits[layer] += (kept & oracle).sum().item()
        counts.mass_kept[layer] += (square * kept).sum().item()
        counts.mass_oracle[layer] += (square * oracle).sum().item()
        return kept.repeat_interleave(a.shape[-1] // kept.shape[-1], -1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._masking.remove()

    def per_layer(self) -> list[dict[str, Any]]:
        """Per layer: recall of the oracle's units, and squared contribution kept of what it keeps."""
        c = self.counts
        recall, mass = c.hits / (c.tokens * self.keep), c.mass_kept / c.mass_oracle.clamp_min(1e-30)
        found = zip(self.attentions, recall.tolist(), mass.tolist(), strict=True)
        return [{"block": a.block.path, "recall": share, "mass_kept": kept} for a, share, kept in found]

    def quality(self) -> dict[str, float]:
        """The same, means over layers."""
        layers = self.per_layer()
        return {name: sum(layer[name] for layer in layers) / len(layers) for name in ("recall", "mass_kept")}

    def bytes_read(self, itemsize: int, context: int) -> tuple[float, float]:
        """(weights and routers, keys and values) that a decode step of the counted batch reads in these layers."""
        weights = cache = 0.0
        for layer, attention in enumerate(self.attentions):
            c, block, size = self.counts, attention.block, attention.size
            rows = c.union[layer] / c.steps[layer] * block.neurons / attention.units(self.unit)
            width = len(block.down_matrix())
            weights += rows.item() * (line_bytes(block.hidden * itemsize) + line_bytes(width * itemsize))
            weights += 2 * attention.groups * size * block.hidden * itemsize
            weights += stored_bytes(self.routers[layer]) if self.routers else 0
            groups = (c.groups[layer] / c.tokens[layer]).item()
            cache += self.batch * groups * 2 * size * context * itemsize
        return weights, cache

    def skipped(self, others: list[Attention], itemsize: int, context: int) -> dict[str, float]:
        """Shares of what a dense decode step reads that is not read, here and in the layers `others` that keep all:
        `weights_skipped` (of q, k, v and o; routers counted as read), `cache_skipped` and `bytes_skipped` of both.
        """
        rest = dense_bytes(others, itemsize, context, self.batch)
        whole = dense_bytes(self.attentions, itemsize, context, self.batch)
        read = self.bytes_read(itemsize, context)
        weights, cache = (1 - (r + part) / (r + all_) for r, part, all_ in zip(rest, read, whole, strict=True))
        both = 1 - (sum(rest) + sum(read)) / (sum(rest) + sum(whole))
        return {"weights_skipped": weights, "cache_skipped": cache, "bytes_skipped": both}

    def figures(self, model: Any, itemsize: int, context: int) -> dict[str, Any]:
        """Of all attention layers of `model`, some of which keep all heads: `skipped`, `quality`, and what ran."""
        paths = {attention.block.path for attention in self.attentions}
        others = [attention for attention in find_attention(model) if attention.block.path not in paths]
        return {
            "unit": self.unit,
            "keep": self.keep,
            "units": self.attentions[0].units(self.unit),
            "layers": len(self.attentions),
            "dense_layers": len(others),
            "context": context,
            **self.skipped(others, itemsize, context),
            **self.quality(),
        }


def dense_bytes(attentions: list[Attention], itemsize: int, context: int, batch: int) -> tuple[int, int]:
    """(weights of q, k, v and o, keys and values) that a dense decode step reads."""
    weights = cache = 0
    for attention in attentions:
        block, keys = attention.block, 2 * attention.groups * attention.size
        weights += (block.neurons + keys) * block.hidden * itemsize + block.down_matrix().numel() * itemsize
        cache += batch * keys * context * itemsize
    return weights, cache
