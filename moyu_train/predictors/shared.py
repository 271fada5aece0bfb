"""`lowrank` with one first matrix for all layers, and a second one for each: a trunk with heads.

That all layers' neurons can be told from a few directions is ShadowLLM's bet (arXiv 2406.16635), whose trunk sees one
layer's input; here each layer puts its own input through it. The trunk is the best one for all layers together where
the mean covariance of their inputs stands for each; the heads are then each layer's own least-squares solution. It is
stored, and counted as read, in every layer, since that is the storage form of `lowrank` and what its op reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.lowrank import LowRank, balanced, stored


class Shared(LowRank):
    """Predictor of one layer. Sums are fp32 on the model's device; the solution is fp64."""

    name, form = "shared", "lowrank"

    def __init__(self, options: LowRank.Options, block: FFNBlock, device: torch.device) -> None:
        super().__init__(options, block, device)
        self.trunk: Tensor | None = None

    @staticmethod
    def together(predictors: Sequence["Shared"]) -> None:
        """The trunk `[R, D]`, from what the predictors of all layers have observed."""
        moments = [predictor.moments() for predictor in predictors]
        mean = torch.stack([cov for _, _, cov, _ in moments]).mean(0)
        root = torch.linalg.cholesky(mean)
        gain = torch.zeros_like(mean)
        for _, _, _, cross in moments:
            whitened = torch.linalg.solve_triangular(root, cross, upper=False)  # [D, F]
            gain += whitened @ whitened.T
        directions = torch.linalg.eigh(gain).eigenvectors[:, -predictors[0].options.rank :]  # [D, R]
        trunk = torch.linalg.solve_triangular(root.T, directions, upper=True).T
        for predictor in predictors:
            predictor.trunk = trunk

    def solve(self) -> dict[str, Tensor]:
        """The predictor in the storage form of `lowrank`; w1 is that of all layers, its row scales are this one's."""
        if self.trunk is None:
            self.together([self])
        assert self.trunk is not None
        mean_x, mean_y, cov, cross = self.moments()
        head = torch.linalg.solve(self.trunk @ cov @ self.trunk.T, self.trunk @ cross).T
        return stored(*balanced(self.trunk, head), mean_x, mean_y)
