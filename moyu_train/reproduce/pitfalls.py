"""Pitfalls of dynamic activation in SwiGLU models: how sparse each layer is at one error (CETT), and what that saves.

The paper's one number: LLaMA-3-8B at CETT 0.2 has 67.29 % sparsity on average, from 99 % in its first layer to a tenth
in its last. Here: on the model at hand, and what a predictor within a few percent of the bytes makes of it.
"""

from collections.abc import Sequence
from typing import ClassVar

from moyu_train.analysis.measures import measure
from moyu_train.analysis.plots import axes_of
from moyu_train.analysis.subject import Subject
from moyu_train.evaluation.compare import compare_predictors
from moyu_train.pipeline import Run, run_up_to
from moyu_train.recipe import Recipe
from moyu_train.reproduce.base import Outcome, Reproduction

PAPER = 0.6729
NEAR = 0.05


class Pitfalls(Reproduction):
    claim: ClassVar[str] = "SwiGLU models are sparse at CETT 0.2, less so with depth, and predictors lose that"
    criterion: ClassVar[str] = (
        f"mean sparsity within {NEAR} of the paper's {PAPER}, the first third of the layers sparser than the last, and "
        "perplexity under predicted masks above that of the rule's at equal bytes."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        untouched = recipe.compare.model_copy(update={"model": "dense"})
        run = Run(recipe.model_copy(update={"compare": untouched}))
        run_up_to(run, "calibrate")
        settings = recipe.analyze.model_copy(update={"measures": ()})
        needed = [row["needed"] for row in measure(Subject("dense", run.dense()), run.test, settings)["layers"]]
        sparse = [1 - share for share in needed]
        third = max(len(sparse) // 3, 1)
        first, last, mean = sum(sparse[:third]) / third, sum(sparse[-third:]) / third, sum(sparse) / len(sparse)
        judged = compare_predictors(run)
        point = judged["points"][0]
        rows = [{"layer": layer, f"sparsity at CETT {settings.tau:g}": value} for layer, value in enumerate(sparse)]
        passed = abs(mean - PAPER) <= NEAR and first > last and point["ppl_over_rule"] > 1
        conclusion = (
            f"At CETT {settings.tau:g} a token needs {1 - mean:.1%} of the neurons ({first:.1%} sparse in the first "
            f"third of the layers, {last:.1%} in the last). Without training, {judged['rows'][0]['family']} at "
            f"{point['would_skip']:.1%} of the bytes skipped has {point['ppl'] / judged['ppl']['dense']:.2f} times the "
            f"dense perplexity, the rule's mask {judged['ppl']['rule'] / judged['ppl']['dense']:.2f}."
        )
        figure, axes = axes_of("layer", f"share of neurons not needed at CETT {settings.tau:g}")
        axes.plot(range(len(sparse)), sparse, marker="o")
        axes.axhline(PAPER, linestyle=":", color="black", label="LLaMA-3-8B, mean (paper)")
        axes.set_ylim(0, 1)
        axes.legend()
        return Outcome(rows, passed, conclusion, figure, {"mean": mean, "judged": judged})
