"""The sparse gated FFN: it stands where the block's module does."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as functional
from torch import Tensor

from .modules import lay_out
from .sparse_ffn import SparseFFN


def gate_up_down(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up `[F, D]` and down of a gated FFN's weights: of three, or of two, the first of which, `[2F, D]`, holds
    gate above up. Nothing is copied."""
    *front, down = weights
    gate, up = front if len(front) == 2 else front[0].chunk(2)
    return gate, up, down


class SparseGatedFFN(SparseFFN):
    """`SparseFFN` of `down(act(gate(x)) * up(x))`, in place of the block's module.

    Args: projections: gate, up and down, in this order, or gate and up in one and down (`gate_up_down`); without
        biases. The others as there.
    """

    gated = True

    def _shape(self, projections: dict[str, Any]) -> tuple[int, int]:
        gate, up, down = gate_up_down([projection.weight for projection in projections.values()])
        if up.shape != gate.shape or down.shape != gate.shape[::-1]:
            shapes = ", ".join(f"{name} {list(projection.weight.shape)}" for name, projection in projections.items())
            raise ValueError(f"{shapes} are not the projections of one gated FFN, [F, D], [F, D] and [D, F]")
        for name, projection in projections.items():
            if projection.bias is not None:
                raise ValueError(f"{name} has a bias, which the op does not add; mask this block at its seam instead")
        return gate.shape[0], gate.shape[1]

    def _store(self, projections: dict[str, Any]) -> None:
        self._names = tuple(projections)
        self.apart = len(projections) == 2  # gate and up are one parameter
        for name, projection in projections.items():
            self.add_module(name, projection)
        self.register_state_dict_post_hook(_apart)
        self.register_load_state_dict_post_hook(lay_out)

    def _keep(self, rows: Sequence[Tensor]) -> None:
        *front, down = (getattr(self, name).weight for name in self._names)
        down.data = rows[-1].t()
        if not self.apart:
            for parameter, matrix in zip(front, rows[:-1], strict=True):
                parameter.data = matrix

    @property
    def weights(self) -> tuple[Tensor, ...]:
        projections = [getattr(self, name) for name in self._names]
        for name, projection in zip(self._names, projections, strict=True):
            if "base_layer" in projection._modules:
                raise ValueError(
                    f"{name} of a sparse FFN holds an adapter (peft), which its op does not read; adapt the attention "
                    "alone, or train adapters on the dense model under its masks (`moyu finetune`), merge and export"
                )
        gate, up, down = gate_up_down([projection.weight for projection in projections])
        return gate, up, down.t()

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return None, None

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up, _ = self.weights
        return functional.linear(x, gate), functional.linear(x, up)

    def _down(self, a: Tensor) -> Tensor:
        return functional.linear(a, self.weights[-1].t())


def _apart(block: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Weights that lie side by side as tensors of their own, which is how they are saved."""
    for name in block._names:
        state[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"].contiguous()
