"""Routers: from an attention's normalised input, before it runs, to a score of each of its heads.

After Polar Sparsity (arXiv 2505.14884), whose head router is one linear map, and DejaVu (arXiv 2310.17157). Here it is
the least-squares solution for `sqrt(contribution)`, from sums that are streamed in one pass over text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from accelerate import PartialState
from moyu_kernels.heads import HeadRouters
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.files import read_tensors, reading
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.heads import Attention, contributions, find_attention
from moyu_train.models.masking import InputMasks, Masking
from moyu_train.predictors.lowrank import LowRank, quantise_rows
from moyu_train.settings_export import Heads
from moyu_train.training.fit import PredictorTrainer, fit_windows

if TYPE_CHECKING:
    from moyu_train.pipeline import Run

FILE = "heads.safetensors"  # routers by their attention's path, in the folders of fit-heads and refit-heads
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


def most(values: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest of each row of `[..., U]`; of equals the first ones."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


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


def sparse_attentions(attentions: list[Attention], settings: Heads) -> list[Attention]:
    """Those whose heads are chosen."""
    return [attention for layer, attention in enumerate(attentions) if layer not in settings.dense_layers]


def check_shares(attentions: list[Attention], settings: Heads, name: str, shares: Sequence[float]) -> None:
    """Whether `heads` fits a model. Args: name: of the setting that holds the `shares` of units kept.

    Raises: MoyuError where it has not the layers and heads that are asked for.
    """
    last = len(attentions) - 1
    if any(layer > last for layer in settings.dense_layers) or len(set(settings.dense_layers)) > last:
        raise MoyuError(
            f"heads.dense_layers {list(settings.dense_layers)}: the model has the layers 0 to {last}, and at least one "
            "has to be sparse; name fewer of these"
        )
    numbers = sorted({attention.units(settings.unit) for attention in attentions})
    if len(numbers) > 1:
        raise MoyuError(
            f"heads.unit {settings.unit!r}: layers of this model have {numbers} of them, and as many are kept in all; "
            "use another model"
        )
    for share in shares:
        keep = round(share * numbers[0])
        if not 1 <= keep < numbers[0]:
            raise MoyuError(
                f"heads.{name} {share} keeps {keep} of the {numbers[0]} {settings.unit}s of a layer; give a share "
                "that keeps at least one and not all"
            )


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


def write_routers(folder: Path, attentions: list[Attention], routers: Routers) -> None:
    if PartialState().is_main_process:
        tensors = {
            f"{attention.block.path}.{part}": tensor
            for attention, router in zip(attentions, routers, strict=True)
            for part, tensor in router.items()
        }
        save_file(tensors, folder / FILE)


def head_routers(run: "Run", stage: str) -> HeadRouters | None:
    """What fit-heads or refit-heads left, with the units that the recipe keeps; none where it has no such stage."""
    settings = run.recipe.heads
    if stage not in run.stages:
        return None
    assert settings.keep is not None
    tensors = read_tensors(run.stage_folder(stage) / FILE)
    attentions = sparse_attentions(find_attention(run.skeleton), settings)
    parts = ("weight", "scale", "bias")
    with reading(run.stage_folder(stage) / FILE):
        routers = {a.block.path: {part: tensors[f"{a.block.path}.{part}"] for part in parts} for a in attentions}
    keep = round(settings.keep * attentions[0].units(settings.unit))
    return HeadRouters(settings.unit, keep, attentions[0].block.down, routers)


def fit_routers(run: "Run", model: Any, attentions: list[Attention]) -> tuple[Routers, Routers]:
    """Routers of all layers on the recipe's `fit.tokens`, and such as name the same units for every token."""
    recipe = run.recipe
    digest = recipe.digest("fit", "data", "seed", "heads.unit")[:12]
    folder = run.folder / "heads" / f"{digest}-{run.inputs_digest[:12]}"  # resumes what it was broken off in
    folder.mkdir(parents=True, exist_ok=True)
    trainer = RouterTrainer(model, attentions, recipe.heads.unit, folder)
    routers = trainer.fit(fit_windows(recipe, run.train), recipe.fit.save_every)
    return routers, [router.fixed() for router in trainer.predictors]
