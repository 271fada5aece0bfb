"""Arms: recipes that differ in a few settings, each trained from several seeds and measured on the same documents.

All figures of one (arm, seed) come from one model and one set of held-out documents, so arms are compared in pairs: by
seed and by document.
"""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.analysis.measures import measure
from moyu_train.analysis.subject import Subject
from moyu_train.data import Documents
from moyu_train.evaluation.compare import compare_predictors
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import score
from moyu_train.files import read_json, write_json
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import Run, run_stage, run_up_to
from moyu_train.progress import console
from moyu_train.recipe import Recipe
from moyu_train.training.stages import read, sparsifier_of

CONTROL = "control"  # the arm without masks or penalty
BATCH = "4"  # sequences decoded together, for the union of their masks
SAMPLES = 4000
SECTIONS = [name for name in Recipe.model_fields if name not in ("run", "bench")]


@dataclass(frozen=True)
class Arm:
    """changes: sections of the recipe in place of its own."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


def arm_recipe(recipe: Recipe, arm: Arm, seed: int) -> Recipe:
    settings = recipe.model_dump(mode="json") | arm.changes | {"seed": seed}
    return Recipe.model_validate(settings | {"run": str(Path(recipe.run) / f"{arm.name}-{seed}")})


def run_arms(
    recipe: Recipe, arms: Sequence[Arm], seeds: Sequence[int], measured: Callable[[Run], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Each arm from each seed, all arms of one seed before the next."""
    return [run_arm(recipe, arm, seed, measured) for seed in seeds for arm in arms]


