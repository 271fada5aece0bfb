"""Predictors that were trained elsewhere: two matrices a layer, as DejaVu or PowerInfer save them. Nothing is fitted.

PowerInfer reads `model_<layer>.pt`, state dicts with `fc1.weight` `[R, D]` and `fc2.weight` `[F, R]`, a ReLU between
them, and gives them the residual (checkpoints/powerinfer.py). DejaVu (arXiv 2310.17157) saves that of a Sequential of
two linear layers, `0.weight` and `1.weight`, nothing between them, in files whose names hold `layer<layer>`. Biases are
taken where they are there. The text only gives the unit of the scores, their root mean square; cuts are found by
calibration.
"""

import pickle
import re
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import LLAMA_LAYERS, FFNBlock
from moyu_train.predictors.lowrank import quantise_rows
from moyu_train.predictors.sums import Sums

LAYER = re.compile(r"(?:^model_|layer_?)(\d+)(?!\d).*\.pt$")


class Imported(Sums):
    """Predictor of one layer. The sum is fp32 on the model's device."""

    keys: tuple[str, str]
    relu: bool

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        folder: str = Field(description="with one .pt file a layer")

    def __init__(self, options: Options, block: FFNBlock, device: torch.device) -> None:
        found = re.search(r"\.(\d+)(\.|$)", block.path)
        assert found  # layers of a decoder are in a list
        self.layers = [part.to(device) for part in self._load(options, int(found[1]))]
        w1, _, w2, _ = self.layers
        wanted = (len(w1), block.hidden), (block.neurons, len(w1))
        if (w1.shape, w2.shape) != wanted:
            raise MoyuError(
                f"the predictor in predictor.folder for {block.path} has {self.keys[0]} {list(w1.shape)} and "
                f"{self.keys[1]} {list(w2.shape)}; the block needs [R, {block.hidden}] and [{block.neurons}, R]"
            )
        self.sums = {name: torch.zeros((), device=device) for name in ("square", "n")}

    @classmethod
    def files(cls, options: Options) -> list[Path]:
        """One file a layer, in order.

        Raises: MoyuError where the folder has none, or not one for each layer.
        """
        folder = Path(options.folder)
        layers = {int(found[1]): path for path in folder.glob("*.pt") if (found := LAYER.search(path.name))}
        if not layers or sorted(layers) != list(range(len(layers))):
            raise MoyuError(
                f"predictor.folder {options.folder!r} has predictors of the layers {sorted(layers)}; it needs one file "
                "a layer from 0 on, model_0.pt, model_1.pt and so on, or with layer0, layer1 in their names"
            )
        for path in layers.values():
            if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
                raise MoyuError(f"predictor.folder: {path} is a link out of the folder, or no file; put the file there")
        return [layers[layer] for layer in sorted(layers)]

    @classmethod
    def planned_bytes(cls, options: Options, hidden: int, neurons: int, gated: bool = True) -> int:
        """Bytes that a decode step will read of a layer's predictor, were all of layer 0's rank."""
        rank = len(cls._load(options, 0)[0])
        return rank * (hidden + neurons) + 4 * (rank + 2 * neurons + (rank + 1 if cls.relu else 0))

    @classmethod
    def _load(cls, options: Options, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """fp32 first matrix `[R, D]`, its bias `[R]`, second matrix `[F, R]`, its bias `[F]`."""
        files = cls.files(options)
        if layer >= len(files):
            raise MoyuError(f"predictor.folder {options.folder!r} has {len(files)} layers and the model has more")
        path = files[layer]
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise MoyuError(f"{path} could not be read as a state dict of tensors and nothing else: {error}") from error
        names = [name.removesuffix("weight") + kind for name in cls.keys for kind in ("weight", "bias")]
        good = isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values())
        if not good or not set(cls.keys) <= set(state) <= set(names):
            found = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise MoyuError(
                f"{path} holds {found}; predictor {cls.name!r} needs {', '.join(cls.keys)}, with biases or without. "
                "Of the families 'dejavu' and 'powerinfer' the other one may fit"
            )
        w1, w2 = (state[name].float() for name in cls.keys)
        if w1.ndim != 2 or w2.ndim != 2:
            raise MoyuError(f"{path} holds weights {list(w1.shape)} and {list(w2.shape)}; both must be matrices")
        b1, b2 = (
            state[name].float() if name in state else w.new_zeros(len(w))
            for name, w in zip(names[1::2], (w1, w2), strict=True)
        )
        if not all(torch.isfinite(part).all() for part in (w1, b1, w2, b2)):
            raise MoyuError(f"{path} holds values that are not finite; train that layer's predictor again")
        return w1, b1, w2, b2

    def observe(self, x: Tensor, contribution: Tensor, kept: Tensor | None = None) -> None:
        """See tokens: x `[N, D]`."""
        w1, b1, w2, b2 = self.layers
        hidden = x.float() @ w1.T + b1
        scores = (torch.relu(hidden) if self.relu else hidden) @ w2.T + b2
        self.sums["square"] += scores.square().mean(1).sum()
        self.sums["n"] += len(x)

    def solve(self) -> dict[str, Tensor]:
        """The predictor in the storage form of `mlp` with a ReLU, else of `lowrank`; int8 matrices."""
        w1, b1, w2, b2 = (part.cpu() for part in self.layers)
        unit = 1 / (self.sums["square"] / self.sums["n"]).sqrt().clamp_min(1e-30).cpu()
        (q1, s1), (q2, s2) = quantise_rows(w1), quantise_rows(w2)
        if self.relu:
            return {"w1": q1, "s1": s1, "w2": q2, "s2": s2, "b1": b1, "scale": unit[None], "bias": b2 * unit}
        return {"w1": q1, "s1": s1, "w2": q2, "s2": s2 * unit, "bias": (w2 @ b1 + b2) * unit}


class DejaVu(Imported):
    name, form = "dejavu", "lowrank"
    keys, relu = ("0.weight", "1.weight"), False


class PowerInfer(Imported):
    """Its input is the residual in front of the norm whose output, `h / rms(h) * w`, ours is: w is divided out."""

    name = "powerinfer"
    form = "mlp"
    keys, relu = ("fc1.weight", "fc2.weight"), True

    def __init__(self, options: Imported.Options, block: FFNBlock, device: torch.device) -> None:
        super().__init__(options, block, device)
        if block.norm is None:
            raise MoyuError(
                f"predictor 'powerinfer' reads the residual in front of the FFN's norm, which is known for "
                f"{', '.join(LLAMA_LAYERS)}, and {block.path} is of another architecture: use another predictor"
            )
        w = block.norm.to(device).float()
        self.layers[0] = torch.where(w == 0, 0.0, self.layers[0] / w)
