"""Predictor families side by side on one model: fitted in one pass over text, judged in the loop on held-out text."""

import copy
from collections.abc import Sequence
from dataclasses import astuple, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from moyu_kernels.ops.ffn.naive import SIMULATED
from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import Counts, SparseMasks
from moyu_train.evaluation.perplexity import Scores, ratio_interval, score
from moyu_train.models.blocks import FFNBlock, ffn_bytes, ffn_sha256, find_blocks
from moyu_train.models.int8 import round_ffn
from moyu_train.models.masking import InputMasks
from moyu_train.models.state import stored_bytes
from moyu_train.predictors import PREDICTORS
from moyu_train.registry import resolve
from moyu_train.settings import Method
from moyu_train.training.cuts import LEAST, Cuts, Predictors, find_cuts, share_for
from moyu_train.training.fit import PredictorTrainer, fit_windows
from moyu_train.training.inputs import input_rules
from moyu_train.training.stages import read, sparsifier_of

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

SAMPLES = 2000


class Several:
    """Predictors of many families for one layer, for `PredictorTrainer` to fit in one pass.

    methods: (class, options) of each; `solve` gives the storage forms in that order.
    """

    name = "several"

    def __init__(self, methods: list[tuple[Any, Any]], block: FFNBlock, device: torch.device) -> None:
        self.predictors = [cls(options, block, device) for cls, options in methods]
        self.in_step = any(predictor.in_step for predictor in self.predictors)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor) -> None:
        for predictor in self.predictors:
            predictor.observe(x, contribution, kept)

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": t for i, p in enumerate(self.predictors) for name, t in p.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, predictor in enumerate(self.predictors):
            predictor.load({name: state[f"{i}.{name}"] for name in predictor.state()})

    def gather(self) -> None:
        for predictor in self.predictors:
            predictor.gather()

    @staticmethod
    def together(layers: Sequence["Several"]) -> None:
        for family in zip(*(layer.predictors for layer in layers), strict=True):
            family[0].together(family)

    def solve(self) -> list[dict[str, Tensor]]:
        return [predictor.solve() for predictor in self.predictors]


def even_cuts(cuts: Cuts, blocks: list[FFNBlock], predictors: Predictors, target: float, itemsize: int) -> list[float]:
    """Where to cut each layer's scores so that about a share `target` of the bytes is skipped, all layers alike.

    Raises: MoyuError where even a single selected neuron in a hundred reads more.
    """

    def skipped(share: float) -> float:
        return cuts.bytes_skipped(blocks, predictors, [share] * len(blocks), itemsize)

    if skipped(LEAST) < target:
        raise MoyuError(
            f"compare.bytes_skipped {target} cannot be reached: {skipped(LEAST):.3f} is skipped with 1 % of the "
            "neurons selected; lower it, or make the predictors smaller"
        )
    return cuts.all.levels(share_for(skipped, target))


def scored(model: Any, masks: SparseMasks, documents: Documents, window: int, what: str) -> tuple[Scores, list[Counts]]:
    """Scores, and the counts of each document by itself."""
    nll: list[float] = []
    tokens: list[int] = []
    counts = [copy.deepcopy(masks.counts)]
    for document in documents.tokens:
        found = score(model, replace(documents, tokens=[document]), window, what)
        nll, tokens = nll + found.nll, tokens + found.tokens
        counts.append(copy.deepcopy(masks.counts))
    parts = [
        Counts(*(b - a for a, b in zip(astuple(before), astuple(after), strict=True)))
        for before, after in pairwise(counts)
    ]
    return Scores(nll, tokens), parts


