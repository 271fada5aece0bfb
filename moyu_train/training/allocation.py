"""How the density is shared out among the layers: greedily by each block's error, as TEAL does (arXiv 2408.14690).

The error of a block at some density is `sum_t norm(W_down @ dropped_t)^2 / sum_t norm(W_down @ a_t)^2`, for dense
inputs. From dense layers on, the next share of neurons always goes from the layer whose error rises least by it, until
the whole model is as sparse as asked.
"""

import heapq
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from moyu_train.analysis.histogram import Histogram
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.sparsifiers.base import HeldSparsifier
from moyu_train.training.rule import LOG2_RANGE, watch


def check_allocation(cls: Any, recipe: Recipe) -> None:
    """Raises: MoyuError where the sparsifier has no levels to move."""
    method = recipe.allocation.method
    if method != "uniform" and not issubclass(cls, HeldSparsifier):
        raise MoyuError(
            f"allocation.method {method!r} needs a sparsifier whose level in every layer is calibrated and then held, "
            f"and {cls.name!r} is none: use the sparsifier 'threshold', 'gate_threshold' or 'fatrelu', or 'uniform'"
        )


def densities(model: Any, recipe: Recipe, documents: Documents) -> list[float]:
    """Density that the recipe's rule is calibrated to in each layer."""
    blocks, settings = find_blocks(model), recipe.allocation
    if settings.method != "greedy":
        return [1 - recipe.target_sparsity] * len(blocks)
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    errors = block_errors(model, cls, options, documents, recipe.calibrate.tokens, settings.sparsities)
    neurons = [block.neurons * block.experts for block in blocks]
    return share_out(errors, neurons, settings.sparsities, recipe.target_sparsity)


@torch.no_grad()
def block_errors(
    model: Any, cls: Any, options: Any, documents: Documents, tokens: int, sparsities: list[float]
) -> Tensor:
    """Relative squared error of each block's output when its rule drops so many neurons, fp64 `[L, len(sparsities)]`.

    cls: a sparsifier that calibrates a level; sparsities: each between 0 and 1.
    """
    blocks = find_blocks(model)
    rules = cls.start(options, blocks, 1.0).rules
    histogram = Histogram(len(blocks), *LOG2_RANGE)
    few = documents.first(tokens)

    def count(layer: int, statistic: Tensor, a: Tensor, expert: int | None) -> None:
        histogram.add(layer, statistic.clamp_min(1e-30).log2())

    watch(model, cls, options, blocks, few, rules, "allocation: statistics", count)
    levels = torch.tensor([histogram.levels(1 - s) for s in sparsities]).exp2()  # [S, L]
    errors = torch.zeros(len(blocks), len(sparsities), dtype=torch.float64)
    sizes = torch.zeros(len(blocks), 1, dtype=torch.float64)

    def measure(layer: int, statistic: Tensor, a: Tensor, expert: int | None) -> None:
        down, a = blocks[layer].down_matrix(expert).float(), a.float()
        sizes[layer] += functional.linear(a, down).square().sum(dtype=torch.float64).cpu()
        for i, level in enumerate(levels[:, layer].tolist()):
            dropped = torch.where(statistic < level, a, 0.0)
            errors[layer, i] += functional.linear(dropped, down).square().sum(dtype=torch.float64).cpu()

    watch(model, cls, options, blocks, few, rules, "allocation: block errors", measure)
    return errors / sizes


def share_out(errors: Tensor, neurons: list[int], sparsities: list[float], target: float) -> list[float]:
    """Density of each layer, so that `target` of all neurons are off.

    Args: errors `[L, S]` at `sparsities`, rising; neurons: of each layer.
    """
    taken = [0.0] * len(neurons)
    missing = target * sum(neurons)

    def offer(layer: int, index: int) -> tuple[float, int, int]:
        before = errors[layer, index - 1].item() if index else 0.0
        share = sparsities[index] - taken[layer]
        return (errors[layer, index].item() - before) / (share * neurons[layer]), layer, index

    offers = [offer(layer, 0) for layer in range(len(neurons))]
    heapq.heapify(offers)
    while missing > 0 and offers:
        _, layer, index = heapq.heappop(offers)
        step = min((sparsities[index] - taken[layer]) * neurons[layer], missing)
        taken[layer] += step / neurons[layer]
        missing -= step
        if index + 1 < len(sparsities):
            heapq.heappush(offers, offer(layer, index + 1))
    return [1 - share for share in taken]
