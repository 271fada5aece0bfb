"""Routers: from an attention's normalised input, before it runs, to a score of each of its heads.

After Polar Sparsity (arXiv 2505.14884), whose head router is one linear map, and DejaVu (arXiv 2310.17157). Here it is
the least-squares solution for `sqrt(contribution)`, from sums that are streamed in one pass over text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.heads import Attention, contributions
from moyu_train.models.masking import InputMasks, Masking
from moyu_train.predictors.lowrank import LowRank, quantise_rows
from moyu_train.training.fit import PredictorTrainer

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

Routers = list[dict[str, Tensor]]  # storage form, one a layer


class Router(LowRank):
    """Router of one attention: the sums of `lowrank`, solved at full rank for one matrix."""

    name = form = "router"

    def __init__(self, attention: Attention, unit: str, device: torch.device) -> None:
        super().__init__(LowRank.Options(), attention.block, device, attention.units(unit))

    def solve(self) -> dict[str, Tensor]:
        """Storage form: weight int8 `[U, D]`, scale and bias fp32 `[U]`; a score is `scale * (weight @ x) + bias`."""
        mean_x, mean_y, cov, cross = self.moments()
        weight, scale = quantise_rows(torch.linalg.solve(cov, cross).T)
        bias = mean_y - scale * (weight.double() @ mean_x)
        return {"weight": weight.contiguous(), "scale": scale.float(), "bias": bias.float()}

    def fixed(self) -> dict[str, Tensor]:
        """The same form, which names the same units for every token: those of largest mean target."""
        mean_x, mean_y, _, _ = self.moments()
        weight = torch.zeros(len(mean_y), len(mean_x), dtype=torch.int8)
        return {"weight": weight, "scale": torch.ones(len(mean_y)), "bias": mean_y.float()}


def scores(x: Tensor, router: Mapping[str, Tensor]) -> Tensor:
    """A router's score of each unit, fp32 `[..., U]`, of an attention's input x `[..., D]`."""
    weight, scale, bias = (router[name].to(x.device) for name in ("weight", "scale", "bias"))
    return functional.linear(x.float(), weight.float()) * scale + bias


class RouterTrainer(PredictorTrainer):
    """Fits the routers of all attentions in one pass, on the model as it is.

    Args: model: its weights are only read; unit: "head" or "group"; folder: for sums of an interrupted fit.
    """

    def __init__(self, model: Any, attentions: list[Attention], unit: str, folder: Path) -> None:
        self.model, self.folder, device = model, folder, device_of(model)
        self.blocks = [attention.block for attention in attentions]
        self.grams = [attention.grams(unit) for attention in attentions]
        self.predictors = [Router(attention, unit, device) for attention in attentions]

    def _observing(self) -> Masking:
        def observe(layer: int, a: Tensor, expert: int | None) -> None:
            x = masking.input(layer).reshape(-1, self.blocks[layer].hidden)
            self.predictors[layer].observe(x, contributions(a, self.grams[layer]).view(len(x), -1))

        masking = Masking(self.blocks, observe, inputs=True)
        return masking


def fit_under(
    model: Any,
    rules: list[Rule],
    inputs: Mapping[str, Rule],
    attentions: list[Attention],
    unit: str,
    windows: Tensor,
    folder: Path,
    save_every: int,
) -> Routers:
    """Routers fitted on the model under exact masks: the rules of its FFN blocks and of sparse inputs, by path."""
    blocks = find_blocks(model)
    trainer = RouterTrainer(model, attentions, unit, folder)
    masks = Masking(blocks, lambda layer, a, expert: rules[layer].mask(a, expert), rules=rules)
    with masks, InputMasks(model, dict(inputs)):
        return trainer.fit(windows, save_every)


def fit_routers(run: "Run", model: Any, attentions: list[Attention]) -> tuple[Routers, Routers]:
    """Routers of all layers on the recipe's `fit.tokens`, and such as name the same units for every token."""
    recipe = run.recipe
    digest = recipe.digest("fit", "data", "seed", "heads.unit")[:12]
    folder = run.folder / "heads" / f"{digest}-{run.inputs_digest[:12]}"  # resumes what it was broken off in
    folder.mkdir(parents=True, exist_ok=True)
    windows = run.train.packed(recipe.fit.window, recipe.seed + 1)[: max(recipe.fit.tokens // recipe.fit.window, 1)]
    trainer = RouterTrainer(model, attentions, recipe.heads.unit, folder)
    routers = trainer.fit(windows, recipe.fit.save_every)
    return routers, [router.fixed() for router in trainer.predictors]
