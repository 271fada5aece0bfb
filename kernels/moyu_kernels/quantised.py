"""The sparse FFN blocks on int8 weights: each row that is read has half the bytes of bf16."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as functional
from torch import Tensor

from .gated import SparseGatedFFN, gate_up_down
from .ops.ffn.int8 import dequantise_rows, quantise_down, quantise_rows
from .plain import PassedOn, SparsePlainFFN
from .sparse_ffn import SparseFFN

PART = 2**22  # weights that prefill widens at a time, so that no second copy of a matrix is kept


class Int8Rows(SparseFFN):
    """`SparseFFN` on the projections' weights rounded to int8, with one fp32 scale a row, and one a column of down
    (`quantise_rows`, `quantise_down`).

    The op takes the rows as they are; prefill widens them in parts to x's dtype. The weights are let go. The state dict
    is the stock one and holds what the rows stand for, in the dtype that the projections would have.

    Raises: ValueError also for weights that are not finite.
    """

    apart = False
    scales: Tensor
    columns: Tensor

    def _round(self, rows: list[Tensor]) -> None:
        """Keep the codes of gate (where there is one), up and down `[F, D]`."""
        *front, down = (weight.detach() for weight in rows)
        self._dtype = down.dtype
        *down_rows, columns = quantise_down(down)
        rounded = [*map(quantise_rows, front), down_rows]
        self._codes = ("gate_codes", "up_codes", "down_codes")[-len(rows) :]
        for name, (codes, _) in zip(self._codes, rounded, strict=True):
            self.register_buffer(name, codes, persistent=False)
        self.register_buffer("scales", torch.stack([scale for _, scale in rounded]), persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def input_dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Codes of gate (where there is one), up and down, each int8 `[F, D]` with contiguous rows."""
        return tuple(getattr(self, name) for name in self._codes)

    def _keep(self, rows: Sequence[Tensor]) -> None:
        for name, codes in zip(self._codes, rows, strict=True):
            setattr(self, name, codes)

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """`scales` fp32 `[matrices, F]`, `columns` fp32 `[D]`."""
        return self.scales, self.columns

    def widened(self) -> list[Tensor]:
        """What the rows of each matrix stand for, `[F, D]` in the projections' dtype."""
        columns = [None] * (len(self._codes) - 1) + [self.columns]
        parts = zip(self.weights, self.scales, columns, strict=True)
        return [dequantise_rows(codes, scale, self._dtype, columns) for codes, scale, columns in parts]

    def _times(self, x: Tensor, which: int) -> Tensor:
        """x `[..., D]` times the rows of a matrix in front of the activation."""
        parts = self._parts(self.weights[which], self.scales[which])
        return torch.cat([functional.linear(x, dequantise_rows(*part, x.dtype)) for part in parts], dim=-1)

    def _down(self, a: Tensor) -> Tensor:
        count = max(PART // self.neurons, 1)
        parts = zip(self.weights[-1].split(count, dim=1), self.columns.split(count), strict=True)
        widened = (dequantise_rows(codes, self.scales[-1], a.dtype, columns) for codes, columns in parts)
        return torch.cat([functional.linear(a, rows.t()) for rows in widened], dim=-1)

    def _parts(self, codes: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        count = max(PART // self.hidden, 1)
        return zip(codes.split(count), scale.split(count), strict=True)


class Int8GatedFFN(Int8Rows, SparseGatedFFN):
    """`Int8Rows` of a gated FFN."""

    def _store(self, projections: dict[str, Any]) -> None:
        self._names = tuple(projections)
        gate, up, down = gate_up_down([projection.weight for projection in projections.values()])
        self._round([gate, up, down.t()])

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._times(x, 0), self._times(x, 1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        gate, up, down = self.widened()
        front = (gate, up) if len(self._names) == 3 else (torch.cat([gate, up]),)
        for name, weight in zip(self._names, (*front, down.t().contiguous()), strict=True):
            destination[f"{prefix}{name}.weight"] = weight


class Int8PlainFFN(Int8Rows, SparsePlainFFN):
    """`Int8Rows` of a plain FFN, with biases as they were."""

    def _store(self, projections: dict[str, Any]) -> None:
        up, down = projections.values()
        self._round([*self._neuron_rows([up.weight, down.weight])])
        self.bias = up.bias
        self._passed_on = (Int8PassedOn(self, down.bias),)

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """Biases of up `[F]` and down `[D]`, `scales` fp32 `[2, F]`, `columns` fp32 `[D]`."""
        return self.bias, self.passed_on.bias, self.scales, self.columns

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        g = self._times(x, 0)
        return g if self.bias is None else g + self.bias, None

    def _down(self, a: Tensor) -> Tensor:
        y, bias = super()._down(a), self.passed_on.bias
        return y if bias is None else y + bias

    def stock_weights(self) -> list[Tensor]:
        """What the rows of up and down stand for, as their projections stored them."""
        return [weight.contiguous() for weight in self._neuron_rows(self.widened())]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.stock_weights()[0]


class Int8PassedOn(PassedOn):
    """`PassedOn` of a down projection whose rows `ffn` holds in int8."""

    def __init__(self, ffn: Int8PlainFFN, bias: Any) -> None:
        super().__init__(None, bias)
        self._ffn = (ffn,)  # in a tuple: it is the module of another place

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self._ffn[0].stock_weights()[1]