def mass_gains(parts: list[Counts], others: list[Counts]) -> list[dict[str, float]]:
    """Per layer the contribution kept, of what the rule keeps, less that of others on the same documents, and its 95 %
    interval (paired bootstrap over documents)."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(parts), (SAMPLES, len(parts)), generator=generator)
    shares = []
    for counts in (parts, others):
        kept, rule = (torch.stack([getattr(c, name) for c in counts]) for name in ("mass_kept", "mass_rule"))
        whole = torch.arange(len(parts))[None]
        shares.append([kept[p].sum(1) / rule[p].sum(1) for p in (whole, picks)])  # [1, L], [SAMPLES, L]
    (own, own_samples), (other, other_samples) = shares
    low, high = torch.quantile(own_samples - other_samples, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    rows = zip((own - other)[0].tolist(), low.tolist(), high.tolist(), strict=True)
    return [{"gain": gain, "low": a, "high": b} for gain, a, b in rows]


def compare_predictors(run: "Run") -> dict[str, Any]:
    """Rows of `compare` of the recipe, on the fine-tuned model or the dense one.

    `rows` are family and operating point: recall and precision by count and contribution kept (of what the rule keeps),
    means over layers; bytes skipped, null where no op computes the family ("simulated"); perplexity over that of the
    oracle at the same density and over the untouched dense model. `points` tells the rest of each, in the same order.
    """
    recipe, settings = run.recipe, run.recipe.compare
    tuned = settings.model == "finetuned"
    stage = "finetune" if tuned else "calibrate"
    run.figures(stage)
    documents, window = run.test.first(recipe.evaluate.tokens), recipe.evaluate.window
    dense = score(run.dense(), documents, window, "compare: dense")
    model = run.trained("finetune") if tuned else run.dense()
    if recipe.export.weights == "int8":
        model = round_ffn(model)
    thresholds, _ = read(run.stage_folder(stage))
    rules, inputs = sparsifier_of(recipe, thresholds).rules, input_rules(run, stage)
    methods = [resolve("compare.predictors", method, PREDICTORS) for method in settings.predictors]
    fitted = _fit(run, model, rules, methods, stage, inputs)
    cuts, _ = find_cuts(model, rules, fitted, run.validation.first(recipe.calibrate.tokens), inputs)
    judge = Judge(model, rules, inputs, documents, window, recipe.export.itemsize)
    rows, points = [], []
    for target in settings.bytes_skipped:
        first: list[Counts] = []
        for method, (cls, _), predictors, found in zip(settings.predictors, methods, fitted, cuts, strict=True):
            levels = even_cuts(found, judge.blocks, predictors, target, judge.itemsize)
            row, point, parts = judge.point(predictors, levels, cls.form, f"{label(method)} at {target:.0%}")
            first = first or parts
            rows.append({"family": label(method), **row, "ppl_over_dense": point["ppl"] / dense.perplexity})
            points.append({"target": target, **point, "mass_gain_on_first": mass_gains(parts, first)})
    return {
        "rows": rows,
        "points": points,
        "ppl": {"dense": dense.perplexity, "rule": judge.rule.perplexity},
        "nll": {"dense": dense.nll, "rule": judge.rule.nll},
        "scored": dense.tokens,
        "model": settings.model,
        "ffn_sha256": ffn_sha256(model),
        "dtype": recipe.export.dtype,
        "fit_tokens": fit_windows(recipe, run.train).numel(),
        "tokens": documents.total,
        "documents": len(documents.tokens),
        "test": recipe.data.test.rpartition("/")[2],
    }


def _fit(
    run: "Run", model: Any, rules: list[Rule], methods: list[tuple[Any, Any]], stage: str, inputs: dict[str, Rule]
) -> list[Predictors]:
    digest = run.recipe.digest("compare", "fit", "data", "seed")[:12]
    folder = run.folder / "compare-predictors" / f"{digest}-{run.key(stage)[:12]}"  # resumes what it was broken off in
    folder.mkdir(parents=True, exist_ok=True)
    trainer = PredictorTrainer(model, rules, Several, methods, folder)
    with InputMasks(model, inputs):
        layers: list[Any] = trainer.fit(fit_windows(run.recipe, run.train), run.recipe.fit.save_every)
    return [[layer[i] for layer in layers] for i in range(len(methods))]


class Judge:
    """Scores predictors in the loop, all on the same documents; `rule` is the score of the exact rule mask."""

    def __init__(
        self,
        model: Any,
        rules: list[Rule],
        inputs: dict[str, Rule],
        documents: Documents,
        window: int,
        itemsize: int,
    ) -> None:
        self.model, self.rules, self.inputs = model, rules, inputs
        self.documents, self.window, self.itemsize = documents, window, itemsize
        self.blocks = find_blocks(model)
        self.ffn = sum(ffn_bytes(block, itemsize) for block in self.blocks)
        with SparseMasks(model, rules, None, inputs=inputs):
            self.rule = score(model, documents, window, "compare: rule mask")

    def point(
        self, predictors: Predictors, cuts: list[float], form: str, what: str
    ) -> tuple[dict[str, Any], dict[str, Any], list[Counts]]:
        """The row of an operating point but for `family` and `ppl_over_dense`, what is told beside it, and the counts
        of each document."""
        arguments = (self.model, self.rules, predictors, cuts)
        with SparseMasks(*arguments, inputs=self.inputs) as masks:
            sparse, parts = scored(self.model, masks, self.documents, self.window, f"compare: {what}")
        with SparseMasks(*arguments, oracle=True, inputs=self.inputs):
            oracle = score(self.model, self.documents, self.window, f"compare: {what}, oracle").perplexity
        layers = masks.per_layer()
        skipped = masks.bytes_skipped(self.itemsize)
        simulated = form in SIMULATED or self.rules[0].op is None
        row = {
            "bytes_share": sum(map(stored_bytes, predictors)) / self.ffn,
            **{name: mean(layers, name) for name in ("recall", "precision", "mass_kept")},
            "bytes_skipped": None if simulated else skipped,
            "ppl_over_oracle": sparse.perplexity / oracle,
        }
        point = {
            "simulated": simulated,
            "would_skip": skipped,
            "selected": mean(layers, "selected"),
            "ppl": sparse.perplexity,
            "nll": sparse.nll,
            "ppl_oracle": oracle,
            "ppl_over_rule": sparse.perplexity / self.rule.perplexity,
            "ppl_over_rule_interval": ratio_interval(sparse, self.rule),
            "layers": layers,
        }
        return row, point, parts


def label(method: Method) -> str:
    """A family's name with the options that were given: `history rank=113 decay=0.5`."""
    return " ".join([method.name, *(f"{name}={value}" for name, value in method.options.items())])


def mean(layers: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(layer[name] for layer in layers) / len(layers))
