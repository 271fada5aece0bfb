"""BlockFFN's adaptive factor (arXiv 2507.08771): a penalty that does not fall gets a larger coefficient.

After every window of steps the coefficient is multiplied by the ratio of the penalty's mean in the window to that in
the window before; where the penalty rose, by `rise` at least. It never goes beyond `most` times what it started from.
"""

import math

import torch
from torch import Tensor


class RatioCoefficient:
    """Its state belongs into the training checkpoint: the value, the last window's mean, this one's sum and steps."""

    def __init__(self, start: float, window: int, rise: float, most: float) -> None:
        self.value, self.window, self.rise, self.highest = start, window, rise, most * start
        self.before = math.nan
        self.sum, self.steps = 0.0, 0

    def update(self, density: float, target: float, progress: float, penalty: float) -> None:
        """Once per optimizer step: the penalty's mean over its tokens."""
        self.sum, self.steps = self.sum + penalty, self.steps + 1
        if self.steps < self.window:
            return
        mean = self.sum / self.steps
        if self.before > 0:
            ratio = mean / self.before
            self.value = min(self.value * (max(ratio, self.rise) if ratio > 1 else ratio), self.highest)
        self.before, self.sum, self.steps = mean, 0.0, 0

    def state(self) -> Tensor:
        """fp64 `[4]`."""
        return torch.tensor([self.value, self.before, self.sum, self.steps], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
        self.value, self.before, self.sum, steps = state.tolist()
        self.steps = int(steps)
