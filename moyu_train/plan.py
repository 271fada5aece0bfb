"""`moyu plan`: what a recipe will need and what it can gain, from the model's config alone, before any weights load."""

import argparse
import tempfile
from statistics import median
from typing import Any

from rich.table import Table

from moyu_train.analysis.tables import console
from moyu_train.checks import check_methods, check_model
from moyu_train.errors import MoyuError
from moyu_train.evaluation.decode_bytes import decode_plan
from moyu_train.models.blocks import find_blocks
from moyu_train.models.loading import resolve_source, skeleton
from moyu_train.pipeline import Run
from moyu_train.predictors import PREDICTORS
from moyu_train.progress import track
from moyu_train.recipe import CONTROL, Recipe
from moyu_train.registry import resolve
from moyu_train.step_cost import Stepper
from moyu_train.training.memory import FULL, HALF, LAUNCHERS, Sizes, measure_sizes, training_memory

PROBE_STEPS = 3


def plan(
    recipe: Recipe,
    processes: int = 2,
    tokens_per_second: float | None = None,
    probe: bool = False,
    wished: float | None = None,
) -> dict[str, Any]:
    """Figures of a recipe's run: `parameters`, `run`, `memory` by launcher, `files`, `decode`, and `time`.

    Args:
        processes: devices of the launchers beside `single`; tokens_per_second: of training, on one device; probe:
            measure it here, by a few steps of the recipe's own fine-tuning; wished: a speed-up of decoding.

    Raises: MoyuError for what the run itself would refuse, or numbers that cannot be.
    """
    if processes < 1:
        raise MoyuError(f"--processes {processes} is no number of devices; give 1 or more")
    if wished is not None and not wished > 1:
        raise MoyuError(f"--speedup {wished:g} is no speed-up; give a number above 1, such as 1.5")
    if tokens_per_second is not None and not tokens_per_second > 0:
        raise MoyuError(f"--tokens-per-second {tokens_per_second:g} is no rate; give a number above 0, or --probe")
    check_methods(recipe)
    settings, source = recipe.finetune, resolve_source(recipe.model)
    model = skeleton(source, recipe.described)
    check_model(recipe, model)
    blocks = find_blocks(model)
    ffn = sum(weight.numel() for block in blocks for weight in block.stored())
    found = measure_sizes(skeleton(source, recipe.described), settings)
    parent = _parent_parameters(recipe, found)
    figures: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": {"total": found.parameters, "ffn": ffn, "trainable": found.trainable, "parent": parent},
        "run": _run(recipe, processes),
        "memory": {name: _memory(recipe, found, name, processes, parent) for name in LAUNCHERS},
        "host_bytes_per_process": FULL * (found.parameters + parent),
        "files": _files(recipe, found),
        "decode": decode_plan(recipe, model, wished),
    }
    if probe:
        tokens_per_second = measure_rate(recipe)
    figures["time"] = _time(recipe, tokens_per_second, processes, measured=probe)
    return figures


def plan_command(recipe: Recipe, known: argparse.Namespace) -> dict[str, Any]:
    figures = plan(recipe, known.processes, known.tokens_per_second, known.probe, known.speedup)
    console.print(table(figures))
    return figures


def _parent_parameters(recipe: Recipe, found: Sizes) -> int:
    if not recipe.finetune.holds_parent:
        return 0
    if recipe.finetune.parent in ("", CONTROL):
        return found.parameters
    return sum(p.numel() for p in skeleton(resolve_source(recipe.finetune.parent)).parameters())


def _run(recipe: Recipe, processes: int) -> dict[str, Any]:
    """Steps of `window * batch * accumulation * processes` tokens; what is left over is not trained on."""
    settings = recipe.finetune
    controls = len(recipe.control.learning_rates) if recipe.control and not recipe.control.reuse else 0
    return {
        "tokens": 0 if recipe.delta else settings.tokens,
        "control_tokens": controls * settings.tokens,
        "tokens_per_step": settings.tokens_per_step,
        "processes": processes,
        "steps": settings.tokens // settings.tokens_per_step,
        "steps_on_processes": settings.tokens // (settings.tokens_per_step * processes),
    }


def _memory(recipe: Recipe, found: Sizes, launcher: str, processes: int, parent: int) -> dict[str, Any]:
    n = 1 if launcher == "single" else processes
    parts = training_memory(found, recipe.finetune, launcher, n, parent, checkpointing=False)
    less = training_memory(found, recipe.finetune, launcher, n, parent, checkpointing=True)
    return parts | {f"{name}_checkpointing": less[name] for name in ("activations", "peak")}


def _files(recipe: Recipe, found: Sizes) -> dict[str, int | None]:
    """Bytes of a delta (fp16, thresholds fp32), of an export, and of a training checkpoint (with AdamW's moments)."""
    thresholds = FULL * sum(found.neurons)
    predictors = 0
    if recipe.predictor:
        cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
        predictors = sum(
            cls.planned_bytes(options, found.hidden, neurons, gated)
            for neurons, gated in zip(found.neurons, found.gated, strict=True)
        )
    weights = found.trainable if recipe.finetune.lora else found.parameters
    return {
        "delta": HALF * found.trainable + thresholds if recipe.finetune.lora else None,
        "checkpoint": (FULL if recipe.export.dtype == "float32" else HALF) * found.parameters + thresholds + predictors,
        "training_checkpoint": FULL * weights + 2 * FULL * found.trainable,
    }


