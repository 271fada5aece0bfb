"""The gradient contract: one small model, ragged texts, a strong penalty; gradients and curves however a step is cut.

Run under a launcher (`python contract.py VARIANT FOLDER [MUTANT]`), each variant writes what it saw to
`FOLDER/VARIANT.safetensors`: the gradients of the first step and the weights after all steps.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from moyu_kernels.compensation import Compensation
from moyu_kernels.heads import HeadRouters
from safetensors.torch import save_file
from tiny import tiny_model, with_deltas
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from moyu_train.models.blocks import find_blocks
from moyu_train.models.compensation import attach
from moyu_train.penalties import PENALTIES
from moyu_train.penalties.base import Penalty
from moyu_train.registry import resolve
from moyu_train.settings import Lora
from moyu_train.settings import Penalty as PenaltySettings
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.control import SparsityControl
from moyu_train.training.head_control import HeadControl
from moyu_train.training.launch import end_processes, whole_parameters
from moyu_train.training.lora import adapt
from moyu_train.training.trainer import SparsityTrainer

STATISTICS_COEFFICIENT = {
    "overlap_residual": 10.0,
    "lag_decorrelation": 100.0,
    "prefix_contrast": 30.0,
    "history_consistency": 3.0,
    "predictability": 3.0,
}
STEPS, RATE, COEFFICIENT, KL, LM = 20, 0.002, 3.0, 0.5, 1.0
LENGTHS = (4, 6, 9, 13, 17, 20, 23, 24)  # the longest six times the shortest
THRESHOLD, GAIN = 0.05, 0.0  # a fixed mask rule: the controller has a test of its own
SCALE = 2.0

VARIANTS = {  # processes, sequences per process and micro-batch, micro-batches per step
    "8x1": (1, 8, 1),
    "1x8": (1, 1, 8),
    "2x4": (1, 2, 4),
    "checkpointing": (1, 4, 2),
    "ddp": (2, 4, 1),
    "ddp-1x4": (2, 1, 4),
    "zero2": (2, 2, 2),
    "zero3": (2, 2, 2),
    "fsdp2": (2, 4, 1),
}
# The same with more at work: adapters alone train, thresholds move, predictors select, heads are off, something stands
# for the neurons that are, padding is left.
MODES = {
    "lora": ("8x1", "ddp-1x4", "zero3"),
    "moving": ("8x1", "ddp-1x4"),
    "predicted": ("8x1", "ddp-1x4"),
    "heads": ("8x1", "checkpointing", "ddp-1x4", "zero3"),
    "compensated": ("8x1", "checkpointing", "zero3"),
    "left": ("8x1",),
}
# Under bf16 autocast, where sums of another order round otherwise and thresholds are crossed.
ROUNDED = ("8x1", "ddp-1x4", "checkpointing", "zero2")
VARIANTS |= {f"bf16_{variant}": VARIANTS[variant] for variant in ROUNDED}
VARIANTS |= {f"{mode}_{variant}": VARIANTS[variant] for mode, variants in MODES.items() for variant in variants}
MUTANTS = ("off", "doubled", "by-world-size", "micro-batch-mean", "labels")
OWN_STATISTICS = "own-statistics"  # a mutant of the penalties with statistics: each process keeps to its own


class Texts(Dataset):
    """Eight sequences of different lengths, padded on the right, or on the left."""

    def __init__(self, left: bool = False) -> None:
        self.left = left
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, width = self.ids[index], max(LENGTHS)
        pad = (width - len(ids), 0) if self.left else (0, width - len(ids))
        labels = ids.clone()
        labels[:3] = -100  # scored tokens are others than real ones; no padding predicts the first
        return {
            "input_ids": torch.nn.functional.pad(ids, pad, value=258),
            "labels": torch.nn.functional.pad(labels, pad, value=-100),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), pad),
        }


class Gradients(TrainerCallback):
    """Keeps the first step's gradients, as the optimizer is about to see them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """DeepSpeed's engine steps at the end of its own backward, before the Trainer says so."""
        engine = self.trainer.model_wrapped
        if state.global_step == 0 and type(engine).__name__ == "DeepSpeedEngine":
            step = engine.step

            def look_and_step(*arguments: Any, **options: Any) -> Any:
                if not self.found and engine.is_gradient_accumulation_boundary():
                    self.found = gradients(engine.module)
                return step(*arguments, **options)

            engine.step = look_and_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.found:
            self.found = gradients(model)


def bare(name: str) -> str:
    return name.removeprefix("module.")


def gradients(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            from deepspeed.utils import safe_get_full_grad

            found[bare(name)] = safe_get_full_grad(parameter).clone()
        else:
            gradient = parameter.grad
            found[bare(name)] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    return found


def mutate(trainer: SparsityTrainer, mutant: str) -> None:
    """Break the penalty in one of the ways that the contract is there to catch."""
    real = trainer.sparsity.take_penalty
    if mutant == "off":
        trainer.sparsity.take_penalty = lambda: 0.0 * real()
    elif mutant == "doubled":
        trainer.sparsity.take_penalty = lambda: 2.0 * real()
    elif mutant == "by-world-size":
        trainer.sparsity.take_penalty = lambda: real() / trainer.accelerator.num_processes
    elif mutant == "micro-batch-mean":
        share = trainer.accelerator.num_processes * trainer.args.gradient_accumulation_steps

        def take() -> Tensor:
            return real() / trainer.sparsity._real.sum() * trainer._real_tokens / share

        trainer.sparsity.take_penalty = take
    elif mutant == "labels":  # divided by the tokens that are scored
        count = trainer._get_num_items_in_batch

        def counted(samples: list, device: torch.device) -> Any:
            items = count(samples, device)
            trainer._real_tokens = items
            return items

        trainer._get_num_items_in_batch = counted
    elif mutant == OWN_STATISTICS:
        step = trainer.sparsity.penalty.step

        def alone() -> None:
            reduce, torch.distributed.all_reduce = torch.distributed.all_reduce, lambda tensor: None
            step()
            torch.distributed.all_reduce = reduce

        trainer.sparsity.penalty.step = alone


def penalty_of(name: str, model: Any, rule: Threshold) -> Penalty:
    more = {} if name in ("hoyer", "history_consistency") else {"memory": 0.5}
    more |= {"rank": 4} if name == "predictability" else {}
    cls, options = resolve("penalty", PenaltySettings(name=name, coefficient=1, **more), PENALTIES)
    penalty = cls(options, [torch.full((96,), SCALE)] * 2, rule.rules, 0.5)
    penalty.begin(model, torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1)))
    return penalty


def zero(stage: int) -> dict[str, Any]:
    return {
        # 0: share out every parameter, which by default these are all too small for
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_force_ds_cpu_optimizer": False,
    }


def adapted(model: Any) -> Any:
    """With LoRA on all linear layers, whose deltas already do something."""
    return with_deltas(adapt(model, Lora(rank=4, alpha=8)), size=0.1, seed=1)


def predictors() -> list[dict[str, Tensor]]:
    """Random low-rank ones that select about two thirds of the neurons, one a layer."""
    generator = torch.Generator().manual_seed(2)

    def int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    return [
        {
            "w1": int8(8, 32),
            "s1": torch.full((8,), 1e-3),
            "w2": int8(96, 8),
            "s2": torch.full((96,), 1e-2),
            "bias": torch.full((96,), 0.2),
        }
        for _ in range(2)
    ]


def routers() -> HeadRouters:
    """Random ones of both layers, of which each token runs two of four heads."""
    generator = torch.Generator().manual_seed(3)
    by_path = {}
    for layer in range(2):
        weight = torch.randint(-127, 128, (4, 32), generator=generator, dtype=torch.int8)
        scale, bias = torch.full((4,), 1e-2), torch.rand(4, generator=generator)
        by_path[f"model.layers.{layer}.self_attn"] = {"weight": weight, "scale": scale, "bias": bias}
    return HeadRouters("head", 2, "o_proj", by_path)


def compensations() -> list[Compensation]:
    """Random ones of rank 4, one a layer."""
    generator = torch.Generator().manual_seed(4)
    shapes = ((4, 32), (32, 4), (32,))
    return [Compensation(*(0.2 * torch.randn(shape, generator=generator) for shape in shapes)) for _ in range(2)]


def make(variant: str, folder: Path, name: str) -> tuple[SparsityTrainer, Gradients]:
    _, batch, accumulation = VARIANTS[variant]
    mode, _, variant = variant.rpartition("_")
    model, dense = tiny_model(), parent()  # before the arguments: ZeRO-3 would partition a model made after them
    arguments = TrainingArguments(
        output_dir=str(folder / variant),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        activation_checkpointing=variant == "checkpointing",
        activation_checkpointing_kwargs={"use_reentrant": False} if variant == "checkpointing" else None,
        deepspeed=zero(int(variant[-1])) if variant.startswith("zero") else None,
        bf16=mode == "bf16",
    )
    gain = 0.2 if mode == "moving" else GAIN
    rule = Threshold(Threshold.Options(gain=gain), [torch.full((96,), THRESHOLD) for _ in range(2)], density=0.5)
    penalty = penalty_of(name, model, rule)
    seen = Gradients()
    selected = predictors() if mode == "predicted" else None
    sparsity = SparsityControl(model, rule, 0.5, predictors=selected, penalty=penalty)
    if mode == "heads":
        HeadControl(model, routers())
    if mode == "compensated":
        attach(find_blocks(model), compensations())
    trainer = SparsityTrainer(
        model=adapted(model) if mode == "lora" else model,
        args=arguments,
        train_dataset=Texts(left=mode == "left"),
        sparsity=sparsity,
        parent=dense,
        kl_weight=KL,
        lm_weight=LM,
        coefficient=lambda progress: COEFFICIENT if name == "hoyer" else STATISTICS_COEFFICIENT[name],
        callbacks=[seen],
    )
    seen.trainer = trainer
    return trainer, seen


def parent() -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    return model


def shard(trainer: SparsityTrainer, seen: Gradients) -> dict[str, Tensor]:
    """FSDP2 by torch's own `fully_shard`, which accelerate does not offer on a CPU: the Trainer's loss, our loop."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    process = PartialState()
    mesh = init_device_mesh("cpu", (process.num_processes,))
    model = trainer.model
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    texts = Texts()
    mine = range(process.process_index, len(texts), process.num_processes)
    batch = {name: torch.stack([texts[i][name] for i in mine]) for name in texts[0]}
    trainer.state.max_steps = STEPS
    model.train()
    for _ in range(STEPS):
        items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
        seen.on_pre_optimizer_step(None, None, None, model)
        optimizer.step()
        optimizer.zero_grad()
    return whole_parameters(model)


def run(variant: str, folder: Path, mutant: str = "", penalty: str = "hoyer") -> None:
    trainer, seen = make(variant, folder, penalty)
    mutate(trainer, mutant)
    processes = VARIANTS[variant][0]
    if trainer.accelerator.num_processes != processes:
        raise SystemExit(f"{trainer.accelerator.num_processes} processes run, {variant} is for {processes}")
    if variant == "fsdp2":
        weights, engine = shard(trainer, seen), "FSDP2"
    else:
        trainer.train()
        trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        weights, engine = whole_parameters(trainer.model, trained), type(trainer.model_wrapped).__name__
    if trainer.accelerator.is_main_process:
        tensors = {f"gradient.{name}": value for name, value in seen.found.items()}
        tensors |= {f"weight.{name}": value for name, value in weights.items()}
        tensors |= {f"threshold.{i}": t for i, t in enumerate(trainer.sparsity.sparsifier.thresholds)}
        tensors |= {"losses": torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])}
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        save_file(tensors, folder / f"{variant}{mutant}{penalty}.safetensors", metadata={"engine": engine})
    end_processes()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
