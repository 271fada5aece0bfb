"""Finds the FFN blocks of a decoder by structure (attribute names, shapes, activation), never by class name."""

import functools
import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moyu_train.errors import MoyuError

GATED = [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]
FUSED = [("gate_up_proj", "down_proj")]
PLAIN = [("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj")]
ACTIVATION_FIELDS = ("hidden_activation", "hidden_act", "activation_function", "activation")


@dataclass(frozen=True)
class FFNBlock:
    """One feed-forward block. `up` and `down` name attributes of `module`; for experts they name 3-D parameters."""

    path: str
    module: nn.Module = field(repr=False)
    layout: str  # gated | fused | plain | experts, or linear: a lone projection, `down`, whose inputs are its neurons
    gate: str | None
    up: str
    down: str
    hidden: int  # D
    neurons: int  # F, of one expert
    experts: int = 1
    act: str = ""  # attribute of `module` that holds the activation

    def describe(self) -> dict[str, Any]:
        """The data that the checkpoint's config block records."""
        names = ("path", "layout", "gate", "up", "down", "neurons", "hidden", "experts", "act")
        return {name: getattr(self, name) for name in names}

    def weights(self) -> list[Tensor]:
        """The FFN's weight matrices as stored, gate (if any), up, down."""
        names = [name for name in (self.gate, self.up, self.down) if name]
        if self.layout == "experts":
            return [getattr(self.module, name).detach() for name in names]
        return [base_layer(getattr(self.module, name)).weight.detach() for name in names]

    def activation(self) -> nn.Module:
        module: nn.Module = getattr(self.module, self.act)
        return module

    def down_norms(self) -> Tensor:
        """`norm(W_down[:, i])` of each neuron, fp32 `[F]`, or `[E, F]` for experts."""
        down = self.weights()[-1].float()
        if self.layout == "experts":
            return down.norm(dim=-2)  # [E, D, F]
        return down.norm(dim=1) if isinstance(base_layer(getattr(self.module, self.down)), Conv1D) else down.norm(dim=0)


