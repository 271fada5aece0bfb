"""SparsityTrainer: the HF Trainer with self-distillation from the dense parent under a sparsifier's mask."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from moyu_train.errors import MoyuError
from moyu_train.files import reading, write_json
from moyu_train.training.anchor import BlockAnchor
from moyu_train.training.control import SparsityControl
from moyu_train.training.health import where_not_finite
from moyu_train.training.launch import asked_engine
from moyu_train.training.losses import Weights, token_loss
from moyu_train.training.shared_parent import SharedParent

COMPLETE = "moyu_complete.json"


class SparsityBar(ProgressCallback):
    """The Trainer's progress bar, with the loss and target against achieved sparsity beside it at every log step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4g}"}
            if "sparsity" in logs:
                shown["sparsity"] = f"{logs['sparsity']:.3f} of {logs['sparsity_target']:.3f}"
            self.training_bar.set_postfix(shown)


class SparsityTrainer(Trainer):
    """One loss, one backward: KL(parent || student), next-token loss, block anchor and penalty, each by its weight.

    Each is a mean over its own tokens of the whole optimizer step, all micro-batches and processes together: those that
    are scored for KL and LM, those that are no padding for the block anchor and the penalty.

    Args:
        sparsity: the mask's owner, or None for a dense run (the dense control).
        parent: the dense model, only read, or what the student is without its deltas and masks; None where kl_weight
            and block_weight are 0.
        parent_offload: keep the parent's weights in the CPU's memory, and move each module's when it computes.
        kl_top_k: of the parent's distribution only so many tokens (losses.kl_target); None: all.
        block_weight: of the FFN blocks' relative output error (training/anchor.py).
        inputs: a further control, of the inputs of other linear layers.
        coefficient: of the penalty that `sparsity` holds, by the share of the steps that are done; None without one.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        sparsity: SparsityControl | None,
        parent: nn.Module | SharedParent | None,
        kl_weight: float,
        lm_weight: float,
        kl_top_k: int | None = None,
        block_weight: float = 0.0,
        inputs: SparsityControl | None = None,
        parent_offload: bool = False,
        coefficient: Callable[[float], float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the step's scored tokens over all ranks
        self.sparsity, self.coefficient, self.block_weight = sparsity, coefficient, block_weight
        self.weights = Weights(kl_weight, lm_weight, kl_top_k)
        self._real_tokens = torch.ones(())
        if (coefficient is None) != (sparsity is None or sparsity.penalty is None):
            raise ValueError("a penalty and its coefficient belong together: give both, or neither")
        if self.args.n_gpu > 1:
            raise MoyuError(
                f"{self.args.n_gpu} GPUs in one process would run DataParallel, whose copies the masks do not reach; "
                "start one process per GPU with `accelerate launch`"
            )
        if isinstance(parent, nn.Module):
            dtype = torch.bfloat16 if self.args.bf16 else None  # computes as the student does, and holds no more
            parent = parent.eval().requires_grad_(False).to(dtype)
            if parent_offload:
                parent = cpu_offload(parent, self.args.device, offload_buffers=True)
            else:
                parent = parent.to(self.args.device)
        self.parent = parent
        self.anchor = BlockAnchor(self.model, parent) if block_weight and isinstance(parent, nn.Module) else None
        self._parts: dict[str, float] = {}
        self.controls = [control for control in (sparsity, inputs) if control is not None]
        for control in self.controls:
            control.counting = False  # but while compute_loss arms it: a recompute in the backward counts nothing
            self.add_callback(control)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(SparsityBar)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        tensors = {key: value for key, value in inputs.items() if key != "labels"}
        training = model.training
        real = inputs.get("attention_mask")
        parent = None
        if self.parent is not None and (self.weights.kl or (training and self.anchor)):
            with torch.no_grad():
                parent = self.parent(**tensors, use_cache=False).logits
        with contextlib.ExitStack() as arms:
            for control in self.controls:
                arms.enter_context(control.armed(training, real, inputs["input_ids"], model))
            if self.anchor and training:
                arms.enter_context(self.anchor.armed(real))
            outputs = model(**tensors, use_cache=False)
        tokens: Tensor | int
        if num_items_in_batch is None:
            tokens, real_tokens, processes = _scored(labels), _real_tokens(inputs), 1
        else:
            tokens, real_tokens = num_items_in_batch, self._real_tokens
            processes = self.accelerator.num_processes
        loss, (kl, lm) = token_loss(outputs.logits, labels, self.weights, parent)
        if self.weights.kl and parent is not None:
            self._note("kl", kl, tokens)
        if self.weights.lm:
            self._note("lm", lm, tokens)
        loss = (
            loss * processes / max(tokens, 1)
        )  # DDP averages gradients over processes; `tokens` is the sum over all of them
        if training and self.anchor:
            blocks = self.anchor.take()
            self._note("blocks", blocks, real_tokens)
            loss = loss + self.block_weight * blocks * processes / real_tokens
        if training and self.sparsity and self.coefficient:
            penalty = self.sparsity.take_penalty()
            self._note("penalty", penalty, real_tokens)
            weight = self.coefficient(self.state.global_step / self.state.max_steps)
            loss = loss + weight * penalty * processes / real_tokens
        if not torch.isfinite(loss):
            where = "where is not looked for"  # a forward of shared-out weights would wait for the other processes
            if self.sparsity and not asked_engine():
                where = where_not_finite(self.accelerator.unwrap_model(model), self.sparsity.blocks, tensors)
            raise MoyuError(
                f"the loss is {loss.item()} at step {self.state.global_step} ({where}); the last good checkpoint is "
                "kept, lower finetune.learning_rate or use finetune.dtype float32"
            )
        return (loss, outputs) if return_outputs else loss

    def _note(self, name: str, value: Tensor, tokens: Tensor | int) -> None:
        """For the log: this process's share of a mean over `tokens`, which `log` sums over processes."""
        if torch.is_grad_enabled():
            self._parts[name] = self._parts.get(name, 0.0) + value.item() / max(float(tokens), 1.0)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Any:
        """Scored tokens of the step over all processes. Not the Trainer's own count, which for some models takes the
        first token of a sequence for a scored one (GPT-2), and for some settings is one process's alone."""
        counts = [torch.stack([_real_tokens(batch), _scored(batch["labels"])]) for batch in batch_samples]
        sums = self.accelerator.gather(torch.stack(counts).sum(0, keepdim=True).to(device)).sum(0)
        self._real_tokens, scored = sums
        return scored

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = max(self.args.logging_steps, 1)
            parts = torch.tensor(list(self._parts.values()), device=self.args.device, dtype=torch.float32)
            sums = self.accelerator.reduce(parts) if self._parts else parts
            logs |= {name: value / steps for name, value in zip(self._parts, sums.tolist(), strict=True)}
            self._parts = {}
            for control in self.controls:
                logs |= control.metrics()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; True resumes from the last checkpoint that was written to its end.

        The mask's state is read here, since with DeepSpeed the Trainer's own loading is left out.
        """
        if resume_from_checkpoint is True:
            last = last_complete_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = None if last is None else str(last)
        if isinstance(resume_from_checkpoint, str):
            for control in self.controls:
                control.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for control in self.controls:
                control.save(folder)
            write_json(folder / COMPLETE, {"step": self.state.global_step})


def _scored(labels: Tensor) -> Tensor:
    """How many of labels `[B, T]` are scored: a sequence's first token has no prediction."""
    return (labels[:, 1:] != -100).sum()


def _real_tokens(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.tensor(batch["input_ids"].numel()) if mask is None else mask.sum()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose completion mark, written last, is there; incomplete ones are deleted."""
    complete = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / COMPLETE).is_file():
            with reading(path / COMPLETE):
                complete.append((int(json.loads((path / COMPLETE).read_text())["step"]), path))
        else:
            shutil.rmtree(path)
    return max(complete)[1] if complete else None
