"""`moyu reproduce NAME`: runs one, prints its table and conclusion, and leaves plot and figures in its folder."""

import importlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moyu_train import __version__
from moyu_train.analysis.tables import console
from moyu_train.errors import MoyuError
from moyu_train.files import check_writable, write_json
from moyu_train.recipe import Recipe, nearest
from moyu_train.reproduce import REPRODUCTIONS


def find(name: str) -> Any:
    """The reproduction of that name.

    Raises: MoyuError naming the nearest.
    """
    if name not in REPRODUCTIONS:
        raise MoyuError(
            f"reproduction {name!r} is unknown{nearest(name, REPRODUCTIONS)}; known: {', '.join(REPRODUCTIONS)}"
        )
    module, cls = REPRODUCTIONS[name].split(":")
    return getattr(importlib.import_module(module), cls)()


def list_all() -> dict[str, Any]:
    """Prints every reproduction with its claim."""
    claims = {name: find(name).claim for name in REPRODUCTIONS}
    for name, claim in claims.items():
        console.print(f"{name:<20} {claim}")
    return claims


def reproduce(name: str, recipe: Recipe, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Figures of the reproduction, also written to `NAME.json` and `NAME.png` in the recipe's run folder."""
    reproduction = find(name)
    folder = Path(recipe.run)
    check_writable(folder, 0)
    outcome = reproduction.run(recipe, seeds or reproduction.seeds)
    verdict = "confirmed" if outcome.passed else "not confirmed"
    figures = {
        "reproduction": name,
        "claim": reproduction.claim,
        "criterion": reproduction.criterion,
        "passed": outcome.passed,
        "conclusion": outcome.conclusion,
        "rows": outcome.rows,
        **outcome.more,
        "seeds": list(seeds or reproduction.seeds),
        "recipe": recipe.model_dump(mode="json", exclude={"run"}),
        "versions": {"moyu": __version__, "torch": torch.__version__, "machine": platform.machine()},
    }
    write_json(folder / f"{name}.json", figures)
    outcome.figure.savefig(folder / f"{name}.png", dpi=150)
    table = Table(title=reproduction.claim)
    for column in outcome.rows[0]:
        table.add_column(column, justify="right" if column != next(iter(outcome.rows[0])) else "left")
    for row in outcome.rows:
        table.add_row(*(_cell(value) for value in row.values()))
    table.caption = f"Criterion: {reproduction.criterion} {verdict.capitalize()}."
    console.print(table)
    console.print(outcome.conclusion)
    console.print(f"{(folder / name).resolve()}.json and .png")
    return figures


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