def base_layer(module: Any) -> Any:
    """The projection below a PEFT wrapper, or the projection itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _sizes(projection: Any) -> tuple[int, int] | None:
    """(in, out) of a linear projection, None for anything else."""
    projection = base_layer(projection)
    if isinstance(projection, nn.Linear):
        return projection.in_features, projection.out_features
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return None


def _match_linear(path: str, module: nn.Module) -> FFNBlock | None:
    children = dict(module.named_children())
    act = _activation_name(module)
    for layout, patterns in (("gated", GATED), ("fused", FUSED), ("plain", PLAIN)):
        for names in patterns:
            if not act or not all(name in children for name in names):
                continue
            ups, down = [_sizes(children[name]) for name in names[:-1]], _sizes(children[names[-1]])
            if down is None or None in ups:
                continue
            neurons, hidden = down
            width = 2 * neurons if layout == "fused" else neurons
            if any(size != (hidden, width) for size in ups):
                continue
            gate = names[0] if layout == "gated" else None
            return FFNBlock(path, module, layout, gate, names[-2], names[-1], hidden, neurons, act=act)
    return None


def _activation_name(module: nn.Module) -> str:
    return next((name for name, child in module.named_children() if isinstance(child, _activation_classes())), "")


@functools.cache
def _activation_classes() -> tuple[type, ...]:
    return tuple({entry[0] if isinstance(entry, tuple) else entry for entry in dict.values(ACT2FN)})


def _match_experts(path: str, module: nn.Module) -> FFNBlock | None:
    parameters = dict(module.named_parameters(recurse=False))
    up, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return None
    experts, hidden, neurons = down.shape
    if up.shape != (experts, 2 * neurons, hidden):
        return None
    act = _activation_name(module)
    return FFNBlock(path, module, "experts", None, "gate_up_proj", "down_proj", hidden, neurons, experts, act)


def find_blocks(model: nn.Module) -> list[FFNBlock]:
    """All FFN blocks of a model, in order.

    Raises: MoyuError where nothing matched, listing what was looked at.
    """
    found = []
    for path, module in model.named_modules():
        block = _match_linear(path, module) or _match_experts(path, module)
        if block:
            found.append(block)
    if not found:
        seen = sorted({type(module).__name__ for module in model.modules() if list(module.children())})
        patterns = ", ".join("/".join(names) for names in [*GATED, *FUSED, *PLAIN])
        raise MoyuError(
            f"no FFN block found in {type(model).__name__}: looked for modules with an activation and the projections "
            f"{patterns}, or 3-D expert parameters gate_up_proj/down_proj; module classes seen: {', '.join(seen)}. "
            "Add the pattern to moyu_train/models/blocks.py if the layout is one of these under other names."
        )
    return found


def linear_block(model: nn.Module, path: str) -> FFNBlock:
    """The linear layer at `path` as a block of its own."""
    size = _sizes(model.get_submodule(path))
    assert size  # callers name linear layers
    parent, _, name = path.rpartition(".")
    return FFNBlock(path, model.get_submodule(parent), "linear", None, name, name, size[1], size[0])


def find_inputs(model: nn.Module, pattern: str) -> list[FFNBlock]:
    """The linear layers with `pattern` (a regular expression) in their path, as blocks of layout `linear`.

    Raises: MoyuError where none matches, or one is inside an FFN block.
    """
    inside = {f"{block.path}.{name}" for block in find_blocks(model) for name in (block.gate, block.up, block.down)}
    found = []
    for path, module in model.named_modules():
        size = _sizes(module)
        if size is None or not re.search(pattern, path):
            continue
        if path in inside:
            raise MoyuError(
                f"inputs.modules {pattern!r} matches {path}, a part of an FFN block, whose neurons are for the "
                "sparsifier; narrow the pattern"
            )
        found.append(linear_block(model, path))
    if not found:
        linear = [path for path, module in model.named_modules() if _sizes(module)]
        raise MoyuError(f"inputs.modules {pattern!r} matches no linear layer; there are {', '.join(linear[:8])}, …")
    return found


def activation_field(config: Any) -> str:
    """Name of the config field that holds the activation.

    Raises: MoyuError where the family has none, since then stock code could not be stopped from answering nonsense.
    """
    for name in ACTIVATION_FIELDS:
        if isinstance(getattr(config, name, None), str):
            return name
    raise MoyuError(
        f"{type(config).__name__} has no activation field (looked for {', '.join(ACTIVATION_FIELDS)}), so a sparse "
        "checkpoint could be loaded densely without notice; this family cannot be exported"
    )


def set_marker(config: Any, rule: str) -> None:
    """Put the marker on a live config: stock transformers refuses the saved model with a KeyError that prints it."""
    name = activation_field(config)
    base = getattr(config, name)
    if not base.startswith("moyu:"):
        setattr(config, name, f"moyu:{rule}:{base} (load with moyu_kernels.from_pretrained)")


def base_activation(config: Any) -> str:
    """The activation's stock name, whether or not the marker is on."""
    value = getattr(config, activation_field(config))
    return value.split(":")[2].split(" ")[0] if value.startswith("moyu:") else value


def clear_marker(config: Any) -> None:
    setattr(config, activation_field(config), base_activation(config))


def ffn_bytes(block: FFNBlock, itemsize: int) -> int:
    """Bytes of one block's weights in a storage format of `itemsize` bytes, dense; one expert's for experts."""
    matrices = 2 if block.layout == "plain" else 3
    return matrices * block.hidden * block.neurons * itemsize


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def ffn_sha256(model: Any) -> str:
    """SHA-256 over the FFN weights of all blocks in order, as bytes of their dtype: what a predictor is tied to."""
    digest = hashlib.sha256()
    for block in find_blocks(model):
        for weight in block.weights():
            digest.update(weight.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
