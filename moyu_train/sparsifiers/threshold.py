"""Keeps a neuron where its statistic reaches its layer's level: CETT-style thresholding of the down projection's input.

`contribution` is `abs(a_i) * norm(W_down[:, i])` (Sparsing Law, arXiv 2411.02335; WINA, arXiv 2505.19427), `magnitude`
is `abs(a_i)`. The level is the quantile, over calibration text, that keeps the target density. The gradient is that of
the hard mask: none through dropped neurons.
"""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.models.blocks import FFNBlock


class Threshold:
    """The whole state is one fp32 threshold on `abs(a)` per neuron: `[F]` a layer, `[E, F]` for experts."""

    name = "threshold"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        statistic: Literal["contribution", "magnitude"] = "contribution"
        gain: float = Field(0.2, ge=0, description="controller: relative change of a threshold per relative error")

    def __init__(self, options: Options, thresholds: list[Tensor]) -> None:
        self.options = options
        self.thresholds = thresholds

    @classmethod
    def scales(cls, options: Options, block: FFNBlock) -> Tensor:
        """What multiplies `abs(a)` in the statistic, fp32 `[F]` or `[E, F]`."""
        norms = block.down_norms()
        return norms.clamp_min(1e-12) if options.statistic == "contribution" else torch.ones_like(norms)

    @classmethod
    def calibrated(cls, options: Options, blocks: list[FFNBlock], levels: list[float]) -> "Threshold":
        """Thresholds from each layer's level of the statistic, at the norms that the weights have now."""
        return cls(options, [level / cls.scales(options, block) for block, level in zip(blocks, levels, strict=True)])

    def keep(self, layer: int, a: Tensor, expert: int | None = None) -> Tensor:
        """The rule mask of `a` `[..., F]`, bool of the same shape."""
        threshold = self.thresholds[layer]
        return a.abs() >= (threshold if expert is None else threshold[expert])

    def control(self, layer: int, density: float, target: float) -> None:
        """Closed loop, once per optimizer step: raise a layer's thresholds where more than `target` was kept."""
        self.thresholds[layer] *= max(1.0 + self.options.gain * (density - target) / target, 0.5)
