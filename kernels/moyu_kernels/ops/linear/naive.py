"""Linear layers, dense and with sparse inputs, in plain PyTorch: the definition of what every backend computes."""

import torch
import torch.nn.functional as functional
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; of int8 rows `(x @ weight.T) * scale + bias` in fp32.

    Args: x `[N, D]`; weight `[outputs, D]` of x's dtype, or int8 beside scale fp32 `[outputs]`; bias `[outputs]`.
    Returns: `[N, outputs]` of x's dtype.
    """
    if scale is None:
        return functional.linear(x, weight, bias)
    y = x.float() @ weight.float().T * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


def linears(x: Tensor, weights: list[Tensor], biases: list[Tensor], scales: Tensor | None = None) -> Tensor:
    """`linear` of several layers on one input, side by side."""
    return linear(x, torch.cat(weights), torch.cat(biases) if biases else None, scales)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`y = where(kept, x, 0) @ weight + bias`, an input kept where `abs(x) >= threshold` and it is not zero.

    TEAL (arXiv 2408.14690), and WINA (arXiv 2505.19427) with thresholds over the norms of the weight's rows. What is
    not a number is not kept. Everything after the dtype of x and the weights is fp32; y is cast back to x's.

    Args: x `[N, D]`; weight `[D, F]` of x's dtype, input-contiguous (the stock weight transposed), so that one input is
        one row; bias `[F]` of x's dtype; threshold `[D]` fp32 (0 keeps all).
    Returns: y `[N, F]` of x's dtype; inputs kept, `[N]` int32.
    """
    kept = (x.abs() >= threshold) & (x != 0)
    y = torch.where(kept, x, 0.0).float() @ weight.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype), kept.sum(-1).to(torch.int32)
