"""LTE (arXiv 2402.06126): efficiency and separability, `mean_i(z_i^2) + weight * mean_i(1 / (z_i - 1/2)^2)` a token.

LTE's z is a router's output and its threshold 1/2; here z is the soft mask, which is 1/2 at the rule's threshold.
`abs(z - 1/2)` is held at 0.05 or more, so that one neuron on its threshold does not outweigh all others.
"""

from pydantic import Field
from torch import Tensor

from moyu_train.penalties.soft import SoftOptions, SoftPenalty

LEAST = 0.05


class LTEOptions(SoftOptions):
    separability: float = Field(5e-3, ge=0, description="weight of the second term, which is 400 at its largest")


class LTE(SoftPenalty):
    name = "lte"
    Options = LTEOptions

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        z = self.mask(layer, a)
        apart = (z - 0.5).abs().clamp_min(LEAST).square().reciprocal()
        return z.square().mean(-1) + self.options.separability * apart.mean(-1)  # type: ignore[attr-defined]
