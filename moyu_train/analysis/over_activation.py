"""Over-activation: how many neurons are active, and how many of them the output needs.

CETT (cumulative error of tail truncation; ReLU^2 Wins, arXiv 2402.03804; Sparsing Law, arXiv 2411.02335) of a token is
`norm(sum_{i dropped} a_i W_i) / norm(sum_i a_i W_i)`, W_i the output direction of neuron i (a bias of the down
projection belongs to no neuron and is left out). It is measured exactly, by a matmul with the dropped neurons alone,
not by the bound
`sqrt(sum n_i^2)`, which takes their directions for orthogonal.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moyu_train.analysis.subject import SKIP, Seen, Subject, Window, neuron_outputs, read
from moyu_train.data import Documents
from moyu_train.evaluation.perplexity import score

SAMPLE = 64  # tokens of each sequence and layer that the matmuls are run on
DENSITIES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.22, 0.16, 0.11, 0.07, 0.04, 0.02)
RELU = 0.05  # share of exact zeros from which a layer is of the ReLU family: then a != 0 is active


def needed(a: Tensor, n: Tensor, outputs: Tensor, tau: float) -> Tensor:
    """Fewest neurons of largest contribution whose dropped rest has a CETT of at most tau, int64 `[N]`.

    By bisection over their number, so it takes the error for falling in it, which it is but for cancellations.

    Args: a, n `[N, F]`, outputs `[F, D]`.
    """
    ranked = n.argsort(-1, descending=True)
    rank = torch.empty_like(ranked).scatter_(-1, ranked, torch.arange(n.shape[-1], device=n.device).expand_as(ranked))
    allowed = tau * (a @ outputs).norm(dim=-1)
    low = torch.zeros(len(a), dtype=torch.int64, device=a.device)  # the answer is above `low`, or 0
    high = (n > 0).sum(-1)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        error = (torch.where(rank >= middle[:, None], a, 0.0) @ outputs).norm(dim=-1)
        enough = error <= allowed
        high, low = torch.where(enough, middle, high), torch.where(enough, low, middle)
    return high


class OverActivation:
    """Per layer, over sampled tokens: active neurons K, those needed k*, and the CETT of each level of contribution.

    `ratio` is `E[(K - k*) / K]`; K counts what is not exactly zero, which is all neurons of a SiLU or GELU model.
    Memory: four sums and `len(DENSITIES)` points a layer.
    """

    def __init__(self, subject: Subject, tau: float) -> None:
        self.subject, self.tau = subject, tau
        layers = len(subject.blocks)
        self.sums = torch.zeros(layers, 4, dtype=torch.float64)  # (K - k*) / K, k* / F, zeros, tokens
        self.log_level = torch.zeros(layers, len(DENSITIES), dtype=torch.float64)
        self.cett = torch.zeros(layers, len(DENSITIES), dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def see(self, window: Window, seen: Seen) -> None:
        a, n = (value.reshape(-1, value.shape[-1]) for value in (seen.a, seen.n))
        if seen.expert is None:
            a, n = a[SKIP:], n[SKIP:]
        pick = torch.randperm(len(a), generator=self._generator)[:SAMPLE].to(a.device)
        a, n = a[pick], n[pick]
        alive = (n > 0).any(-1)
        a, n = a[alive], n[alive]
        if not len(a):
            return
        layer, count = seen.layer, len(a)
        outputs = neuron_outputs(self.subject.blocks[layer], seen.expert)
        active, fewest = (n > 0).sum(-1), needed(a, n, outputs, self.tau)
        zeros = (n == 0).double().mean(-1)
        values = [
            (active - fewest) / active,
            fewest / n.shape[-1],
            zeros,
            torch.ones_like(n[:, 0]),
        ]
        self.sums[layer] += torch.stack([value.double().sum().cpu() for value in values])
        whole = (a @ outputs).norm(dim=-1)
        ordered = n.flatten().sort(descending=True).values
        for point, density in enumerate(DENSITIES):
            level = ordered[min(math.ceil(density * len(ordered)), len(ordered)) - 1]
            dropped = (torch.where(n < level, a, 0.0) @ outputs).norm(dim=-1)
            self.log_level[layer, point] += count * level.clamp_min(1e-30).log().item()
            self.cett[layer, point] += (dropped / whole).double().sum().item()

    def relu(self, layer: int) -> bool:
        return bool(self.sums[layer, 2] / self.sums[layer, 3].clamp_min(1) > RELU)

    def level(self, layer: int, tau: float) -> float:
        """The contribution below which dropping everything has a mean CETT of tau, interpolated."""
        tokens = self.sums[layer, 3].clamp_min(1)
        rising = (self.cett[layer] / tokens).cummax(0).values
        return float(np.exp(np.interp(tau, rising.numpy(), (self.log_level[layer] / tokens).numpy())))

    def level_at(self, layer: int, density: float) -> float:
        """The contribution that a share `density` of the neurons reaches, interpolated."""
        levels = (self.log_level[layer] / self.sums[layer, 3].clamp_min(1)).numpy()
        return float(np.exp(np.interp(density, DENSITIES[::-1], levels[::-1])))

    def layers(self) -> list[dict[str, float]]:
        means = (self.sums[:, :2] / self.sums[:, 3:].clamp_min(1)).tolist()
        return [{"over_activation": ratio, "needed": share} for ratio, share in means]


def measure(subject: Subject, sequences: list[Window], tau: float, density: float | None) -> OverActivation:
    """Measure over-activation, and set a dense subject's levels by CETT, or so that they keep `density`."""
    found = OverActivation(subject, tau)
    read(subject, sequences, found.see, "needed neurons")
    if subject.rules is None:
        for layer in range(len(subject.blocks)):
            if density is not None:
                subject.levels[layer] = found.level_at(layer, density)
            elif not found.relu(layer):
                subject.levels[layer] = found.level(layer, tau)
    return found


def cett_ppl(
    subject: Subject, found: OverActivation, documents: Documents, tokens: int, percent: float, steps: int
) -> dict[str, Any]:
    """CETT-PPL-p % (Sparsing Law): the sparsity at the largest CETT, the same in all layers, that costs p % perplexity.

    Bisection over tau with a pass over the text each. Of a sparse checkpoint it is what can be dropped beyond its own
    mask.
    """

    def perplexity(levels: list[float]) -> tuple[float, float]:
        kept = seen = 0

        def drop(one: Seen) -> Tensor:
            nonlocal kept, seen
            mask = (one.n >= levels[one.layer]) & (one.n > 0)
            kept, seen = kept + int(mask.sum()), seen + mask.numel()
            return mask

        with subject.masked(drop):
            scores = score(subject.model, documents, None, f"analyze {subject.name}: CETT-PPL-{percent:g}%", tokens)
        return scores.perplexity, 1 - kept / seen

    layers = range(len(subject.blocks))
    whole, zeros = perplexity([0.0] * len(layers))
    low, high, sparsity, reached = 0.0, 1.0, zeros, whole
    for _ in range(steps):
        tau = (low + high) / 2
        value, off = perplexity([found.level(layer, tau) for layer in layers])
        if value <= whole * (1 + percent / 100):
            low, sparsity, reached = tau, off, value
        else:
            high = tau
    return {"percent": percent, "tau": low, "sparsity": sparsity, "perplexity_ratio": reached / whole}
