"""How the bytes are shared out among the layers: allocations, and the search for one with the model in the loop."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moyu_train.models.blocks import FFNBlock
from moyu_train.training.cuts import LEAST, MOST, Cuts, Predictors, share_for

GROUPS = 6  # of neighbouring layers, whose shares are searched one after the other
STEP = 2**0.25  # factor on the shares of a group
LEAST_PRICE = 0.01  # nats a token per share of bytes


@dataclass(frozen=True)
class Allocation:
    """Shares of neurons that each layer selects, around a level that is common to all.

    guided: 0: the level everywhere, 1: as the guide shares it out, between: the geometric mean; factors: one a layer.
    """

    guide: Cuts
    blocks: list[FFNBlock]
    predictors: Predictors
    itemsize: int
    guided: float
    factors: tuple[float, ...]

    def shares(self, level: float) -> list[float]:
        shared = self.guide.shared_out(self.blocks, level) if self.guided else [level] * len(self.blocks)
        mixed = (level ** (1 - self.guided) * max(s, LEAST) ** self.guided for s in shared)
        return [min(max(share * f, LEAST), MOST) for share, f in zip(mixed, self.factors, strict=True)]

    def expected(self, level: float) -> float:
        """Bytes skipped, as the guide has it."""
        return self.guide.bytes_skipped(self.blocks, self.predictors, self.shares(level), self.itemsize)

    def times(self, layers: range, factor: float) -> "Allocation":
        return replace(self, factors=tuple(f * factor if i in layers else f for i, f in enumerate(self.factors)))


def search(
    run: Callable[[list[float], str], dict[str, Any]],
    runs: int,
    start: Allocation,
    level: float,
    point: dict[str, Any],
    price: float,
) -> tuple[Allocation, float, dict[str, Any]]:
    """The allocation with the least cost in `runs` runs: nats a token, and the bytes read at their price.

    Each candidate is tried at the level where it should read as much as the best one so far. Tried are the guide's own
    allocation, then more or less for each of `GROUPS` groups of layers, until a whole round finds nothing better.

    Args: run: figures of the model with such shares of each layer's neurons; level, point: those of `start`.
    """

    def cost(point: dict[str, Any]) -> float:
        return math.log(point["perplexity"]) - price * float(point["bytes_skipped"])

    best, left = (start, level, point), runs

    def better(candidate: Allocation, what: str) -> bool:
        nonlocal best, left
        if not left:
            return False
        left -= 1
        level = share_for(candidate.expected, best[0].expected(best[1]))
        point = run(candidate.shares(level), what)
        if cost(point) >= cost(best[2]):
            return False
        best = candidate, level, point
        return True

    for guided in (1.0, 0.5):
        if better(replace(start, guided=guided), "the guide's shares"):
            break
    layers = len(start.blocks)
    count = min(GROUPS, layers)
    groups = [range(layers * g // count, layers * (g + 1) // count) for g in range(count)]
    found = True
    while left and found:
        found = False
        for group in groups:
            what = f"layers {group.start} to {group.stop - 1}"
            if better(best[0].times(group, STEP), what) or better(best[0].times(group, 1 / STEP), what):
                found = True
    return best


def price_near(points: list[dict[str, Any]], near: dict[str, Any]) -> float:
    """Nats a token that a share of bytes is worth around a point, from the two points of others nearest to it."""
    if len(points) < 2:
        return LEAST_PRICE
    a, b = sorted(points, key=lambda point: abs(point["bytes_skipped"] - near["bytes_skipped"]))[:2]
    bytes_apart = a["bytes_skipped"] - b["bytes_skipped"]
    if not bytes_apart:
        return LEAST_PRICE
    return float(max((math.log(a["perplexity"]) - math.log(b["perplexity"])) / bytes_apart, LEAST_PRICE))
