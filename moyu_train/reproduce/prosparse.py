"""Progressive against constant L1 on a model whose activation has become ReLU (ProSparse, arXiv 2402.13516).

Equal tokens and equal final coefficient; the progressive one rises by sine stages from 0.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

from moyu_train.analysis.plots import axes_of
from moyu_train.errors import MoyuError
from moyu_train.recipe import Recipe
from moyu_train.reproduce.arms import Arm, measure_rule, run_arms
from moyu_train.reproduce.base import Outcome, Reproduction

STAGES = ((0.0, 0.0), (0.3, 0.1), (0.65, 0.4), (1.0, 1.0))  # share of the steps, share of the final coefficient
MOST = 1.01  # of the constant arm's perplexity


class ProSparse(Reproduction):
    claim: ClassVar[str] = "Progressive L1 makes a ReLU model sparser than constant L1 of the same final coefficient"
    criterion: ClassVar[str] = (
        f"the progressive arm keeps fewer neurons at no more than {MOST} times the perplexity of the constant one."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        if recipe.penalty is None or recipe.penalty.name != "l1":
            raise MoyuError("reproduction 'prosparse' needs penalty.name l1; its coefficient is the final")
        final = recipe.penalty.coefficient[-1][1]
        arms = [
            Arm("no penalty", {"penalty": None}),
            Arm("constant", {"penalty": {"name": "l1", "coefficient": final}}),
            Arm("progressive", {"penalty": {"name": "l1", "coefficient": [(s, final * c) for s, c in STAGES]}}),
        ]
        measured = run_arms(recipe, arms, seeds, measure_rule)
        rows = []
        for arm in arms:
            own = [row for row in measured if row["arm"] == arm.name]
            loss = sum(sum(row["nll"]["rule"]) / sum(row["tokens"]) for row in own) / len(own)
            density = sum(row["density"] for row in own) / len(own)
            rows.append({"arm": arm.name, "neurons off": 1 - density, "perplexity": math.exp(loss)})
        _, constant, progressive = rows
        sparser = progressive["neurons off"] > constant["neurons off"]
        passed = sparser and progressive["perplexity"] <= MOST * constant["perplexity"]
        conclusion = (
            f"With a final coefficient of {final:g}, constant L1 ends at {constant['neurons off']:.1%} off and "
            f"perplexity {constant['perplexity']:.2f}, progressive L1 at {progressive['neurons off']:.1%} and "
            f"{progressive['perplexity']:.2f}; without a penalty {rows[0]['neurons off']:.1%} and "
            f"{rows[0]['perplexity']:.2f}."
        )
        figure, axes = axes_of("neurons off", "perplexity")
        for row in rows:
            axes.scatter(row["neurons off"], row["perplexity"], label=row["arm"])
        axes.legend()
        return Outcome(rows, passed, conclusion, figure)
