"""What every sparsifier has: rules for the blocks, how they are found on text, and how training moves them."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Sparsifier:
    """Rules of all blocks. A method overrides `rule`, and of the rest what it needs.

    Args:
        options: of the method's `Options`.
        thresholds: fp32, one tensor per neuron a layer: `[F]`, or `[E, F]` for experts.
        density: share of the neurons to keep.
    """

    name: ClassVar[str]
    straight_through = False  # whether the gradient is that of the activation without the mask
    Options: ClassVar[type[BaseModel]] = NoOptions
    # Of what the level is calibrated: a statistic of the activation a, of the gate, of a sequence's first tokens, or of
    # nothing (no calibration).
    calibrates: ClassVar[Literal["activation", "gate", "prompt", ""]] = ""
    layouts: ClassVar[tuple[str, ...]] = ("gated", "fused", "plain", "experts")

    def __init__(self, options: Any, thresholds: list[Tensor], density: float) -> None:
        self.options, self.density = options, density
        self.rules: list[Rule] = [self.rule(threshold) for threshold in thresholds]

    def rule(self, threshold: Tensor) -> Rule:
        """The rule of a block with this threshold, fp32 `[F]`, or `[E, F]` for experts."""
        raise NotImplementedError

    @classmethod
    def start(cls, options: Any, blocks: list[FFNBlock], density: float) -> "Sparsifier":
        """Rules before any calibration: thresholds 0."""
        return cls(options, [torch.zeros_like(block.down_norms()) for block in blocks], density)

    @classmethod
    def statistic(cls, options: Any, block: FFNBlock) -> Tensor:
        """What multiplies the magnitude of what is calibrated, fp32 `[F]` or `[E, F]`."""
        return torch.ones_like(block.down_norms())

    @classmethod
    def calibrated(cls, options: Any, blocks: list[FFNBlock], levels: list[float], density: float) -> "Sparsifier":
        """Rules from each layer's level of the statistic, at the weights that the blocks have now."""
        thresholds = [level / cls.statistic(options, block) for block, level in zip(blocks, levels, strict=True)]
        return cls(options, thresholds, density)

    @classmethod
    def check(cls, blocks: list[FFNBlock]) -> None:
        """Raises: MoyuError for a layout that the method's rule cannot act on."""
        for block in blocks:
            if block.layout not in cls.layouts:
                raise MoyuError(
                    f"sparsifier {cls.name!r} acts on {', '.join(cls.layouts)} blocks, {block.path} is "
                    f"{block.layout!r}; use the sparsifier 'threshold'"
                )

    @property
    def thresholds(self) -> list[Tensor]:
        """Of all blocks, fp32, shared with the rules."""
        return [rule.threshold for rule in self.rules]

    @thresholds.setter
    def thresholds(self, thresholds: list[Tensor]) -> None:
        for rule, threshold in zip(self.rules, thresholds, strict=True):
            rule.threshold = threshold

    @property
    def centres(self) -> list[Tensor | None]:
        """Of the rules, each fp32 `[F]` or None."""
        return [rule.centre for rule in self.rules]

    @centres.setter
    def centres(self, centres: Sequence[Tensor | None]) -> None:
        for rule, centre in zip(self.rules, centres, strict=True):
            rule.centre = centre

    @property
    def settled(self) -> bool:
        """Whether what is kept is the rule's own doing, so that it says something to a controller."""
        return True

    def control(self, layer: int, density: float, target: float) -> None:
        """Closed loop, once per optimizer step, where `settled`: what a layer kept in it, and what it should keep."""

    def advance(self, progress: float) -> None:
        """Called with the share of the training steps that are done, before each of them."""


class Held(BaseModel):
    """Options of the methods whose thresholds are moved to hold the density."""

    model_config = ConfigDict(extra="forbid")
    gain: float = Field(0.2, ge=0, description="controller: relative change of a threshold per relative error")


class HeldSparsifier(Sparsifier):
    """Moves a layer's thresholds up where more than the target was kept, and down where less was."""

    Options: ClassVar[type[BaseModel]] = Held

    def control(self, layer: int, density: float, target: float) -> None:
        self.rules[layer].threshold *= max(1.0 + self.options.gain * (density - target) / target, 0.5)
