"""The stages around fine-tuning: what is calibrated and fitted before it, and again after it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from moyu_kernels.heads import HeadRouters
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.analysis.plots import calibration
from moyu_train.errors import MoyuError
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.files import read_tensors, reading
from moyu_train.models.blocks import ffn_sha256
from moyu_train.models.heads import attention_sha256, find_attention
from moyu_train.models.int8 import round_ffn
from moyu_train.models.masking import InputMasks
from moyu_train.models.state import (
    predictors_from_tensors,
    predictors_to_tensors,
    stored_bytes,
    thresholds_from_tensors,
    thresholds_to_tensors,
)
from moyu_train.predictors import PREDICTORS
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.allocation import densities
from moyu_train.training.fit import PredictorTrainer, fit_windows
from moyu_train.training.heads import fit_under, head_routers, sparse_attentions, write_routers
from moyu_train.training.inputs import calibrate_inputs, input_rules, write_inputs
from moyu_train.training.loop import calibrate_in_loop
from moyu_train.training.rule import calibrate_rule

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

CALIBRATION = "calibration.png"
STATE = "state.safetensors"  # thresholds and, from fit-predictors on, predictors


def write(folder: Path, thresholds: list[Tensor], predictors: list[dict[str, Tensor]]) -> None:
    if PartialState().is_main_process:
        save_file(thresholds_to_tensors(thresholds) | predictors_to_tensors(predictors), folder / STATE)


def read(folder: Path) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    tensors = read_tensors(folder / STATE)
    with reading(folder / STATE):
        return thresholds_from_tensors(tensors), predictors_from_tensors(tensors)


def sparsifier_of(recipe: Recipe, thresholds: list[Tensor]) -> Any:
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    return cls(options, thresholds, 1 - recipe.target_sparsity)


def calibrate(run: "Run", folder: Path) -> dict[str, Any]:
    """Levels of the rule on the dense model."""
    recipe = run.recipe
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    model = run.dense()
    targets = densities(model, recipe, run.train)
    rule = calibrate_rule(model, cls, options, targets, run.train, recipe.calibrate.tokens, passes=2)
    write(folder, rule.thresholds, [])
    write_inputs(folder, calibrate_inputs(model, recipe, run.train, rule.rules))
    seen = run.train.first(recipe.calibrate.tokens).total
    return {"tokens": seen, "density": 1 - recipe.target_sparsity, "densities": targets}


def _fit(run: "Run", folder: Path, source: str, model: Any) -> dict[str, Any]:
    recipe = run.recipe
    thresholds, _ = read(run.stage_folder(source))
    assert recipe.predictor  # the pipeline runs this stage only with one
    cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
    trainer = PredictorTrainer(model, sparsifier_of(recipe, thresholds).rules, cls, options, folder)
    windows = fit_windows(recipe, run.train)
    with InputMasks(model, input_rules(run, source)):
        predictors = trainer.fit(windows, recipe.fit.save_every)
    write(folder, thresholds, predictors)
    return {
        "tokens": windows.numel(),
        "family": cls.name,
        "predictor_bytes": sum(map(stored_bytes, predictors)),
        "ffn_sha256": ffn_sha256(model),
    }


def fit_predictors(run: "Run", folder: Path) -> dict[str, Any]:
    """Predictors of the dense model's activations under the rule, all layers in one pass."""
    return _fit(run, folder, "calibrate", run.dense())


def refit_predictors(run: "Run", folder: Path) -> dict[str, Any]:
    """Predictors again, of the fine-tuned model: its activations have moved, and become easier to predict."""
    return _fit(run, folder, "finetune", _finetuned(run))


def fit_heads(run: "Run", folder: Path) -> dict[str, Any]:
    """Routers of attention heads that fine-tuning runs under, on the dense model under the rule's exact masks."""
    return _fit_heads(run, folder, "calibrate", run.dense())


def refit_heads(run: "Run", folder: Path) -> dict[str, Any]:
    """Routers that are exported, on the fine-tuned model under its rule's exact masks, with all heads."""
    return _fit_heads(run, folder, "finetune", _finetuned(run))


def _fit_heads(run: "Run", folder: Path, source: str, model: Any) -> dict[str, Any]:
    """source: the stage that has the rules."""
    recipe = run.recipe
    rules = sparsifier_of(recipe, read(run.stage_folder(source))[0]).rules
    attentions, windows = sparse_attentions(find_attention(model), recipe.heads), fit_windows(recipe, run.train)
    inputs, unit = input_rules(run, source), recipe.heads.unit
    routers = fit_under(model, rules, inputs, attentions, unit, windows, folder, recipe.fit.save_every)
    write_routers(folder, attentions, routers)
    paths, dtype = [attention.block.path for attention in attentions], getattr(torch, recipe.export.dtype)
    return {
        "tokens": windows.numel(),
        "router_bytes": sum(map(stored_bytes, routers)),
        "attention_sha256": attention_sha256(model, paths, dtype),
    }


def _finetuned(run: "Run") -> Any:
    """The fine-tuned model on the weights that the export decodes with: predictors and their cuts are for these."""
    model = run.trained("finetune")
    return round_ffn(model) if run.recipe.export.weights == "int8" else model


def _in_loop(
    run: "Run", folder: Path, source: str, weights: str, model: Any, heads: HeadRouters | None = None
) -> dict[str, Any]:
    """source: the stage that fitted the predictors; weights: the one whose rules go with the model's weights."""
    thresholds, fitted = read(run.stage_folder(source))
    with HeadMasks.of(model, heads):
        predictors, figures = calibrate_in_loop(
            model,
            sparsifier_of(run.recipe, thresholds).rules,
            fitted,
            run.validation,
            run.recipe.calibrate,
            run.recipe.export.itemsize,
            input_rules(run, weights),
            folder / "search.jsonl",
        )
    write(folder, thresholds, predictors)
    if PartialState().is_main_process:
        calibration(figures).savefig(folder / CALIBRATION, dpi=120)
    return figures


def in_loop(run: "Run", folder: Path) -> dict[str, Any]:
    """Cuts with the untouched dense model in the loop: what the training starts from, and is compared with."""
    model = run.dense()
    _check_weights(run, "fit-predictors", model)
    return _in_loop(run, folder, "fit-predictors", "calibrate", model)


def recalibrate(run: "Run", folder: Path) -> dict[str, Any]:
    """Cuts again, with the fine-tuned model in the loop."""
    model = _finetuned(run)
    _check_weights(run, "refit-predictors", model)
    return _in_loop(run, folder, "refit-predictors", "finetune", model, head_routers(run, "refit-heads"))


def _check_weights(run: "Run", stage: str, model: Any) -> None:
    if ffn_sha256(model) != run.figures(stage)["ffn_sha256"]:
        raise MoyuError(
            f"the predictors in {str(run.stage_folder(stage))!r} were fitted for other weights; delete that folder and "
            f"run `moyu {stage}` again"
        )
