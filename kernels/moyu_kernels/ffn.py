"""Which op computes an FFN block, and the block that runs it, put in the stock one's place."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .gated import SparseGatedFFN, gate_up_down
from .ops.ffn.naive import PLAIN_RULES
from .plain import SparsePlainFFN
from .plain import install as install_plain
from .prompt_ffn import PromptFFN, PromptGatedFFN, PromptInt8GatedFFN, PromptInt8PlainFFN, PromptPlainFFN
from .quantised import Int8GatedFFN, Int8PlainFFN
from .rules import Rule
from .sparse_ffn import SparseFFN, activation

# transformers' names of the activations that have an op; other ones run under a mask on the dense module.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATED_LAYOUTS = ("gated", "fused")
LAYOUTS_WITH_OP = (*GATED_LAYOUTS, "plain")
# By whether there is a gate, and whether weights are int8.
BLOCKS: dict[tuple[bool, bool], type[SparseFFN]] = {
    (True, False): SparseGatedFFN,
    (True, True): Int8GatedFFN,
    (False, False): SparsePlainFFN,
    (False, True): Int8PlainFFN,
}
PROMPT_BLOCKS: dict[tuple[bool, bool], type[PromptFFN]] = {
    (True, False): PromptGatedFFN,
    (True, True): PromptInt8GatedFFN,
    (False, False): PromptPlainFFN,
    (False, True): PromptInt8PlainFFN,
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def sparse_ffn(
    module: Any,
    block: dict[str, Any],
    act_name: str,
    rule: Rule,
    predictor: list[Tensor],
    mode: str,
    backend: str,
    weights: str = "stored",
) -> SparseFFN:
    """The sparse block on the projections of `module`, for which `simulated_because` found nothing.

    Args: block and act_name: as there; the others as for `from_pretrained`, backend resolved.
    """
    projections = {name: getattr(module, name) for name in _names(block)}
    act = "relu" if rule.substitutes else ACTIVATIONS[act_name]  # substitutes are all that the op then computes
    kind = block["layout"] in GATED_LAYOUTS, weights == "int8"
    if rule.prompt:
        return PROMPT_BLOCKS[kind](projections, act, rule, mode, backend)
    op, keep = _op_on(backend, rule), rule.count(block["neurons"])
    assert op
    return BLOCKS[kind](projections, act, rule.op_threshold, predictor, mode, backend, op, keep)


def install_ffn(model: nn.Module, block: dict[str, Any], ffn: SparseFFN) -> None:
    """Put what `sparse_ffn` made in the block's place; block: as `blocks` of a checkpoint has it."""
    if isinstance(ffn, SparsePlainFFN):
        install_plain(model.get_submodule(block["path"]), block["up"], block["act"], block["down"], ffn)
        return
    parent, _, name = block["path"].rpartition(".")
    setattr(model.get_submodule(parent), name, ffn)


def installed_ffn(model: nn.Module, path: str, up: str) -> SparseFFN:
    """The sparse FFN of the block at `path`, whose up projection is the attribute `up`."""
    ffn = found_ffn(model, path, up)
    assert ffn is not None
    return ffn


def found_ffn(model: nn.Module, path: str, up: str) -> SparseFFN | None:
    """As `installed_ffn`; None where the block kept its dense module."""
    module = model.get_submodule(path)
    places = (module, getattr(module, up, None))
    return next((place for place in places if isinstance(place, SparseFFN)), None)


def _op_on(backend: str, rule: Rule) -> str | None:
    """Which rule of the op computes `rule` on a backend; None where none does."""
    if backend != "triton" or rule.op in ("threshold", "topk", "prompt"):
        return rule.op
    return "threshold" if rule.stock_activation == "relu" else None  # thresholds of zero, with relu as activation


