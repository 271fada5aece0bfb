"""Inertia by intervention: an unrelated prefix put in front of a text, and tokens with and without their sequence.

Prefix swap. The same `SPAN` tokens s after their own prefix h and after one h' of another document; phi of inertia.py,
zbar the mean mask of a prefix:
  `carry = phi(z_s(h'), zbar_h') - phi(z_s(h), zbar_h')`: how far the masks of s move towards a prefix that has nothing
  to do with it, once that stands in front;
  `topic = phi(z_s(h), zbar_h) - phi(z_s(h), zbar_h')`: how much closer they are to their own prefix than to the other.
  That is what a comparison within ordinary text shows; it holds shared meaning too, so `carry` is the one to read as
  inertia;
  `kept = phi(z_s(h), z_s(h'))`: the same token's masks under both prefixes.

The 2x2 probe (after the figures of MOYU, arXiv 2406.12569): O is the mean phi of all pairs of tokens of a text, in
{sentence, shuffled, random ids} x {one sequence, each token alone}; `index = (O(random, sequence) - O(random, alone)) /
(O(sentence, sequence) - O(sentence, alone))`: near 1, the pattern persists whatever the tokens mean; near 0, it is all
meaning. "Alone" is behind one sink token (the text's first), which also stands in front of the sequences: a token at
the very start is abnormally dense in most models, and would be compared with tokens that are not.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moyu_train.analysis.inertia import overlap
from moyu_train.analysis.subject import SKIP, Seen, Subject
from moyu_train.data import Documents
from moyu_train.progress import track

PREFIX, SPAN, SPANS = 96, 32, 12
PROBES = 12  # sequences of `SPAN` tokens
SMALL = 0.01  # of the index's denominator, below which it says nothing


def _masks(subject: Subject, ids: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """Active neurons of each layer, bool `[B, T, F]`, of ids int64 `[B, T]`."""
    found: dict[int, Tensor] = {}

    def see(seen: Seen) -> None:
        found[seen.layer] = seen.active.reshape(*ids.shape, -1).cpu()

    subject.run(ids, see, positions)
    return [found[layer] for layer in range(len(subject.blocks))]


def texts(documents: Documents, length: int) -> list[tuple[int, Tensor]]:
    """Windows of exactly `length` tokens with their documents, of all documents in turn."""
    by_document: dict[int, list[Tensor]] = {}
    for document, ids in documents.windows(length):
        if len(ids) == length:
            by_document.setdefault(document, []).append(ids)
    found: list[tuple[int, Tensor]] = []
    while any(by_document.values()):
        found += [(document, pieces.pop(0)) for document, pieces in by_document.items() if pieces]
    return found


def apart(pieces: list[tuple[int, Tensor]], count: int) -> list[Tensor]:
    """Up to `count` of them, in a circle in which neighbours are of different documents; none where that cannot be."""
    found: list[tuple[int, Tensor]] = []
    for document, ids in pieces:
        if len(found) < count and (not found or found[-1][0] != document):
            found.append((document, ids))
    while found and found[0][0] == found[-1][0]:
        found.pop()
    return [ids for _, ids in found]


def swap(subject: Subject, documents: Documents, rates: list[Tensor]) -> list[dict[str, float | None]]:
    """Per layer `carry`, `topic` and `kept`, means over `SPANS` texts; nulls where no two documents are long enough.

    Memory: packed in bools, the masks of one text and the mean masks of the prefixes.
    """
    pieces = apart(texts(documents, PREFIX + SPAN), SPANS)
    if not pieces:
        return [{"carry": None, "topic": None, "kept": None} for _ in rates]
    sums = torch.zeros(len(rates), 3, dtype=torch.float64)
    for i, own in track(list(enumerate(pieces)), f"analyze {subject.name}: prefix swap"):
        other = pieces[i - 1]
        runs = [_masks(subject, ids[None]) for ids in (own, other, torch.cat([other[:PREFIX], own[PREFIX:]]))]
        for layer, p in enumerate(rates):
            home, away, swapped = (run[layer][0].double() for run in runs)
            mean, other_mean = home[SKIP:PREFIX].mean(0), away[SKIP:PREFIX].mean(0)
            stay, moved = home[PREFIX:], swapped[PREFIX:]
            base = overlap(stay, other_mean, p)
            values = overlap(moved, other_mean, p) - base, overlap(stay, mean, p) - base, overlap(stay, moved, p)
            sums[layer] += torch.stack([value.mean() for value in values])
    return [dict(zip(("carry", "topic", "kept"), row, strict=True)) for row in (sums / len(pieces)).tolist()]


def mean_overlap(z: Tensor, p: Tensor) -> float:
    """Mean phi over all pairs of different tokens of one text, z `[T, F]`."""
    x = z.double() - p
    pairs = len(x) * (len(x) - 1)
    return ((x.sum(0).square() - x.square().sum(0)).sum() / (p * (1 - p)).sum().clamp_min(1e-12) / pairs).item()


def probe(subject: Subject, documents: Documents, rates: list[Tensor]) -> dict[str, Any]:
    """The 2x2: O of each cell, `<content>_<sequence|alone>`, means over layers, the index, and both per layer."""
    generator = torch.Generator().manual_seed(0)
    pieces = [ids for _, ids in texts(replace(documents, start=None), SPAN)]
    pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator)[:PROBES].tolist()]
    vocabulary = len(subject.embeddings())
    cells: dict[str, Tensor] = {}
    for piece in track(pieces, f"analyze {subject.name}: 2x2 probe"):
        contents = {
            "sentence": piece,
            "shuffled": piece[torch.randperm(SPAN, generator=generator)],
            "random": torch.randint(vocabulary, (SPAN,), generator=generator),
        }
        sink = documents.windows(2)[0][1][:1]
        for content, ids in contents.items():
            together = [z[0, 1:] for z in _masks(subject, torch.cat([sink, ids])[None])]
            rows = torch.stack([sink.expand(SPAN), ids], dim=1)
            positions = torch.stack([torch.zeros(SPAN, dtype=torch.int64), torch.arange(1, SPAN + 1)], dim=1)
            alone = [z[:, 1] for z in _masks(subject, rows, positions)] if content != "shuffled" else []
            for mode, masks in (("sequence", together), ("alone", alone)):
                if masks:
                    values = [mean_overlap(z, p) for z, p in zip(masks, rates, strict=True)]
                    name = f"{content}_{mode}"
                    cells[name] = cells.get(name, 0) + torch.tensor(values, dtype=torch.float64) / len(pieces)
    if not cells:
        return {"index": None, "layers": [{"index": None} for _ in rates]}
    gains = [cells[f"{content}_sequence"] - cells[f"{content}_alone"] for content in ("random", "sentence")]
    random, sentence = gains[0].mean().item(), gains[1].mean().item()
    return {
        **{name: value.mean().item() for name, value in cells.items()},
        "index": random / sentence if sentence > SMALL else None,
        "layers": [
            {"index": a / b if b > SMALL else None} for a, b in zip(*(gain.tolist() for gain in gains), strict=True)
        ],
    }
