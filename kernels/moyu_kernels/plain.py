"""The sparse plain FFN: it stands where up does, and down's place passes on what it computes.

Some families have the projections of a plain FFN among the attention's in a decoder layer (OPT), so no module is the
FFN alone. In the places of up, activation and down of any of them stand the whole FFN and two that do nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

from .modules import lay_out
from .sparse_ffn import SparseFFN


class PassedOn(nn.Module):
    """In the place of a down projection, whose parameters it keeps: hands on its input, which is the FFN's output.

    Args: transposed: whether the weight is `[D, F]`, of which the ops read columns.
    """

    def __init__(self, weight: Any, bias: Any, transposed: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self._transposed = weight, bias, transposed
        self.register_load_state_dict_post_hook(lay_out)

    def _lay_out(self) -> None:
        if self.weight is not None:
            weight = self.weight.data
            self.weight.data = weight.t().contiguous().t() if self._transposed else weight.contiguous()

    def forward(self, y: Tensor) -> Tensor:
        return y


class SparsePlainFFN(SparseFFN):
    """`SparseFFN` of `down(act(up(x)))`, with biases or without, in the place of up; `passed_on` goes to down's.

    Args: projections: up and down, linear layers or transformers' Conv1D, whose weights are transposed. The others as
        there.
    """

    gated = False
    apart = True  # down's weight is a parameter of another module, which may move by itself
    weight: Tensor
    bias: Tensor | None

    def _shape(self, projections: dict[str, Any]) -> tuple[int, int]:
        self._straight = [isinstance(up_or_down, nn.Linear) for up_or_down in projections.values()]
        self._straight[1] = not self._straight[1]
        up, down = self._neuron_rows([projection.weight for projection in projections.values()])
        if up.shape != down.shape:
            shapes = ", ".join(f"{name} {list(projection.weight.shape)}" for name, projection in projections.items())
            raise ValueError(f"{shapes} are not the projections of one plain FFN")
        return up.shape[0], up.shape[1]

    def _neuron_rows(self, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """up and down as `[F, D]`: the weights of linear layers are `[out, in]`, of Conv1D `[in, out]`."""
        up, down = (w if straight else w.t() for w, straight in zip(weights, self._straight, strict=True))
        return up, down

    def _store(self, projections: dict[str, Any]) -> None:
        up, down = projections.values()
        self.weight, self.bias = up.weight, up.bias
        # In a tuple: its parameters are those of another place.
        self._passed_on = (PassedOn(down.weight, down.bias, transposed=not self._straight[1]),)
        self.register_load_state_dict_post_hook(lay_out)

    @property
    def passed_on(self) -> PassedOn:
        """What has to stand in the place of down."""
        return self._passed_on[0]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """up and down, each `[F, D]` with contiguous rows."""
        return self._neuron_rows([self.weight, self.passed_on.weight])

    def _keep(self, rows: Sequence[Tensor]) -> None:
        self.weight.data, self.passed_on.weight.data = self._neuron_rows([*rows])  # which is its own inverse

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """Biases of up `[F]` and down `[D]`."""
        return self.bias, self.passed_on.bias

    def _front(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return functional.linear(x, self.weights[0], self.bias), None

    def _down(self, a: Tensor) -> Tensor:
        return functional.linear(a, self.weights[1].t(), self.passed_on.bias)


def install(module: nn.Module, up: str, act: str, down: str, ffn: SparsePlainFFN) -> None:
    """Put a sparse plain FFN in the places of a block's up, activation and down."""
    for name, part in ((up, ffn), (act, nn.Identity()), (down, ffn.passed_on)):
        setattr(module, name, part)
