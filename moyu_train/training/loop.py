"""Calibrates the predictors' cuts with the model in the loop, to the bytes skipped that the user named."""

import math
from typing import Any

from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.analysis.histogram import Histogram
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks, bytes_skipped
from moyu_train.evaluation.perplexity import score

TOLERANCE, ROUNDS = 0.002, 8
SCORES = 8.0  # a cut lies within so many times the mean that a predictor measures its scores in


def calibrate_in_loop(
    model: Any,
    rules: list[Rule],
    predictors: list[dict[str, Tensor]],
    documents: Documents,
    tokens: int,
    target: float,
    itemsize: int,
    inputs: dict[str, Rule] | None = None,
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Predictors with their cuts folded into the bias, and the figures of the run that found them.

    Every layer selects the same share of its neurons. Each round runs the masked model, takes the layers' cuts from the
    score distributions that the masked model really produces, and moves the share by secant steps until the bytes
    skipped, predictor bytes counted as read, meet the target.
    """
    share, slope = min(1.2 * (1 - target), 0.95), 0.75  # slope: bytes skipped per share of neurons not selected
    last: tuple[float, float] | None = None
    cuts = [-math.inf] * len(predictors)  # the first round runs the rule mask, only to see the scores
    for number in range(ROUNDS):
        histogram = Histogram(len(predictors), -SCORES, SCORES)
        with SparseMasks(model, rules, predictors, cuts, observe=histogram.add, inputs=inputs) as masks:
            perplexity = score(model, documents, 1024, f"calibrate in loop {number + 1}", tokens).perplexity
        skipped = bytes_skipped(masks.blocks, masks.counts, predictors, itemsize)
        if number and abs(skipped - target) <= TOLERANCE:
            break
        if number:
            if last and abs(share - last[0]) > 1e-4:
                slope = min(max((last[1] - skipped) / (share - last[0]), 0.4), 1.5)
            last = share, skipped
            share = min(max(share + (skipped - target) / slope, 0.01), 0.99)
        cuts = histogram.levels(share)
    else:
        if skipped > target:
            raise MoyuError(
                f"calibrate.bytes_skipped {target} was not met in {ROUNDS} rounds: {skipped:.3f} is skipped at least, "
                f"since many neurons score alike (as under ReLU); raise it to about {skipped:.2f}"
            )
        raise MoyuError(
            f"calibrate.bytes_skipped {target} was not reached in {ROUNDS} rounds (last {skipped:.3f}); lower it, "
            "raise target_sparsity or change the predictor"
        )
    figures = {
        "bytes_skipped": skipped,
        "perplexity": perplexity,
        "selected_share": share,
        "rounds": number + 1,
        "layers": masks.per_layer(),
    }
    folded = [{**p, "bias": p["bias"] - cut} for p, cut in zip(predictors, cuts, strict=True)]
    return folded, figures
