"""`lowrank` on the input and on what came before it: reduced-rank regression of `sqrt(contribution)` on `[x_t, m_t]`.

`m_t` is a decaying mean of the inputs before token t (`past_means`), with `decay` 0 the previous token's: an answer to
history-related activation uncertainty (MOYU, arXiv 2406.12569), if a linear map can give one. The term of `m_t` is
known before x_t, so a decode step keeps one vector per layer. It starts anew where the model's own context does.
"""

import torch
from moyu_kernels.ops.ffn.simulated import past_means
from pydantic import Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.lowrank import LowRank, quantise_rows, reduced_rank
from moyu_train.predictors.sums import Sums


class History(Sums):
    """Predictor of one layer. Sums are fp32 on the model's device; the solution is fp64."""

    name = form = "history"

    class Options(LowRank.Options):
        decay: float = Field(0.0, ge=0, le=1, description="0: the previous token's input, 1: mean of all before")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        self.options, self.hidden = options, block.hidden
        width = 2 * block.hidden
        self.sums = {
            "zz": torch.zeros(width, width, device=device),
            "zy": torch.zeros(width, block.neurons, device=device),
            "z": torch.zeros(width, device=device),
            "y": torch.zeros(block.neurons, device=device),
            "n": torch.zeros((), device=device),
        }

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor, its state included.

        Raises: MoyuError for a rank above twice the hidden size.
        """
        if options.rank > 2 * hidden:
            raise MoyuError(f"predictor.rank {options.rank} is above twice the hidden size {hidden}; lower it")
        return options.rank * (2 * hidden + neurons) + 4 * (2 * options.rank + 2 * neurons + hidden + 1)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add one window, whose first token has no past and is left out: x `[T, D]`, contribution `[T, F]`."""
        x = x.float()
        past = past_means(x, self.options.decay, x[0])
        z, y = torch.cat([x, past], dim=1)[1:], contribution[1:].float().sqrt()
        self.sums["zz"].addmm_(z.T, z)
        self.sums["zy"].addmm_(z.T, y)
        self.sums["z"] += z.sum(0)
        self.sums["y"] += y.sum(0)
        self.sums["n"] += len(z)

    def solve(self) -> dict[str, Tensor]:
        """The predictor in storage form: `lowrank`'s, m1 int8 `[R, D]` with t1 `[R]`, start `[D]` and decay `[1]`.

        `start`, which stands for the past of a first token, is its mean.
        """
        sums = {name: value.double().cpu() for name, value in self.sums.items()}
        mean_z, mean_y = sums["z"] / sums["n"], sums["y"] / sums["n"]
        cov = sums["zz"] / sums["n"] - torch.outer(mean_z, mean_z)
        cross = (sums["zy"] / sums["n"] - torch.outer(mean_z, mean_y)) / mean_y.mean()
        for half in cov.diagonal().split(self.hidden):  # a mean of many inputs varies less than one
            half.add_(self.options.ridge * half.mean())
        w, w2 = reduced_rank(cov, cross, self.options.rank)
        (q1, s1), (r1, t1) = (quantise_rows(part.contiguous()) for part in w.split(self.hidden, dim=1))
        q2, s2 = quantise_rows(w2)
        x, past = mean_z.split(self.hidden)
        fitted = (q2.double() * s2[:, None]) @ (s1 * (q1.double() @ x) + t1 * (r1.double() @ past))
        return {
            "w1": q1,
            "s1": s1.float(),
            "m1": r1,
            "t1": t1.float(),
            "w2": q2,
            "s2": s2.float(),
            "start": past.float(),
            "decay": torch.tensor([self.options.decay]),
            "bias": (mean_y / mean_y.mean() - fitted).float(),
        }
