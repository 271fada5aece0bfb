"""L1 on activations in units of their layer's root mean square, so that a coefficient means the same in any model.

`mean_i(abs(a_i) * s_i)` a token, s from `penalties.scale`: by contribution (the weight of WINA, arXiv 2505.19427, which
stops a model from hiding mass in the norms of the down projection) or by magnitude (ProSparse, arXiv 2402.13516; TwELL,
arXiv 2603.23198). It shrinks what it keeps; `hoyer` does not.
"""

from torch import Tensor

from moyu_train.penalties.scale import ScaledPenalty


class L1(ScaledPenalty):
    name = "l1"

    def __call__(self, layer: int, a: Tensor, real: Tensor | None = None) -> Tensor:
        return (a.float().abs() * self.scales[layer]).mean(-1)
