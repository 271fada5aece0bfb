"""What tokens mean, as far as it can be told without a model's layers: by input embeddings, averaged over neighbours.

For comparing masks of tokens that mean the same, where the layers, whose masks are compared, must have no part in it.
"""

import torch
from torch import Tensor

REACHES = (2, 16)  # tokens on either side: the phrase, and about the sentence


def sketch(embeddings: Tensor, size: int = 64) -> Tensor:
    """Embeddings `[V, D]` projected at random, the same for the same D, fp32 `[V, min(D, size)]` on the CPU."""
    found = embeddings.detach().float().cpu()
    if found.shape[1] > size:
        found = found @ torch.randn(found.shape[1], size, generator=torch.Generator().manual_seed(0))
    return found


def around(vectors: Tensor, reach: int) -> Tensor:
    """Sum over up to `reach` tokens on either side, of length 1: `[..., T, R]`. Padding is 0 and stays out of it."""
    sums = torch.nn.functional.pad(vectors.cumsum(-2), (0, 0, 1, 0))
    length = vectors.shape[-2]
    at = torch.arange(length, device=vectors.device)
    high, low = (at + reach + 1).clamp_max(length), (at - reach).clamp_min(0)
    return torch.nn.functional.normalize(sums[..., high, :] - sums[..., low, :], dim=-1)
