"""Sign bits of the gate against sign bits of the input (SparseInfer, arXiv 2411.12692), and a line per neuron.

SparseInfer takes a neuron of a ReLU model as active where more products of x and the gate are positive than negative.
Here that count predicts `sqrt(contribution)` by least squares per neuron, so that it also ranks neurons under SiLU.
"""

import torch
from moyu_kernels.ops.ffn.simulated import pack_signs, sign
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.sums import Sums, slopes


class Signs(Sums):
    """Predictor of one layer. Sums are fp32 on the model's device."""

    name = form = "signs"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        self.block = block
        self.sums = {name: torch.zeros(block.neurons, device=device) for name in ("v", "vv", "vy", "y")}
        self.sums["n"] = torch.zeros((), device=device)

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor."""
        return neurons * (-(-hidden // 8) + 2 * 4)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add tokens: x `[N, D]`, contribution `[N, F]` (non-negative)."""
        y = contribution.float().sqrt()
        value = sign(x) @ sign(self.block.fronts()[0]).T / x.shape[1]
        for name, part in (("v", value), ("vv", value * value), ("vy", value * y), ("y", y)):
            self.sums[name] += part.sum(0)
        self.sums["n"] += len(x)

    def solve(self) -> dict[str, Tensor]:
        """The predictor in storage form: signs uint8 `[F, ceil(D / 8)]`, weight and bias fp32 `[F]`."""
        slope, intercept = slopes({name: value.cpu() for name, value in self.sums.items()})
        mean = (self.sums["y"] / self.sums["n"]).double().mean().cpu()
        signs = pack_signs(self.block.fronts()[0]).cpu()
        return {"signs": signs, "weight": (slope / mean).float(), "bias": (intercept / mean).float()}
