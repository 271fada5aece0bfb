"""A penalty's coefficient in closed loop: given the density that training should reach, it finds the coefficient.

From the density of the first step to the target the goal follows half a sine over the first `ramp` of the steps, as
ProSparse raises its coefficient; each step multiplies the coefficient by `exp(gain * error)`, where the error is that
of the density relative to the goal, within -1 and 1.
"""

import math

import torch
from torch import Tensor

from moyu_train.penalties.schedule import coefficient


class AdaptiveCoefficient:
    """Its state, the value and the density that it started from, belongs into the training checkpoint."""

    def __init__(self, start: float, gain: float, ramp: float) -> None:
        self.value, self.gain, self.ramp = start, gain, ramp
        self.first: float | None = None

    def update(self, density: float, target: float, progress: float, penalty: float) -> None:
        """Once per optimizer step: the density that it had, the one wanted in the end, the share of steps done."""
        if self.first is None:
            self.first = density
        goal = coefficient(((0.0, self.first), (self.ramp, target)), "sine", progress)
        self.value *= math.exp(self.gain * min(max((density - goal) / goal, -1.0), 1.0))

    def state(self) -> Tensor:
        """fp64 `[2]`."""
        return torch.tensor([self.value, math.nan if self.first is None else self.first], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
        self.value, first = state.tolist()
        self.first = None if math.isnan(first) else first
