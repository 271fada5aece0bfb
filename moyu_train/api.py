"""For users of another trainer: put a recipe's rule on a live model."""

from typing import Any

from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import describe_blocks
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.allocation import check_allocation, densities
from moyu_train.training.control import SparsityControl
from moyu_train.training.rule import calibrate_rule


def sparsify(model: Any, recipe: Recipe, documents: Documents) -> SparsityControl:
    """Calibrate the recipe's rule on text and put it on `model`, whose config gets the marker.

    Returns: a TrainerCallback that holds the density at `1 - recipe.target_sparsity`; add it to a transformers or TRL
        trainer. `.metrics()` gives target and achieved, `.save(folder)` and `.load(folder)` its state, `.remove()`
        takes the masks off.

    Raises: MoyuError for a recipe with a penalty, which joins the loss of our own trainer only.
    """
    if recipe.penalty:
        raise MoyuError("sparsify holds a rule only; train with moyu_train's SparsityTrainer to use recipe.penalty")
    describe_blocks(model.config, recipe.described)
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    check_allocation(cls, recipe)
    targets = densities(model, recipe, documents)
    rule = calibrate_rule(model, cls, options, targets, documents, recipe.calibrate.tokens, passes=2)
    together = recipe.allocation.method == "learned"
    return SparsityControl(model, rule, 1 - recipe.target_sparsity, targets=targets, together=together)
