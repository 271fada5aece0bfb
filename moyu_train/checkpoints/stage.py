"""The export and verify stages of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moyu_train.checkpoints.card import write_card
from moyu_train.checkpoints.export import RECORDED, export
from moyu_train.checkpoints.verify import verify
from moyu_train.errors import MoyuError
from moyu_train.files import check_writable
from moyu_train.models.blocks import ffn_bytes, find_blocks
from moyu_train.models.heads import attention_sha256
from moyu_train.models.state import family_of, stored_bytes
from moyu_train.recipe import Recipe
from moyu_train.training.heads import head_routers
from moyu_train.training.inputs import input_rules
from moyu_train.training.stages import read, sparsifier_of

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

CHECKPOINT = "checkpoint"
CALIBRATION = ("goal", "batch", "bytes_skipped", "ppl_over_rule", "recall", "frontier")  # that a checkpoint tells


def recorded(recipe: Recipe, calibrated: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config tells of its predictors, beside their family and weights.

    calibrated: figures of the calibration in the loop. Where the text came from is not told: paths are private.
    """
    settings = recipe.model_dump(mode="json", include={"predictor", "fit", "calibrate", "seed"})
    return {
        "selected": calibrated["selected_share"],
        "calibration": {name: calibrated[name] for name in CALIBRATION},
        RECORDED: settings,
    }


def export_stage(run: "Run", folder: Path) -> dict[str, Any]:
    """Write the sparse checkpoint into `export/checkpoint` of the run folder."""
    dtype = getattr(torch, run.recipe.export.dtype)
    model = run.trained("finetune", dtype, device="cpu")
    check_writable(folder, 2 * sum(p.numel() * p.element_size() for p in model.parameters()))
    thresholds, predictors = read(run.before("export"))
    rules, name = sparsifier_of(run.recipe, thresholds).rules, run.recipe.sparsifier.name
    family = family_of(predictors)
    about = recorded(run.recipe, run.figures("recalibrate")) if family else None
    inputs = input_rules(run, "finetune")
    weights, heads = run.recipe.export.weights, head_routers(run, "refit-heads")
    if heads and attention_sha256(model, heads.routers) != run.figures("refit-heads")["attention_sha256"]:
        raise MoyuError(
            f"the routers in {str(run.stage_folder('refit-heads'))!r} were fitted for other weights; delete that "
            "folder and run `moyu refit-heads` again"
        )
    export(model, run.tokenizer, folder / CHECKPOINT, name, rules, predictors, family, about, inputs, weights, heads)
    stock = bool(rules[0].stock_activation and not inputs and weights == "stored")
    write_card(folder / CHECKPOINT, run.recipe, stock)
    ffn, in_dtype = (
        sum(ffn_bytes(block, size) for block in find_blocks(model))
        for size in (run.recipe.export.itemsize, dtype.itemsize)
    )
    return {
        "checkpoint": str(folder / CHECKPOINT),
        "dtype": run.recipe.export.dtype,
        "weights": weights,
        "weights_over_dtype": ffn / in_dtype,
        "predictor_bytes_share": sum(map(stored_bytes, predictors)) / ffn,
    }


def verify_stage(run: "Run", folder: Path) -> dict[str, Any]:
    """Reload the export, compare logits, and see stock transformers refuse it."""
    return verify(run.stage_folder("export") / CHECKPOINT)
