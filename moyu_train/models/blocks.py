"""Finds the FFN blocks of a decoder by structure (attribute names, shapes, activation), never by class name."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from moyu_kernels.gated import gate_up_down
from moyu_kernels.seam import ExpertsSeam
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moyu_train.errors import MoyuError
from moyu_train.models.structure import activation_name, base_layer, guess, largest_weights, sizes

# (gate, up, down). The layout is told by the shapes: an `up` of twice the neurons is gate and up in one.
PATTERNS: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "gate_up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "up_proj", "down_proj"),
)


LLAMA_LAYERS = ("llama", "mistral")  # model types whose FFN reads `h / rms(h) * w` of the residual h


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
    norm: Tensor | None = field(default=None, repr=False, compare=False)  # [D], of a Llama layer's norm in front

    def describe(self) -> dict[str, Any]:
        """The data that the checkpoint's config block records."""
        names = ("path", "layout", "gate", "up", "down", "neurons", "hidden", "experts", "act")
        return {name: getattr(self, name) for name in names}

    def stored(self) -> list[nn.Parameter]:
        """The parameters of the FFN's matrices: gate (if any), up, down."""
        parts = [getattr(self.module, name) for name in (self.gate, self.up, self.down) if name]
        return parts if self.layout == "experts" else [base_layer(part).weight for part in parts]

    def weights(self) -> list[Tensor]:
        """The FFN's weight matrices as stored, gate (if any), up, down."""
        return [weight.detach() for weight in self.stored()]

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate and up `[F, D]` and down `[D, F]` of a gated or fused block, as stored."""
        return gate_up_down(self.weights())

    @property
    def matrix_count(self) -> int:
        """Of the FFN, gate and up counted as two where they are one."""
        return 2 if self.layout == "plain" else 3

    def fronts(self) -> list[Tensor]:
        """`[F, D]` in front of the activation: gate and up, of a plain block up alone. Not for experts."""
        if self.layout != "plain":
            return list(self.matrices()[:2])
        up = self.weights()[0]
        return [up.T if isinstance(base_layer(getattr(self.module, self.up)), Conv1D) else up]

    def up_bias(self) -> Tensor | None:
        """Of a plain block `[F]`, where it has one; blocks of other layouts have none that their op adds."""
        if self.layout != "plain":
            return None
        bias: Tensor | None = base_layer(getattr(self.module, self.up)).bias
        return None if bias is None else bias.detach()

    def activation(self) -> nn.Module:
        module: nn.Module = getattr(self.module, self.act)
        return module

    def down_norms(self) -> Tensor:
        """`norm(W_down[:, i])` of each neuron, fp32 `[F]`, or `[E, F]` for experts."""
        return self.down_matrix().float().norm(dim=-2)

    def down_matrix(self, expert: int | None = None) -> Tensor:
        """The down projection `[D, F]`; for experts all of them, `[E, D, F]`, or one."""
        down = self.weights()[-1]
        if self.layout == "experts":
            return down if expert is None else down[expert]
        return down.T if isinstance(base_layer(getattr(self.module, self.down)), Conv1D) else down


def _match(path: str, module: Any, gate: str | None, up: str, down: str, act: str) -> FFNBlock | str:
    """The block that these names make of a module, its layout by their shapes; or why they make none."""
    parts = {name: getattr(module, name, None) for name in (gate, up, down) if name}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        return f"{path} has no {', '.join(missing)}"
    if isinstance(parts[up], nn.Parameter):
        return _match_experts(path, module, up, down, act)
    if not isinstance(getattr(module, act, None), nn.Module):
        return f"{path} has no activation module {act}".strip()
    shapes = {name: sizes(part) for name, part in parts.items()}
    hidden_neurons = (shapes[down] or (0, 0))[::-1]
    layout = "gated" if gate else "plain"
    if not gate and shapes[up] == (hidden_neurons[0], 2 * hidden_neurons[1]):
        layout = "fused"
    elif any(shape != hidden_neurons for name, shape in shapes.items() if name != down):
        said = ", ".join(f"{name} {list(shape) if shape else 'not linear'}" for name, shape in shapes.items())
        return f"the projections (in, out) of {path} do not make an FFN block: {said}"
    return FFNBlock(path, module, layout, gate, up, down, *hidden_neurons, act=act)


def _match_experts(path: str, module: Any, up: str, down: str, act: str) -> FFNBlock | str:
    ups, downs = getattr(module, up), getattr(module, down)
    if (up, down) != ("gate_up_proj", "down_proj") or downs.ndim != 3:
        return f"{path} has experts that are not 3-D parameters gate_up_proj and down_proj"
    reason = ExpertsSeam.unsupported(module)
    if reason:
        return f"{path}: {reason}"
    experts, hidden, neurons = downs.shape
    if ups.shape != (experts, 2 * neurons, hidden):
        said = f"gate_up_proj {list(ups.shape)} and down_proj {list(downs.shape)}"
        return f"{said} of {path} are not [E, 2F, D] and [E, D, F]"
    return FFNBlock(path, module, "experts", None, up, down, hidden, neurons, experts, act)


def find_blocks(model: Any) -> list[FFNBlock]:
    """All FFN blocks of a model's decoder, in order: as `describe_blocks` put them on its config, else by structure.

    Raises: MoyuError where nothing matched, listing what was looked at, or where a description does not fit.
    """
    described = (getattr(getattr(model, "config", None), "moyu", None) or {}).get("described")
    if described:
        return _described_blocks(model, described)
    decoder = set((model.get_decoder() if hasattr(model, "get_decoder") else model).modules())  # no image encoders
    found, near = [], []
    for path, module in model.named_modules():
        if module not in decoder:
            continue
        act = activation_name(module)
        names_here = [names for names in PATTERNS if all(hasattr(module, name) for name in names if name)]
        tried = [_match(path, module, *names, act) for names in names_here]
        block = next((result for result in tried if isinstance(result, FFNBlock)), None)
        if block:
            found.append(replace(block, norm=_norm_in_front(model, path)))
        elif tried:
            near.append(tried[0])
    if not found:
        raise MoyuError(_nothing_found(model, [str(reason) for reason in near]))
    return found


def _norm_in_front(model: Any, path: str) -> Tensor | None:
    """Weight `[D]` of the norm whose output a Llama layer's FFN reads; None for other model types.

    Others have a norm of that name too, after the FFN (OLMo 2) or with a weight of `1 + w` (Gemma).
    """
    if getattr(getattr(model, "config", None), "model_type", None) not in LLAMA_LAYERS:
        return None
    return model.get_submodule(path.rpartition(".")[0]).post_attention_layernorm.weight.detach()


def linear_block(model: nn.Module, path: str) -> FFNBlock:
    """The linear layer at `path` as a block of its own."""
    size = sizes(model.get_submodule(path))
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
        size = sizes(module)
        if size is None or not re.search(pattern, path):
            continue
        if path in inside:
            raise MoyuError(
                f"inputs.modules {pattern!r} matches {path}, a part of an FFN block, whose neurons are for the "
                "sparsifier; narrow the pattern"
            )
        found.append(linear_block(model, path))
    if not found:
        linear = [path for path, module in model.named_modules() if sizes(module)]
        raise MoyuError(f"inputs.modules {pattern!r} matches no linear layer; there are {', '.join(linear[:8])}, …")
    return found


def describe_blocks(config: Any, described: Sequence[Mapping[str, str | None]]) -> None:
    """Put a recipe's `blocks` on a config: `find_blocks` reads them there, and every checkpoint carries them."""
    if described:
        config.moyu = {**(getattr(config, "moyu", None) or {}), "described": [dict(names) for names in described]}


