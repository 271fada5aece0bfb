"""Inertia, raw and chance-corrected: what neighbouring tokens' active sets share, by lag, and what a stale mask misses.

The overlap of tokens t and s is `phi(t, s) = sum_i (z_ti - p_i)(z_si - p_i) / sum_i p_i (1 - p_i)`, p_i neuron i's rate
over the whole text: 0 for independent tokens however hot some neurons are, 1 for equal masks. Not centred per sequence,
which would take away the very thing. Jaccard and recall are reported beside it, as other papers have them; hot neurons
and topics push both up. What of phi is not explained by meaning: matched.py.
"""

from typing import Any

import torch
from torch import Tensor

from moyu_train.analysis.subject import SKIP, Seen, Subject, Window

LAGS = (1, 2, 4, 8, 16, 32, 64)
UNIONS = (1, 2, 4, 8, 16, 32, 64)
STALE = (1, 8, 64)  # lags of the mask that a token is computed with
SAMPLE = 64  # tokens of each sequence and layer for the stale masks, which need sorting


def overlap(z: Tensor, s: Tensor, p: Tensor) -> Tensor:
    """phi of masks, or of mean masks, z and s, fp `[..., F]`, with the rates p `[F]`."""
    return ((z - p) * (s - p)).sum(-1) / (p * (1 - p)).sum().clamp_min(1e-12)


class Lags:
    """Streams rates and pair counts per neuron and lag. Memory: `3 len(LAGS) + 1` fp64 numbers a neuron."""

    def __init__(self, subject: Subject) -> None:
        self.rate = [torch.zeros(block.neurons, dtype=torch.float64) for block in subject.blocks]
        self.pairs = [torch.zeros(len(LAGS), 3, block.neurons, dtype=torch.float64) for block in subject.blocks]
        self.raw = torch.zeros(len(subject.blocks), len(LAGS), 3, dtype=torch.float64)  # Jaccard, recall, pairs
        self.tokens = torch.zeros(len(subject.blocks), dtype=torch.float64)

    def see(self, window: Window, seen: Seen) -> None:
        z = seen.active.reshape(-1, seen.active.shape[-1])[SKIP:].float()
        size = z.sum(-1)
        self.rate[seen.layer] += z.sum(0).double().cpu()
        self.tokens[seen.layer] += len(z)
        for place, lag in enumerate(LAGS):
            if len(z) <= lag:
                break
            now, before = z[lag:], z[:-lag]
            both = now * before
            counts = torch.stack([both.sum(0), now.sum(0), before.sum(0)])
            self.pairs[seen.layer][place] += counts.double().cpu()
            shared, own = both.sum(-1), size[lag:]
            jaccard = shared / (own + size[:-lag] - shared).clamp_min(1)
            values = torch.stack([jaccard.sum(), (shared / own.clamp_min(1)).sum()])
            self.raw[seen.layer, place] += torch.cat([values, values.new_tensor([len(own)])]).double().cpu()

    def rates(self, layer: int) -> Tensor:
        """p, fp64 `[F]`."""
        return self.rate[layer] / self.tokens[layer].clamp_min(1)

    def layers(self) -> list[dict[str, Any]]:
        found = []
        for layer, (pairs, raw) in enumerate(zip(self.pairs, self.raw, strict=True)):
            p, count = self.rates(layer), raw[:, 2:].clamp_min(1)
            both, now, before = (pairs / count[..., None]).unbind(1)
            rho = (both - p * (now + before) + p * p).sum(-1) / (p * (1 - p)).sum().clamp_min(1e-12)
            jaccard, recall = (raw[:, :2] / count).T.tolist()
            there = [str(lag) for lag, n in zip(LAGS, raw[:, 2].tolist(), strict=True) if n]
            by_lag = [dict(zip(there, values, strict=False)) for values in (rho.tolist(), jaccard, recall)]
            found.append({"density": p.mean().item(), "overlap": by_lag[0], "jaccard": by_lag[1], "recall": by_lag[2]})
        return found


