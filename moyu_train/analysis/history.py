"""History-related activation uncertainty (HAU): how much of a neuron's on and off the current token leaves open.

With Z_i the bits of one layer and V the token's id, `HAU = sum_i E_V h(p_i|V) / sum_i h(p_i)`, h the entropy in bits,
over tokens whose id occurs at least `LEAST` times; each entropy with the Miller-Madow correction `1 / (2 N ln 2)` where
0 < p < 1, without which few occurrences look like certainty. 0: the id fixes the mask, nothing before it matters. 1:
the id says nothing. p_i is taken over the same tokens as p_i|V, so that a layer that ignores the id has 1, not the
ratio of two samples. What context settles is useful too (which `bank` is meant), so `excess HAU` has (id, sense) in V's
place: what is still open then, no cheap reading of the current meaning resolves.

Flip margin: the share of neurons with `abs(log(n / threshold)) < DELTA`, which a change of that size turns over.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moyu_train.analysis.subject import SKIP, Seen, Subject, Window
from moyu_train.models.blocks import device_of
from moyu_train.models.masking import Masking
from moyu_train.progress import track

LEAST = 64  # occurrences of an id, or of a sense
ROWS = 256  # most ids that are followed: bounds the table
SENSES = 8  # most senses of an id
SKETCH = 32  # numbers that an FFN input is projected to before it is clustered
DELTA = 0.1


def entropy(p: Tensor, count: Tensor) -> Tensor:
    """Of bits that are 1 with probability p, estimated on `count` draws: bits, fp64 of p's shape."""
    plain = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)
    return plain + ((p > 0) & (p < 1)) / (2 * count * math.log(2))


def uncertainty(counts: Tensor, seen: Tensor) -> Tensor:
    """HAU `[...]` of counts `[..., R, F]` of active neurons and occurrences `[R]` of each row (id, or sense)."""
    counts, seen = counts.double(), seen.double()
    total = seen.sum()
    inside = (entropy(counts / seen[:, None], seen[:, None]) * (seen / total)[:, None]).sum(-2)
    return inside.sum(-1) / entropy(counts.sum(-2) / total, total).sum(-1).clamp_min(1e-30)


def frequent_rows(sequences: list[Window], senses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row of each token, int64 over all that are read, -1 where its id is too rare or it is among the first `SKIP`.

    Returns: the rows, numbered by (id, sense), and each row's id as a number from 0, int64 `[R]`.
    """
    ids = torch.cat([window.ids for window in sequences])
    use = torch.ones(len(ids), dtype=torch.bool)
    for window in sequences:
        use[window.start : window.start + SKIP] = False
    values, counts = ids[use].unique(return_counts=True)
    chosen = values[counts.argsort(descending=True)[:ROWS]]
    chosen = chosen[torch.isin(chosen, values[counts >= LEAST])]
    number = torch.full((int(ids.max()) + 1,), -1).scatter_(0, chosen, torch.arange(len(chosen)))[ids]
    number[~use] = -1
    pair = torch.where(number < 0, -1, number * SENSES + (0 if senses is None else senses))
    known = pair[pair >= 0].unique()
    rows = torch.where(pair < 0, -1, torch.searchsorted(known, pair))
    return rows, known // SENSES


class History:
    """Streams the tables of active counts, int32 `[R, F]` a layer, and the margins. Memory: `4 R F` bytes a layer."""

    def __init__(self, subject: Subject, rows: Tensor, row_id: Tensor, senses: bool) -> None:
        self.rows, self.row_id, self.senses = rows, row_id, senses
        self.seen = torch.bincount(rows[rows >= 0], minlength=len(row_id))
        self.counts = [torch.zeros(len(row_id), block.neurons, dtype=torch.int32) for block in subject.blocks]
        self.flips = torch.zeros(len(subject.blocks), 2, dtype=torch.float64)

    def see(self, window: Window, seen: Seen) -> None:
        active = seen.active.reshape(-1, seen.active.shape[-1])
        rows = self.rows[window.start : window.start + len(active)]
        use = rows >= 0
        self.counts[seen.layer].index_add_(0, rows[use], active.cpu()[use].int())
        if seen.ratio is not None:
            ratio = seen.ratio.reshape(active.shape)[SKIP:]
            near = (ratio.clamp_min(1e-30).log().abs() < DELTA).double().mean()
            self.flips[seen.layer] += torch.stack([near * len(ratio), near.new_tensor(len(ratio))]).cpu()

    def layers(self) -> list[dict[str, float | None]]:
        found: list[dict[str, float | None]] = []
        for counts, (near, tokens) in zip(self.counts, self.flips.tolist(), strict=True):
            row: dict[str, float | None] = {"hau": None, "excess_hau": None}
            if len(self.row_id):
                ids = int(self.row_id.max()) + 1
                by_id = torch.zeros(ids, counts.shape[1], dtype=torch.int32).index_add_(0, self.row_id, counts)
                seen = torch.zeros(ids, dtype=torch.int64).index_add_(0, self.row_id, self.seen)
                row["hau"] = uncertainty(by_id, seen).item()
                row["excess_hau"] = uncertainty(counts, self.seen).item() if self.senses else None
            found.append({**row, "flip_margin": near / tokens if tokens else None})
        return found

    def covered(self) -> dict[str, Any]:
        """What HAU was measured on."""
        return {"ids": int(self.row_id.max()) + 1 if len(self.row_id) else 0, "tokens": int(self.seen.sum())}


def find_senses(subject: Subject, sequences: list[Window]) -> Tensor:
    """Sense of each token, int64 over all that are read: k-means of the frequent ids' inputs to the middle FFN block.

    The dense model's, without masks. Each id gets one sense per `LEAST` occurrences, at most `SENSES`. Memory: `SKETCH`
    numbers a token of a frequent id.
    """
    rows, _ = frequent_rows(sequences)
    middle = len(subject.blocks) // 2
    generator = torch.Generator().manual_seed(0)
    hidden = subject.blocks[middle].hidden
    project = torch.randn(hidden, SKETCH, generator=generator) / math.sqrt(SKETCH)
    sketches = torch.zeros(int((rows >= 0).sum()), SKETCH)
    place = (rows >= 0).cumsum(0) - 1
    masking = Masking(subject.blocks, lambda layer, a, expert: None, inputs=True)
    with masking, torch.no_grad():
        for window in track(sequences, f"analyze {subject.name}: senses"):
            span = slice(window.start, window.start + len(window.ids))
            subject.model(input_ids=window.ids[None].to(device_of(subject.model)), use_cache=False, logits_to_keep=1)
            x = masking.input(middle).reshape(-1, hidden).float().cpu()
            use = rows[span] >= 0
            sketches[place[span][use]] = x[use] @ project
    senses = torch.zeros(len(rows), dtype=torch.int64)
    for row in range(int(rows.max()) + 1):
        where = (rows == row).nonzero()[:, 0]
        senses[where] = k_means(sketches[place[where]], min(SENSES, len(where) // LEAST), generator)
    return senses


def k_means(points: Tensor, k: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Lloyd's algorithm from k random points; clusters of fewer than `LEAST` points join the nearest of the others.

    Returns: int64 `[N]`.
    """
    centres = points[torch.randperm(len(points), generator=generator)[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(-1)
        sizes = torch.bincount(nearest, minlength=len(centres)).clamp_min(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / sizes[:, None]
    sizes = torch.bincount(torch.cdist(points, centres).argmin(-1), minlength=len(centres))
    big = centres[sizes >= min(LEAST, int(sizes.max()))]
    return torch.cdist(points, big).argmin(-1)
