"""Perplexity over documents, with whatever masks are on the model."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import device_of
from moyu_train.models.context import check_window, longest_window
from moyu_train.progress import track
from moyu_train.training.losses import Weights, token_loss


@dataclass(frozen=True)
class Scores:
    """Summed negative log-likelihood (nats) and scored tokens of each document."""

    nll: list[float]
    tokens: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.nll) / sum(self.tokens))


@torch.no_grad()
def score(
    model: Any, documents: Documents, window: int | None, what: str, limit: int | None = None, batch: int = 1
) -> Scores:
    """Score all tokens of the documents (or about `limit`) in windows of `window` with stride `window`.

    The first token of each window has no prediction and is not scored.

    window: None for `longest_window`.
    batch: windows that the model sees at once, see `side_by_side`.

    Raises: MoyuError where there are not so many.
    """
    if window is None:
        window = longest_window(model)
    check_window(model, window, "evaluate.window")
    documents = documents.first(limit)
    nll, tokens = [0.0] * len(documents.tokens), [0] * len(documents.tokens)
    groups = side_by_side(documents.windows(window), batch)
    if not groups:
        raise MoyuError(
            f"{what}: {batch} sequences side by side need as many windows of text, and there are "
            f"{len(documents.windows(window))} of up to {window} tokens; give longer text, or fewer sequences"
        )
    for group in track(groups, what):
        ids = torch.stack([piece for _, piece in group]).to(device_of(model))
        logits = model(input_ids=ids, use_cache=False).logits
        for row, (document, piece) in enumerate(group):
            one = slice(row, row + 1)
            nll[document] += token_loss(logits[one], ids[one], Weights(kl=0.0, lm=1.0))[0].item()
            tokens[document] += len(piece) - 1
    return Scores(nll, tokens)


def side_by_side(windows: list[tuple[int, Tensor]], batch: int) -> list[list[tuple[int, Tensor]]]:
    """Windows in groups of `batch`, those of a group as far as possible of other documents and of one length.

    Longer ones are cut to the shortest of their group; what does not fill a group is left out.
    """
    if batch == 1:
        return [[window] for window in windows]
    order: list[tuple[int, int, int, Tensor]] = []
    seen = Counter[int]()
    for document, piece in windows:
        order.append((-len(piece), seen[document], document, piece))
        seen[document] += 1
    order.sort(key=lambda entry: entry[:3])
    groups = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
    return [[(document, piece[: -group[-1][0]]) for *_, document, piece in group] for group in groups]


def ratio_interval(a: Scores, b: Scores, samples: int = 2000, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of perplexity(a) / perplexity(b), paired bootstrap over documents; None where fewer than two of
    them have scored tokens."""
    scored = [index for index, tokens in enumerate(a.tokens) if tokens]
    if len(scored) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(scored), (samples, len(scored)), generator=generator)
    one, other, counts = (torch.tensor(values, dtype=torch.float64)[scored] for values in (a.nll, b.nll, a.tokens))
    tokens, difference = counts[picks].sum(-1), one - other
    ratios = torch.exp(difference[picks].sum(-1) / tokens)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
