"""The dense control: what the same training makes of the model without masks."""

import gc
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState

from moyu_train.errors import MoyuError
from moyu_train.evaluation.perplexity import score
from moyu_train.files import read_json, reading, write_json
from moyu_train.training.finetune import check_memory_of, train

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def control(run: "Run", folder: Path) -> dict[str, Any]:
    """The dense control: same data, order, tokens and optimizer, LM loss, no mask, best learning rate on validation."""
    recipe, settings = run.recipe, run.recipe.finetune
    assert recipe.control  # the pipeline runs this stage only with one
    if recipe.control.reuse:
        return _reuse_control(run)
    check_memory_of(run, parent=False)
    tried: dict[str, float] = {}
    for rate in recipe.control.learning_rates:
        place = folder / f"lr-{rate:g}"
        done = place / "validation.json"
        if not done.is_file():
            model = run.to_train()
            model, _, _ = train(run, place, settings, rate, None, model)
            model.eval()
            perplexity = score(model, run.validation, None, f"control {rate:g}", recipe.analyze.tokens).perplexity
            if PartialState().is_main_process:
                model.save_pretrained(place / "model")
                shutil.rmtree(place / "checkpoints", ignore_errors=True)
                write_json(done, perplexity)
            PartialState().wait_for_everyone()
            del model
            gc.collect()
        with reading(done):
            tried[f"{rate:g}"] = float(json.loads(done.read_text()))
    finite = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    best = min(finite, key=lambda rate: finite[rate])
    for name in tried:
        if name != best:
            shutil.rmtree(folder / f"lr-{name}" / "model", ignore_errors=True)
    return {
        "validation_perplexity": tried,
        "best_learning_rate": best,
        "model": f"lr-{best}/model",
        "tokens": settings.tokens // (step := settings.tokens_per_step * PartialState().num_processes) * step,
    }


def _reuse_control(run: "Run") -> dict[str, Any]:
    """Another run's control, where text, model, training settings and learning rates are the same.

    Raises: MoyuError where it is not finished or belongs to other settings.
    """
    asked = run.recipe.control
    assert asked
    folder = Path(asked.reuse)
    alike = run.recipe.model_copy(update={"control": asked.model_copy(update={"reuse": ""})})
    key = run.key_of("control", alike)
    path = folder / "control" / "stage.json"
    record = read_json(path) if path.is_file() else {}
    if record.get("key") != key:
        raise MoyuError(
            f"control.reuse {str(folder)!r} holds no finished control of the same model, text, training settings and "
            "learning rates; run `moyu control` there with them, or leave control.reuse empty"
        )
    return {**record["figures"], "model": str((folder / "control" / record["figures"]["model"]).resolve())}
