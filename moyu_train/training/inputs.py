"""Sparse inputs of linear layers (the recipe's `inputs`): their rules beside those of the FFN blocks, by layer path."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.files import read_tensors
from moyu_train.models.blocks import FFNBlock, device_of, find_blocks, find_inputs
from moyu_train.models.context import longest_window
from moyu_train.models.masking import Masking
from moyu_train.progress import track
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.control import SparsityControl
from moyu_train.training.rule import calibrate_rule

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

FILE = "inputs.safetensors"  # thresholds and centres by path, in the folders of calibrate and finetune
CENTRE = ".centre"
SAMPLES = 512  # tokens that a median is taken of


class InputControl(SparsityControl):
    """A further control on the same model: of the inputs of linear layers."""

    prefix = "inputs_"


def calibrate_inputs(model: Any, recipe: Recipe, documents: Documents, rules: list[Rule]) -> dict[str, Rule]:
    """Rules by path, with the FFN blocks already under theirs; none without `inputs` in the recipe."""
    if not recipe.inputs:
        return {}
    cls, options = resolve("inputs", recipe.inputs, SPARSIFIERS)
    layers, density = find_inputs(model, recipe.inputs.modules), 1 - recipe.inputs.sparsity
    tokens, centres = recipe.calibrate.tokens, list[Tensor]()
    with Masking(find_blocks(model), lambda layer, a, expert: rules[layer].mask(a, expert), rules=rules):
        if recipe.inputs.centre == "median":
            centres = channel_medians(model, layers, documents.first(tokens))
        found = calibrate_rule(model, cls, options, density, documents, tokens, 2, layers, centres)
    return dict(zip((layer.path for layer in layers), found.rules, strict=True))


@torch.no_grad()
def channel_medians(model: Any, layers: list[FFNBlock], documents: Documents) -> list[Tensor]:
    """Median of each input of linear layers over about `SAMPLES` tokens, evenly spread, fp32 `[D]` a layer."""
    stride = max(documents.total // SAMPLES, 1)
    seen: list[list[Tensor]] = [[] for _ in layers]

    def look(layer: int, x: Tensor, expert: int | None) -> None:
        seen[layer].append(x.reshape(-1, x.shape[-1])[::stride].float().cpu())

    with Masking(layers, look):
        for _, ids in track(documents.windows(longest_window(model)), "calibrate inputs: medians"):
            model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
    return [torch.cat(rows).median(0).values for rows in seen]


def input_tensors(rules: dict[str, Rule]) -> dict[str, Tensor]:
    """Thresholds by path and, under the path and `CENTRE`, centres where there are some."""
    found = {path: rule.threshold for path, rule in rules.items()}
    return found | {f"{path}{CENTRE}": rule.centre for path, rule in rules.items() if rule.centre is not None}


def write_inputs(folder: Path, rules: dict[str, Rule]) -> None:
    if rules and PartialState().is_main_process:
        save_file(input_tensors(rules), folder / FILE)


def _sparsifier(recipe: Recipe, tensors: dict[str, Tensor], paths: list[str]) -> Any:
    assert recipe.inputs
    cls, options = resolve("inputs", recipe.inputs, SPARSIFIERS)
    sparsifier = cls(options, [tensors[path] for path in paths], 1 - recipe.inputs.sparsity)
    sparsifier.centres = [tensors.get(f"{path}{CENTRE}") for path in paths]
    return sparsifier


def input_rules(run: "Run", stage: str) -> dict[str, Rule]:
    """Rules by path as a stage, calibrate or finetune, left them; none without `inputs` in the recipe."""
    if not run.recipe.inputs:
        return {}
    tensors = read_tensors(run.stage_folder(stage) / FILE)
    paths = [name for name in tensors if not name.endswith(CENTRE)]
    return dict(zip(paths, _sparsifier(run.recipe, tensors, paths).rules, strict=True))


def inputs_on(run: "Run", model: Any) -> InputControl | None:
    """The rules that calibrate found, on a model in training."""
    if not run.recipe.inputs:
        return None
    layers, tensors = find_inputs(model, run.recipe.inputs.modules), input_tensors(input_rules(run, "calibrate"))
    sparsifier = _sparsifier(run.recipe, tensors, [layer.path for layer in layers])
    return InputControl(model, sparsifier, 1 - run.recipe.inputs.sparsity, blocks=layers)


def put_back(control: InputControl, tensors: dict[str, Tensor]) -> None:
    """Give a control the rules that `input_tensors` were taken of."""
    control.sparsifier.thresholds = [tensors[block.path] for block in control.blocks]
    control.sparsifier.centres = [tensors.get(f"{block.path}{CENTRE}") for block in control.blocks]


def rules_of(control: InputControl | None) -> dict[str, Rule]:
    """By path, on the CPU."""
    if control is None:
        return {}
    named = zip(control.blocks, control.sparsifier.rules, strict=True)
    return {block.path: replace(rule, threshold=rule.threshold.cpu()) for block, rule in named}
