"""Attention found by structure: which inputs of the output projection are whose head, and what a head adds."""

import hashlib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, add_weight
from moyu_train.models.structure import base_layer, sizes

# Projections of the input (query, key and value, or all in one), and the one back.
PATTERNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "dense"),
    (("qkv_proj",), "o_proj"),
    (("query_key_value",), "dense"),
    (("c_attn",), "c_proj"),
)
HEAD_SIZES = ("head_dim", "head_size")  # attributes of attention modules


@dataclass(frozen=True)
class Attention:
    """One attention module. `block` is its output projection as a block, whose neurons are `heads` times `size`."""

    block: FFNBlock
    inputs: tuple[str, ...]  # projections of its input: q, k and v, or all in one
    heads: int
    groups: int  # heads of keys and values; neighbouring query heads share one
    size: int  # of a head

    def units(self, unit: str) -> int:
        """How many of `unit` there are: "head", or "group" of the heads that share keys and values."""
        return self.heads if unit == "head" else self.groups

    def grams(self, unit: str) -> Tensor:
        """`W_u.T @ W_u` of each unit's columns of the output projection, fp32 `[U, S, S]`."""
        parts = self.block.down_matrix().float().unflatten(1, (self.units(unit), -1))  # [D, U, S]
        return torch.einsum("dus,dut->ust", parts, parts)


def attention_sha256(model: Any, paths: Container[str], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over the projections' weights of the attention modules at `paths`, in the model's order, as bytes of
    their dtype, or of `dtype`: what routers are tied to.
    """
    digest = hashlib.sha256()
    for attention in find_attention(model):
        if attention.block.path in paths:
            for name in (*attention.inputs, attention.block.down):
                add_weight(digest, base_layer(getattr(attention.block.module, name)).weight.to(dtype))
    return digest.hexdigest()


def contributions(a: Tensor, grams: Tensor) -> Tensor:
    """`norm(W_u a_u)`: what each unit adds to the output.

    Args: a `[..., U * S]`, input of the output projection; grams from `Attention.grams`. Returns: fp32 `[..., U]`.
    """
    parts = a.float().unflatten(-1, (len(grams), -1))
    return (torch.einsum("...us,ust->...ut", parts, grams) * parts).sum(-1).clamp_min(0).sqrt()


def find_attention(model: Any) -> list[Attention]:
    """The attention modules of a model's decoder, in order.

    Raises: MoyuError where none is found, or one has sizes that are not those of heads, saying what was found.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = set(decoder.modules())
    found = []
    for path, module in model.named_modules():
        names = next((n for n in PATTERNS if all(hasattr(module, name) for name in (*n[0], n[1]))), None)
        if module in inside and names:
            found.append(_match(path, module, *names))
    if not found:
        patterns = ", ".join("/".join((*inputs, output)) for inputs, output in PATTERNS)
        near = [path for path, module in decoder.named_modules() if "attention" in type(module).__name__.lower()][:1]
        children = [name for name, _ in decoder.get_submodule(near[0]).named_children()] if near else []
        raise MoyuError(
            f"no attention found in {type(model).__name__}: looked for modules with the projections {patterns}"
            + (f"; {near[0]} has {', '.join(children)}" if near else "")
            + ". Its heads cannot be told apart; use another model"
        )
    return found


def _match(path: str, module: nn.Module, inputs: tuple[str, ...], output: str) -> Attention:
    shapes = {name: sizes(getattr(module, name)) for name in (*inputs, output)}
    size = next((value for name in HEAD_SIZES if isinstance(value := getattr(module, name, None), int)), 0)
    if size and all(shapes.values()):
        ins, outs = zip(*(shape for shape in shapes.values() if shape), strict=True)
        width = ins[-1]  # of all heads side by side
        heads = width // size
        # In one projection stand all queries, then or beside them keys and values.
        keys = outs[1] if len(inputs) == 3 else (outs[0] - width) // 2
        groups = keys // size
        expected = (width, keys, keys) if len(inputs) == 3 else (width + 2 * keys,)
        whole = groups >= 1 and heads % groups == 0 and (heads * size, groups * size) == (width, keys)
        if whole and outs[:-1] == expected and len(set(ins[:-1])) == 1:
            block = FFNBlock(path, module, "attention", None, inputs[0], output, ins[0], width)
            return Attention(block, inputs, heads, groups, size)
    said = ", ".join(f"{name} {list(shape) if shape else 'not linear'}" for name, shape in shapes.items())
    raise MoyuError(
        f"the projections (in, out) of {path} do not make attention heads of {size or 'an unknown size'}: {said}; its "
        "heads cannot be told apart, use another model"
    )
