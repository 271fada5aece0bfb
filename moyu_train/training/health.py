"""Watches over a sparse model in training: neurons that died, layers that keep nothing, thresholds that ran away."""

from typing import Any

import torch
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.models.masking import Masking

DEAD_AFTER = 10_000  # tokens without being kept once
EXPLODED = 1e4  # times the threshold that training began with


class Health:
    """Tokens since each neuron was last kept, int64 `[F]` a layer (`[E, F]` for experts)."""

    def __init__(self, blocks: list[FFNBlock], thresholds: list[Tensor]) -> None:
        self.blocks = blocks
        self.silent = [torch.zeros_like(threshold, dtype=torch.int64) for threshold in thresholds]
        self._first = [threshold.mean().item() for threshold in thresholds]
        self._active = [torch.zeros_like(threshold, dtype=torch.bool) for threshold in thresholds]

    def to(self, device: torch.device) -> None:
        """Where the model trains, so that no layer of its forward waits for a copy."""
        self.silent = [silent.to(device) for silent in self.silent]
        self._active = [active.to(device) for active in self._active]

    def note(self, layer: int, keep: Tensor, expert: int | None) -> None:
        """Within a step: keep bool `[..., F]`."""
        active = self._active[layer] if expert is None else self._active[layer][expert]
        active |= keep.reshape(-1, keep.shape[-1]).any(0).to(active.device)

    def step(self, tokens: int) -> None:
        """At the end of an optimizer step of `tokens` tokens, over all processes."""
        for silent, active in zip(self.silent, self._active, strict=True):
            flags = active.to(torch.uint8)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            silent += tokens
            silent[flags.bool()] = 0
            active.zero_()

    def check(self, density: list[float], thresholds: list[Tensor], step: int) -> None:
        """Raises: MoyuError naming the layer that keeps nothing, or whose threshold ran away."""
        for block, kept, threshold, first in zip(self.blocks, density, thresholds, self._first, strict=True):
            if kept == 0:
                raise MoyuError(
                    f"{block.path} kept no neuron in step {step}, so it computes nothing; the last good checkpoint is "
                    "kept, lower target_sparsity, the penalty's coefficient or finetune.learning_rate"
                )
            mean = threshold.mean().item()
            if not mean <= EXPLODED * first and first > 0:
                raise MoyuError(
                    f"the threshold of {block.path} went from {first:.3g} to {mean:.3g} by step {step}: its "
                    "activations grow without end; the last good checkpoint is kept, lower finetune.learning_rate or "
                    "sparsifier.gain"
                )

    def metrics(self) -> dict[str, float]:
        """Share of the neurons that are dead, and of the layer that has most of them."""
        shares = [(silent >= DEAD_AFTER).double().mean().item() for silent in self.silent]
        return {"dead_neurons": sum(shares) / len(shares), "dead_highest_layer": max(shares)}


@torch.no_grad()
def where_not_finite(model: Any, blocks: list[FFNBlock], inputs: dict[str, Tensor]) -> str:
    """Where a forward first goes wrong, in words for an error message."""
    bad: list[str] = []

    def observe(layer: int, a: Tensor, expert: int | None) -> None:
        if not torch.isfinite(a).all():
            bad.append(blocks[layer].path)

    with Masking(blocks, observe):
        model(**inputs, use_cache=False)
    if bad:
        return f"the first activation that is not finite is in {bad[0]}"
    return "all FFN activations are finite, so it comes from the last norm, the head or the loss"
