"""What sparsity costs a training step: the recipe's rule and penalty against the plain Hugging Face Trainer.

Same model, batch and optimizer, next-token loss, no parent. Times are of whole steps (forward, backward, optimizer),
interleaved in one process; peak memory is that of a process of its own for each.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from moyu_train.errors import MoyuError
from moyu_train.pipeline import Run
from moyu_train.progress import track
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.finetune import Windows, sparsity_on, training_windows
from moyu_train.training.lora import adapt
from moyu_train.training.rule import calibrate_rule
from moyu_train.training.trainer import SparsityTrainer

ROUNDS = 7
VARIANTS = ("plain", "sparse")


class Stepper:
    """One training step at a time.

    variant: "plain", the Hugging Face Trainer; "sparse", ours with the rule and penalty alone; "recipe", with all that
        the recipe's fine-tuning has, its parent (of the model's own size), LoRA and activation checkpointing.
    """

    def __init__(self, run: Run, variant: str, folder: str) -> None:
        recipe, settings = run.recipe, run.recipe.finetune
        self.windows, self.batch = training_windows(run, settings), settings.batch
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch,
            learning_rate=1e-5,
            max_steps=100,
            bf16=settings.dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            remove_unused_columns=False,
        )
        model = run.to_train()
        common: dict[str, Any] = {"args": arguments, "train_dataset": Windows(self.windows)}
        self.trainer: Trainer
        if variant == "plain":
            self.trainer = Trainer(model=model, **common)
        else:
            cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
            tokens = recipe.calibrate.tokens
            rule = calibrate_rule(model, cls, options, 1 - recipe.target_sparsity, run.train, tokens, passes=1)
            sparsity = sparsity_on(run, model, rule, [])
            value = recipe.penalty.coefficient[-1][1] if recipe.penalty else 0.0
            whole = variant == "recipe"
            self.trainer = SparsityTrainer(
                model=adapt(model, settings.lora) if whole and settings.lora else model,
                sparsity=sparsity,
                parent=run.to_train() if whole and settings.holds_parent else None,
                parent_offload=settings.parent_offload,
                kl_weight=settings.kl_weight if whole else 0.0,
                lm_weight=settings.lm_weight if whole else 1.0,
                kl_top_k=settings.kl_top_k if whole else None,
                block_weight=settings.block_weight if whole else 0.0,
                coefficient=(lambda progress: value) if recipe.penalty else None,
                **common,
            )
            sparsity.on_train_begin(arguments, self.trainer.state, self.trainer.control)  # state to the model's device
            sparsity.sparsifier.advance(1.0)
        self.trainer.create_optimizer()
        if variant == "recipe" and settings.activation_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # As Trainer.train does it; without this, `bf16` is not in force.
        self.trainer.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.trainer.state.max_steps = 100
        self.done = 0

    def step(self) -> float:
        """Seconds of one step."""
        start = self.done * self.batch % (len(self.windows) - self.batch + 1)
        batch = {"input_ids": self.windows[start : start + self.batch]}
        inputs: dict[str, Tensor] = {**batch, "labels": batch["input_ids"]}
        trainer, self.done = self.trainer, self.done + 1
        begun = time.perf_counter()
        assert trainer.model and trainer.optimizer  # noqa: PT018 - not a test: both are there since __init__
        trainer.training_step(trainer.model, inputs, trainer._get_num_items_in_batch([inputs], trainer.args.device))
        trainer.optimizer.step()
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def _peak(recipe: Recipe, variant: str) -> int:
    """Peak bytes of a process that takes three steps."""
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(Run(recipe), variant, folder)
        for _ in range(3):
            stepper.step()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_cost(recipe: Recipe) -> dict[str, Any]:
    """Ratios of time (median, least and most over the rounds) and of peak memory, sparse over plain.

    Raises: MoyuError where a process that measures memory is killed.
    """
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            memory = {variant: pool.submit(_peak, recipe, variant).result() for variant in VARIANTS}
    except BrokenProcessPool as error:
        raise MoyuError(
            "the process that measures a step's peak memory was killed, for want of memory most likely; lower "
            "finetune.batch or finetune.window"
        ) from error
    run = Run(recipe)
    with tempfile.TemporaryDirectory() as folder:
        steppers = {variant: Stepper(run, variant, folder) for variant in VARIANTS}
        for stepper in steppers.values():
            stepper.step()
        times = [{name: steppers[name].step() for name in VARIANTS} for _ in track(range(ROUNDS), "step cost")]
    ratios = [round_["sparse"] / round_["plain"] for round_ in times]
    return {
        "tokens_per_step": recipe.finetune.window * recipe.finetune.batch,
        "rounds": ROUNDS,
        "plain_seconds": statistics.median(round_["plain"] for round_ in times),
        "sparse_seconds": statistics.median(round_["sparse"] for round_ in times),
        "time_ratio": statistics.median(ratios),
        "time_ratio_least": min(ratios),
        "time_ratio_most": max(ratios),
        "plain_peak_bytes": memory["plain"],
        "sparse_peak_bytes": memory["sparse"],
        "memory_ratio": memory["sparse"] / memory["plain"],
    }
