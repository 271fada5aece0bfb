"""Sparse inputs of linear layers (the recipe's `inputs`): their rules beside those of the FFN blocks, by layer path."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.files import read_tensors
from moyu_train.models.blocks import find_blocks, find_inputs
from moyu_train.models.masking import Masking
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.control import SparsityControl
from moyu_train.training.rule import calibrate_rule

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

FILE = "inputs.safetensors"  # thresholds by path, in the folders of calibrate and finetune


class InputControl(SparsityControl):
    """A further control on the same model: of the inputs of linear layers."""

    prefix = "inputs_"


def calibrate_inputs(model: Any, recipe: Recipe, documents: Documents, rules: list[Rule]) -> dict[str, Tensor]:
    """Thresholds by path, with the FFN blocks already under their rules; none without `inputs` in the recipe."""
    if not recipe.inputs:
        return {}
    cls, options = resolve("inputs", recipe.inputs, SPARSIFIERS)
    layers, density = find_inputs(model, recipe.inputs.modules), 1 - recipe.inputs.sparsity
    with Masking(find_blocks(model), lambda layer, a, expert: rules[layer].mask(a, expert), rules=rules):
        found = calibrate_rule(model, cls, options, density, documents, recipe.calibrate.tokens, 2, layers)
    return dict(zip((layer.path for layer in layers), found.thresholds, strict=True))


def write_inputs(folder: Path, thresholds: dict[str, Tensor]) -> None:
    if thresholds and PartialState().is_main_process:
        save_file(thresholds, folder / FILE)


def _sparsifier(recipe: Recipe, thresholds: list[Tensor]) -> Any:
    assert recipe.inputs
    cls, options = resolve("inputs", recipe.inputs, SPARSIFIERS)
    return cls(options, thresholds, 1 - recipe.inputs.sparsity)


def input_rules(run: "Run", stage: str) -> dict[str, Rule]:
    """Rules by path as a stage, calibrate or finetune, left them; none without `inputs` in the recipe."""
    if not run.recipe.inputs:
        return {}
    tensors = read_tensors(run.stage_folder(stage) / FILE)
    return dict(zip(tensors, _sparsifier(run.recipe, list(tensors.values())).rules, strict=True))


def inputs_on(run: "Run", model: Any) -> InputControl | None:
    """The rules that calibrate found, on a model in training."""
    if not run.recipe.inputs:
        return None
    layers, rules = find_inputs(model, run.recipe.inputs.modules), input_rules(run, "calibrate")
    sparsifier = _sparsifier(run.recipe, [rules[layer.path].threshold for layer in layers])
    return InputControl(model, sparsifier, 1 - run.recipe.inputs.sparsity, blocks=layers)


def thresholds_of(control: InputControl | None) -> dict[str, Tensor]:
    if control is None:
        return {}
    return {b.path: t.cpu() for b, t in zip(control.blocks, control.sparsifier.thresholds, strict=True)}
