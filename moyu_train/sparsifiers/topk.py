"""Keeps a fixed share of the neurons of every token.

`topk` takes the neurons of largest statistic, as `threshold` names them; with `straight_through` the gradient is that
of the activation without the mask (Q-Sparse, arXiv 2407.10969). `statistical_topk` (Spark, arXiv 2506.06644) finds the
gate's level from its mean and deviation over the neurons, without sorting.
"""

from typing import Any, Literal

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.models.blocks import FFNBlock
from moyu_train.settings import STATISTIC
from moyu_train.sparsifiers.base import Sparsifier


class TopKOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    statistic: Literal["contribution", "magnitude"] = Field("contribution", description=STATISTIC)
    straight_through: bool = Field(True, description="gradient of the activation without the mask (Q-Sparse)")


class TopK(Sparsifier):
    """Keeps the same number of neurons for every token, those of largest statistic.

    Ranks `abs(a) / threshold`, with thresholds of 1 / norm for `contribution` and 1 for `magnitude`.
    """

    name = "topk"
    Options = TopKOptions
    layouts = (*Sparsifier.layouts, "linear")

    def __init__(self, options: TopKOptions, thresholds: list[Tensor], density: float) -> None:
        super().__init__(options, thresholds, density)
        self.straight_through = options.straight_through

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, keep="topk", share=self.density)

    @classmethod
    def start(cls, options: Any, blocks: list[FFNBlock], density: float) -> "TopK":
        norms = [block.down_norms() for block in blocks]
        contribution = options.statistic == "contribution"
        return cls(options, [1 / n.clamp_min(1e-12) if contribution else torch.ones_like(n) for n in norms], density)


class StatisticalTopKOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    soft: bool = Field(False, description="also lower what is kept by the level, as Spark does")


class StatisticalTopK(Sparsifier):
    """Keeps the gates above their mean plus so many deviations as give the target density for normal ones."""

    name = "statistical_topk"
    Options = StatisticalTopKOptions

    def rule(self, threshold: Tensor) -> Rule:
        gate = "statistical_topk_soft" if self.options.soft else "statistical_topk"
        return Rule(threshold, gate=gate, keep="nonzero", share=self.density)
