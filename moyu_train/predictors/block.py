"""`lowrank` for blocks of neighbouring neurons: one score for all neurons of a block, which is selected as a whole.

The target is the square root of the block's mean contribution, `sqrt(mean(c))`, by reduced-rank regression (`lowrank`).
Rows of selected neurons then lie together in memory in runs of at least `block`; the rule still drops single neurons
after that. The second matrix has one row a block, and is stored with that row for each of its neurons, which is the
storage form of `lowrank`: its op computes this family exactly, and its bytes are what a decode step reads.
"""

import torch
from pydantic import Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.lowrank import LowRank


class Block(LowRank):
    """Predictor of one layer. Sums are fp32 on the model's device, of blocks; the solution is fp64."""

    name, form = "block", "lowrank"

    class Options(LowRank.Options):
        block: int = Field(16, ge=16, le=128, description="neighbouring neurons that share a score")

    options: Options

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        super().__init__(options, block, device, block.neurons // options.block)

    @classmethod
    def planned_bytes(cls, options: LowRank.Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor.

        Raises: MoyuError where the neurons do not make whole blocks, or the rank is above the hidden size.
        """
        assert isinstance(options, Block.Options)
        if neurons % options.block:
            raise MoyuError(
                f"predictor.block {options.block} does not divide a layer's {neurons} neurons into whole blocks; use a "
                "number that does, such as 16"
            )
        return super().planned_bytes(options, hidden, neurons, gated)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add tokens: x `[N, D]`, contribution `[N, F]` (non-negative)."""
        super().observe(x, contribution.float().unflatten(1, (-1, self.options.block)).mean(2))

    def solve(self) -> dict[str, Tensor]:
        """The predictor in the storage form of `lowrank`."""
        stored = super().solve()
        return {
            name: tensor.repeat_interleave(self.options.block, dim=0) if name in ("w2", "s2", "bias") else tensor
            for name, tensor in stored.items()
        }
