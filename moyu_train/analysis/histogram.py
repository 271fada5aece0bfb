"""Streamed distribution of a value per layer; memory does not grow with the number of tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moyu_train.errors import MoyuError

BINS = 4096


class Histogram:
    """Counts `[L, BINS]`, fp64, on an even scale from `low` to `high`; what lies outside falls into the ends."""

    def __init__(self, layers: int, low: float, high: float) -> None:
        self.low, self.step = low, (high - low) / BINS
        self.counts = torch.zeros(layers, BINS, dtype=torch.float64)

    def add(self, layer: int, values: Tensor, weights: Tensor | None = None) -> None:
        """values: fp32, any shape; weights: of each, of the same shape, default 1.

        Raises: MoyuError for values that are not a number.
        """
        if values.isnan().any():
            raise MoyuError(
                f"activations of layer {layer} are not numbers (NaN) on this text; check the model's weights, "
                "which may be damaged or overflow in their dtype"
            )
        bins = ((values.detach() - self.low) / self.step).clamp(0, BINS - 1).long()
        weights = weights if weights is None else weights.flatten().double()
        self.counts[layer] += torch.bincount(bins.flatten(), weights, minlength=BINS).double().cpu()

    def levels(self, density: float | Sequence[float]) -> list[float]:
        """Per layer the value that a share of the counted values reaches, interpolated within a bin.

        density: the share, one for all layers or one a layer.
        """
        densities = [density] * len(self.counts) if isinstance(density, float) else density
        levels = []
        for counts, share in zip(self.counts, densities, strict=True):
            above = counts.flip(0).cumsum(0).flip(0) / counts.sum()  # share at or above each bin's lower edge
            i = int((above >= share).nonzero().max())
            next_above = above[i + 1].item() if i + 1 < BINS else 0.0
            inside = (above[i].item() - share) / max(above[i].item() - next_above, 1e-12)
            levels.append(self.low + (i + inside) * self.step)
        return levels
