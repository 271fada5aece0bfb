"""Perplexity over documents, with whatever masks are on the model."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from moyu_train.data import Documents
from moyu_train.models.blocks import device_of
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
def score(model: Any, documents: Documents, window: int, what: str, limit: int | None = None) -> Scores:
    """Score all tokens of the documents (or about `limit`) in windows of `window` with stride `window`.

    The first token of each window has no prediction and is not scored.
    """
    documents = documents.first(limit)
    nll, tokens = [0.0] * len(documents.tokens), [0] * len(documents.tokens)
    for document, ids in track(documents.windows(window), what):
        ids = ids[None].to(device_of(model))
        logits = model(input_ids=ids, use_cache=False).logits
        nll[document] += token_loss(logits, ids, Weights(kl=0.0, lm=1.0))[0].item()
        tokens[document] += ids.shape[1] - 1
    return Scores(nll, tokens)


def ratio_interval(a: Scores, b: Scores, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of perplexity(a) / perplexity(b), paired bootstrap over documents."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(a.nll), (samples, len(a.nll)), generator=generator)
    tokens = torch.tensor(a.tokens, dtype=torch.float64)[picks].sum(-1)
    difference = torch.tensor(a.nll, dtype=torch.float64) - torch.tensor(b.nll, dtype=torch.float64)
    ratios = torch.exp(difference[picks].sum(-1) / tokens)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