def simulated_because(module: Any, block: dict[str, Any], act_name: str, rule: Rule, backend: str = "cpu") -> str:
    """Why no op computes an FFN block, so that it runs under a mask after a dense matmul; empty where one does.

    Args: block: as `blocks` of a checkpoint has it; act_name: transformers' name of the activation.
    """
    layout = block["layout"]
    if layout not in LAYOUTS_WITH_OP:
        return f"layout {layout!r} has no op"
    if _op_on(backend, rule) is None or (layout == "plain" and rule.op not in (*PLAIN_RULES, "prompt")):
        return f"rule {rule.describe()} has no op for the backend {backend!r}"
    if act_name not in ACTIVATIONS and not rule.substitutes:
        return f"activation {act_name!r} has no op"
    projections = [getattr(module, name) for name in _names(block)]
    if not all(_is_linear(p, conv1d=layout == "plain") for p in projections):
        return "its projections are not plain linear layers"
    if layout != "plain" and any(p.bias is not None for p in projections):
        return "its projections have biases"
    if layout == "plain" and not block.get("act"):
        return "the checkpoint does not name its activation module; export it again"
    if layout == "plain" and rule.prompt and not sees_sequences(module, block):
        return "it sees the tokens of all sequences in one row, and masks from the prompt are of sequences"
    function = getattr(module, block["act"]) if rule.substitutes else activation(ACTIVATIONS[act_name])
    if projections[0].weight.is_meta:
        return ""
    if layout == "plain":
        same, formula = _is_plain_ffn(module, block, projections, function), "down(act(up(x)))"
    else:
        same, formula = _is_gated_ffn(module, projections, function), "down(act(gate(x)) * up(x))"
    return "" if same else f"it computes more than {formula}"


def _names(block: dict[str, Any]) -> list[str]:
    """Of its projections, in the order gate (where it is one of its own), up, down."""
    return [block[name] for name in ("gate", "up", "down") if block[name]]


def _is_linear(projection: Any, conv1d: bool) -> bool:
    """Whether it is a linear layer by its weight and bias alone; conv1d: or transformers' transposed one."""
    from transformers.pytorch_utils import Conv1D

    if conv1d and type(projection) is Conv1D:
        return True
    own = set(projection._parameters) | set(projection._buffers) | set(projection._modules)
    return isinstance(projection, nn.Linear) and own == {"weight", "bias"} and projection.weight.is_floating_point()


@torch.no_grad()
def _is_gated_ffn(
    module: Callable[[Tensor], Tensor], projections: list[nn.Linear], act: Callable[[Tensor], Tensor]
) -> bool:
    """Whether the stock block computes what the op does, tried on a few random inputs."""
    gate, up, down = gate_up_down([projection.weight for projection in projections])
    x = _probe(gate, gate.shape[1])
    return _equal(module(x), linear(act(linear(x, gate)) * linear(x, up), down))


@torch.no_grad()
def _is_plain_ffn(
    module: nn.Module, block: dict[str, Any], projections: list[Any], act: Callable[[Tensor], Tensor]
) -> bool:
    """Whether a block goes from up by the activation to down alone, tried as there, with the FFN in up's place.

    It may do something else before and after, such as attention in a decoder layer.
    """
    up, down = projections
    x = _probe(up.weight, block["hidden"])
    outputs: list[Tensor] = []  # of down, and of the FFN in up's place
    whole = nn.Sequential(up, _Function(act), down)
    watched = [part.register_forward_hook(lambda module, args, y: outputs.append(y)) for part in (down, whole)]
    stock = _tried(module, x)
    before = {name: getattr(module, name) for name in (block["up"], block["act"], block["down"])}
    try:
        for name, part in zip(before, (whole, nn.Identity(), nn.Identity()), strict=True):
            setattr(module, name, part)
        swapped = _tried(module, x)
    finally:
        for name, part in before.items():
            setattr(module, name, part)
        for hook in watched:
            hook.remove()
    return len(outputs) == 3 and _equal(outputs[-1], outputs[0]) and _equal(swapped, stock)


@torch.no_grad()
def sees_sequences(module: nn.Module, block: dict[str, Any]) -> bool:
    """Whether a plain block hands `[B, T, D]` to up, tried on two tokens; also on the meta device."""
    up, seen = getattr(module, block["up"]), list[int]()
    hook = up.register_forward_pre_hook(lambda module, args: seen.append(args[0].ndim))
    try:
        _tried(module, _probe(up.weight, block["hidden"]))
    finally:
        hook.remove()
    return seen == [3]


def _tried(module: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What a block makes of x; None where it wants more than hidden states."""
    try:
        return module(x)
    except (TypeError, AttributeError, ValueError):
        return None


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


def _probe(weight: Tensor, hidden: int) -> Tensor:
    """Two random tokens `[1, 2, D]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 2, hidden, generator=generator).to(weight.device, weight.dtype)


def _equal(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.numel() != expected.numel():
        return False
    error = (found.view_as(expected).float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return bool(error < TOLERANCE[expected.dtype])
