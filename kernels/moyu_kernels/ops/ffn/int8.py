"""Weight rows in int8, symmetric, with one fp32 scale a row: half the bytes of bf16 for every row that is read."""

import torch
from torch import Tensor

TOP = 127  # -128 is not used


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and scales fp32 `[F]` of rows `[F, D]`: `scale = max(abs(row)) / 127`, codes rounded half to even.

    Deterministic, an element at a time. `codes * scale` is within scale / 2 of the weight; a row of zeros has scale 0.

    Raises: ValueError for weights that are not finite.
    """
    wide = weight.float()
    scale = wide.abs().amax(-1) / TOP
    if not torch.isfinite(scale).all():
        raise ValueError(f"weights {list(weight.shape)} hold values that are not finite, which int8 rows cannot hold")
    inverse = torch.where(scale > 0, scale, 1.0)
    return (wide / inverse[:, None]).round_().clamp_(-TOP, TOP).to(torch.int8), scale


def dequantise_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What rows stand for: `codes * scale`, computed in fp32; codes `[F, D]`, scale `[F]`."""
    return (codes.float() * scale[:, None]).to(dtype)
