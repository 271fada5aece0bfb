"""Predictability: what of a token's soft mask a small linear map of the FFN's input cannot foresee.

With x = z - p and the forecast y, a token costs `sum_i (x_i - y_i)^2 / sum_i p_i (1 - p_i)`: the unforeseen share of
the masks' variance. The gradient goes through z alone. y = C f, f the first `rank` principal directions of the
normalised input, white and fixed as they were before training; so C = E[x f] is the least-squares map, streamed as the
rates are (no second optimizer, no second backward). The squared error in place of a cross-entropy, whose gradient in
its target does not vanish where forecast and mask agree, and drives masks to be always or never on.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, Field
from torch import Tensor

from moyu_train.penalties.rates import RateOptions, RatePenalty


class PredictabilityOptions(RateOptions):
    rank: int = Field(32, ge=1, description="of the map that foresees the mask")


class Predictability(RatePenalty):
    name = "predictability"
    Options: ClassVar[type[BaseModel]] = PredictabilityOptions
    needs_input = True

    def __init__(self, options: Any, scales: list[Tensor], rules: list[Rule], density: float) -> None:
        self.moments = options.rank
        super().__init__(options, scales, rules, density)
        self._basis: list[Tensor] = []  # fp32 [1 + D, R] a layer: of 1 and the normalised input, to white features

    def features(self, layer: int) -> Tensor:
        """fp32 `[..., R]`, without a gradient."""
        with torch.no_grad(), torch.autocast(self._basis[layer].device.type, enabled=False):
            basis = self._basis[layer]
            return _normalised(self.input(layer)) @ basis[1:] + basis[0]

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        x, p = self.centred(layer, a, real), self.rate(layer)
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            forecast = (self.features(layer) @ self.measured[layer][1:]).view_as(x)
        value = (x - forecast).square().sum(-1) / (p * (1 - p)).sum().clamp_min(1e-6)
        return value if real is None else value * real

    def observed(self, layer: int, x: Tensor, real: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        with torch.autocast(x.device.type, enabled=False):
            sums = self.features(layer).flatten(0, -2).T @ x.flatten(0, 1)  # [R, F]; x is 0 in padding
        return [(row, real.sum()) for row in sums]

    @torch.no_grad()
    def begin(self, model: Any, windows: Tensor) -> None:
        """Also the basis: the range of the inputs' second moment, then their spread in it."""
        hidden = model.get_input_embeddings().weight.shape[1]
        start = torch.randn(hidden, self.moments, generator=torch.Generator().manual_seed(0))
        ranges = [start.to(scale.device) for scale in self.scales]
        for _ in range(2):  # twice over the text: subspace iteration
            sums = [torch.zeros_like(one) for one in ranges]

            def spread(number: int, layer: int, x: Tensor) -> None:
                v = _normalised(self.input(layer)).flatten(0, -2)
                sums[layer] += v.T @ (v @ ranges[layer])  # noqa: B023 - called within this round

            self._forwards(model, windows, spread)
            ranges = [torch.linalg.qr(total)[0] for total in sums]
        size = 1 + self.moments
        moments = [torch.zeros(size, size, dtype=torch.float64, device=one.device) for one in ranges]

        def look(number: int, layer: int, x: Tensor) -> None:
            g = _normalised(self.input(layer)).flatten(0, -2) @ ranges[layer]
            g = torch.cat([torch.ones_like(g[:, :1]), g], dim=1).double()
            moments[layer] += g.T @ g

        self._forwards(model, windows, look)
        self._basis = [_white(one, moment / moment[0, 0]) for one, moment in zip(ranges, moments, strict=True)]
        super().begin(model, windows)

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._basis = [basis.to(device) for basis in self._basis]


def _normalised(x: Tensor) -> Tensor:
    """fp32 `[..., D]` of mean square 1 a token: the first token's, often huge, is not all there is."""
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=1e-12)


def _white(directions: Tensor, moment: Tensor) -> Tensor:
    """A basis fp32 `[1 + D, R]` of features of mean 0 and variance 1.

    Args: directions: `[D, R]`; moment: second moment `[1 + R, 1 + R]` of 1 and what they give.
    """
    mean = moment[0, 1:]
    covariance = moment[1:, 1:] - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(covariance)
    turn = vectors * values.clamp_min(1e-6 * values.max()).rsqrt()
    return torch.cat([-(mean @ turn)[None], directions.double() @ turn]).float()
