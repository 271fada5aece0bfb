"""Calibrates the predictors' cuts to the goal that the user named, with the model in the loop.

Every figure that decides is that of a run of the masked model on validation text: bytes, perplexity and recall of the
same tokens. A pass under the rule's mask (`Cuts`) only says which cuts to try.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from moyu_kernels.rules import Rule

from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import score, side_by_side
from moyu_train.files import reading
from moyu_train.models.blocks import find_blocks
from moyu_train.models.context import WINDOW, longest_window
from moyu_train.progress import console
from moyu_train.settings import Calibrate
from moyu_train.training.cuts import LEAST, MOST, Predictors, find_cuts
from moyu_train.training.shares import Allocation, price_near, search

BYTES_TOLERANCE = 0.002
ROUNDS = 8  # runs to meet a goal with one allocation
SWEEP = (0.6, 1.0, 1.5, 2.2)  # first shares selected, times the rule's density: where the goal lies, and the frontier
BATCHED_WINDOW = 256  # tokens of a window side by side with others

Point = dict[str, Any]  # figures of one run of the masked model


class Loop:
    """Runs the masked model; what has been run is kept in a file, so that an interrupted search goes on from there.

    log: JSON lines, one a run; None: nothing is kept.
    """

    def __init__(
        self,
        model: Any,
        rules: list[Rule],
        predictors: Predictors,
        documents: Documents,
        settings: Calibrate,
        itemsize: int,
        inputs: dict[str, Rule] | None,
        log: Path | None,
    ) -> None:
        self.model, self.rules, self.predictors, self.documents = model, rules, predictors, documents
        self.itemsize, self.inputs, self.batch, self.log = itemsize, inputs or {}, settings.batch, log
        self.window = longest_window(model, WINDOW if self.batch == 1 else BATCHED_WINDOW)
        if not side_by_side(documents.windows(self.window), self.batch):
            raise MoyuError(
                f"calibrate.batch {self.batch} needs as many windows of validation text, and there are "
                f"{len(documents.windows(self.window))} of up to {self.window} tokens; raise calibrate.tokens or "
                "data.validation_documents"
            )
        self.blocks = find_blocks(model)
        (self.guide,), found = find_cuts(
            model, rules, [predictors], documents, self.inputs, self.window, batch=self.batch
        )
        self.rule_perplexity = found.perplexity
        self.points: list[Point] = []
        self._known = _read(log)

    def run(self, shares: list[float], what: str) -> Point:
        """Figures of the model with a share of each layer's neurons selected (as the guide has it)."""
        return self.run_cuts(self.guide.all.levels(shares), what, len(set(shares)) == 1)

    def run_cuts(self, cuts: list[float], what: str, even: bool) -> Point:
        """Figures of the model with these cuts; even: whether all layers select alike."""
        point = self._known.get(tuple(cuts))
        if point is None:
            point = self._measure(cuts, f"calibrate in loop {len(self.points) + 1}: {what}")
            point |= {"even": even}
            if self.log and PartialState().is_main_process:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(point) + "\n")
        self.points.append(point)
        return point

    def _measure(self, cuts: list[float], what: str) -> Point:
        with SparseMasks(self.model, self.rules, self.predictors, cuts, inputs=self.inputs, batch=self.batch) as masks:
            perplexity = score(self.model, self.documents, self.window, what, batch=self.batch).perplexity
        layers = [{**row, "cut": cut} for row, cut in zip(masks.per_layer(), cuts, strict=True)]
        return {
            "cuts": cuts,
            "bytes_skipped": masks.bytes_skipped(self.itemsize),
            "perplexity": perplexity,
            "ppl_over_rule": perplexity / self.rule_perplexity,
            "recall": sum(row["recall"] for row in layers) / len(layers),
            "selected_share": masks.share_selected(),
            "layers": layers,
        }


def _read(log: Path | None) -> dict[tuple[float, ...], Point]:
    known: dict[tuple[float, ...], Point] = {}
    if log is None or not log.is_file():
        return known
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:  # broken off while it was written
            break
        with reading(log):
            known[tuple(point["cuts"])] = point
    return known


def miss(goal: str, value: float, point: Point) -> float:
    """How far a point is from a goal: within -1 and 1 it meets it, above it selects too many neurons.

    Bytes are met to `BYTES_TOLERANCE`; the perplexity and the recall never fall short of what was asked.
    """
    if goal == "bytes_skipped":
        return (value - point["bytes_skipped"]) / BYTES_TOLERANCE
    if goal == "ppl_over_rule":
        half = (value - 1) / 40
        return (value - half - point["ppl_over_rule"]) / half
    half = min(0.005, 1 - value) / 2
    return (point["recall"] - value - half) / half


