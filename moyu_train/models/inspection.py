"""What moyu finds in a model, from its config alone: its FFN blocks, what kernels support, what is not covered."""

from typing import Any

import torch
from moyu_kernels.ffn import simulated_because
from moyu_kernels.rules import Rule

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.loading import resolve_source, skeleton
from moyu_train.models.marker import activation_field, base_activation, check_marker
from moyu_train.models.structure import largest_weights
from moyu_train.recipe import Recipe

OTHERS = 4  # weights outside of FFN blocks that are named


def inspect(recipe: Recipe) -> dict[str, Any]:
    """Figures of the recipe's model, built on the meta device: no weights are loaded.

    Returns: `blocks`, one row each; `others`, the largest weights that are in none of them; `parameters` of the model
        and the `share` of them in FFN blocks; `activation` and its `field` in the config, or null; `export`, why the
        family cannot be exported, or "".

    Raises: MoyuError where no FFN block is found.
    """
    model = skeleton(resolve_source(recipe.model), recipe.described)
    blocks = find_blocks(model)
    parameters = sum(weight.numel() for weight in model.parameters())
    covered = {id(weight) for block in blocks for weight in block.stored()}
    act, field, refused = _activation(model.config)
    rows = [_row(block, act, parameters) for block in blocks]
    others = [
        {"weight": path, "shape": shape, "count": count, "share": count * torch.Size(shape).numel() / parameters}
        for path, shape, count in largest_weights(model, OTHERS, covered)
    ]
    return {
        "model": type(model).__name__,
        "parameters": parameters,
        "share": sum(row["share"] for row in rows),
        "activation": act,
        "field": field,
        "export": refused,
        "blocks": rows,
        "others": others,
    }


def _activation(config: Any) -> tuple[str | None, str | None, str]:
    """Its name, the config field that holds it, and why a checkpoint of this family cannot be exported."""
    try:
        check_marker(config)
    except MoyuError as error:
        return None, None, str(error)
    return base_activation(config), activation_field(config), ""


def _row(block: FFNBlock, act: str | None, parameters: int) -> dict[str, Any]:
    activation = act or (type(block.activation()).__name__ if block.act else "")
    reason = simulated_because(block.module, block.describe(), activation, Rule(torch.zeros(())))
    return {
        **block.describe(),
        "activation": activation,
        "share": sum(weight.numel() for weight in block.stored()) / parameters,
        "kernels": not reason,
        "simulated_because": reason,
    }