def run_arm(recipe: Recipe, arm: Arm, seed: int, measured: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
    """Train one arm from one seed and measure it, or take what an earlier call measured. The model is not kept.

    Returns: `arm`, `seed`, and the figures of `measured`, or for the control `nll` and `tokens` of each document.
    """
    run = Run(arm_recipe(recipe, arm, seed))
    path = run.folder / "measured.json"
    key = f"{run.recipe.digest(*SECTIONS)}-{run.inputs_digest}-{measured.__name__}"
    if path.is_file():
        found = read_json(path)
        if found.get("key") == key:
            console.print(f"[dim]{arm.name}, seed {seed}: measured before, reused[/dim]")
            return found
    console.print(f"[bold]{arm.name}, seed {seed}[/bold]")
    figures = _control(run) if arm.name == CONTROL else measured(run)
    found = {"key": key, "arm": arm.name, "seed": seed, **figures}
    write_json(path, found)
    for stage in ("finetune", "control", "compare-predictors"):
        shutil.rmtree(run.stage_folder(stage), ignore_errors=True)
    gc.collect()
    return found


def _control(run: Run) -> dict[str, Any]:
    run_stage(run, "control")
    model = run.trained("control")
    scores = score(model, held_out(run), run.recipe.evaluate.window, "control")
    return {"nll": {"control": scores.nll}, "tokens": scores.tokens}


def held_out(run: Run) -> Documents:
    return run.test.first(run.recipe.evaluate.tokens)


def trained(run: Run) -> tuple[Any, list[Rule]]:
    """The fine-tuned model of a run, trained here where it is not yet, and its rules."""
    run_up_to(run, "finetune")
    folder = run.stage_folder("finetune")
    sparsifier = sparsifier_of(run.recipe, read(folder)[0])
    sparsifier.advance(1.0)
    return load_dense(folder / "model"), sparsifier.rules


def measure_rule(run: Run) -> dict[str, Any]:
    """Under the rule's mask alone: `nll` of each document, `density`, and what masks of neighbours share."""
    model, rules = trained(run)
    documents, window = held_out(run), run.recipe.evaluate.window
    with SparseMasks(model, rules, None) as masks:
        scores = score(model, documents, window, "rule mask")
    notions = measure(Subject("sparse", model, rules), documents, run.recipe.analyze)["inertia"]
    return {
        "nll": {"rule": scores.nll},
        "tokens": scores.tokens,
        "density": 1 - masks.neurons_off(),
        "overlap": notions["overlap"]["1"],
        "union_8": notions["union"]["8"],
    }


def measure_all(run: Run) -> dict[str, Any]:
    """Under the rule and under the masks of `compare`'s first predictor and point; inertia and uncertainty."""
    model, rules = trained(run)
    judged = compare_predictors(run)
    notions = measure(Subject("sparse", model, rules), held_out(run), run.recipe.analyze)
    inertia, history = notions["inertia"], notions["history"]
    point, row = judged["points"][0], judged["rows"][0]
    return {
        "nll": {**judged["nll"], "predicted": point["nll"]},
        "tokens": judged["scored"],
        "density": inertia["density"],
        "predictor_bytes_skipped": point["would_skip"],
        "recall": row["recall"],
        "mass_kept": row["mass_kept"],
        "overlap": inertia["overlap"]["1"],
        "siai": inertia["siai"],
        "stale_error": inertia["stale_error"],
        "union_8": inertia["union"]["8"],
        "union_batch_4": inertia["union_independent"][BATCH],
        "hau": history["hau"],
        "flip_margin": history["flip_margin"],
    }


class Paired:
    """What arms' perplexities say against a base arm, paired by seed and document.

    Args: rows: of `run_arm`, every arm and the control from the same seeds on the same documents.
    """

    def __init__(self, rows: list[dict[str, Any]], base: str) -> None:
        self.base = base
        self.seeds = sorted({row["seed"] for row in rows})
        self.rows = {(row["arm"], row["seed"]): row for row in rows}
        self.arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != CONTROL))
        self.tokens = torch.tensor(rows[0]["tokens"], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        documents, seeds = len(self.tokens), len(self.seeds)
        self._documents = torch.randint(documents, (SAMPLES, documents), generator=generator)
        self._seeds = torch.randint(seeds, (SAMPLES, seeds), generator=generator)

    def _losses(self, arm: str, which: str) -> tuple[Tensor, Tensor]:
        """Mean loss (nats a token) of each seed, fp64 `[1, S]`, and of draws with replacement, `[SAMPLES, S]`."""
        nll = torch.tensor([self.rows[arm, seed]["nll"][which] for seed in self.seeds], dtype=torch.float64)
        whole = (nll.sum(-1) / self.tokens.sum())[None]
        drawn = nll[:, self._documents].sum(-1) / self.tokens[self._documents].sum(-1)  # [S, SAMPLES]
        return whole, drawn.T.gather(1, self._seeds)

    def excess(self, arm: str, which: str) -> tuple[Tensor, Tensor]:
        """Mean over seeds of perplexity over the smaller of dense and control, less 1: `[1]`, and `[SAMPLES]`."""
        found = []
        for loss, dense, control in zip(
            self._losses(arm, which), self._losses(arm, "dense"), self._losses(CONTROL, CONTROL), strict=True
        ):
            found.append((loss - torch.minimum(dense, control)).exp().mean(-1) - 1)
        return found[0], found[1]

    def less_excess(self, arm: str, which: str) -> dict[str, float]:
        """How much smaller the arm's excess is than the base's, as a share of that, with its 95 % interval."""
        own, drawn = self.excess(arm, which)
        other, other_drawn = self.excess(self.base, which)
        return _interval((1 - own / other).item(), 1 - drawn / other_drawn)

    def difference(self, arm: str, figure: str, key: str = "") -> dict[str, float]:
        """Mean over seeds of a figure of the arm less the base's, and the lowest and highest of the seeds."""

        pairs = zip(self._values(arm, figure, key), self._values(self.base, figure, key), strict=True)
        gains = [own - other for own, other in pairs]
        return {"value": sum(gains) / len(gains), "low": min(gains), "high": max(gains)}

    def mean(self, arm: str, figure: str, key: str = "") -> float:
        """Mean of a figure over seeds."""
        return sum(self._values(arm, figure, key)) / len(self.seeds)

    def _values(self, arm: str, figure: str, key: str) -> list[float]:
        found = [self.rows[arm, seed][figure] for seed in self.seeds]
        return [float(one[key] if key else one) for one in found]


def _interval(value: float, drawn: Tensor) -> dict[str, float]:
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}
