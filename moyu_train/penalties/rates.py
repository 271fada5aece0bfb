"""Penalties on how soft masks depart, token by token, from each neuron's own rate, and what they share between tokens.

The rates are measured before training (`begin`), and follow it: after each optimizer step they move by `1 - memory`
towards that step's, summed over its micro-batches and processes. Within a step they stand still and have no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, Field
from torch import Tensor

from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.masking import Masking
from moyu_train.penalties.soft import SoftOptions, SoftPenalty

LAGS = (1, 2, 4, 8, 16, 32, 64)


class RateOptions(SoftOptions):
    memory: float = Field(0.9, ge=0, lt=1, description="share of the measured rates that a step leaves as it was")


class RatePenalty(SoftPenalty):
    """A penalty on `x = z - p`, z the soft mask, p fp32 `[F]` a layer; `moments` is what else a method streams."""

    Options: ClassVar[type[BaseModel]] = RateOptions

    moments = 0

    def __init__(self, options: Any, scales: list[Tensor], rules: list[Rule], density: float) -> None:
        super().__init__(options, scales, rules, density)
        shape = (1 + self.moments, *scales[0].shape)
        self.measured = [torch.zeros(shape, device=scale.device) for scale in scales]  # rates, then the method's own
        for measured in self.measured:
            measured[0] = density
        self._sums = [torch.zeros(2, *shape, dtype=torch.float64, device=scale.device) for scale in scales]
        self._mask = torch.empty(0)

    def rate(self, layer: int) -> Tensor:
        """p, how often each neuron of a layer is on, fp32 `[F]`."""
        return self.measured[layer][0]

    def centred(self, layer: int, a: Tensor, real: Tensor | None) -> Tensor:
        """x of whole sequences, fp32 `[B, T, F]`, 0 in padding."""
        z = self.sequence(layer, a, real)
        self._mask = z.detach()
        x = z - self.rate(layer)
        return x if real is None else x * real[..., None]

    def observed(self, layer: int, x: Tensor, real: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """For each of `moments`: its sum over the tokens `[F]`, and their number. x is without a gradient."""
        return ()

    def count(self, layer: int, real: Tensor | None) -> None:
        z = self._mask
        real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if real is None else real
        x = (z - self.rate(layer)) * real[..., None]
        for place, (total, number) in enumerate([(z.sum((0, 1)), real.sum()), *self.observed(layer, x, real)]):
            self._sums[layer][0, place] += total
            self._sums[layer][1, place] += number

    def step(self) -> None:
        self._take(self.options.memory)  # type: ignore[attr-defined]

    def _take(self, memory: float) -> None:
        for layer, sums in enumerate(self._sums):
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            before, (total, number) = self.measured[layer], sums
            found = (total / number.clamp_min(1)).to(before.dtype)
            self.measured[layer] = torch.where(number > 0, found.lerp(before, memory), before)
            sums.zero_()

    @torch.no_grad()
    def begin(self, model: Any, windows: Tensor) -> None:
        """The rates, and then what is measured with them."""
        for _ in range(2 if self.moments else 1):
            self._forwards(model, windows, lambda number, layer, x: self.count(layer, None))
            self._take(0.0)

    def _forwards(self, model: Any, windows: Tensor, see: Callable[[int, int, Tensor], None]) -> None:
        """Run the windows one by one; `see` gets each one's number, the layer, and x `[T, F]`."""

        def observe(layer: int, a: Tensor, expert: int | None) -> None:
            see(number, layer, self.centred(layer, a.view(1, -1, a.shape[-1]), None)[0])

        with Masking(find_blocks(model), observe, inputs=self.needs_input, rules=self.rules) as masking:
            self.input = masking.input
            for number, ids in enumerate(windows):  # noqa: B007 - `observe` reads it
                model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.measured = [measured.to(device) for measured in self.measured]
        self._sums = [sums.to(device) for sums in self._sums]

    def state(self) -> dict[str, Tensor]:
        return {f"measured.{layer}": measured for layer, measured in enumerate(self.measured)}

    def load(self, state: dict[str, Tensor]) -> None:
        self.measured = [state[f"measured.{layer}"].to(old) for layer, old in enumerate(self.measured)]
