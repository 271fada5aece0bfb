"""Predictor gap: what a cheap map needs to know to foresee a token's active neurons.

Reduced-rank regressions of `sqrt(n)` of equal rank, fitted on some documents and judged on the others, that see
  `token`: the token's input embedding alone;
  `input`: the FFN's normalised input x_t, as predictors do;
  `previous`: the input of the FFN block before it, a layer of look-ahead;
  `past`: x_t and a decaying mean of the inputs before it (predictors/history.py).
Each selects the `SELECTED` neurons of highest score; the figure is the share of the contribution that these hold, the
oracle's being that of the largest. `input - token` is what history settles (the residual stream has it), `past - input`
what memory of one's own would add (MOYU's history-related uncertainty as usable information, arXiv 2406.12569).
"""

from typing import Any

import torch
from moyu_kernels.ops.ffn.naive import lowrank_scores
from moyu_kernels.ops.ffn.simulated import history_scores
from torch import Tensor

from moyu_train.analysis.subject import SKIP, Seen, Subject, Window, read
from moyu_train.predictors.history import History
from moyu_train.predictors.lowrank import LowRank

RANK, DECAY = 32, 0.8
SELECTED = 0.3  # of the neurons
LAYERS = 4  # that are measured, evenly spread: sums of one take some `4 D (5 D + 5 F)` bytes
KINDS = ("token", "input", "previous", "past")


class Gap:
    """One pass fits (`see`), a second one over other sequences judges (`judge`)."""

    def __init__(self, subject: Subject) -> None:
        count = len(subject.blocks)
        self.chosen = sorted({round(i * (count - 1) / max(LAYERS - 1, 1)) for i in range(LAYERS)} - {0})
        device = subject.embeddings().device
        rank = min(RANK, *(subject.blocks[layer].hidden for layer in self.chosen)) if self.chosen else RANK
        plain, remembering = LowRank.Options(rank=rank), History.Options(rank=rank, decay=DECAY)
        self.fits: dict[int, dict[str, Any]] = {
            layer: {
                kind: History(remembering, subject.blocks[layer], device)
                if kind == "past"
                else LowRank(plain, subject.blocks[layer], device)
                for kind in KINDS
            }
            for layer in self.chosen
        }
        self.embeddings = subject.embeddings()
        self.solved: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.sums = {layer: torch.zeros(len(KINDS) + 1, 2, dtype=torch.float64) for layer in self.chosen}
        self._before: Tensor | None = None

    def _views(self, window: Window, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """n `[T, F]` and what each kind sees `[T, D]`, of one layer."""
        assert seen.x is not None
        n, x = seen.n.reshape(-1, seen.n.shape[-1]), seen.x.reshape(-1, seen.x.shape[-1]).float()
        before, self._before = self._before, x
        token = self.embeddings[window.ids.to(self.embeddings.device)].float()
        return n, {"token": token, "input": x, "previous": x if before is None else before, "past": x}

    def see(self, window: Window, seen: Seen) -> None:
        n, views = self._views(window, seen)
        for kind, fit in self.fits.get(seen.layer, {}).items():
            start = SKIP - 1 if kind == "past" else SKIP  # it leaves its first token out
            fit.observe(views[kind][start:], n[start:])

    def judge(self, window: Window, seen: Seen) -> None:
        n, views = self._views(window, seen)
        if seen.layer not in self.fits:
            return
        if seen.layer not in self.solved:
            solved = {kind: fit.solve() for kind, fit in self.fits[seen.layer].items()}
            self.solved[seen.layer] = {
                kind: {name: tensor.to(n.device) for name, tensor in found.items()} for kind, found in solved.items()
            }
        count = max(round(SELECTED * n.shape[-1]), 1)
        whole = n.sum(-1).clamp_min(1e-30)
        for place, kind in enumerate((*KINDS, "oracle")):
            if kind == "oracle":
                scores = n
            else:
                tensors = self.solved[seen.layer][kind].values()
                scores = (history_scores if kind == "past" else lowrank_scores)(views[kind], *tensors)
            held = (n.gather(-1, scores.topk(count, dim=-1).indices).sum(-1) / whole)[SKIP:]
            self.sums[seen.layer][place] += torch.stack([held.sum(), held.new_tensor(len(held))]).double().cpu()

    def layers(self, count: int) -> list[dict[str, Any]]:
        """`gap` of each measured layer, null of the others."""
        rows: list[dict[str, Any]] = [{"gap": None} for _ in range(count)]
        for layer, sums in self.sums.items():
            values = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
            rows[layer]["gap"] = dict(zip((*KINDS, "oracle"), values, strict=True))
        return rows


def measure_gap(subject: Subject, sequences: list[Window]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Means over the measured layers, with `history` (input less token) and `extra` (past less input); and their rows.

    Nulls with fewer than two documents, or where all blocks share the first layer.
    """
    gap = Gap(subject)
    documents = sorted({window.document for window in sequences})
    fitted = [window for window in sequences if documents.index(window.document) % 2 == 0]
    judged = [window for window in sequences if documents.index(window.document) % 2]
    if not judged or not gap.chosen:
        return None, [{"gap": None} for _ in subject.blocks]
    read(subject, fitted, gap.see, "predictor gap, fit", inputs=True)
    read(subject, judged, gap.judge, "predictor gap", inputs=True)
    rows = gap.layers(len(subject.blocks))
    names = (*KINDS, "oracle")
    means = {name: sum(rows[layer]["gap"][name] for layer in gap.chosen) / len(gap.chosen) for name in names}
    differences = {"history": means["input"] - means["token"], "extra": means["past"] - means["input"]}
    return {**means, **differences, "rank": gap.fits[gap.chosen[0]]["input"].options.rank}, rows
