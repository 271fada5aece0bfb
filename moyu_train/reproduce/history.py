"""Uncertainty against diversity at fixed tokens: do predictors and masks suffer from a more diverse history?

The same number of tokens from few documents, or from many: predictors are fitted on them and judged on documents that
none of them has seen; and the uncertainty of masks given the token (HAU) is measured on them.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from moyu_train.analysis.measures import measure
from moyu_train.analysis.plots import axes_of
from moyu_train.analysis.subject import Subject
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.compare import Judge, even_cuts
from moyu_train.pipeline import Run, run_up_to
from moyu_train.predictors import PREDICTORS
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.reproduce.base import Outcome, Reproduction
from moyu_train.training.cuts import find_cuts
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.stages import read, sparsifier_of

FEWEST, STEPS = 4, 3  # documents, and how many numbers of them up to all


class History(Reproduction):
    claim: ClassVar[str] = "At fixed tokens, a more diverse history makes activations harder to predict"
    criterion: ClassVar[str] = (
        "contribution kept on unseen documents falls, and HAU rises, with each step from few documents to many."
    )

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        run = Run(recipe)
        run_up_to(run, "calibrate")
        model, tokens = run.dense(), recipe.fit.tokens
        sparsifier = sparsifier_of(recipe, read(run.stage_folder("calibrate"))[0])
        cls, options = resolve("compare.predictors", recipe.compare.predictors[0], PREDICTORS)
        documents = run.test.first(recipe.evaluate.tokens)
        item = recipe.export.itemsize
        judge = Judge(model, sparsifier.rules, {}, documents, recipe.evaluate.window, item)
        rows: list[dict[str, Any]] = []
        for text in histories(run.train, tokens, recipe.seed):
            folder = run.folder / f"history-{len(text.tokens)}"
            folder.mkdir(exist_ok=True)
            windows = text.packed(recipe.fit.window, recipe.seed)
            trainer = PredictorTrainer(model, sparsifier.rules, cls, options, folder)
            fitted: Any = trainer.fit(windows, recipe.fit.save_every)
            validation = run.validation.first(recipe.calibrate.tokens)
            (cuts,), _ = find_cuts(model, sparsifier.rules, [fitted], validation, {})
            levels = even_cuts(cuts, judge.blocks, fitted, recipe.compare.bytes_skipped[0], item)
            row, point, _ = judge.point(fitted, levels, cls.form, f"{len(text.tokens)} documents")
            settings = recipe.analyze.model_copy(update={"measures": ("history",), "tokens": tokens})
            hau = measure(Subject("dense", model), text, settings)["history"]["hau"]
            rows.append(
                {
                    "documents": len(text.tokens),
                    "tokens": windows.numel(),
                    "mass kept": row["mass_kept"],
                    "recall": row["recall"],
                    "perplexity over rule": point["ppl_over_rule"],
                    "bytes skipped": point["would_skip"],
                    "HAU": hau,
                }
            )
        pairs = list(pairwise(rows))
        hau_rises = all(a["HAU"] is not None and b["HAU"] is not None and a["HAU"] < b["HAU"] for a, b in pairs)
        passed = hau_rises and all(a["mass kept"] > b["mass kept"] for a, b in pairs)
        few, many = rows[0], rows[-1]
        conclusion = (
            f"From {few['documents']} to {many['documents']} documents at {few['tokens']} tokens, the contribution "
            f"that "
            f"predictors keep on unseen documents goes from {few['mass kept']:.3f} to {many['mass kept']:.3f}, and HAU "
            f"from {_number(few['HAU'])} to {_number(many['HAU'])}."
        )
        figure, axes = axes_of("documents, at fixed tokens", "contribution kept on unseen documents")
        axes.plot([row["documents"] for row in rows], [row["mass kept"] for row in rows], marker="o")
        axes.set_xscale("log")
        return Outcome(rows, passed, conclusion, figure)


def histories(documents: Documents, tokens: int, seed: int) -> list[Documents]:
    """About `tokens` tokens from the starts of `FEWEST` documents, of more, and of all: all of them long enough for the
    first, and those of one among those of the next."""
    long = [ids for ids in documents.tokens if len(ids) >= tokens // FEWEST]
    if len(long) < 2 * FEWEST:
        raise MoyuError(
            f"reproduction 'history' needs {2 * FEWEST} training documents of {tokens // FEWEST} tokens, there are "
            f"{len(long)}; lower fit.tokens or give other text"
        )
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = [round(FEWEST * (len(long) / FEWEST) ** (step / (STEPS - 1))) for step in range(STEPS)]
    return [
        replace(documents, tokens=[long[i][: tokens // count] for i in order[:count]], scored=None) for count in counts
    ]


def _number(value: float | None) -> str:
    return "too few tokens" if value is None else f"{value:.3f}"
