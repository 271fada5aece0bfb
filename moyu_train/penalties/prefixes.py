"""Sequences with another text of the training set as their first half, for penalties on what a prefix carries over."""

import torch
from torch import Tensor


class Prefixes:
    """Args: windows: int64 `[N, T]` of text to take prefixes from. Where all begin with one token, which the tokenizer
    puts before any text, it stays where it is."""

    def __init__(self, windows: Tensor) -> None:
        first = windows[:, 0]
        self.start = int(first[0]) if len(first) > 1 and bool((first == first[0]).all()) else None
        self.text = (windows if self.start is None else windows[:, 1:]).flatten()

    def swap(self, ids: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The sequences with other first halves, and where the first and second halves are, bool: all `[B, T]`.

        Which text a sequence gets follows from its own tokens alone, so that every way to cut a step sees the same.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
        place, length = real.cumsum(1) - 1, real.sum(1, keepdim=True)
        first = real & (place < length // 2)
        start = (ids * real).sum(1, keepdim=True)
        text, other = self.text.to(ids.device), first
        if self.start is not None:
            other = first & ~((place == 0) & (ids == self.start))
        return torch.where(other, text[(start + place) % len(text)], ids), first, real & ~first
