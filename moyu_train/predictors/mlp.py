"""Two matrices with a ReLU between them, trained online to tell kept neurons from others.

The network of DejaVu (arXiv 2310.17157) with the ReLU of ProSparse (arXiv 2402.13516), and their loss: binary
cross-entropy in which a neuron that is not kept weighs its layer's density + 0.005, so that missing one costs more
than reading one in vain. `focal` multiplies each term by `(1 - p)^focal`, p the probability given to what is true (Lin
et al. 2017, arXiv 1708.02002; Polar Sparsity, arXiv 2505.14884). A step takes `batch` tokens and forgets them.
"""

import math

import torch
import torch.nn.functional as functional
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.lowrank import quantise_rows
from moyu_train.predictors.sums import Sums

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
PARAMETERS, BIASES = ("w1", "b1", "w2", "b2"), ("b1", "b2")
UNIT = 4.0  # logits in a unit of scores, so that they lie where calibration looks for cuts


class MLP(Sums):
    """Predictor of one layer: fp32 weights and moments of Adam on the model's device."""

    name = form = "mlp"
    in_step = True

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        rank: int = Field(128, ge=1, description="R: numbers between the two matrices")
        learning_rate: float = Field(1e-3, gt=0, description="of Adam")
        batch: int = Field(128, ge=1, description="tokens per step")
        negative_weight: float | None = Field(
            None, gt=0, description="of neurons that are not kept; default the share kept + 0.005; 1: plain loss"
        )
        biases: bool = Field(True, description="false: the two matrices alone, as PowerInfer takes them")
        focal: float = Field(0.0, ge=0, description="exponent of the focal loss; 0: none")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        self.options, self.path = options, block.path
        generator = torch.Generator().manual_seed(0)
        rank, hidden, neurons = options.rank, block.hidden, block.neurons
        start = {
            "w1": torch.randn(rank, hidden, generator=generator) * math.sqrt(2 / hidden),
            "b1": torch.zeros(rank),
            "w2": torch.randn(neurons, rank, generator=generator) * math.sqrt(1 / rank),
            "b2": torch.zeros(neurons),
        }
        self.sums = {name: value.to(device) for name, value in start.items()}
        for name in PARAMETERS:
            self.sums[f"{name}.mean"] = torch.zeros_like(self.sums[name])
            self.sums[f"{name}.square"] = torch.zeros_like(self.sums[name])
        self.sums |= {name: torch.zeros((), device=device) for name in ("steps", "size")}

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor."""
        return options.rank * (hidden + neurons) + 4 * (2 * options.rank + 2 * neurons + 1)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Train on tokens: x `[N, D]`, contribution `[N, F]`, kept bool `[N, F]`: which the rule keeps."""
        assert kept is not None
        x = x.float()
        if not self.sums["size"]:  # the first window sets the unit of x, and how often each neuron is kept
            self.sums["size"] += self._mean(x.square().mean()).sqrt().clamp_min(1e-30)
            if self.options.biases:
                self.sums["b2"] += torch.logit(self._mean(kept.float().mean(0)), eps=0.01)
        for part, target in zip(x.split(self.options.batch), kept.split(self.options.batch), strict=True):
            self._step(part / self.sums["size"], target.float())

    def gather(self) -> None:
        """Nothing: processes have stepped together."""

    def loss(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Mean over tokens and neurons; logits and kept (0 or 1) `[N, F]`, fp32."""
        negative = self.options.negative_weight
        weight = torch.where(kept > 0, 1.0, kept.mean() + 0.005 if negative is None else negative)
        each = functional.binary_cross_entropy_with_logits(logits, kept, reduction="none")
        if self.options.focal:
            each = each * (-torch.expm1(-each)).clamp_min(1e-12) ** self.options.focal  # exp(-each) is p of the truth
        return (weight * each).mean()

    @torch.enable_grad()
    def _step(self, x: Tensor, kept: Tensor) -> None:
        weights = [self.sums[name].detach().requires_grad_() for name in PARAMETERS]
        w1, b1, w2, b2 = weights
        logits = functional.linear(torch.relu(functional.linear(x, w1, b1)), w2, b2)
        gradients = torch.autograd.grad(self.loss(logits, kept), weights)
        self.sums["steps"] += 1
        first, second = (1 - beta ** self.sums["steps"].item() for beta in BETAS)
        with torch.no_grad():
            for name, gradient in zip(PARAMETERS, gradients, strict=True):
                if name in BIASES and not self.options.biases:
                    continue
                gradient = self._mean(gradient)
                mean, square = self.sums[f"{name}.mean"], self.sums[f"{name}.square"]
                mean.lerp_(gradient, 1 - BETAS[0])
                square.lerp_(gradient.square(), 1 - BETAS[1])
                step = (mean / first) / ((square / second).sqrt() + EPSILON)
                self.sums[name] -= self.options.learning_rate * step

    @staticmethod
    def _mean(value: Tensor) -> Tensor:
        """Over the processes, where there are several."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
            value = value / torch.distributed.get_world_size()
        return value

    def solve(self) -> dict[str, Tensor]:
        """The predictor in storage form: w1 int8 `[R, D]`, w2 int8 `[F, R]`, the rest fp32.

        Raises: MoyuError where training has diverged.
        """
        w1, b1, w2, b2 = (self.sums[name].cpu() for name in PARAMETERS)
        if not all(torch.isfinite(part).all() for part in (w1, b1, w2, b2)):
            raise MoyuError(f"the predictor of {self.path} has diverged; lower predictor.learning_rate")
        (q1, s1), (q2, s2) = quantise_rows(w1 / self.sums["size"].cpu()), quantise_rows(w2)
        scale = torch.tensor([1 / UNIT])
        return {"w1": q1, "s1": s1, "w2": q2, "s2": s2, "b1": b1, "scale": scale, "bias": b2 / UNIT}
