"""Two matrices without a non-linearity between them, in closed form: reduced-rank regression (Izenman 1975).

The target is `sqrt(contribution)` of each neuron, the input the FFN's normalised input x. Training streams the second
moments of (x, target) in one pass over text, so nothing is dumped, memory does not depend on the number of tokens, the
sums of many processes add up, and there is no learning rate to tune. The two factors are then the best rank-R linear
map in the least-squares sense. Stored as int8 with a scale per row.
"""

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.sums import Sums


class LowRank(Sums):
    """Predictor of one layer. Sums are fp32 on the model's device; the solution is fp64."""

    name = form = "lowrank"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        rank: int = Field(128, ge=1, description="R: numbers between the two matrices")
        ridge: float = Field(0.1, gt=0, description="relative to the mean square of x")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device, targets: int | None = None) -> None:
        """targets: how many scores are predicted, default one a neuron."""
        self.options = options
        hidden, targets = block.hidden, targets or block.neurons
        self.sums = {
            "xx": torch.zeros(hidden, hidden, device=device),
            "xy": torch.zeros(hidden, targets, device=device),
            "x": torch.zeros(hidden, device=device),
            "y": torch.zeros(targets, device=device),
            "n": torch.zeros((), device=device),
        }

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor.

        Raises: MoyuError for a rank above the hidden size.
        """
        if options.rank > hidden:
            raise MoyuError(f"predictor.rank {options.rank} is above the hidden size {hidden}; lower it")
        return options.rank * (hidden + neurons) + 4 * (options.rank + 2 * neurons)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add tokens: x `[N, D]`, contribution `[N, F]` (non-negative)."""
        x, y = x.float(), contribution.float().sqrt()
        self.sums["xx"].addmm_(x.T, x)
        self.sums["xy"].addmm_(x.T, y)
        self.sums["x"] += x.sum(0)
        self.sums["y"] += y.sum(0)
        self.sums["n"] += len(x)

    def solve(self) -> dict[str, Tensor]:
        """The fitted predictor in storage form: w1 int8 `[R, D]`, s1 `[R]`, w2 int8 `[F, R]`, s2 and bias `[F]`, fp32.

        `score = s2 * (w2 @ (s1 * (w1 @ x))) + bias` predicts `sqrt(contribution)` in units of its mean over the layer.
        """
        mean_x, mean_y, cov, cross = self.moments()
        return stored(*reduced_rank(cov, cross, self.options.rank), mean_x, mean_y)

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp64 means of x `[D]` and of the target `[F]`, covariances of x with itself (with ridge) and the target.

        The target is in units of its mean over the layer.
        """
        sums = {name: value.double().cpu() for name, value in self.sums.items()}
        mean_x, mean_y = sums["x"] / sums["n"], sums["y"] / sums["n"]
        cov = sums["xx"] / sums["n"] - torch.outer(mean_x, mean_x)
        cross = (sums["xy"] / sums["n"] - torch.outer(mean_x, mean_y)) / mean_y.mean()
        cov.diagonal().add_(self.options.ridge * cov.diagonal().mean())
        return mean_x, mean_y / mean_y.mean(), cov, cross


def reduced_rank(cov: Tensor, cross: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best map of rank R from x to y in the least-squares sense, `y = w2 @ (w1 @ x)`.

    Args: cov fp64 `[D, D]` of x, positive definite; cross fp64 `[D, F]` of x with y.
    Returns: w1 `[R, D]` and w2 `[F, R]`, fp64; the columns of w2 have a largest value of 1.
    """
    root = torch.linalg.cholesky(cov)
    whitened = torch.linalg.solve_triangular(root, cross, upper=False)  # [D, F]
    directions = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -rank:]  # [D, R]
    w1 = torch.linalg.solve_triangular(root.T, directions, upper=True).T
    return balanced(w1, whitened.T @ directions)


def balanced(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The same product of `[R, D]` and `[F, R]`, the columns of w2 with a largest value of 1.

    int8 has one scale a row: what the columns of w2 differ by is moved into the rows of w1, whose scales take it.
    """
    size = w2.abs().amax(0).clamp_min(1e-12)
    return w1 * size[:, None], w2 / size


def stored(w1: Tensor, w2: Tensor, mean_x: Tensor, mean_y: Tensor) -> dict[str, Tensor]:
    """The storage form of `score = w2 @ (w1 @ x) + b`, its bias such that the mean of x gives the mean of y."""
    (q1, s1), (q2, s2) = quantise_rows(w1), quantise_rows(w2)
    fitted = (q2.double() * s2[:, None]) @ ((q1.double() * s1[:, None]) @ mean_x)
    return {"w1": q1, "s1": s1.float(), "w2": q2, "s2": s2.float(), "bias": (mean_y - fitted).float()}


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale per row: (int8 `[N, M]`, scale `[N]` of the weight's dtype)."""
    scale = weight.abs().amax(1).clamp_min(1e-30) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale
