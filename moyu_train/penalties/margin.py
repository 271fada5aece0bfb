"""Margin: `mean_i(relu(gamma - abs(log(abs(a_i) / theta_i)))^2)` a token: keeps activations away from the threshold.

The separability loss of LTE (arXiv 2402.06126) in logarithms, where its gradient is bounded. Neurons that small changes
do not flip are what a predictor can get right.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.penalties.soft import SoftPenalty


class MarginOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    gamma: float = Field(0.2, gt=0, description="width of the margin, in natural logarithms on either side")


class Margin(SoftPenalty):
    name = "margin"
    Options = MarginOptions

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        gamma: float = self.options.gamma  # type: ignore[attr-defined]
        return torch.relu(gamma - self.distance(layer, a).abs()).square().mean(-1)
