"""The stages that train: finetune, under the masks, and control, without them."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import ffn_sha256
from moyu_train.models.compensation import attach_empty, compensation_rank, save, taken_off
from moyu_train.models.loading import check_memory, skeleton
from moyu_train.models.marker import marked_rule, set_marker
from moyu_train.models.state import thresholds_from_tensors
from moyu_train.models.structure import freeze_embeddings
from moyu_train.penalties import PENALTIES
from moyu_train.penalties.adaptive import AdaptiveCoefficient
from moyu_train.penalties.ratio import RatioCoefficient
from moyu_train.penalties.scale import measure_scales
from moyu_train.penalties.schedule import coefficient
from moyu_train.recipe import SHARED, Recipe
from moyu_train.registry import resolve
from moyu_train.settings import Optimise
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.compensate import fit_compensations
from moyu_train.training.control import SparsityControl
from moyu_train.training.delta import load_delta, round_delta, save_delta
from moyu_train.training.head_control import HeadControl
from moyu_train.training.heads import head_routers
from moyu_train.training.inputs import InputControl, input_tensors, inputs_on, put_back, rules_of, write_inputs
from moyu_train.training.launch import asked_engine, check_engine, leave_engine, whole_parameters
from moyu_train.training.lora import adapt, merge, quantise
from moyu_train.training.memory import launcher_of_this, measure_sizes, training_memory
from moyu_train.training.shared_parent import SharedParent
from moyu_train.training.stages import read, sparsifier_of, write
from moyu_train.training.trainer import SparsityTrainer, last_complete_checkpoint

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

SCALE_WINDOWS = 8  # of text to measure a penalty's scales on


class Windows(Dataset):
    """Packed windows int64 `[N, T]` as the Trainer takes them; `labels` as `Documents.packed_labels`, default all."""

    def __init__(self, windows: Tensor, labels: Tensor | None = None) -> None:
        self.windows, self.labels = windows, windows if labels is None else labels

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.labels[index]}


def training_windows(run: "Run", settings: Optimise) -> Tensor:
    windows = run.train.packed(settings.window, run.recipe.seed)
    wanted = settings.tokens // settings.window
    if wanted > len(windows) * settings.epochs:
        raise MoyuError(
            f"finetune.tokens {settings.tokens} is more than the training text holds ({len(windows) * settings.window} "
            f"tokens in full windows, finetune.epochs {settings.epochs}); lower it, give more text, or raise epochs"
        )
    return windows[:wanted]


def train(
    run: "Run",
    folder: Path,
    settings: Optimise,
    learning_rate: float,
    sparsity: SparsityControl | None,
    model: Any,
    inputs: InputControl | None = None,
    heads: HeadControl | None = None,
) -> tuple[Any, list[dict[str, float]], dict[str, Any]]:
    """Fine-tune `model`, resuming from the last complete checkpoint.

    Returns: the model, whole and with deltas merged; the log lines; the engine that ran, and what merging changed.
    """
    distils = (settings.kl_weight or settings.block_weight) and sparsity
    # Before TrainingArguments: from then on ZeRO-3 cuts up every model that is loaded.
    parent: Any = run.parent() if distils and settings.parent != SHARED else None
    penalty = run.recipe.penalty if sparsity else None
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
    windows = training_windows(run, settings)
    ffn = ffn_sha256(model) if settings.lora else ""
    if not settings.embeddings:
        freeze_embeddings(model)
    if sparsity and settings.compensation:
        sparsity.counting = False
        fit_compensations(model, windows, settings.compensation)
    set_seed(run.recipe.seed)  # for LoRA's random matrices: the Trainer sets it after them
    adapted = adapt(model, settings.lora) if settings.lora else model
    if distils and settings.parent == SHARED:
        parent = SharedParent(adapted, [control for control in (sparsity, inputs, heads) if control])
    coefficients: Callable[[float], float] | None = None
    if penalty:
        adaptive = sparsity.adaptive if sparsity else None
        points = partial(coefficient, penalty.coefficient, penalty.interpolation)
        coefficients = (lambda _: adaptive.value) if adaptive else points
    trainer = SparsityTrainer(
        model=adapted,
        args=arguments,
        train_dataset=Windows(windows, run.train.packed_labels(settings.window, run.recipe.seed)[: len(windows)]),
        sparsity=sparsity,
        parent=parent,
        parent_offload=settings.parent_offload,
        kl_weight=settings.kl_weight if sparsity else 0.0,
        lm_weight=settings.lm_weight if sparsity else 1.0,
        kl_top_k=settings.kl_top_k,
        block_weight=settings.block_weight if sparsity else 0.0,
        coefficient=coefficients,
        inputs=inputs,
    )
    figures: dict[str, Any] = {"engine": check_engine(trainer)}
    with PartialState().main_process_first():
        checkpoint = last_complete_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # its forward computes in fp32 again
    log = [line for line in trainer.state.log_history if "loss" in line]
    thresholds = sparsity.sparsifier.thresholds if sparsity else []
    if asked_engine():
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        values = whole_parameters(adapted, trained)
        leave_engine()
        adapted, sparsity = _like(run, model, settings), None  # no engine, and not the masks of the one that trained
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
    if not settings.lora:
        return adapted, log, figures
    round_delta(adapted)
    if thresholds and PartialState().is_main_process:
        tokens = steps * settings.tokens_per_step * processes
        under = _trained_under(run.recipe)
        save_delta(adapted, thresholds, input_tensors(rules_of(inputs)), ffn, under, tokens, folder / "delta")
    merged, moved = merge(adapted, sparsity, windows[0])
    return merged, log, figures | moved


def learning_rate(run: "Run") -> float:
    asked = run.recipe.finetune.learning_rate
    return asked if isinstance(asked, float) else float(run.figures("control")["best_learning_rate"])


def _like(run: "Run", model: Any, settings: Optimise) -> Any:
    """A fresh dense model with the marker and the deltas that `model` has."""
    fresh = run.to_train()
    rule = marked_rule(model.config)
    if rule:
        set_marker(fresh.config, rule)
    if rank := compensation_rank(model):
        attach_empty(fresh, rank)
    return adapt(fresh, settings.lora) if settings.lora else fresh


def _trained_under(recipe: Recipe) -> dict[str, Any]:
    """The rule of a recipe as data, to tell whether a delta belongs to it."""
    _, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    rule = {"name": recipe.sparsifier.name, **options.model_dump(mode="json")}
    found: dict[str, Any] = {"sparsifier": rule, "target_sparsity": recipe.target_sparsity}
    if recipe.finetune.lora and recipe.finetune.lora.quantise:
        found["quantise"] = recipe.finetune.lora.quantise
    if recipe.finetune.compensation:
        found["compensation"] = recipe.finetune.compensation.rank
    if recipe.heads.train:
        found["heads"] = recipe.heads.model_dump(mode="json", include={"keep", "unit", "dense_layers"})
    return found | ({"inputs": recipe.inputs.model_dump(mode="json")} if recipe.inputs else {})


def check_memory_of(run: "Run", parent: bool) -> None:
    """Raises: MoyuError where a device has too little memory for the training, by its formula."""
    settings = run.recipe.finetune
    found = measure_sizes(skeleton(run.source, run.recipe.described), settings)
    launcher, processes = launcher_of_this()
    needed = training_memory(found, settings, launcher, processes, found.parameters if parent else 0)["peak"]
    check_memory(round(needed), "fine-tuning", "finetune.batch, finetune.window or choose a smaller model")


def sparsity_on(
    run: "Run",
    model: Any,
    sparsifier: Any,
    predictors: list[dict[str, Tensor]],
    targets: Sequence[float] | None = None,
) -> SparsityControl:
    """The rule and predictors on `model`, and the recipe's penalty, scaled on the text and weights it starts from.

    targets: density of each layer, default the recipe's in all.
    """
    recipe = run.recipe
    penalty = None
    adaptive: AdaptiveCoefficient | RatioCoefficient | None = None
    if recipe.penalty:
        cls, options = resolve("penalty", recipe.penalty, PENALTIES)
        windows = training_windows(run, recipe.finetune)[:SCALE_WINDOWS]
        scales = measure_scales(model, getattr(options, "statistic", "contribution"), windows, sparsifier.rules)
        penalty = cls(options, scales, sparsifier.rules, sparsifier.density)
        penalty.begin(model, windows)
        start = recipe.penalty.coefficient[0][1]
        if loop := recipe.penalty.adaptive:
            adaptive = AdaptiveCoefficient(start, loop.gain, loop.ramp)
        if ratio := recipe.penalty.ratio:
            adaptive = RatioCoefficient(start, ratio.window, ratio.rise, ratio.most)
    return SparsityControl(
        model,
        sparsifier,
        1 - recipe.target_sparsity,
        predictors,
        penalty,
        adaptive,
        targets=targets,
        together=recipe.allocation.method == "learned",
    )


def finetune(run: "Run", folder: Path) -> dict[str, Any]:
    """Fine-tune under the very mask that the export decodes with: the rule and the predictors together.

    The rule is held at its density by the controller; the predictors stay, and the model learns to live with them, as
    with the routers of heads, where `heads.train` puts these on too.
    """
    recipe, settings = run.recipe, run.recipe.finetune
    check_memory_of(run, parent=settings.holds_parent)
    model = run.to_train()
    thresholds, predictors = read(run.before("finetune"))
    targets = run.figures("calibrate")["densities"]
    sparsity = sparsity_on(run, model, sparsifier_of(recipe, thresholds), predictors, targets)
    inputs, routers = inputs_on(run, model), head_routers(run, "fit-heads")
    heads = HeadControl(model, routers) if routers else None
    if recipe.delta:
        model, tokens, ran = _rebuild(run, Path(recipe.delta), model, sparsity, inputs)
        log: list[dict[str, float]] = []
    else:
        model, log, ran = train(run, folder, settings, learning_rate(run), sparsity, model, inputs, heads)
        tokens = len(log) * settings.tokens_per_step * PartialState().num_processes
    sparsity.remove()
    for control in (inputs, heads):
        if control:
            control.remove()
    write_inputs(folder, rules_of(inputs))
    if PartialState().is_main_process:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        write(folder, sparsity.sparsifier.thresholds, predictors)
        with taken_off(model) as compensations:
            model.save_pretrained(folder / "model")
            save(folder / "model", compensations)
        run.tokenizer.save_pretrained(folder / "model")
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    figures = {
        "tokens": tokens,
        "processes": PartialState().num_processes,
        "sparsity_target": recipe.target_sparsity,
        "ffn_sha256": ffn_sha256(model),
        **ran,
    }
    if log and inputs:
        figures["inputs_sparsity"] = log[-1]["inputs_sparsity"]
    if log:
        figures |= {"sparsity": log[-1]["sparsity"], "loss_first": log[0]["loss"], "loss_last": log[-1]["loss"]}
    return figures


def _rebuild(
    run: "Run", folder: Path, model: Any, sparsity: SparsityControl, inputs: InputControl | None
) -> tuple[Any, int, dict[str, float]]:
    """The fine-tuned model from a delta, and the tokens of its training; the rules get the delta's thresholds."""
    if run.recipe.finetune.compensation:
        attach_empty(model, run.recipe.finetune.compensation.rank)
    adapted, state, tokens = load_delta(model, ffn_sha256(model), _trained_under(run.recipe), folder)
    sparsity.sparsifier.thresholds = thresholds_from_tensors(state)
    if inputs:
        put_back(inputs, state)
    sparsity.sparsifier.advance(1.0)
    if run.recipe.finetune.lora and run.recipe.finetune.lora.quantise:
        quantise(adapted)
    merged, moved = merge(adapted, sparsity, training_windows(run, run.recipe.finetune)[0])
    return merged, tokens, moved
