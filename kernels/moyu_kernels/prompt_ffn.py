"""The sparse FFN block under one mask for a whole sequence, taken from its first tokens (prompt.py)."""

import logging
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from .gated import SparseGatedFFN
from .modules import MAX_ROWS
from .ops import cpu
from .ops.ffn.naive import pack_mask
from .plain import SparsePlainFFN
from .prompt import PromptState
from .quantised import Int8GatedFFN, Int8PlainFFN
from .rules import Rule
from .sparse_ffn import SparseFFN, activation

logger = logging.getLogger(__name__)


class PromptFFN(SparseFFN):
    """`SparseFFN` under a rule that keeps by the first `rule.prompt` tokens of a sequence. For inference only.

    These tokens run dense matmuls and are watched; then a step of one token for each of up to 8 sequences runs the op
    on the neurons kept by any of them, each sequence under its own mask. On the backend "cpu" the rows of these neurons
    are first gathered, once a sequence, so that steps read them in one stream: their share of the FFN's memory once
    more. Elsewhere the op picks the rows from the one copy. More tokens or sequences run dense matmuls under the mask.

    Whoever calls the block says where sequences begin: `watch_sequences`, or `state.begin()`.

    Args: rule: `prompt_topk` or `prompt_threshold` on the stock gate and up; the others as there, mode "rule" or
        "dense".

    Raises: ValueError as there.
    """

    mask: Tensor
    state: PromptState

    def __init__(
        self, projections: dict[str, Any], act: str, rule: Rule, mode: str = "rule", backend: str = "cpu"
    ) -> None:
        self.prompt_rule, self.state = rule, PromptState(rule.prompt)
        self._rows: list[Tensor] = []
        self._vectors: list[Tensor | None] = []
        super().__init__(projections, act, rule.threshold, [], mode, backend)
        mask = torch.zeros(self.neurons, dtype=torch.uint8, device=self.threshold.device)
        self.register_buffer("mask", mask, persistent=False)

    def set_mode(self, mode: str, backend: str | None = None) -> Self:
        before = getattr(self, "backend", None)
        super().set_mode(mode, backend)
        self.state.active = mode != "dense"
        # The naive op multiplies dropped rows too, so it must not see those that were never written.
        self._gathers = self.backend == "cpu" and cpu.load()
        if before != self.backend and self.state.complete:
            self._gather()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.state.begin()
        old, new = self._rows[:1], self.weights[0]
        if old and (old[0].dtype, old[0].device) != (new.dtype, new.device):
            self._rows = []
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, D]`, the next tokens of B sequences; returns the same shape and dtype."""
        if self.mode == "dense":
            return super().forward(x)
        if not self.state.complete or x.shape[:-1].numel() > MAX_ROWS or x.ndim != 3 or x.shape[1] > 1:
            return self._watch(x)
        self.state.check(x)
        weights, vectors = (self._rows, self._vectors) if self._gathers else (self.weights, self.vectors)
        rows, rest = len(x), ("threshold", 0, *vectors)
        x_rows = x.reshape(rows, self.hidden)
        y, counts = self._run(x_rows, *weights, self.no_threshold, self.act, [self.mask], *rest)
        selected, kept = counts.sum(0)
        self._count(rows, selected, kept)
        return y.view(x.shape)

    @torch.compiler.disable
    def _watch(self, x: Tensor) -> Tensor:
        """Dense matmuls under the mask, or of tokens that the mask is taken from."""
        g, u = self._front(x)
        a = activation(self.act)(g)
        a = a if u is None else a * u
        complete = self.state.complete
        keep = self.prompt_rule.mask(a, state=self.state)
        if self.state.complete and not complete:
            self._gather()
        kept = keep.sum()
        self._count(x.shape[:-1].numel(), kept, kept)
        return self._down(torch.where(keep, a, 0.0))

    @torch.no_grad()
    def _gather(self) -> None:
        """Make the masks of what was watched those of the next steps, all of them on the device."""
        keep = self.prompt_rule.prompt_keeps(self.state.statistic)[:, 0]
        if len(keep) > MAX_ROWS:
            logger.warning(
                "moyu: %d sequences at once run dense matmuls under their masks from the prompt, nothing is skipped; "
                "decode up to %d together",
                len(keep),
                MAX_ROWS,
            )
            return
        mask = pack_mask(keep)
        if not self._gathers:
            self.mask.copy_(mask)
            return
        if not self._rows:  # made once, since compiled steps hold on to them; memory is taken as rows are written
            size = (self.neurons, len(self.weights), self.hidden)
            self._rows = [*self.weights[0].new_empty(size).unbind(1)]  # as `side_by_side` has them
            self._vectors = list(self.vectors)
            self._vectors[::2] = [v if v is None else torch.empty_like(v) for v in self.vectors[::2]]
        index = mask.nonzero()[:, 0]
        self.mask.zero_()
        self.mask[: len(index)] = mask[index]
        for rows, weight in zip(self._rows, self.weights, strict=True):
            torch.index_select(weight, 0, index, out=rows[: len(index)])
        for gathered, values in zip(self._vectors[::2], self.vectors[::2], strict=True):
            if gathered is not None and values is not None:
                gathered[..., : len(index)] = values[..., index]

    @property
    def predictor(self) -> list[Tensor]:
        """What stands in a predictor's place: the mask of the steps, as `pack_mask` makes it."""
        return [self.mask]

    @property
    def names_neurons(self) -> bool:
        return self.mode != "dense"


class PromptGatedFFN(PromptFFN, SparseGatedFFN):
    """`PromptFFN` of a gated FFN."""


class PromptPlainFFN(PromptFFN, SparsePlainFFN):
    """`PromptFFN` of a plain FFN."""


class PromptInt8GatedFFN(PromptFFN, Int8GatedFFN):
    """`PromptFFN` of a gated FFN on int8 rows."""


class PromptInt8PlainFFN(PromptFFN, Int8PlainFFN):
    """`PromptFFN` of a plain FFN on int8 rows."""
