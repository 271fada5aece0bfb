"""Predictors as PowerInfer computes them: in files for its converter, `model_<layer>.pt`, or in a GGUF file.

PowerInfer computes `fc2 @ relu(fc1 @ h)`, without biases, and takes the neurons whose score reaches one threshold for
all layers. Its h is the residual *before* the norm in front of the FFN, and ours comes after: `x = h / rms(h) * w`.
With w in the first matrix, the score is ours times `rms(h)`: of the same sign, and of another size with every token. So
the only cut is 0, and a cut of another value is refused, as is everything that cannot be said exactly.
"""

from pathlib import Path
from typing import Any

import torch
from moyu_kernels.ops.ffn.naive import predictor_family
from torch import Tensor

from moyu_train.checkpoints.export import check_whole, read_state
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import LLAMA_LAYERS, find_blocks
from moyu_train.models.compensation import compensation_rank
from moyu_train.models.loading import load_dense

THRESHOLD = 1e-30  # PowerInfer takes scores from it on, we those above 0; it is 0 where no unit of the ReLU fires
FIT = "predictor: {name: mlp, biases: false} and calibrate: {cut: 0}"


def export_powerinfer(folder: Path, out: Path) -> dict[str, Any]:
    """Write `model_<layer>.pt` into `out`, fp32 `fc1.weight` `[R, D]` and `fc2.weight` `[F, R]`."""
    check_whole(folder)
    layers = matrices(folder, load_dense(folder, "auto", device="cpu"))
    out.mkdir(parents=True, exist_ok=True)
    for index, (fc1, fc2) in enumerate(layers):
        torch.save({"fc1.weight": fc1, "fc2.weight": fc2}, out / f"model_{index}.pt")
    return {"folder": str(out), "layers": len(layers), "threshold": THRESHOLD}


def matrices(folder: Path, model: Any) -> list[tuple[Tensor, Tensor]]:
    """First `[R, D]` and second `[F, R]` matrix of each layer, fp32, their rows scaled so that float16 holds them.

    `lowrank` has no ReLU: its first matrix is there beside its negative, since `relu(z) - relu(-z) = z`.

    Args: model: of the checkpoint.
    Raises: MoyuError for an architecture whose FFN input is not known, a family that is not of two matrices, biases,
        and cuts that are not 0.
    """
    if compensation_rank(model):
        raise MoyuError(
            f"{str(folder)!r} has compensations, and PowerInfer has no place for them: use finetune.compensation: null"
        )
    _, predictors = read_state(folder)
    if not predictors:
        raise MoyuError(f"{str(folder)!r} has no predictors, and PowerInfer computes no FFN without; fit some: {FIT}")
    if model.config.model_type not in LLAMA_LAYERS:
        raise MoyuError(
            f"what PowerInfer's predictors read is known for {', '.join(LLAMA_LAYERS)}, and {str(folder)!r} is of the "
            f"architecture {model.config.model_type!r}"
        )
    found = []
    for layer, (block, predictor) in enumerate(zip(find_blocks(model), predictors, strict=True)):
        first, second = _matrices(predictor, layer)
        assert block.norm is not None  # these architectures have one
        found.append(_scaled(first * block.norm.float(), second))
    return found


def _matrices(predictor: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """First and second matrix for a ReLU between them."""
    family = predictor_family(list(predictor.values()))
    if family not in ("mlp", "lowrank"):
        raise MoyuError(f"PowerInfer's predictors are two matrices a layer; {family!r} is none: fit {FIT}")
    bias = predictor["bias"]
    if (bias != bias[0]).any() or ("b1" in predictor and predictor["b1"].any()):
        raise MoyuError(f"the predictor of layer {layer} has biases, which PowerInfer's have not; fit {FIT}")
    if bias[0]:
        raise MoyuError(
            f"the cut of layer {layer} is {-bias[0].item():.3g}, and PowerInfer's predictors read what no norm has "
            f"sized yet, so that only 0 is a cut; fit {FIT}"
        )
    w1, w2 = predictor["w1"] * predictor["s1"][:, None], predictor["w2"] * predictor["s2"][:, None]
    return (torch.cat([w1, -w1]), torch.cat([w2, -w2], dim=1)) if family == "lowrank" else (w1, w2)


def _scaled(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same signs of all scores, with 1 as the largest value of every row."""
    size = first.abs().amax(1).clamp_min(1e-30)
    second = second * size
    return first / size[:, None], second / second.abs().amax(1, keepdim=True).clamp_min(1e-30)
