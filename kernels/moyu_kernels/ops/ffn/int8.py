"""Weight rows in int8, symmetric, with one fp32 scale a row: half the bytes of bf16 for every row that is read."""

import torch
from torch import Tensor

TOP = 127  # -128 is not used
MOST = 64.0  # of a column's factor


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


def quantise_down(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`quantise_rows` of down's rows `[F, D]` over a factor for each column, and these factors fp32 `[D]`.

    A few neurons write one large value into an outlier of the residual stream, on the first token of a sequence above
    all. Its weight would set the scale of the whole row, and their large activations would write the rounding error of
    all others. A column's factor is the largest `abs(weight) / rms(row)` in it over the median column's, 1 to 64.
    """
    wide = weight.float()
    rms = wide.square().mean(-1, keepdim=True).sqrt()
    peaks = (wide.abs() / torch.where(rms > 0, rms, 1.0)).amax(0)
    columns = (peaks / peaks.median().clamp_min(1e-3)).clamp(1.0, MOST)
    return *quantise_rows(wide / columns), columns


def dequantise_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> Tensor:
    """What rows stand for: `codes * scale * columns`, computed in fp32; codes `[F, D]`, scale `[F]`, columns `[D]`."""
    rows = codes.float() * scale[:, None]
    return (rows if columns is None else rows * columns).to(dtype)
