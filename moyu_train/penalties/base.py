"""What a penalty gets, and what it gives: one fp32 value a token, which the trainer sums and divides."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel
from torch import Tensor

from moyu_train.errors import MoyuError

# peek(ids, real, look): the student on other tokens, under its masks and without a gradient; look(layer, a) sees each
# block's activation before the mask. Returns the logits.
Peek = Callable[[Tensor, Tensor | None, Callable[[int, Tensor], None]], Tensor]


class Penalty:
    """A penalty on the activations of FFN blocks, taken before the mask.

    Args:
        options: of the method's `Options`.
        scales: fp32 `[F]` a layer (penalties/scale.py): `abs(a) * scale` has a mean square of 1.
        rules: of the sparsifier, live: their thresholds move, by `control`, between optimizer steps.
        density: the share of neurons to keep.
    """

    name: ClassVar[str]
    Options: ClassVar[type[BaseModel]]
    needs_threshold: ClassVar[bool] = False  # a rule with a threshold on the activation
    needs_input: ClassVar[bool] = False  # `input` then gives a layer's FFN input `[..., D]`, without its gradient
    input: Callable[[int], Tensor]

    def __init__(self, options: BaseModel, scales: list[Tensor], rules: list[Rule], density: float) -> None:
        self.options, self.scales, self.rules, self.density = options, scales, rules, density

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        """Values `[...]` of `a` `[..., F]`; real: bool `[B, T]`, where a token is no padding (None: everywhere)."""
        raise NotImplementedError

    def begin(self, model: Any, windows: Tensor) -> None:
        """Before training: measure on int64 `[N, T]` what the penalty compares with."""

    def prepare(self, ids: Tensor | None, real: Tensor | None, peek: Peek) -> None:
        """Before each training forward: its tokens, int64 `[B, T]`, where they are no padding, bool `[B, T]`."""

    def count(self, layer: int, real: Tensor | None) -> None:
        """After the penalty of each layer of a training forward, but not of a recompute: add to its statistics."""

    def step(self) -> None:
        """At the end of an optimizer step: take the statistics, summed over processes, for the next one."""

    def to(self, device: torch.device) -> None:
        """Move all tensors to a device."""
        self.scales = [scale.to(device) for scale in self.scales]

    def state(self) -> dict[str, Tensor]:
        """What a training checkpoint keeps of the statistics."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint's `state`."""


def not_prepared(name: str) -> MoyuError:
    """For a penalty that looks at other text and has been given no tokens."""
    return MoyuError(f"penalty {name!r} looks at other text too and was not given the tokens; pass `ids` to `armed`")
