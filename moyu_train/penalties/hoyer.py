"""Square Hoyer: `sum(n)^2 / sum(n^2) / F` a token, with n = abs(a) * s (D2DMoE, arXiv 2310.04361).

The share of neurons that a token's activation is spread over: 1 where all are equal, 1 / F where one stands alone. It
does not change with the size of `a`, so it concentrates without shrinking.
"""

from torch import Tensor

from moyu_train.penalties.scale import ScaledPenalty

SMALL = 1e-6  # of the mean square, which is 1 after scaling: a token that is all zero costs nothing


class Hoyer(ScaledPenalty):
    name = "hoyer"

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        n = a.float().abs() * self.scales[layer]
        return n.mean(-1).square() / (n.square().mean(-1) + SMALL)
