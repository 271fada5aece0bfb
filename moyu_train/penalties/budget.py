"""Budget: `relu(mean_i(z_i) - density)^2` a token, z the soft mask: costs nothing below the density that is wanted."""

import torch
from torch import Tensor

from moyu_train.penalties.soft import SoftPenalty


class Budget(SoftPenalty):
    name = "budget"

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        return torch.relu(self.mask(layer, a).mean(-1) - self.density).square()
