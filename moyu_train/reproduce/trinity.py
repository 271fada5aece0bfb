"""Quality, speed and generality in one table: the trinity that MOYU (arXiv 2406.12569) calls impossible.

Methods without training (CATS, contribution thresholds, GRIFFIN, TDA, a predictor on the untouched model), a swap to
ReLU trained with L1 (ProSparse), and training under predicted masks, all for one target sparsity. Quality: perplexity
after the prompt, where all masks act, over the smaller of dense and dense control. Speed: decoding the exported
checkpoint against the same weights dense in the same runner, on the bytes that it really skips. Generality: in how many
families of models a kernel computes the method, or a mask does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moyu_train.analysis.plots import axes_of
from moyu_train.checkpoints.export import export, read_state
from moyu_train.checkpoints.stage import CHECKPOINT, recorded
from moyu_train.checks import check_model
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import bench_checkpoint
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import Scores
from moyu_train.files import read_json, write_json
from moyu_train.models.loading import load_dense
from moyu_train.models.state import family_of
from moyu_train.pipeline import Run, run_up_to
from moyu_train.recipe import Recipe
from moyu_train.reproduce.arms import SECTIONS, Arm, arm_recipe, held_out
from moyu_train.reproduce.base import Outcome, Reproduction
from moyu_train.reproduce.prompt_masks import PROMPT, late_scores
from moyu_train.settings_export import Bench
from moyu_train.training.stages import read, sparsifier_of

HOW = {"kernel": True, "simulated": False}  # whether speed can be measured
FAMILIES = ("opt", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "mixtral")
GOOD = 1.05  # times the smaller perplexity of dense and control
FASTER = 1.05  # times the speed of the same weights dense, median of the rounds


@dataclass(frozen=True)
class Method:
    """changes: sections of the recipe in place of its own."""

    trained: bool
    changes: dict[str, Any] = field(default_factory=dict)


def rule(name: str, **options: Any) -> dict[str, Any]:
    return {"sparsifier": {"name": name, **options}, "predictor": None}


OURS = "predicted masks, trained"
METHODS = {
    "CATS": Method(False, rule("gate_threshold")),
    "contribution": Method(False, rule("threshold")),
    "GRIFFIN": Method(False, rule("griffin", prompt=PROMPT)),
    "TDA": Method(False, rule("tda", prompt=PROMPT)),
    "predicted masks": Method(False),
    "ReLU, trained": Method(True, rule("relu") | {"penalty": {"name": "l1", "coefficient": 0.1}}),
    OURS: Method(True),
}


class Trinity(Reproduction):
    claim: ClassVar[str] = "Training under predicted masks keeps quality, speed and generality together"
    criterion: ClassVar[str] = (
        f"{OURS}: at most {GOOD} times the perplexity of dense and control, {FASTER} times as fast as dense and faster "
        "in every round, and kernels in as many families as any other method."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        if recipe.bench is None or recipe.predictor is None:
            raise MoyuError("trinity measures speed and predictors: give the recipe `bench` and `predictor`")
        rows = []
        for name, method in METHODS.items():
            # Both kinds of predicted masks are one recipe, whose stages they share.
            folder = "predicted" if not method.changes else name.replace(", ", "-")
            run = Run(arm_recipe(recipe, Arm(folder, method.changes), recipe.seed))
            found = measured(run, name, method.trained)
            reached = reach(run.recipe)
            rows.append(
                {
                    "method": name,
                    "training tokens": recipe.finetune.tokens if method.trained else 0,
                    **found,
                    "kernel": sum(how == "kernel" for how in reached.values()),
                    "simulated": sum(how == "simulated" for how in reached.values()),
                    "refused": ", ".join(family for family, how in reached.items() if how == "refused"),
                }
            )
        base = min(row["base"] for row in rows)
        for row in rows:
            row["over dense"] = row.pop("perplexity") / base
            del row["base"]
        ours = rows[-1]
        fast = [row for row in rows if row["speed"] >= FASTER and row["least"] > 1]
        good = [row["method"] for row in fast if row["over dense"] <= GOOD]
        passed = OURS in good and ours["kernel"] == max(row["kernel"] for row in rows)
        conclusion = (
            f"{OURS.capitalize()}: {ours['over dense']:.3f} times the perplexity of the better of dense and control, "
            f"{ours['speed']:.2f} times its speed ({ours['least']:.2f} to {ours['most']:.2f}), kernels in "
            f"{ours['kernel']} of {len(FAMILIES)} families. Within {GOOD} of dense and {FASTER} times as fast: "
            f"{', '.join(good) or 'none'}. Neurons off count the prompt, which masks from it leave dense; bytes are of "
            "the decode steps that were timed."
        )
        figure, axes = axes_of("decoding speed over dense, same runner", "perplexity over the better of dense, control")
        for row in rows:
            axes.scatter(row["speed"], row["over dense"], s=20 * row["kernel"] + 5)
            axes.annotate(row["method"], (row["speed"], row["over dense"]))
        axes.set_yscale("log")
        return Outcome(rows, passed, conclusion, figure, {"families": FAMILIES})


def measured(run: Run, name: str, trained: bool) -> dict[str, Any]:
    """Quality and speed of one method's checkpoint, or what an earlier call measured of it.

    `base`: the smaller perplexity of the dense model and, of a trained one, the control.
    """
    path, key = run.folder / f"{name}.json", f"{run.recipe.digest(*SECTIONS, 'bench')}-{run.inputs_digest}"
    if path.is_file() and (found := read_json(path)).get("key") == key:
        del found["key"]
        return found
    assert run.recipe.bench
    folder = trained_checkpoint(run) if trained else untrained_checkpoint(run)
    documents, window = held_out(run), run.recipe.evaluate.window
    dense = [late_scores(run.dense(), documents, window, "dense")]
    if trained and run.recipe.control:
        run_up_to(run, "control")
        control = run.trained("control")
        dense.append(late_scores(control, documents, window, "dense control"))
    scores, off = masked_scores(folder, documents, window, name)
    speed = bench_checkpoint(folder, run.test.longest(), run.recipe.bench)
    ratio = speed["over_dense_runner"]
    found = {
        "perplexity": scores.perplexity,
        "base": min(one.perplexity for one in dense),
        "neurons off": off,
        "bytes skipped": speed["bytes_skipped"],
        "speed": ratio["speedup"],
        "least": ratio["least"],
        "most": ratio["most"],
    }
    write_json(path, {"key": key, **found})
    return found


def trained_checkpoint(run: Run) -> Path:
    run_up_to(run, "export")
    return run.stage_folder("export") / CHECKPOINT


def untrained_checkpoint(run: Run) -> Path:
    """The untouched model with its calibrated rule, and predictors where the recipe has them."""
    recipe, last = run.recipe, "calibrate-in-loop" if run.recipe.predictor else "calibrate"
    run_up_to(run, last)
    thresholds, predictors = read(run.stage_folder(last))
    family = family_of(predictors)
    folder = run.folder / "untrained"
    export(
        run.dense(getattr(torch, recipe.export.dtype)),
        run.tokenizer,
        folder,
        recipe.sparsifier.name,
        sparsifier_of(recipe, thresholds).rules,
        predictors,
        family,
        recorded(recipe, run.figures(last)) if family else None,
    )
    return folder


def masked_scores(folder: Path, documents: Documents, window: int, what: str) -> tuple[Scores, float]:
    """Scores of a sparse checkpoint after the prompt, under the masks that it decodes with, and the neurons off."""
    rules, predictors = read_state(folder)
    model = load_dense(folder)
    with SparseMasks(model, rules, predictors) as masks:
        scores = late_scores(model, documents, window, what)
    return scores, masks.neurons_off()


def reach(recipe: Recipe) -> dict[str, str]:
    """How each family runs the recipe: `kernel` where ops compute all blocks, `simulated`, `refused`.

    Each as a recipe is checked before a model loads, predictor included: with speed to be measured, or without.
    """
    found = {}
    for family in FAMILIES:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=1))
        found[family] = next((how for how, bench in HOW.items() if _runs(recipe, model, bench)), "refused")
    return found


def _runs(recipe: Recipe, model: Any, bench: bool) -> bool:
    try:
        check_model(recipe.model_copy(update={"bench": Bench() if bench else None}), model)
    except MoyuError:
        return False
    return True
