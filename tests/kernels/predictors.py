"""Random tensors of every predictor family, their scores spread around zero."""

import torch
from moyu_kernels.ops.ffn import naive
from torch import Tensor

# As a checkpoint names them, of a gated FFN and of a plain one.
FAMILIES, PLAIN_FAMILIES = (
    tuple(family for family in naive.PREDICTORS if family != other) for other in ("lowbit_up", "lowbit")
)
KINDS, PLAIN_KINDS = (*FAMILIES, "onebit"), (*PLAIN_FAMILIES, "onebit_up")  # lowbit has 2 bits or 1


def random_predictor(family: str, hidden: int, neurons: int, rank: int, seed: int = 0) -> list[Tensor]:
    """The tensors of a predictor whose bias is zero (lowrank) or about the middle of the scores (lowbit in 2 bits or,
    for `onebit`, 1; of up alone with `_up`), or a mask that keeps each neuron for half of the rows (given).
    """
    g = torch.Generator().manual_seed(seed)
    if family == "given":
        return [torch.randint(256, (neurons,), generator=g).to(torch.uint8)]
    if family == "lowrank":
        w1, w2 = (
            torch.randint(-127, 128, shape, generator=g).to(torch.int8) for shape in ((rank, hidden), (neurons, rank))
        )
        s1, s2 = torch.rand(rank, generator=g) / 73 / hidden**0.5, torch.rand(neurons, generator=g) / 73 / rank**0.5
        return [w1, s1, w2, s2, torch.zeros(neurons)]
    bits, parts = 1 if family.startswith("onebit") else 2, []
    for _ in range(1 if family.endswith("_up") else 2):
        levels = torch.randint(0, 2**bits, (neurons, hidden), generator=g) * 2.0 - (2**bits - 1)
        scales = (torch.rand(2, neurons, generator=g) + 0.5) * torch.tensor([[3.0 - bits], [0.5]]) / hidden**0.5
        parts += [naive.pack_codes(levels, bits), scales]
    return [*parts, torch.rand(neurons, generator=g) + 0.5, torch.full((neurons,), -0.85)]
