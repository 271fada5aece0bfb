"""The analyze stage of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moyu_train.analysis.measures import measure
from moyu_train.analysis.subject import Subject
from moyu_train.analysis.uplift import uplift_curve

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def analyze(run: "Run", folder: Path) -> dict[str, Any]:
    """The MOYU notions of the dense model on the validation documents."""
    settings, model = run.recipe.analyze, run.dense()
    figures = uplift_curve(model, run.validation, settings.tokens, settings.sparsities)
    measured = measure(Subject("dense", model), run.validation, settings)
    for row, more in zip(figures["layers"], measured.pop("layers"), strict=True):
        row |= more
    return figures | measured
