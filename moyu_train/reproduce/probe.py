"""The 2x2 of MOYU's figures (arXiv 2406.12569): do masks stay alike by meaning, or by standing in one sequence?"""

from collections.abc import Sequence
from typing import ClassVar

from moyu_train.analysis.measures import measure
from moyu_train.analysis.plots import axes_of
from moyu_train.analysis.subject import Subject
from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe
from moyu_train.reproduce.base import Outcome, Reproduction

CELLS = ("sentence_sequence", "sentence_alone", "random_sequence", "random_alone")
PERSISTS = 0.5  # index from which most of what a sequence adds owes nothing to meaning


class Probe(Reproduction):
    claim: ClassVar[str] = "Activation patterns persist within a sequence whatever its tokens mean"
    criterion: ClassVar[str] = (
        f"the inertia index of the 2x2 is at least {PERSISTS} and the interval of SIAI is above 0."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        run = Run(recipe)
        settings = recipe.analyze.model_copy(update={"measures": ("inertia", "causal")})
        found = measure(Subject("dense", run.dense()), run.test, settings)
        inertia, probe = found["inertia"], found["inertia"]["probe"]
        rows = [
            {"tokens": content, "in one sequence": probe[f"{content}_sequence"], "alone": probe[f"{content}_alone"]}
            for content in ("sentence", "random")
        ]
        index, interval = probe["index"], inertia["interval"]
        passed = index is not None and index >= PERSISTS and interval is not None and interval[0] > 0
        ends = "no interval (too few documents)" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        conclusion = (
            f"Standing in one sequence adds {rows[0]['in one sequence'] - rows[0]['alone']:+.3f} of overlap beyond "
            f"chance "
            f"to the tokens of sentences and {rows[1]['in one sequence'] - rows[1]['alone']:+.3f} to random ones: "
            f"index "
            f"{'undefined' if index is None else f'{index:.2f}'}. SIAI {inertia['siai']:.4f}, {ends}. An unrelated "
            f"prefix moves masks by {inertia['carry']:.4f} towards its own."
        )
        figure, axes = axes_of("", "overlap of masks beyond chance")
        axes.bar(range(len(CELLS)), [probe[cell] for cell in CELLS])
        axes.set_xticks(range(len(CELLS)), [cell.replace("_", "\n") for cell in CELLS])
        return Outcome(rows, passed, conclusion, figure, {"inertia": inertia, "layers": found["layers"]})