class Unions:
    """Share of neurons that at least one of L consecutive tokens uses, and what it would be if tokens were independent.

    Per layer; windows of L start at the beginning of a sequence. Memory: two numbers a length.
    """

    def __init__(self, subject: Subject) -> None:
        self.sums = torch.zeros(len(subject.blocks), len(UNIONS), 2, dtype=torch.float64)

    def see(self, window: Window, seen: Seen) -> None:
        z = seen.active.reshape(-1, seen.active.shape[-1])[SKIP:]
        for place in range(len(UNIONS)):  # each of twice the length before
            if place:
                z = z[: len(z) // 2 * 2].view(-1, 2, z.shape[-1]).any(1)
            if not len(z):
                break
            self.sums[seen.layer, place] += torch.stack(
                [z.double().mean(-1).sum().cpu(), torch.tensor(len(z)).double()]
            )

    def layers(self, lags: Lags) -> list[dict[str, Any]]:
        found = []
        for layer, sums in enumerate(self.sums):
            p = lags.rates(layer)
            there = [(str(length), *row) for length, row in zip(UNIONS, sums.tolist(), strict=True) if row[1]]
            found.append(
                {
                    "union": {length: share / count for length, share, count in there},
                    "union_independent": {length: (1 - (1 - p) ** int(length)).mean().item() for length, *_ in there},
                }
            )
        return found


class Stale:
    """Inertia error: contribution that a stale mask misses, beyond what the best mask of the same size misses.

    Share of the token's contribution; the mask is that of the token `lag` before, or (`prompt`, as GRIFFIN and TDA do)
    the neurons of the first half of the sequence with the largest root mean square of their share of the token's norm,
    as many as a token has active on average, used in the second half. Inertia that lowers it is an asset.
    """

    def __init__(self, subject: Subject) -> None:
        self.sums = torch.zeros(len(subject.blocks), len(STALE) + 1, 2, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def see(self, window: Window, seen: Seen) -> None:
        n, z = (value.reshape(-1, value.shape[-1])[SKIP:] for value in (seen.n, seen.active))
        pick = torch.randperm(len(n), generator=self._generator)[:SAMPLE].to(n.device)
        for place, lag in enumerate(STALE):
            late = pick[pick >= lag]
            if len(late):
                self._add(seen.layer, place, n[late], z[late - lag])
        half = len(n) // 2
        late = pick[pick >= half]
        if half and len(late):
            first = n[:half]
            shares = (first / first.norm(dim=-1, keepdim=True).clamp_min(1e-12)).square().mean(0)
            size = round(z[:half].float().sum(-1).mean().item())
            prompt = torch.zeros_like(z[0])
            prompt[shares.topk(size).indices] = True
            self._add(seen.layer, len(STALE), n[late], prompt.expand(len(late), -1))

    def _add(self, layer: int, place: int, n: Tensor, mask: Tensor) -> None:
        missed = stale_error(n, mask)
        self.sums[layer, place] += torch.stack([missed.sum(), missed.new_tensor(len(n))]).double().cpu()

    def layers(self) -> list[dict[str, Any]]:
        names = [*map(str, STALE), "prompt"]
        return [
            {"stale_error": {name: error / count for name, (error, count) in zip(names, rows, strict=True) if count}}
            for rows in self.sums.tolist()
        ]


def stale_error(n: Tensor, mask: Tensor) -> Tensor:
    """Share of each token's n `[N, F]` that the mask misses, beyond what the best mask of its size misses, `[N]`."""
    best = n.sort(-1, descending=True).values.cumsum(-1)
    size = mask.sum(-1)
    most = torch.where(size > 0, best.gather(-1, (size - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    return (most - (n * mask).sum(-1)) / best[:, -1].clamp_min(1e-30)