def _described_blocks(model: nn.Module, described: Sequence[Mapping[str, str]]) -> list[FFNBlock]:
    """Raises: MoyuError where a path matches no module, or a module is not the block that its names say."""
    found = {}
    modules = list(model.named_modules())
    for names in described:
        # In front of a path may stand what wrappers add, such as peft's base_model.model.
        pattern = r"(.+\.)?" + re.escape(names["path"]).replace(r"\*", r"[^.]+")
        matches = [(path, module) for path, module in modules if re.fullmatch(pattern, path)]
        if not matches:
            weights = ", ".join(path for path, *_ in largest_weights(model, 8))
            raise MoyuError(
                f"blocks: no module of {type(model).__name__} matches the path {names['path']!r} (* stands for one "
                f"name); its largest weights are {weights}"
            )
        for path, module in matches:
            block = _match(path, module, names.get("gate"), names["up"], names["down"], names["act"])
            if isinstance(block, str):
                raise MoyuError(f"blocks: {block}; correct the names, or the path {names['path']!r}")
            found[path] = block
    return [found[path] for path, _ in modules if path in found]


def _nothing_found(model: nn.Module, near: list[str]) -> str:
    patterns = ", ".join("/".join(filter(None, names)) for names in PATTERNS)
    weights = "".join(f"\n  {path} {shape} x {count}" for path, shape, count in largest_weights(model, 8))
    names = guess(model)
    lines = "\n    ".join(f"{key}: {value}" for key, value in names.items())
    return (
        f"no FFN block found in {type(model).__name__}: looked for modules with an activation and the projections "
        f"{patterns}, or 3-D expert parameters gate_up_proj/down_proj."
        + (f" Not quite: {near[0]}." if near else "")
        + f"\nIts largest weights, with * for the layer, are{weights}\n"
        + "If FFN blocks are there under other names, put their names into the recipe (docs/models.md)"
        + (f"; a guess, to check:\nblocks:\n  - {lines}" if names else ".")
    )


def ffn_bytes(block: FFNBlock, itemsize: int) -> int:
    """Bytes of one block's matrices in a storage format of `itemsize` bytes, dense; one expert's for experts.

    itemsize: 1 is int8, where the fp32 scales of the rows, and of down's columns, count too.
    """
    return block.matrix_count * block.hidden * block.neurons * itemsize + scale_bytes(block, itemsize)


def scale_bytes(block: FFNBlock, itemsize: int) -> int:
    """Bytes of the fp32 scales of all rows, and of down's columns, which int8 weights have."""
    return 4 * (block.matrix_count * block.neurons + block.hidden) if itemsize == 1 else 0


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def ffn_sha256(model: Any) -> str:
    """SHA-256 over the FFN weights of all blocks in order, as bytes of their dtype: what a predictor is tied to."""
    digest = hashlib.sha256()
    for block in find_blocks(model):
        for weight in block.weights():
            add_weight(digest, weight)
    return digest.hexdigest()


def add_weight(digest: Any, weight: Tensor) -> None:
    """Add a weight's bytes, of its dtype, to a hash of hashlib."""
    digest.update(weight.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
