"""Keeps a neuron where its statistic reaches its layer's level: CETT-style thresholding of the down projection's input.

`contribution` is `abs(a_i) * norm(W_down[:, i])` (Sparsing Law, arXiv 2411.02335; WINA, arXiv 2505.19427), `magnitude`
is `abs(a_i)`. The level is the quantile, over calibration text, that keeps the target density. The gradient is that of
the hard mask: none through dropped neurons.
"""

from typing import Any, Literal

import torch
from moyu_kernels.rules import Rule
from pydantic import Field
from torch import Tensor

from moyu_train.models.blocks import FFNBlock
from moyu_train.settings import STATISTIC
from moyu_train.sparsifiers.base import Held, HeldSparsifier


class ThresholdOptions(Held):
    statistic: Literal["contribution", "magnitude"] = Field("contribution", description=STATISTIC)


class Threshold(HeldSparsifier):
    """Keeps a neuron where its statistic reaches its layer's level, which is held at the target density."""

    name = "threshold"
    Options = ThresholdOptions
    calibrates = "activation"
    layouts = (*HeldSparsifier.layouts, "linear")

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, keep="threshold")

    @classmethod
    def statistic(cls, options: Any, block: FFNBlock) -> Tensor:
        norms = block.down_norms()
        return norms.clamp_min(1e-12) if options.statistic == "contribution" else torch.ones_like(norms)
