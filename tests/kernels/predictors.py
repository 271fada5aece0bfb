"""Random tensors of every predictor family, their scores spread around zero."""

import torch
from moyu_kernels.ops.ffn import naive
from torch import Tensor

FAMILIES = tuple(naive.PREDICTORS)


def random_predictor(family: str, hidden: int, neurons: int, rank: int, seed: int = 0) -> list[Tensor]:
    """The tensors of a predictor whose bias is zero (lowrank) or about the middle of the scores (lowbit)."""
    g = torch.Generator().manual_seed(seed)
    if family == "lowrank":
        w1, w2 = (
            torch.randint(-127, 128, shape, generator=g).to(torch.int8) for shape in ((rank, hidden), (neurons, rank))
        )
        s1, s2 = torch.rand(rank, generator=g) / 73 / hidden**0.5, torch.rand(neurons, generator=g) / 73 / rank**0.5
        return [w1, s1, w2, s2, torch.zeros(neurons)]
    parts = []
    for _ in range(2):
        levels = torch.randint(0, 4, (neurons, hidden), generator=g) * 2.0 - 3
        parts += [naive.pack_codes(levels), (torch.rand(neurons, generator=g) + 0.5) / hidden**0.5]
    return [*parts, torch.rand(neurons, generator=g) + 0.5, torch.full((neurons,), -0.65)]
