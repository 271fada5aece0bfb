"""What a pass under the rule's mask tells about where to cut each layer's scores: a guide for searches in the loop."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.analysis.histogram import Histogram
from moyu_train.data import Documents
from moyu_train.evaluation.inloop import Counts, bytes_skipped
from moyu_train.evaluation.perplexity import Scores, score
from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.masking import InputMasks, Masking
from moyu_train.training.allocation import share_out

SCORES = 8.0  # a cut lies within so many times the mean that a predictor measures its scores in
HALVINGS = 30
LEAST, MOST = 0.01, 0.99  # shares of a layer's neurons that are selected
GRID = [i / 50 for i in range(1, 50)]  # shares of a layer's neurons that are not selected

Predictors = list[dict[str, Tensor]]  # storage form, one a layer


class Cuts:
    """Distributions of each layer's scores, of those of the neurons that the rule keeps, and of their contribution."""

    def __init__(self, layers: int) -> None:
        self.all, self.kept, self.energy = (Histogram(layers, -SCORES, SCORES) for _ in range(3))

    def add(self, layer: int, scores: Tensor, kept: Tensor, contribution: Tensor) -> None:
        """scores, contribution fp32 and kept bool `[..., F]`."""
        self.all.add(layer, scores)
        self.kept.add(layer, scores[kept])
        self.energy.add(layer, scores[kept], contribution[kept].square())

    def bytes_skipped(
        self, blocks: list[FFNBlock], predictors: Predictors, shares: Sequence[float], itemsize: int
    ) -> float:
        """What a decode step of one token would skip with a share of each layer's neurons selected.

        How many of them the rule keeps is from the pass under its own mask; under the predicted masks it comes out a
        little different.
        """
        counts = Counts.zeros(len(blocks))
        for layer, (block, share, level) in enumerate(zip(blocks, shares, self.all.levels(shares), strict=True)):
            above = int((level - self.all.low) / self.all.step)
            counts.steps[layer] = self.all.counts[layer].sum() / block.neurons
            counts.selected_rows[layer] = share * self.all.counts[layer].sum()
            counts.kept_rows[layer] = self.kept.counts[layer, above:].sum()
        return bytes_skipped(blocks, counts, predictors, itemsize)

    def shared_out(self, blocks: list[FFNBlock], share: float) -> list[float]:
        """Shares of each layer's neurons, `share` of all of them, that lose little: greedily by squared contribution.

        The loss of a layer is relative to what its rule keeps; `share_out` says how the layers take turns.
        """
        above = self.energy.counts.flip(1).cumsum(1).flip(1) / self.energy.counts.sum(1, keepdim=True)
        lost = torch.empty(len(blocks), len(GRID), dtype=torch.float64)
        for i, off in enumerate(GRID):
            for layer, level in enumerate(self.all.levels(1 - off)):
                lost[layer, i] = 1 - above[layer, int((level - self.all.low) / self.all.step)]
        return share_out(lost, [block.neurons for block in blocks], GRID, 1 - share)


def share_for(skipped: Callable[[float], float], target: float) -> float:
    """The share between `LEAST` and `MOST` at which `skipped(share)`, falling, is `target`."""
    low, high = LEAST, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if skipped(middle) < target else (middle, high)
    return low


@torch.no_grad()
def find_cuts(
    model: Any,
    rules: list[Rule],
    fitted: list[Predictors],
    documents: Documents,
    inputs: dict[str, Rule],
    window: int | None = None,
    batch: int = 1,
) -> tuple[list[Cuts], Scores]:
    """One `Cuts` for each family's predictors, all from one pass over the documents, and its scores.

    window, batch: as for `score`.
    """
    blocks = find_blocks(model)
    norms = [block.down_norms() for block in blocks]
    cuts = [Cuts(len(blocks)) for _ in fitted]

    def keep(layer: int, a: Tensor, expert: int | None) -> Tensor:
        mask = rules[layer].mask(a, expert) & (a != 0)
        for found, predictors in zip(cuts, fitted, strict=True):
            scores = masking.scores(layer, predictors[layer]).view_as(a)
            found.add(layer, scores, mask, a.abs().float() * norms[layer])
        return mask

    masking = Masking(blocks, keep, inputs=True, rules=rules)
    with InputMasks(model, inputs), masking:
        found = score(model, documents, window, "scores under the rule", batch=batch)
    return cuts, found
