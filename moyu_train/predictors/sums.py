"""What predictors fitted in closed form share: sums over tokens, which a fit saves, resumes and adds over processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Sums:
    """`sums`: fp32 tensors on the model's device, each a sum over the tokens observed so far.

    form: the family's name where its scores are computed, a key of `PREDICTORS` or `SIMULATED` in
        `moyu_kernels.ops.ffn.naive`.
    in_step: whether all processes have to observe as many windows, since each step of theirs is a common one.
    """

    name: str
    form: str
    in_step = False
    sums: dict[str, Tensor]

    @classmethod
    def files(cls, options: Any) -> list[Path]:
        """Files that a predictor is made of, beside the text."""
        return []

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint of a fit keeps."""
        return self.sums

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, value in state.items():
            self.sums[name].copy_(value)

    @staticmethod
    def together(predictors: Sequence[Any]) -> None:
        """Once, before `solve`, with the predictors of all layers: what they have in common."""

    def gather(self) -> None:
        """Once, after the last window, where there are several processes: what all of them observed."""
        for total in self.sums.values():
            torch.distributed.all_reduce(total)


def slopes(sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Per neuron the least-squares line from a feature v to a target y: slope and intercept, fp64 `[F]`.

    Args: sums: `v`, `vv`, `vy`, `y` `[F]` and `n`, sums over tokens.
    """
    v, vv, vy, y = (sums[name].double() / sums["n"].double() for name in ("v", "vv", "vy", "y"))
    slope = (vy - v * y) / (vv - v * v).clamp_min(1e-30)
    return slope, y - slope * v
