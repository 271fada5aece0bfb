"""Lag decorrelation: `mean_{k,i} p_i (1 - p_i) rho_i(k)^2`, rho_i(k) a neuron's correlation with itself k tokens ago.

With x = z - p and `c_i(k) = E[x_ti x_{t-k,i}]` that is `mean_{k,i} c_i(k)^2 / v_i`, `v = p (1 - p)`: in the manner of
Barlow Twins (arXiv 2103.03230), over time. It knows nothing of meaning and punishes justified persistence too: the
ablation to `overlap_residual`. It is no sum over tokens, so a token has the linearisation at the covariances c' of the
steps before, `mean_{k,i} (2 c'_i(k) x_ti x_{t-k,i} - c'_i(k)^2) / v_i`: the same value and gradient where c is c'.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from moyu_train.penalties.rates import LAGS, RatePenalty

LEAST = 1e-3  # of v: a neuron that is always or never on has nothing to be decorrelated


class LagDecorrelation(RatePenalty):
    name = "lag_decorrelation"
    moments = len(LAGS)

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        x, p = self.centred(layer, a, real), self.rate(layer)
        v = (p * (1 - p)).clamp_min(LEAST)
        value = torch.zeros_like(x[..., 0])
        for lag, before in zip(LAGS, self.measured[layer][1:], strict=True):
            slope = 2 * before / v / x.shape[-1]
            pairs = (x[:, lag:] * slope * x[:, :-lag]).sum(-1)
            value = value + functional.pad(pairs, (min(lag, x.shape[1]), 0)) - (before.square() / v).mean()
        value = value / len(LAGS)
        return value if real is None else value * real

    def observed(self, layer: int, x: Tensor, real: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [((x[:, lag:] * x[:, :-lag]).sum((0, 1)), real.sum()) for lag in LAGS]