def meet(
    run: Callable[[float], Point], goal: tuple[str, float], points: list[tuple[float, Point]]
) -> tuple[float, Point]:
    """The level, a mean share of neurons selected, at which a goal is met; by secant steps between two known levels.

    Args: run: the model at a level; points: levels and figures known beforehand, at least one.
    Raises: MoyuError where the goal is out of reach.
    """
    known = [(level, miss(*goal, point), point) for level, point in points]
    for rounds_left in reversed(range(ROUNDS + 1)):
        known.sort(key=lambda entry: abs(entry[1]))
        if abs(known[0][1]) <= 1:
            return known[0][0], known[0][2]
        level = _next_level([(level, off) for level, off, _ in known])
        if not rounds_left or any(level == entry[0] for entry in known):  # at the end of what can be selected
            break
        point = run(level)
        known.append((level, miss(*goal, point), point))
    return _closest(goal, known)


def _next_level(known: list[tuple[float, float]]) -> float:
    """known: level and miss, the least miss first."""
    low = max((level for level, off in known if off < 0), default=LEAST)
    high = min((level for level, off in known if off > 0 and level > low), default=MOST)
    if high == MOST and known[0][1] < 0 and len(known) == 1:
        return min(low * 1.1, MOST)
    if low == LEAST and known[0][1] > 0 and len(known) == 1:
        return max(high / 1.1, LEAST)
    (x, fx), (y, fy) = known[:2]
    root = x - fx * (x - y) / (fx - fy) if fx != fy else math.nan
    return root if low < root < high else (low + high) / 2


def _closest(goal: tuple[str, float], known: list[Any]) -> tuple[float, Point]:
    """Of points that do not quite meet a goal, the one that skips most without falling short, if the goal allows it."""
    name, value = goal
    points = [point for *_, point in known]
    if name == "bytes_skipped":
        near = min(points, key=lambda point: abs(point[name] - value))[name]
        if near > value:
            raise MoyuError(
                f"calibrate.bytes_skipped {value} was not met in the loop: {near:.3f} is skipped at least, since many "
                f"neurons score alike (as under ReLU); raise it to about {math.ceil(near * 100) / 100:.2f}"
            )
        raise MoyuError(
            f"calibrate.bytes_skipped {value} was not reached in the loop (at most {near:.3f}); lower it, raise "
            "target_sparsity or change the predictor"
        )
    over = name == "recall"
    enough = [entry for entry in known if (entry[2][name] >= value if over else entry[2][name] <= value)]
    if not enough:
        best = (max if over else min)(point[name] for point in points)
        raise MoyuError(
            f"calibrate.{name} {value} was not reached in the loop: {best:.4f} with at most {MOST:.0%} of the neurons "
            f"selected; {'lower' if over else 'raise'} it, or change the predictor"
        )
    level, _, point = max(enough, key=lambda entry: entry[2]["bytes_skipped"])
    return level, point


def calibrate_in_loop(
    model: Any,
    rules: list[Rule],
    predictors: Predictors,
    documents: Documents,
    settings: Calibrate,
    itemsize: int,
    inputs: dict[str, Rule] | None = None,
    log: Path | None = None,
) -> tuple[Predictors, dict[str, Any]]:
    """Predictors with their cuts folded into the bias, and the figures of the run that found them.

    First every layer selects the same share of its neurons: a few shares show the frontier, and between them lies the
    goal. With `settings.search`, so many more runs share the bytes out among the layers, and the goal is met again.

    Args: documents: validation text; log: see `Loop`.
    Raises: MoyuError where the goal is out of reach.
    """
    loop = Loop(model, rules, predictors, documents.first(settings.tokens), settings, itemsize, inputs, log)
    goal = settings.goal
    density = (loop.guide.kept.counts.sum() / loop.guide.all.counts.sum()).item()
    even = Allocation(loop.guide, loop.blocks, predictors, itemsize, 0.0, (1.0,) * len(loop.blocks))
    figures: dict[str, Any] = {"goal": dict([goal]), "batch": settings.batch, "rule_perplexity": loop.rule_perplexity}
    if goal[0] == "cut":
        point = loop.run_cuts([goal[1]] * len(loop.blocks), "the cut", even=False)
    else:
        levels = sorted({min(max(factor * density, LEAST), 0.95) for factor in SWEEP})
        swept = [(level, loop.run(even.shares(level), "even shares")) for level in levels]
        level, point = meet(lambda level: loop.run(even.shares(level), "even shares"), goal, swept)
    if settings.search:
        figures["even"] = {name: point[name] for name in ("bytes_skipped", "ppl_over_rule", "recall")}
        price = price_near([point for _, point in swept], point)
        best, level, point = search(loop.run, settings.search, even, level, point, price)
        level, point = meet(lambda level: loop.run(best.shares(level), "shares found"), goal, [(level, point)])
    console.print(
        f"calibrated in the loop: {point['bytes_skipped']:.1%} of the bytes skipped at batch {settings.batch}, "
        f"perplexity {point['ppl_over_rule']:.4f} of the rule's, recall {point['recall']:.1%}"
    )
    folded = [{**p, "bias": p["bias"] - cut} for p, cut in zip(predictors, point["cuts"], strict=True)]
    names = ("even", "bytes_skipped", "ppl_over_rule", "recall")
    return folded, {
        **figures,
        **{name: value for name, value in point.items() if name not in ("cuts", "even")},
        "rounds": len(loop.points),
        "frontier": [{name: p[name] for name in names} for p in loop.points],
    }
