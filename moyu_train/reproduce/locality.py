"""Which sign of the knob serves which budget: neurons a token, or neurons that eight tokens use together.

Each arm is trained at two densities, and compared with the line between its two points (loss against density, loss
against the union): below the base's line is better at the same budget (BlockFFN, arXiv 2507.08771, trains for unions).
"""

from collections.abc import Sequence
from typing import ClassVar

from moyu_train.analysis.plots import axes_of
from moyu_train.recipe import Recipe
from moyu_train.reproduce.arms import Arm, measure_rule, run_arms
from moyu_train.reproduce.base import Outcome, Reproduction

SPARSITIES = (0.7, 0.8)
SIGNS = {
    "no penalty": None,
    "against inertia": {"name": "overlap_residual", "coefficient": 3.0},
    "for locality": {"name": "locality", "coefficient": 0.3},
}


class Locality(Reproduction):
    claim: ClassVar[str] = "Against inertia serves a budget per token, locality one per eight tokens"
    criterion: ClassVar[str] = (
        "at equal density `against inertia` has the lower loss of the two penalties, at equal union of eight tokens "
        "`for locality`."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        arms = [
            Arm(f"{sign} {sparsity}".replace(" ", "-"), {"penalty": penalty, "target_sparsity": sparsity})
            for sign, penalty in SIGNS.items()
            for sparsity in SPARSITIES
        ]
        measured = run_arms(recipe, arms, seeds, measure_rule)
        points: dict[str, list[dict[str, float]]] = {}
        for sign in SIGNS:
            for sparsity in SPARSITIES:
                own = [row for row in measured if row["arm"] == f"{sign} {sparsity}".replace(" ", "-")]
                points.setdefault(sign, []).append(
                    {
                        "loss": sum(sum(row["nll"]["rule"]) / sum(row["tokens"]) for row in own) / len(own),
                        **{name: sum(row[name] for row in own) / len(own) for name in ("density", "union_8")},
                    }
                )
        base = points["no penalty"]
        rows, at = [], {}
        for sign, line in points.items():
            at[sign] = {budget: loss_at(line, budget, base[-1][budget]) for budget in ("density", "union_8")}
            rows.append(
                {
                    "arm": sign,
                    **{f"{name}, {s:.0%} off": p[name] for s, p in zip(SPARSITIES, line, strict=True) for name in p},
                    "loss at density": at[sign]["density"],
                    "loss at union": at[sign]["union_8"],
                }
            )
        against, local = at["against inertia"], at["for locality"]
        wins = against["density"] < local["density"], local["union_8"] < against["union_8"]
        none = at["no penalty"]
        conclusion = (
            f"At {base[-1]['density']:.1%} of the neurons a token, no penalty costs {none['density']:.3f} nats, "
            f"against "
            f"inertia {against['density']:.3f}, locality {local['density']:.3f}. At {base[-1]['union_8']:.1%} of the "
            f"neurons for eight tokens: {none['union_8']:.3f}, {against['union_8']:.3f}, {local['union_8']:.3f}."
        )
        figure, axes = axes_of("share of neurons that eight tokens use together", "loss under the rule (nats a token)")
        for sign, line in points.items():
            axes.plot([p["union_8"] for p in line], [p["loss"] for p in line], marker="o", label=sign)
        axes.legend()
        return Outcome(rows, all(wins), conclusion, figure, {"points": points})


def loss_at(line: list[dict[str, float]], budget: str, value: float) -> float:
    """Loss at `budget` = value on the line through an arm's two points."""
    first, last = line[0], line[-1]
    slope = (last["loss"] - first["loss"]) / (last[budget] - first[budget])
    return last["loss"] + slope * (value - last[budget])
