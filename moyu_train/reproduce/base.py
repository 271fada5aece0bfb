"""A reproduction: a claim, how it is measured, when it counts as confirmed, and a sentence made from what came out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from matplotlib.figure import Figure

from moyu_train.recipe import Recipe


@dataclass
class Outcome:
    """rows: of the table, one key a column. passed: whether the criterion is met. more: what else `--json` keeps."""

    rows: list[dict[str, Any]]
    passed: bool
    conclusion: str
    figure: Figure
    more: dict[str, Any] = field(default_factory=dict)


class Reproduction:
    claim: ClassVar[str]
    criterion: ClassVar[str]
    seeds: ClassVar[tuple[int, ...]] = (0,)  # that it trains from, unless others are given

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        """Measures in the recipe's run folder, where a run that was broken off goes on."""
        raise NotImplementedError


def span(found: dict[str, float], digits: int = 3) -> str:
    """`0.12 (0.08 to 0.15)` of a value with its `low` and `high`."""
    return f"{found['value']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"
