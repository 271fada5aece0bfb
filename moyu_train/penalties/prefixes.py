"""Sequences with another text of the training set as their first half, for penalties on what a prefix carries over."""

import torch
from torch import Tensor


class Prefixes:
    """Args: windows: int64 `[N, T]` of text to take prefixes from."""

    def __init__(self, windows: Tensor) -> None:
        self.text = windows.flatten()

    def swap(self, ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences with other first halves, and where the first and second halves are, bool: all `[B, T]`.

        Which text a sequence gets follows from its own tokens alone, so that every way to cut a step sees the same.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        place, length = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        first = real & (place < length // 2)
        start = (ids * real).sum(1, keepdim=True)
        text = self.text.to(ids.device)
        return torch.where(first, text[(start + place) % len(text)], ids), first, real & ~first
