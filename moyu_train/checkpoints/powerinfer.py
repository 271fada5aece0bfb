"""Writes a sparse checkpoint's predictors as PowerInfer's converter reads them: `model_<layer>.pt`, one a layer.

PowerInfer computes `fc2 @ relu(fc1 @ x)`, without biases, and takes the neurons whose score reaches one threshold for
all layers. What that cannot say exactly is refused.
"""

from pathlib import Path
from typing import Any

import torch
from moyu_kernels.ops.ffn.naive import predictor_family
from torch import Tensor

from moyu_train.checkpoints.export import read_state
from moyu_train.errors import MoyuError


def export_powerinfer(folder: Path, out: Path) -> dict[str, Any]:
    """Write `model_<layer>.pt` into `out`, fp32 `fc1.weight` `[R, D]` and `fc2.weight` `[F, R]`.

    A layer's cut c goes into the scale of its second matrix, so that one threshold (-1, 0 or 1) does for all layers.
    `lowrank` has no ReLU: its first matrix is written beside its negative, since `relu(z) - relu(-z) = z`.

    Raises: MoyuError for a family that is not of two matrices, for biases that differ, and for cuts of both signs.
    """
    _, predictors = read_state(folder)
    if not predictors:
        raise MoyuError(f"{str(folder)!r} has no predictors")
    layers = [_matrices(predictor, index) for index, predictor in enumerate(predictors)]
    signs = {(cut > 0) - (cut < 0) for _, _, cut in layers}
    if len(signs) > 1:
        cuts = ", ".join(f"{cut:.3g}" for _, _, cut in layers)
        raise MoyuError(
            f"the layers' cuts are {cuts}, and PowerInfer's one threshold for all fits cuts of one sign; calibrate for "
            "fewer selected neurons, so that all are positive"
        )
    out.mkdir(parents=True, exist_ok=True)
    for index, (fc1, fc2, cut) in enumerate(layers):
        state = {"fc1.weight": fc1.contiguous(), "fc2.weight": (fc2 / abs(cut) if cut else fc2).contiguous()}
        torch.save(state, out / f"model_{index}.pt")
    return {"folder": str(out), "layers": len(layers), "threshold": signs.pop()}


def _matrices(predictor: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor, float]:
    """First and second matrix for a ReLU between them, and the score above which a neuron is selected."""
    family = predictor_family(list(predictor.values()))
    if family not in ("mlp", "lowrank"):
        raise MoyuError(
            f"PowerInfer's predictors are two matrices a layer; {family!r} is none: use the predictor 'mlp'"
        )
    bias = predictor["bias"]
    if (bias != bias[0]).any() or ("b1" in predictor and predictor["b1"].any()):
        raise MoyuError(
            f"the predictor of layer {layer} has biases, which PowerInfer's have not; fit one without: "
            "predictor: {name: mlp, biases: false}"
        )
    w1, w2 = predictor["w1"] * predictor["s1"][:, None], predictor["w2"] * predictor["s2"][:, None]
    if family == "lowrank":
        return torch.cat([w1, -w1]), torch.cat([w2, -w2], dim=1), -bias[0].item()
    return w1, w2 * predictor["scale"], -bias[0].item()
