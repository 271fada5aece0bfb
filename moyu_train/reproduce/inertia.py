"""Does training against activation inertia, or against uncertain neurons, help? The question that MOYU leaves open.

Arms of equal data, tokens and target sparsity. Against inertia are `overlap_residual` (what masks share beyond
meaning), `lag_decorrelation` (all persistence) and `prefix_contrast` (what a prefix carries over); for inertia
`locality`; against uncertainty `margin`, `history_consistency`, `predictability`, and training under the predicted
masks themselves, where what a predictor cannot foresee is not there to rely on. Asked of each: is the excess
perplexity (over the smaller of dense and control, less 1) smaller than without it, under the rule's mask and under
predicted masks that skip equal bytes; and what moved of what it was meant to move.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from moyu_train.analysis.plots import axes_of
from moyu_train.recipe import Recipe
from moyu_train.reproduce.arms import CONTROL, Arm, Paired, measure_all, run_arms
from moyu_train.reproduce.base import Outcome, Reproduction, span
from moyu_train.settings import GOALS

BASE = "no penalty"
AIM = 0.15  # share of the excess that a penalty has to take away


def penalty(name: str, coefficient: float) -> dict[str, Any]:
    return {"penalty": {"name": name, "coefficient": coefficient}}


PENALTIES = {
    "overlap_residual": 3.0,
    "lag_decorrelation": 30.0,
    "prefix_contrast": 30.0,
    "margin": 10.0,
    "history_consistency": 1.0,
    "predictability": 0.3,
    "locality": 0.3,
}
PREDICTED = "predicted masks"


def arms_of(recipe: Recipe) -> list[Arm]:
    """No penalty, each penalty, and training under the masks of the predictor that all are judged with."""
    predictor, bytes_skipped = recipe.compare.predictors[0], recipe.compare.bytes_skipped[0]
    goal = {**dict.fromkeys(GOALS), "bytes_skipped": bytes_skipped}
    calibrate = recipe.calibrate.model_copy(update=goal)
    in_loop = {"predictor": predictor.model_dump(mode="json"), "calibrate": calibrate.model_dump(mode="json")}
    return [
        Arm(BASE, {"penalty": None}),
        *(Arm(name, penalty(name, coefficient)) for name, coefficient in PENALTIES.items()),
        Arm(PREDICTED, in_loop),
    ]


class Inertia(Reproduction):
    claim: ClassVar[str] = "Training against activation inertia or uncertain neurons helps at equal bytes skipped"
    criterion: ClassVar[str] = (
        f"one of them takes at least {AIM:.0%} of the excess perplexity under predicted masks, with an interval off 0."
    )
    seeds: ClassVar[tuple[int, ...]] = (11, 12, 13)

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        measured = run_arms(recipe, (Arm(CONTROL), *arms_of(recipe)), seeds, measure_all)
        paired = Paired(measured, BASE)
        rows, gains = [], {}
        for arm in paired.arms:
            gains[arm] = {which: paired.less_excess(arm, which) for which in ("rule", "predicted")}
            rows.append(
                {
                    "arm": arm,
                    "excess, rule": paired.excess(arm, "rule")[0].item(),
                    "taken away": span(gains[arm]["rule"]),
                    "excess, predicted": paired.excess(arm, "predicted")[0].item(),
                    "taken away, predicted": span(gains[arm]["predicted"]),
                    "bytes skipped": paired.mean(arm, "predictor_bytes_skipped"),
                    "recall": paired.mean(arm, "recall"),
                    "stale error, 1 back": paired.mean(arm, "stale_error", "1"),
                    "overlap, 1 back": paired.mean(arm, "overlap"),
                    "SIAI": paired.mean(arm, "siai"),
                    "HAU": paired.mean(arm, "hau"),
                    "union of 8": paired.mean(arm, "union_8"),
                    "union, batch 4": paired.mean(arm, "union_batch_4"),
                }
            )
        others = paired.arms[1:]
        best = max(others, key=lambda arm: gains[arm]["predicted"]["value"])
        passed = gains[best]["predicted"]["value"] >= AIM and gains[best]["predicted"]["low"] > 0
        moved = {arm: {name: paired.difference(arm, *name.split(".")) for name in MOVED} for arm in others}
        return Outcome(
            rows, passed, conclude(best, gains, moved), plot(paired, gains), {"gains": gains, "moved": moved}
        )


MOVED = ("recall", "mass_kept", "stale_error.1", "stale_error.prompt", "overlap", "siai", "hau", "flip_margin",
         "union_8", "union_batch_4", "density")  # fmt: skip


def conclude(best: str, gains: dict[str, Any], moved: dict[str, Any]) -> str:
    gain = gains[best]["predicted"]
    verdict = "helps" if gain["low"] > 0 else "does not help" if gain["high"] < 0 else "cannot be told from no penalty"
    text = [f"The best arm, {best}, {verdict}: it takes {span(gain)} of the excess under predicted masks."]
    for arm, figures in moved.items():
        sure = [
            f"{name.replace('_', ' ').replace('.', ' ')} {found['value']:+.4f}"
            for name, found in figures.items()
            if found["low"] > 0 or found["high"] < 0
        ]
        text.append(f"{arm} moved, in all seeds alike: {', '.join(sure) or 'nothing'}.")
    return " ".join(text)


def plot(paired: Paired, gains: dict[str, Any]) -> Any:
    figure, axes = axes_of("excess perplexity taken away (95 % interval)", "")
    arms = paired.arms[1:]
    for shift, which in ((-0.12, "rule"), (0.12, "predicted")):
        found = [gains[arm][which] for arm in arms]
        errors = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
        places = [i + shift for i in range(len(arms))]
        axes.errorbar([f["value"] for f in found], places, xerr=errors, fmt="o", capsize=3, label=f"{which} masks")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(AIM, color="black", linestyle=":", label="aim")
    axes.set_yticks(range(len(arms)), arms)
    axes.legend()
    return figure
