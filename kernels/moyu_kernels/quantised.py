"""The sparse FFN block on int8 weights: each row that is read has half the bytes of bf16."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from .modules import SparseGatedFFN, gate_up_down
from .ops.ffn.int8 import dequantise_rows, quantise_down, quantise_rows

PART = 2**22  # weights that prefill widens at a time, so that no second copy of a matrix is kept


class Int8GatedFFN(SparseGatedFFN):
    """`SparseGatedFFN` on the projections' weights rounded to int8, with one fp32 scale a row, and one a column of down
    (`quantise_rows`, `quantise_down`).

    The op takes the rows as they are; prefill widens them in parts to x's dtype. The projections are let go. The state
    dict is the stock one and holds what the rows stand for, in the projections' dtype.

    Raises: ValueError also for weights that are not finite.
    """

    scales: Tensor
    columns: Tensor
    gate_codes: Tensor
    up_codes: Tensor
    down_codes: Tensor

    def _store(self, projections: dict[str, Any]) -> None:
        self._names = tuple(projections)
        gate, up, down = gate_up_down([projection.weight.detach() for projection in projections.values()])
        self._dtype = gate.dtype
        *down_rows, columns = quantise_down(down.t())
        rows = [quantise_rows(gate), quantise_rows(up), down_rows]
        for part, (codes, _) in zip(("gate", "up", "down"), rows, strict=True):
            self.register_buffer(f"{part}_codes", codes.contiguous(), persistent=False)
        self.register_buffer("scales", torch.stack([scale for _, scale in rows]), persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Codes of gate, up and down, each contiguous int8 `[F, D]`."""
        return self.gate_codes, self.up_codes, self.down_codes

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None]:
        """`scales` fp32 `[3, F]`, `columns` fp32 `[D]`."""
        return self.scales, self.columns

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = (
            torch.cat([functional.linear(x, dequantise_rows(codes, scale, x.dtype)) for codes, scale in parts], dim=-1)
            for parts in (self._parts(self.gate_codes, 0), self._parts(self.up_codes, 1))
        )
        return gate, up

    def _down(self, a: Tensor) -> Tensor:
        count = max(PART // self.neurons, 1)
        parts = zip(self.down_codes.split(count, dim=1), self.columns.split(count), strict=True)
        widened = (dequantise_rows(codes, self.scales[2], a.dtype, columns) for codes, columns in parts)
        return torch.cat([functional.linear(a, rows.t()) for rows in widened], dim=-1)

    def _parts(self, codes: Tensor, which: int) -> Iterator[tuple[Tensor, Tensor]]:
        count = max(PART // self.hidden, 1)
        return zip(codes.split(count), self.scales[which].split(count), strict=True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        gate, up, down = (
            dequantise_rows(codes, scale, self._dtype, columns)
            for codes, scale, columns in zip(self.weights, self.scales, (None, None, self.columns), strict=True)
        )
        front = (gate, up) if len(self._names) == 3 else (torch.cat([gate, up]),)
        for name, weight in zip(self._names, (*front, down.t().contiguous()), strict=True):
            destination[f"{prefix}{name}.weight"] = weight
