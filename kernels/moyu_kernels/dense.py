"""The linear layer that decodes at memory speed."""

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .modules import MAX_ROWS, wants_gradient
from .ops import cpu


class Linear(nn.Module):
    """A linear layer's twin on the same parameters: `moyu::linear` for up to 8 tokens, `F.linear` for more.

    Args: original: the layer whose parameters are shared.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        self.weight, self.bias = original.weight, original.bias
        cpu.load()

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]`; returns `[..., out]`."""
        return dense_linear(x, self.weight, self.bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x `[..., in]`, by `moyu::linear` for up to 8 tokens on a CPU, once `cpu.load()` has been called."""
    rows = x.numel() // x.shape[-1]
    if rows > MAX_ROWS or wants_gradient(x, weight):
        return functional.linear(x, weight, bias)
    y = torch.ops.moyu.linear.default(x.reshape(rows, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))
