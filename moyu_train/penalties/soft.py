"""Penalties on soft masks: how surely a neuron is on, in units of its own threshold.

`z = sigmoid(kappa * log(abs(a) / theta))`, theta the rule's threshold as it stands in that step: 1/2 at the threshold,
towards 1 above and 0 below, at whatever scale the layer's activations have. The gradient goes through a alone.
"""

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.penalties.base import Penalty

SMALL = 1e-8  # of abs(a) / theta, below which a neuron is off and gets no gradient


class SoftOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kappa: float = Field(4.0, gt=0, description="steepness of the soft mask")


class SoftPenalty(Penalty):
    Options: ClassVar[type[BaseModel]] = SoftOptions
    needs_threshold = True
    options: SoftOptions

    def distance(self, layer: int, a: Tensor) -> Tensor:
        """`log(abs(a) / theta)`, fp32 `[..., F]`."""
        return (a.float().abs() / self.rules[layer].threshold).clamp_min(SMALL).log()

    def mask(self, layer: int, a: Tensor) -> Tensor:
        """The soft mask z, fp32 `[..., F]`."""
        return torch.sigmoid(self.options.kappa * self.distance(layer, a))

    def sequence(self, layer: int, a: Tensor, real: Tensor | None) -> Tensor:
        """The soft mask of whole sequences `[B, T, F]`, 0 in padding.

        Raises: MoyuError where the block does not see sequences.
        """
        if a.ndim != 3:
            raise MoyuError(
                f"penalty {self.name!r} compares neighbouring tokens, and this model's FFN blocks see them without "
                f"their order, as {list(a.shape)}; use another penalty"
            )
        z = self.mask(layer, a)
        return z if real is None else z * real[..., None]


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """Of soft masks to others, both `[..., F]`, mean over neurons. The gradient reaches both."""
    z = z.clamp(1e-6, 1 - 1e-6)
    return -(target * z.log() + (1 - target) * (1 - z).log()).mean(-1)
