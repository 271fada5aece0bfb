"""The ReLU family: the activation is replaced by one that gives exact zeros, and training has to get used to it.

ReLU and shifted ReLU (ReLU Strikes Back, arXiv 2310.04564), FATReLU (ProSparse, arXiv 2402.13516), squared ReLU (arXiv
2402.03804) and dReLU (TurboSparse, arXiv 2406.05955). Over the first `transition` of the steps the activation goes
from the stock one to the new one in a straight line; ProSparse and TurboSparse swap at once (0). A mixture is nowhere
zero, so until it ends thresholds and coefficients stand still. All but FATReLU have the density that training leaves
them, which a penalty with an adaptive coefficient brings to the target.
"""

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.sparsifiers.base import Held, HeldSparsifier, Sparsifier


class SwapOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    transition: float = Field(0.0, ge=0, le=0.9, description="share of the steps from the stock activation to this one")


class Swap(Sparsifier):
    """A sparsifier that goes from the stock activation to its own."""

    Options = SwapOptions

    def advance(self, progress: float) -> None:
        blend = min(progress / self.options.transition, 1.0) if self.options.transition else 1.0
        for rule in self.rules:
            rule.blend = blend

    @property
    def settled(self) -> bool:
        return all(rule.blend >= 1 for rule in self.rules)


class ReLUOptions(SwapOptions):
    shift: float = Field(0.0, ge=0, description="b of relu(g - b)")


class ReLU(Swap):
    """`relu(g - shift)` in place of `act(g)`."""

    name = "relu"
    Options = ReLUOptions
    layouts = ("gated", "fused", "plain")

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(torch.full_like(threshold, self.options.shift), gate="relu", keep="nonzero")


class ReLU2(Swap):
    """`relu(g) ** 2` in place of `act(g)`."""

    name = "relu2"

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, gate="relu2", keep="nonzero")


class DReLU(Swap):
    """`relu(g) * relu(u)` in place of `act(g) * u`."""

    name = "drelu"
    layouts = ("gated",)

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, gate="relu", up="relu", keep="nonzero")


class FATReLU(HeldSparsifier, Swap):
    """g where `g >= t` in place of `act(g)`; t is calibrated to the target density and then held there."""

    name = "fatrelu"
    calibrates = "gate"
    layouts = ("gated", "fused", "plain")

    class Options(Held, SwapOptions):
        pass

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, gate="fatrelu", keep="nonzero")
