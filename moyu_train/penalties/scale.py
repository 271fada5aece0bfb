"""What an activation is multiplied with before it is penalised, so that its mean square is 1 in every layer.

Measured once, before training, and kept: a penalty that follows its own statistic would reward a model for growing it.
"""

from typing import Any, ClassVar, Literal

import torch
from moyu_kernels.rules import Rule
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.masking import Masking
from moyu_train.penalties.base import Penalty
from moyu_train.settings import STATISTIC


class ScaleOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    statistic: Literal["contribution", "magnitude"] = Field("contribution", description=STATISTIC)


class ScaledPenalty(Penalty):
    """A penalty on `abs(a) * scale`."""

    Options: ClassVar[type[BaseModel]] = ScaleOptions


@torch.no_grad()
def measure_scales(model: Any, statistic: str, windows: Tensor, rules: list[Rule] | None = None) -> list[Tensor]:
    """Scale of each neuron, fp32 `[F]` a layer, on `windows` int64 `[N, T]`, with the rules' gate and up in place.

    Raises: MoyuError for layers of experts, whose tokens a penalty cannot tell from padding yet.
    """
    blocks = find_blocks(model)
    if any(block.layout == "experts" for block in blocks):
        raise MoyuError("penalties act on dense FFN blocks so far, this model has experts; remove `penalty`")
    weights = [
        norms if statistic == "contribution" else torch.ones_like(norms)
        for norms in (block.down_norms() for block in blocks)
    ]
    sums = torch.zeros(len(blocks), dtype=torch.float64)

    def observe(layer: int, a: Tensor, expert: int | None) -> None:
        sums[layer] += (a.float() * weights[layer]).double().square().mean().item()

    with Masking(blocks, observe, rules=rules):
        for ids in windows:
            model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
    rms = (sums / len(windows)).sqrt().clamp_min(1e-12)
    return [weight / size for weight, size in zip(weights, rms.tolist(), strict=True)]
