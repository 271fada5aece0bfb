"""Truncation-aware SVD of the gate (SVDP, arXiv 2603.14110; SVD-LLM, arXiv 2403.07378), and a line per neuron.

What a neuron contributes is predicted from its gate alone: `sqrt(contribution) = slope * (gate @ x) + b`, by least
squares per neuron. The matrix `slope * gate` is then cut to rank R where that costs the products with x least, which is
the SVD of the matrix times a root of the covariance of x, not of the matrix itself. Nothing but the lines is fitted to
the text's contributions. Same storage form as `lowrank`.
"""

import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor

from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.lowrank import LowRank, reduced_rank, stored
from moyu_train.predictors.sums import Sums, slopes


class SVD(Sums):
    """Predictor of one layer. Sums are fp32 on the model's device; the solution is fp64."""

    name, form = "svd", "lowrank"

    class Options(LowRank.Options):
        ridge: float = Field(0.01, gt=0, description="relative to the mean square of x")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        self.options, self.block = options, block
        neurons = {name: torch.zeros(block.neurons, device=device) for name in ("v", "vv", "vy", "y")}
        self.sums = {
            "xx": torch.zeros(block.hidden, block.hidden, device=device),
            "x": torch.zeros(block.hidden, device=device),
            "n": torch.zeros((), device=device),
            **neurons,
        }

    planned_bytes = LowRank.planned_bytes

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add tokens: x `[N, D]`, contribution `[N, F]` (non-negative)."""
        x, y = x.float(), contribution.float().sqrt()
        gate = functional.linear(x, self.block.fronts()[0].float())
        self.sums["xx"].addmm_(x.T, x)
        for name, value in (("x", x), ("v", gate), ("vv", gate * gate), ("vy", gate * y), ("y", y)):
            self.sums[name] += value.sum(0)
        self.sums["n"] += len(x)

    def solve(self) -> dict[str, Tensor]:
        """The predictor in the storage form of `lowrank`."""
        sums = {name: value.double().cpu() for name, value in self.sums.items()}
        mean_x, mean_y = sums["x"] / sums["n"], sums["y"] / sums["n"]
        cov = sums["xx"] / sums["n"] - torch.outer(mean_x, mean_x)
        cov.diagonal().add_(self.options.ridge * cov.diagonal().mean())
        slope, _ = slopes(sums)
        matrix = (slope / mean_y.mean())[:, None] * self.block.fronts()[0].double().cpu()
        w1, w2 = reduced_rank(cov, cov @ matrix.T, self.options.rank)
        return stored(w1, w2, mean_x, mean_y / mean_y.mean())