def _time(recipe: Recipe, rate: float | None, processes: int, measured: bool) -> dict[str, Any] | None:
    """Seconds of fine-tuning and of the controls at a rate, on one device and on all, as if they scaled perfectly."""
    if rate is None:
        return None
    run = _run(recipe, processes)
    seconds = {name: run[name] / rate for name in ("tokens", "control_tokens")}
    return {
        "tokens_per_second": rate,
        "measured": measured,
        "finetune_seconds": seconds["tokens"],
        "control_seconds": seconds["control_tokens"],
        "finetune_seconds_on_processes": seconds["tokens"] / processes,
    }


def measure_rate(recipe: Recipe) -> float:
    """Tokens per second of the recipe's own fine-tuning steps, here and now: the median of a few after a first one."""
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper(Run(recipe.model_copy(update={"run": folder})), "recipe", f"{folder}/trainer")
        stepper.step()
        seconds = median(stepper.step() for _ in track(range(PROBE_STEPS), "probe"))
    return recipe.finetune.window * recipe.finetune.batch / seconds


def table(figures: dict[str, Any]) -> Table:
    """All of a plan in one table."""
    found = Table(title=f"Plan: {figures['model']}", caption=CAPTION)
    found.add_column("what")
    found.add_column("figure", overflow="fold")
    parameters, run = figures["parameters"], figures["run"]
    share = parameters["ffn"] / parameters["total"]
    found.add_row("parameters", f"{_millions(parameters['total'])}, {share:.1%} of them in FFN blocks")
    found.add_row("trainable", f"{_millions(parameters['trainable'])}")
    many = f"{run['processes']} processes"
    found.add_row(
        "steps",
        f"{run['steps']} of {run['tokens_per_step']} tokens; on {many} {run['steps_on_processes']}",
    )
    found.add_row("tokens", f"{run['tokens']:,}, and {run['control_tokens']:,} for the dense control", end_section=True)
    for launcher, parts in figures["memory"].items():
        name = launcher if launcher == "single" else f"{launcher}, {many}"
        inside = ", ".join(f"{part} {_bytes(parts[part])}" for part in PARTS if parts[part])
        less = f"with checkpointing {_bytes(parts['peak_checkpointing'])}"
        found.add_row(f"memory, {name}", f"[bold]{_bytes(parts['peak'])}[/bold] ({less}): {inside}")
    found.add_row("host memory while loading", f"{_bytes(figures['host_bytes_per_process'])} a process")
    sizes = ", ".join(f"{n.replace('_', ' ')} {_bytes(v)}" for n, v in figures["files"].items() if v)
    found.add_row("files", sizes, end_section=True)
    for label, text in _decode_rows(figures["decode"]):
        found.add_row(label, text)
    if timed := figures["time"]:
        found.add_section()
        how = "measured here" if timed["measured"] else "as given"
        found.add_row(
            "time",
            f"{_hours(timed['finetune_seconds'])} at {timed['tokens_per_second']:.0f} tokens/s ({how}), controls at "
            f"most {_hours(timed['control_seconds'])}; on {many}, if they scaled perfectly, "
            f"{_hours(timed['finetune_seconds_on_processes'])}",
        )
    return found


PARTS = ("weights", "gradients", "optimiser", "gathered", "parent", "activations", "logits")
CAPTION = (
    "Memory per device, by formula (moyu_train/training/memory.py); penalties, the block anchor and what libraries "
    "hold for themselves are left out. Speed-ups are limits of the byte model, not measured."
)


def _decode_rows(decode: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (
            "decode, dense",
            f"{_bytes(decode['dense_bytes'])} a token ({decode['dtype']}, context {decode['context']}), "
            f"{decode['ffn_share']:.1%} of it FFN; limit if no FFN were read {decode['limit']:.2f}x",
        )
    ]
    names = {"kept": "if just the kept neurons are read", "calibrated": "at calibrate.bytes_skipped"}
    for name, label in names.items():
        if point := decode[name]:
            text = f"{point['bytes_skipped']:.1%} of the FFN's bytes skipped, {_bytes(point['bytes'])} a token"
            rows.append((f"decode, {label}", f"{text}; at most {point['speedup']:.2f}x"))
    if decode["predictor_share"]:
        rows.append(("predictor", f"{decode['predictor_share']:.1%} of the FFN's bytes, counted as read"))
    if decode["simulated_because"]:
        rows.append(("simulated", f"nothing is skipped, since {decode['simulated_because']}"))
    if wished := decode.get("wished"):
        skipped, off = wished["bytes_skipped"], wished["neurons_off"]
        text = (
            f"{skipped:.1%} of the FFN's bytes have to be skipped" if skipped else "no share of the FFN's bytes will do"
        )
        if skipped:
            text += f", {off:.1%} of the neurons off" if off else ", which this rule and predictor cannot"
        rows.append((f"for {wished['speedup']:g}x", text))
    return rows


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"


def _millions(value: int) -> str:
    return f"{value / 1e6:,.1f} million" if value >= 1e5 else f"{value:,}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
