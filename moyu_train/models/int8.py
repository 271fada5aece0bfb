"""A dense model on the int8 weights that its export decodes with: by value, and by row for timing."""

import copy
from typing import Any

import torch
from moyu_kernels.ffn import ACTIVATIONS, BLOCKS, install_ffn
from moyu_kernels.ops.ffn.int8 import dequantise_rows, quantise_down, quantise_rows

from moyu_train.models.blocks import find_blocks
from moyu_train.models.marker import base_activation


@torch.no_grad()
def round_ffn(model: Any) -> Any:
    """Put what int8 rows stand for in place of the FFN weights of a model with gated, fused or plain blocks.

    A row belongs to a neuron, so `down` `[D, F]` is rounded by its columns. Returns: the model.
    """
    for block in find_blocks(model):
        for rows in block.fronts():
            rows.copy_(dequantise_rows(*quantise_rows(rows), rows.dtype))
        down = block.down_matrix().T
        codes, scale, columns = quantise_down(down)
        down.copy_(dequantise_rows(codes, scale, down.dtype, columns))
    return model


def int8_twin(model: Any) -> Any:
    """A copy of a dense model that shares its parameters, but for its FFN blocks, which read all of their int8 rows.

    It is for timing: where no op has the blocks' activation, it computes silu in its place, at the same cost.
    """
    blocks = find_blocks(model)
    act = ACTIVATIONS.get(base_activation(model.config), "silu")
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in blocks:
        names = [part for part in (block.gate, block.up, block.down) if part]
        projections = {part: twin.get_submodule(f"{block.path}.{part}") for part in names}
        cls = BLOCKS[block.layout != "plain", True]
        install_ffn(twin, block.describe(), cls(projections, act, torch.zeros(block.neurons), [], "dense", "auto"))
    return twin
