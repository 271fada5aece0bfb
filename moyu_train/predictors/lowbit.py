"""2-bit or 1-bit copies of gate and up: the predictor computes the FFN's own activation, roughly, at 1/8 or 1/16.

Of a plain FFN up alone is copied, and the score adds up's own bias before the activation.

Rounding follows GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and the error of
each is made up for by those after it, so that `norm((W - W2) @ x)` over the text is small rather than `norm(W - W2)`.
A few sweeps of coordinate descent (QuantEase, Behdin et al. 2023, arXiv 2309.01885) then go on from where that ends.
All that this needs of the text is the second moment of x, streamed in one pass: nothing is dumped, the sums of many
processes add up, and there is nothing to tune by gradient. How far a copy is off on average follows from it too, and
the score allows for it.
"""

from typing import Literal

import torch
from moyu_kernels.ops.ffn.naive import pack_codes
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock
from moyu_train.predictors.sums import Sums

# between the 4 or 2 even levels of least mean square error for a normal variable of variance 1 (Max 1960)
SPACING = {2: 0.9957, 1: 1.5958}
COLUMNS = 64  # rounded before their error is carried to the rest
SWEEPS = 4  # of coordinate descent


class LowBit(Sums):
    """Predictor of one layer. Sums are fp32 on the model's device; rounding is fp32, its triangular factor fp64."""

    name = form = "lowbit"

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        bits: Literal[1, 2] = Field(2, description="of each weight of the copies")
        damp: float = Field(0.01, gt=0, description="added to the second moment's diagonal, relative to its mean")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        self.options, self.block = options, block
        self.sums = {
            "xx": torch.zeros(block.hidden, block.hidden, device=device),
            "y": torch.zeros((), device=device),
            "n": torch.zeros((), device=device),
        }

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor."""
        copies = 2 if gated else 1
        return neurons * (copies * (-(-hidden * options.bits // 8) + 2 * 4) + 2 * 4)

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """Add tokens: x `[N, D]`, contribution `[N, F]` (non-negative)."""
        x = x.float()
        self.sums["xx"].addmm_(x.T, x)
        self.sums["y"] += contribution.float().sqrt().mean(1).sum()
        self.sums["n"] += len(x)

    def solve(self) -> dict[str, Tensor]:
        """The predictor in storage form: codes uint8 `[F, ceil(D * bits / 8)]`, scales fp32 `[2, F]`, weight and bias
        fp32 `[F]`.

        The score, as `naive.lowbit_scores` has it, predicts `sqrt(contribution)` in units of its mean over the layer.
        """
        moment = self.sums["xx"].double() / self.sums["n"].double()
        moment.diagonal().add_(self.options.damp * moment.diagonal().mean())
        fronts = self.block.fronts()
        try:
            rounded = [round_weight(weight.float(), moment, self.options.bits) for weight in fronts]
        except torch.linalg.LinAlgError as error:
            raise MoyuError(
                f"the inputs of {self.block.path} have no usable second moment ({error}); raise predictor.damp or "
                "fit.tokens, or look for values that are not finite"
            ) from error
        mean = self.sums["y"] / self.sums["n"]
        weight = self.block.down_norms().sqrt() / mean
        stored: dict[str, Tensor] = {}
        for name, (levels, scales) in zip(("gate", "up")[-len(fronts) :], rounded, strict=True):
            stored |= {f"{name}_codes": pack_codes(levels, self.options.bits), f"{name}_scales": scales}
        stored |= {"weight": weight, "bias": torch.zeros_like(weight)}
        return {name: tensor.cpu() for name, tensor in stored.items()}


def round_weight(weight: Tensor, moment: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Levels -3, -1, 1 and 3, or with 1 bit -1 and 1, and a scale per row, for a small error of the product with x.

    Args: weight fp32 `[F, D]`; moment fp64 `[D, D]`, positive definite: the mean of `outer(x, x)`.
    Returns: levels fp32 `[F, D]`; scales fp32 `[2, F]`: the best one for these levels in the least-squares sense, and
        the root mean square of the product's error over that of `norm(x)`.
    """
    levels, moment32 = _gptq(weight, moment, bits), moment.float()
    for _ in range(SWEEPS):
        _sweep(levels, weight, moment32, bits)
    scale = _best_scale(levels, weight, moment32)
    error = weight - levels * scale[:, None]
    energy = ((error @ moment32) * error).sum(1).clamp_min(0) / moment32.trace()
    return levels, torch.stack([scale, energy.sqrt()])


def _gptq(weight: Tensor, moment: Tensor, bits: int) -> Tensor:
    """Levels `[F, D]`, column by column, with the error of each made up for by those after it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    scale = weight.std(1).clamp_min(1e-30) * SPACING[bits] / 2
    rest, levels = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for i in range(start, end):
            column = _nearest(rest[:, i] / scale, bits)
            levels[:, i] = column
            error = (rest[:, i] - column * scale) / factor[i, i]
            errors[:, i - start] = error
            rest[:, i:end] -= torch.outer(error, factor[i, i:end])
        rest[:, end:] -= errors @ factor[start:end, end:]
    return levels


def _sweep(levels: Tensor, weight: Tensor, moment: Tensor, bits: int) -> None:
    """Put each column of `levels` in turn to what is best for the product, all others and the scale being as they are.

    moment: fp32 `[D, D]`.
    """
    scale = _best_scale(levels, weight, moment)  # 0 of a row of zeros, whose gradient is 0 too
    gradient = (weight - levels * scale[:, None]) @ moment  # half of it, negative
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        near, moves = gradient[:, start:end].clone(), torch.empty_like(weight[:, start:end])
        for i in range(start, end):
            step = near[:, i - start] / (scale * moment[i, i]).clamp_min(1e-36)
            column = _nearest(levels[:, i] + step, bits)
            moves[:, i - start] = (column - levels[:, i]) * scale
            levels[:, i] = column
            near[:, i - start + 1 :] -= torch.outer(moves[:, i - start], moment[i, i + 1 : end])
        gradient -= moves @ moment[start:end]


def _nearest(value: Tensor, bits: int) -> Tensor:
    """The level nearest to it."""
    half = 2 ** (bits - 1)
    return (value / 2 - 0.5).round().clamp(-half, half - 1) * 2 + 1


def _best_scale(levels: Tensor, weight: Tensor, moment: Tensor) -> Tensor:
    weighted = levels @ moment
    return (weighted * weight).sum(1) / (weighted * levels).sum(1)
