"""Overlap residual: what neighbouring tokens' masks share beyond what their meaning accounts for.

With x = z - p, `phi(t, s) = sum_i x_ti x_si / sum_i p_i (1 - p_i)` (analysis/inertia.py), and q(t, s) the overlap that
tokens of the same similarity have in different sequences: `mean_k relu(phi(t, t - k) - q(t, t - k) - margin)^2` a
token. q is linear in the similarity of meaning (models/meaning.py) and in whether the ids are equal, fitted before
training on pairs of different sequences, and frozen. Lags are fixed, up to 64, in place of partners drawn at random, so
that a recompute and every way to cut a step see the same pairs; there is no `T^2`.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from moyu_kernels.rules import Rule
from pydantic import BaseModel, Field
from torch import Tensor

from moyu_train.models.meaning import REACHES, around, sketch
from moyu_train.penalties.base import Peek, not_prepared
from moyu_train.penalties.rates import LAGS, RateOptions, RatePenalty

FEATURES = 3  # 1, similarity, equal ids
PARTNERS = 32  # random partners in other windows of each token, for the fit


class OverlapResidualOptions(RateOptions):
    margin: float = Field(0.02, ge=0, description="overlap beyond meaning that costs nothing")


class OverlapResidual(RatePenalty):
    name = "overlap_residual"
    Options: ClassVar[type[BaseModel]] = OverlapResidualOptions

    def __init__(self, options: Any, scales: list[Tensor], rules: list[Rule], density: float) -> None:
        super().__init__(options, scales, rules, density)
        self.weights = torch.zeros(len(scales), FEATURES, device=scales[0].device)  # of q; 0: meaning explains nothing
        self._meaning = torch.zeros(0, 0)
        self._features: list[Tensor] = []

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        x = self.centred(layer, a, real)
        margin: float = self.options.margin  # type: ignore[attr-defined]
        p = self.rate(layer)
        spread, value = (p * (1 - p)).sum().clamp_min(1e-6), torch.zeros_like(x[..., 0])
        for place, lag in enumerate(LAGS):
            if x.shape[1] <= lag:
                break
            phi = (x[:, lag:] * x[:, :-lag]).sum(-1) / spread
            if self._features:
                phi = phi - self._features[place] @ self.weights[layer]
            excess = torch.relu(phi - margin).square()
            if real is not None:
                excess = excess * (real[:, lag:] & real[:, :-lag])
            value = value + functional.pad(excess, (lag, 0))
        return value / len(LAGS)

    def prepare(self, ids: Tensor | None, real: Tensor | None, peek: Peek) -> None:
        if not len(self._meaning):
            return
        if ids is None:
            raise not_prepared(self.name)
        meaning = self._meaning[ids]
        if real is not None:
            meaning = meaning * real[..., None]
        views = [around(meaning, reach) for reach in REACHES]
        self._features = [
            _features([(view[:, lag:], view[:, :-lag]) for view in views], ids[:, lag:] == ids[:, :-lag])
            for lag in LAGS
        ]

    @torch.no_grad()
    def begin(self, model: Any, windows: Tensor) -> None:
        """Also fits q, by least squares on pairs of neighbouring windows. Memory: one window's masks of all layers."""
        super().begin(model, windows)
        windows, device = windows.to(self.weights.device), self.weights.device
        self._meaning = sketch(model.get_input_embeddings().weight).to(device)
        self._meaning = self._meaning - self._meaning[windows].mean((0, 1))
        views = [around(self._meaning[windows], reach) for reach in REACHES]
        length = windows.shape[1]
        late = torch.arange(length, device=device).repeat_interleave(PARTNERS)
        early = torch.randint(length, (len(windows), len(late)), generator=torch.Generator().manual_seed(0)).to(device)
        before: dict[int, Tensor] = {}
        moments = torch.zeros(len(self.weights), FEATURES, FEATURES + 1, dtype=torch.float64, device=device)

        def see(number: int, layer: int, x: Tensor) -> None:
            if number:
                pick = early[number]
                pairs = [(view[number][late], view[number - 1][pick]) for view in views]
                f = _features(pairs, windows[number][late] == windows[number - 1][pick]).double()
                p = self.rate(layer)
                phi = (x @ before[layer].T / (p * (1 - p)).sum().clamp_min(1e-6))[late, pick]
                moments[layer] += f.T @ torch.cat([f, phi[:, None].double()], dim=1)
            before[layer] = x

        self._forwards(model, windows, see)
        left = moments[..., :-1] + 1e-6 * torch.eye(FEATURES, dtype=torch.float64, device=device)
        self.weights = torch.linalg.solve(left, moments[..., -1]).float()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.weights, self._meaning = self.weights.to(device), self._meaning.to(device)


def _features(pairs: list[tuple[Tensor, Tensor]], equal: Tensor) -> Tensor:
    """fp32 `[..., FEATURES]` of pairs of tokens: their meanings `[..., R]` in each view, and whether ids are equal."""
    similarity = torch.stack([(one * other).sum(-1) for one, other in pairs]).mean(0)
    return torch.stack([torch.ones_like(similarity), similarity, equal.float()], dim=-1)
