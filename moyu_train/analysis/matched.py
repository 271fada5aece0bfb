"""SIAI, semantic-irrelevant activation inertia: how much more alike two tokens' masks are for standing in one sequence,
than those of two tokens of different documents that mean the same.

`SIAI = sum_b w_b (E[phi | same sequence, b] - E[phi | different documents, b])`, phi of inertia.py, over bins b of
equal similarity of meaning, equal id or not, and position; w_b as the smaller of the two counts. Where p_i is estimated
on the same text its error cancels in the difference.

Two choices beyond the definition. Pairs of one sequence are drawn at distances of 1 to `NEAR` tokens: drawn evenly over
a sequence, 94 % of the pairs in 1,024 tokens would be further apart than any mask is reused, and the number would
depend on the window. What lies beyond `NEAR` is a figure of its own, and so is each band of distances. And the partner
from another document stands at the very position of the token that it replaces, so that positions match pair by pair.

Similarity is the mean cosine of the two views of models/meaning.py, of embeddings less their mean.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moyu_train.analysis.subject import SKIP, Seen, Window
from moyu_train.models.meaning import REACHES, around, sketch

NEAR = 64
BANDS = (1, 5, 17, NEAR + 1)  # where bands of distances begin
PAIRS = 20_000  # of each kind, near and far
BINS = 20
BOOTSTRAPS = 200
BANK_BYTES = 512 * 2**20
MIN_DOCUMENTS = 5  # for an interval


class Bank:
    """Masks of the text's tokens as packed bits, for pairs that are drawn afterwards.

    Memory: at most `BANK_BYTES` over all layers; of longer texts, each document's first tokens. `pack` and `overlaps`
    take whole layers at a time.
    """

    def __init__(self, neurons: list[int], sequences: list[Window]) -> None:
        most = BANK_BYTES // sum(math.ceil(count / 8) for count in neurons)
        documents = max(len({window.document for window in sequences}), 1)
        taken: dict[int, int] = {}
        self.place: dict[int, int] = {}  # a sequence's start to its first row
        rows = 0
        for window in sequences:
            before = taken.get(window.document, 0)
            if before + len(window.ids) <= max(most // documents, len(window.ids)):
                taken[window.document] = before + len(window.ids)
                self.place[window.start] = rows
                rows += len(window.ids)
        self.bits = [np.zeros((rows, math.ceil(count / 8)), dtype=np.uint8) for count in neurons]
        kept = [window for window in sequences if window.start in self.place]
        self.ids = torch.cat([window.ids for window in kept])
        self.document = torch.cat([torch.full_like(window.ids, window.document) for window in kept])
        self.sequence = torch.cat([torch.full_like(window.ids, window.start) for window in kept])
        self.position = torch.cat([torch.arange(len(window.ids)) for window in kept])

    def see(self, window: Window, seen: Seen) -> None:
        if window.start in self.place:
            rows = slice(self.place[window.start], self.place[window.start] + len(window.ids))
            active = seen.active.reshape(-1, seen.active.shape[-1]).cpu().numpy()
            self.bits[seen.layer][rows] = np.packbits(active, axis=-1)

    def overlaps(self, layer: int, p: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """phi of rows first and second, int64 `[P]`; fp64 `[P]`."""
        bits = self.bits[layer]
        weight = p.numpy()
        along = np.concatenate([np.unpackbits(part, axis=-1, count=len(p)) @ weight for part in _parts(bits)])
        rows = zip(_parts(first.numpy()), _parts(second.numpy()), strict=True)
        both = np.concatenate([np.bitwise_count(bits[a] & bits[b]).sum(-1, dtype=np.int64) for a, b in rows])
        spread = max(float((weight * (1 - weight)).sum()), 1e-12)
        return torch.from_numpy((both - along[first] - along[second] + (weight**2).sum()) / spread)


def _parts(rows: Any, size: int = 2048) -> list[Any]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@dataclass(frozen=True)
class Pairs:
    """Rows of pairs in one sequence, and of others in two documents at the same positions: int64 `[P]` each."""

    same: tuple[Tensor, Tensor]
    different: tuple[Tensor, Tensor]


def draw_pairs(bank: Bank, near: bool, generator: torch.Generator, count: int = PAIRS) -> Pairs:
    """Evenly over tokens and distances: 1 to `NEAR`, or from there to the sequence's ends."""
    rows = len(bank.ids)
    late = torch.randint(rows, (4 * count,), generator=generator)
    if near:
        distance = torch.randint(1, NEAR + 1, late.shape, generator=generator)
    else:
        room = (bank.position[late] - NEAR).clamp_min(1)
        distance = NEAR + 1 + (torch.rand(late.shape, generator=generator) * room).long()
    early = late - distance
    use = (bank.position[late] - distance) >= SKIP
    late, early = late[use][:count], early[use][:count]
    # A row of another document at the early token's position: rows ordered by position, one drawn among equals.
    order = bank.position.argsort(stable=True)
    starts = torch.searchsorted(bank.position[order].contiguous(), bank.position[early])
    numbers = torch.bincount(bank.position, minlength=int(bank.position.max()) + 1)[bank.position[early]]
    partner = order[starts + (torch.rand(len(early), generator=generator) * numbers).long()]
    other = bank.document[partner] != bank.document[late]
    return Pairs((late, early), (late[other], partner[other]))


