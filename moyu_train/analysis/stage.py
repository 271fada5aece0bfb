"""The analyze stage of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moyu_train.analysis.uplift import uplift_curve

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def analyze(run: "Run", folder: Path) -> dict[str, Any]:
    """Over-activation of the dense model on the validation documents."""
    settings = run.recipe.analyze
    return uplift_curve(run.dense(), run.validation, settings.tokens, settings.sparsities)
