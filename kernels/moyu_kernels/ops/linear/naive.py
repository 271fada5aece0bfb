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


def head_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, router: Tensor, scale: Tensor, offset: Tensor, keep: int
) -> Tensor:
    """`linear` for the units (heads of attention, or groups of them) that a router chooses; zero for the others.

    Chosen are the `keep` largest of `scale * (router @ x) + offset` (fp32), of equals the first ones.

    Args: x `[N, D]`; weight `[U * S, D]`, S rows a unit, and bias `[U * S]`, both of x's dtype; router int8 `[U, D]`;
        scale and offset fp32 `[U]`.
    Returns: `[N, U * S]` of x's dtype.
    """
    scores = x.float() @ router.float().T * scale + offset
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    return torch.where(kept.repeat_interleave(len(weight) // len(router), 1), linear(x, weight, bias), 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, skip_zero: bool = False) -> Tensor:
    """Attention of one new token over a static cache.

    Args: q `[B, H, 1, D]`; k and v `[B, G, L, D]`, G a divisor of H, of q's dtype; mask bool `[B or 1, 1, 1, L]`, True
        where a position is seen, at least one in each row; skip_zero: a head whose query is all zeros is off, its
        output is zero.
    Returns: `[B, 1, H, D]` of q's dtype.
    """
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if skip_zero:
        y = zero_where_off(y, q)
    return y.transpose(1, 2).contiguous()


def zero_where_off(y: Tensor, q: Tensor) -> Tensor:
    """Attention's outputs, zero for heads whose query is all zeros; both `[..., D]`."""
    return torch.where((q != 0).any(-1, keepdim=True), y, 0.0)


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