class Meaning:
    """Similarity of meaning of two rows of a bank, by the model's input embeddings `[V, D]`."""

    def __init__(self, embeddings: Tensor, bank: Bank) -> None:
        used, place = bank.ids.unique(return_inverse=True)
        vectors = sketch(embeddings[used.to(embeddings.device)])[place]
        vectors = vectors - vectors.mean(0)
        lengths = bank.sequence.unique_consecutive(return_counts=True)[1].tolist()
        self.views = [torch.cat([around(rows, reach) for rows in vectors.split(lengths)]) for reach in REACHES]

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([(view[first] * view[second]).sum(-1) for view in self.views]).mean(0)


def bins_of(bank: Bank, pairs: Pairs, same: Tensor, different: Tensor) -> tuple[Tensor, Tensor]:
    """Bin of each pair, by its similarity (quantiles of all pairs), equal id, and position of the earlier token."""
    edges = torch.quantile(torch.cat([same, different]).double(), torch.linspace(0, 1, BINS + 1).double()[1:-1])

    def number(similarity: Tensor, first: Tensor, second: Tensor) -> Tensor:
        equal = (bank.ids[first] == bank.ids[second]).long()
        place = (bank.position[second].clamp_min(1).float().log2() / 2).long().clamp_max(5)
        return (torch.bucketize(similarity.double(), edges) * 2 + equal) * 6 + place

    return number(same, *pairs.same), number(different, *pairs.different)


def matched_difference(
    same: tuple[Tensor, Tensor], different: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`sum_b w_b (E[phi | same, b] - E[phi | different, b])`.

    Args: each (phi fp64 `[L, P]`, bin int64 `[P]`); weights: of the pairs, fp64 `[P]` each. Returns fp64 `[L]`.
    """
    bins = int(max(same[1].max(), different[1].max())) + 1
    means, counts = [], []
    for place, (phi, number) in enumerate((same, different)):
        weight = torch.ones(len(number), dtype=torch.float64) if weights is None else weights[place]
        count = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, weight)
        total = torch.zeros(len(phi), bins, dtype=torch.float64).index_add_(1, number, phi * weight)
        means.append(total / count.clamp_min(1e-12))
        counts.append(count)
    share = torch.minimum(*counts)
    return ((means[0] - means[1]) * share).sum(-1) / share.sum().clamp_min(1e-12)


def interval(
    same: tuple[Tensor, Tensor], different: tuple[Tensor, Tensor], documents: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """95 % interval of `matched_difference` for each layer and for their mean, bootstrap over documents: `[L + 1, 2]`.

    A pair of two documents counts as often as both were drawn.

    Args: documents: number from 0 of the `same` pairs' document, and of both of the `different` pairs.
    """
    generator = torch.Generator().manual_seed(0)
    count = int(max(part.max() for part in documents)) + 1
    found = []
    for _ in range(BOOTSTRAPS):
        drawn = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count).double()
        weights = (drawn[documents[0]], drawn[documents[1]] * drawn[documents[2]])
        found.append(matched_difference(same, different, weights))
    values = torch.stack(found)  # [R, L]
    values = torch.cat([values, values.mean(-1, keepdim=True)], dim=-1)
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T


def siai(bank: Bank, meaning: Any, rates: list[Tensor]) -> dict[str, Any]:
    """SIAI of all layers with its intervals, by bands of distance, and how much of phi meaning explains.

    Args: meaning: similarity of two lists of rows; rates: p, fp64 `[F]` a layer.
    Returns: `siai`, `interval` (null with fewer than `MIN_DOCUMENTS` documents), `far`, `bands` (by first distance),
    each a
        mean over layers, and `layers` with `siai` and `siai_interval`. Empty with a single document.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for near in (True, False):
        pairs = draw_pairs(bank, near, generator)
        if not len(pairs.same[0]) or not len(pairs.different[0]):
            continue
        number, other = bins_of(bank, pairs, meaning(*pairs.same), meaning(*pairs.different))
        phi, phi_other = (
            torch.stack([bank.overlaps(layer, p, *kind) for layer, p in enumerate(rates)])
            for kind in (pairs.same, pairs.different)
        )
        same, different = (phi, number), (phi_other, other)
        value = matched_difference(same, different)
        if not near:
            found["far"] = value.mean().item()
            continue
        _, document = bank.document.unique(return_inverse=True)
        rows: list[dict[str, Any]] = [{"siai": one, "siai_interval": None} for one in value.tolist()]
        found |= {"siai": value.mean().item(), "interval": None, "layers": rows}
        if int(document.max()) + 1 >= MIN_DOCUMENTS:
            places = (document[pairs.same[0]], document[pairs.different[0]], document[pairs.different[1]])
            *each, found["interval"] = interval(same, different, places).tolist()
            for row, ends in zip(rows, each, strict=True):
                row["siai_interval"] = ends
        distance = pairs.same[0] - pairs.same[1]
        found["bands"] = {}
        for low, high in pairwise(BANDS):
            inside = (distance >= low) & (distance < high)
            if inside.any():
                part = matched_difference((phi[:, inside], number[inside]), different)
                found["bands"][str(low)] = part.mean().item()
    return found
