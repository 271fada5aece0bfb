"""What modules are made of: projections, activations, weights. By shape and attribute, never by a model's class."""

import functools
import math
import re
from collections import Counter
from collections.abc import Container
from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


def base_layer(module: Any) -> Any:
    """The projection below a PEFT wrapper, or the projection itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def sizes(projection: Any) -> tuple[int, int] | None:
    """(in, out) of a linear projection, None for anything else."""
    projection = base_layer(projection)
    if isinstance(projection, nn.Linear):
        return projection.in_features, projection.out_features
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return None


def freeze_embeddings(model: Any) -> None:
    """Training leaves the token embeddings and the output layer, tied or not, as they are."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.requires_grad_(False)


def activation_name(module: nn.Module) -> str:
    """The child that is one of transformers' activations, or ""."""
    return next((name for name, child in module.named_children() if isinstance(child, _activation_classes())), "")


@functools.cache
def _activation_classes() -> tuple[type, ...]:
    return tuple({entry[0] if isinstance(entry, tuple) else entry for entry in dict.values(ACT2FN)})


def pattern_of(path: str) -> str:
    """A path with `*` for every name that is a number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def largest_weights(model: nn.Module, most: int, without: Container[int] = ()) -> list[tuple[str, list[int], int]]:
    """(path with `*` for the layer, shape, how many there are) of the largest weights; `without`: ids to leave out."""
    weights = [(path, weight) for path, weight in model.named_parameters() if id(weight) not in without]
    found = Counter((pattern_of(path), tuple(weight.shape)) for path, weight in weights)
    ordered = sorted(found, key=lambda key: -math.prod(key[1]))
    return [(path, list(shape), found[path, shape]) for path, shape in ordered[:most]]


def guess(model: nn.Module) -> dict[str, str]:
    """The largest module that could be an FFN block under other names, as a recipe's `blocks` has it; {} where none is.

    That is a module with an activation, projections D to F and one F to D. Of two, the first is taken for the gate.
    """
    best: tuple[tuple[bool, int], dict[str, str]] = ((False, 0), {})
    for path, module in model.named_modules():
        act = activation_name(module) or _bare_child(module)
        shapes = {name: size for name, child in module.named_children() if (size := sizes(child))} if act else {}
        for down, (neurons, hidden) in shapes.items():
            ups = [name for name, size in shapes.items() if size in ((hidden, neurons), (hidden, 2 * neurons))]
            rank = neurons > hidden, hidden * neurons * (len(ups) + 1)
            if neurons != hidden and 1 <= len(ups) <= 2 and rank > best[0]:
                names = {"gate": ups[0], "up": ups[1]} if len(ups) == 2 else {"up": ups[0]}
                best = rank, {"path": pattern_of(path), **names, "down": down, "act": act}
    return best[1]


def _bare_child(module: nn.Module) -> str:
    """A child without parameters or children that is not dropout: likely an activation of a class of its own."""
    for name, child in module.named_children():
        if not isinstance(child, nn.Dropout) and not [*child.parameters(), *child.children()]:
            return name
    return ""
