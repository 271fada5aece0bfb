"""The training stages of a recipe: calibrate, finetune, control, fit-predictors, calibrate-in-loop, untouched."""

import gc
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from moyu_train.checkpoints.export import ffn_sha256
from moyu_train.errors import MoyuError
from moyu_train.evaluation.perplexity import score
from moyu_train.models.loading import check_memory, load_dense, training_bytes
from moyu_train.predictors import PREDICTORS
from moyu_train.predictors.lowrank import stored_bytes
from moyu_train.recipe import Optimise
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.control import SparsityControl
from moyu_train.training.fit import PredictorTrainer, predictors_from_tensors, predictors_to_tensors
from moyu_train.training.loop import calibrate_in_loop
from moyu_train.training.rule import calibrate_rule, thresholds_from_tensors, thresholds_to_tensors
from moyu_train.training.trainer import SparsityTrainer, last_complete_checkpoint

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

THRESHOLDS, PREDICTOR_FILE = "thresholds.safetensors", "predictors.safetensors"
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class Windows(Dataset):
    """Packed windows int64 `[N, T]` as the Trainer takes them; every token but the first of a window is scored."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def calibrate(run: "Run", folder: Path) -> dict[str, Any]:
    """Levels of the rule on the dense model."""
    recipe = run.recipe
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    model = run.dense()
    density = 1 - recipe.target_sparsity
    rule = calibrate_rule(model, cls, options, density, run.train, recipe.calibrate.tokens, passes=2)
    save_file(thresholds_to_tensors(rule.thresholds), folder / THRESHOLDS)
    return {"tokens": recipe.calibrate.tokens, "density": density}


def training_windows(run: "Run", settings: Optimise) -> Tensor:
    windows = run.train.packed(settings.window, run.recipe.seed)
    wanted = settings.tokens // settings.window
    if len(windows) < wanted:
        raise MoyuError(
            f"finetune.tokens {settings.tokens} is more than the training text holds ({len(windows) * settings.window} "
            "tokens in full windows); lower it or give more text"
        )
    return windows[:wanted]


def train(
    run: "Run", folder: Path, settings: Optimise, learning_rate: float, sparsity: SparsityControl | None, model: Any
) -> list[dict[str, float]]:
    """Fine-tune `model` in place, resuming from the last complete checkpoint; returns the log lines."""
    parent = run.dense() if settings.kl_weight and sparsity else None
    processes = PartialState().num_processes
    steps = settings.tokens // (settings.tokens_per_step * processes)
    if steps == 0:
        raise MoyuError(
            f"finetune.tokens {settings.tokens} is less than one step on {processes} processes "
            f"({settings.tokens_per_step * processes} tokens); raise it or lower finetune.batch"
        )
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(settings.warmup * steps)),
        weight_decay=settings.weight_decay,
        bf16=settings.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.activation_checkpointing else None,
        logging_steps=1,
        save_steps=settings.save_steps,
        save_total_limit=2,
        seed=run.recipe.seed,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to="none",
    )
    trainer = SparsityTrainer(
        model=model,
        args=arguments,
        train_dataset=Windows(training_windows(run, settings)),
        sparsity=sparsity,
        parent=parent,
        kl_weight=settings.kl_weight if sparsity else 0.0,
        lm_weight=settings.lm_weight if sparsity else 1.0,
    )
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return [line for line in trainer.state.log_history if "loss" in line]


def finetune(run: "Run", folder: Path) -> dict[str, Any]:
    """Fine-tune under the rule's hard mask, then calibrate the rule again on the new weights."""
    recipe, settings = run.recipe, run.recipe.finetune
    parameters, config = run.parameters
    needed = training_bytes(parameters, config, settings.batch * settings.window, settings.kl_weight > 0)
    check_memory(needed, "finetune", "finetune.batch, finetune.window or choose a smaller model")
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    rule = cls(options, thresholds_from_tensors(load_file(run.stage_folder("calibrate") / THRESHOLDS)))
    density = 1 - recipe.target_sparsity
    model = run.dense()
    sparsity = SparsityControl(model, rule, density)
    log = train(run, folder, settings, settings.learning_rate, sparsity, model)
    sparsity.remove()
    model.eval()
    rule = calibrate_rule(model, cls, options, density, run.train, recipe.calibrate.tokens, passes=2)
    if PartialState().is_main_process:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        save_file(thresholds_to_tensors(rule.thresholds), folder / THRESHOLDS)
        model.save_pretrained(folder / "model")
        run.tokenizer.save_pretrained(folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {
        "tokens": len(log) * settings.tokens_per_step * PartialState().num_processes,
        "processes": PartialState().num_processes,
        "engine": PartialState().distributed_type.value,
        "sparsity_target": recipe.target_sparsity,
        "sparsity": log[-1]["sparsity"],
        "loss_first": log[0]["loss"],
        "loss_last": log[-1]["loss"],
        "ffn_sha256": ffn_sha256(model),
    }


def control(run: "Run", folder: Path) -> dict[str, Any]:
    """The dense control: same data, order, tokens and optimizer, LM loss, no mask, best learning rate on validation."""
    recipe, settings = run.recipe, run.recipe.finetune
    tried: dict[str, float] = {}
    for rate in recipe.control.learning_rates:
        place = folder / f"lr-{rate:g}"
        done = place / "validation.json"
        if not done.is_file():
            model = run.dense()
            train(run, place, settings, rate, None, model)
            model.eval()
            perplexity = score(model, run.validation, recipe.evaluate.window, f"control {rate:g}", None).perplexity
            if PartialState().is_main_process:
                model.save_pretrained(place / "model")
                shutil.rmtree(place / "checkpoints", ignore_errors=True)
                done.write_text(json.dumps(perplexity))
            del model
            gc.collect()
        tried[f"{rate:g}"] = json.loads(done.read_text())
    finite = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    best = min(finite, key=lambda rate: finite[rate])
    for rate in tried:
        if rate != best:
            shutil.rmtree(folder / f"lr-{rate}" / "model", ignore_errors=True)
    return {"validation_perplexity": tried, "best_learning_rate": best, "model": f"lr-{best}/model",
            "tokens": settings.tokens // settings.tokens_per_step * settings.tokens_per_step}


def _fit(run: "Run", folder: Path, model: Any, thresholds: list[Tensor]) -> dict[str, Any]:
    recipe = run.recipe
    sparsifier, sparsifier_options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
    trainer = PredictorTrainer(model, sparsifier(sparsifier_options, thresholds), cls, options, folder)
    windows = run.train.packed(recipe.fit.window, recipe.seed + 1)[: max(recipe.fit.tokens // recipe.fit.window, 1)]
    predictors = trainer.fit(windows, recipe.fit.save_every)
    save_file(predictors_to_tensors(predictors), folder / PREDICTOR_FILE)
    return {
        "tokens": windows.numel(),
        "family": cls.name,
        "predictor_bytes": sum(map(stored_bytes, predictors)),
        "ffn_sha256": ffn_sha256(model),
    }


def fit_predictors(run: "Run", folder: Path) -> dict[str, Any]:
    """Predictors of the fine-tuned model, all layers in one pass."""
    source = run.stage_folder("finetune")
    return _fit(run, folder, load_dense(source / "model"), thresholds_from_tensors(load_file(source / THRESHOLDS)))


def _in_loop(run: "Run", folder: Path, fitted: Path, model: Any, thresholds: list[Tensor]) -> dict[str, Any]:
    recipe = run.recipe
    predictors, figures = calibrate_in_loop(
        model,
        thresholds,
        predictors_from_tensors(load_file(fitted / PREDICTOR_FILE)),
        run.validation,
        recipe.calibrate.tokens,
        recipe.calibrate.bytes_skipped,
        ITEMSIZE[recipe.export.dtype],
    )
    save_file(thresholds_to_tensors(thresholds) | predictors_to_tensors(predictors), folder / "state.safetensors")
    return figures


def in_loop(run: "Run", folder: Path) -> dict[str, Any]:
    """Cuts of the predictors with the fine-tuned model in the loop."""
    source, fitted = run.stage_folder("finetune"), run.stage_folder("fit-predictors")
    model = load_dense(source / "model")
    if ffn_sha256(model) != run.figures("fit-predictors")["ffn_sha256"]:
        raise MoyuError("the predictors were fitted for other weights; run `moyu fit-predictors` again")
    return _in_loop(run, folder, fitted, model, thresholds_from_tensors(load_file(source / THRESHOLDS)))


def untouched(run: "Run", folder: Path) -> dict[str, Any]:
    """The same pipeline without fine-tuning: what the training bought, at equal bytes."""
    model = run.dense()
    thresholds = thresholds_from_tensors(load_file(run.stage_folder("calibrate") / THRESHOLDS))
    fitted = _fit(run, folder, model, thresholds)
    return {**_in_loop(run, folder, folder, model, thresholds), "tokens": fitted["tokens"]}
