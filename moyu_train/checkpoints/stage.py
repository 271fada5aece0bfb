"""The export and verify stages of a recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moyu_train.checkpoints.card import write_card
from moyu_train.checkpoints.export import export
from moyu_train.checkpoints.verify import verify
from moyu_train.evaluation.inloop import row_bytes
from moyu_train.files import check_writable
from moyu_train.models.blocks import find_blocks
from moyu_train.models.loading import load_dense
from moyu_train.models.state import stored_bytes
from moyu_train.predictors import PREDICTORS
from moyu_train.registry import resolve
from moyu_train.training.inputs import input_rules
from moyu_train.training.stages import read, sparsifier_of

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

CHECKPOINT = "checkpoint"


def export_stage(run: "Run", folder: Path) -> dict[str, Any]:
    """Write the sparse checkpoint into `export/checkpoint` of the run folder."""
    dtype = getattr(torch, run.recipe.export.dtype)
    model = load_dense(run.stage_folder("finetune") / "model", dtype)
    check_writable(folder, 2 * sum(p.numel() * p.element_size() for p in model.parameters()))
    thresholds, predictors = read(run.before("export"))
    rules, name = sparsifier_of(run.recipe, thresholds).rules, run.recipe.sparsifier.name
    family = resolve("predictor", run.recipe.predictor, PREDICTORS)[0].form if run.recipe.predictor else None
    selected = run.figures("recalibrate")["selected_share"] if family else None
    inputs = input_rules(run, "finetune")
    export(model, run.tokenizer, folder / CHECKPOINT, name, rules, predictors, family, selected, inputs)
    write_card(folder / CHECKPOINT, run.recipe, stock=bool(rules[0].stock_activation and not inputs))
    blocks = find_blocks(model)
    itemsize = dtype.itemsize
    dense = sum(3 * block.neurons * row_bytes(block, itemsize) for block in blocks)
    return {
        "checkpoint": str(folder / CHECKPOINT),
        "dtype": run.recipe.export.dtype,
        "predictor_bytes_share": sum(map(stored_bytes, predictors)) / dense,
    }


def verify_stage(run: "Run", folder: Path) -> dict[str, Any]:
    """Reload the export, compare logits, and see stock transformers refuse it."""
    return verify(run.stage_folder("export") / CHECKPOINT)
