"""Parts of a sparse model on the very inputs that those of a masked stock model had: FFN blocks, linear layers.

Hard masks are chaotic under rounding: one neuron more or less, and later layers see other inputs, on which more neurons
come or go. So two ways to compute a whole model may differ, and both be right; blocks on the same inputs may not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from moyu_kernels.ffn import found_ffn
from moyu_kernels.modules import SparseModule
from torch import Tensor
from torch.utils._pytree import tree_map_only

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, device_of
from moyu_train.progress import track

SAME = 1e-4  # largest relative difference (norms) of a block's output for one token under the same mask
OTHER_MASKS = 0.005  # largest share of outputs that may differ by more: a neuron is on its threshold to the last bit
FEW = 2  # or so many of them
_NONE = torch.empty(0)


@dataclass
class Part:
    """An FFN block, or a linear layer (`up` and `down` are ""), and what it got and gave."""

    path: str
    up: str = ""
    down: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Tensor = _NONE  # fp32 `[..., D]`
    x: Tensor = _NONE  # into up, and out of down
    y: Tensor = _NONE


def parts_of(blocks: Iterable[FFNBlock], linears: Iterable[str] = ()) -> list[Part]:
    """linears: paths of linear layers."""
    ffns = [Part(block.path, *(("", "") if block.layout == "experts" else (block.up, block.down))) for block in blocks]
    return ffns + [Part(path) for path in linears]


@torch.no_grad()
def record(model: Any, parts: list[Part], ids: Tensor) -> None:
    """Fill the parts in, in one forward over ids `[B, T]`, with the masks that are on the model."""
    handles = []
    for part in parts:
        module = model.get_submodule(part.path)
        handles.append(module.register_forward_hook(partial(_see, part), with_kwargs=True))
        if part.up:
            handles.append(getattr(module, part.up).register_forward_hook(partial(_see_x, part)))
            handles.append(getattr(module, part.down).register_forward_hook(partial(_see_y, part)))
    try:
        model(input_ids=ids.to(device_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _see(part: Part, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    part.args, part.kwargs, part.output = tree_map_only(Tensor, torch.clone, (args, kwargs, _first(output)))


def _see_x(part: Part, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    part.x = args[0].clone()


def _see_y(part: Part, module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    part.y = output.clone()


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _again(sparse: Any, part: Part) -> tuple[Tensor, list[Tensor]]:
    """What the part gave in the masked model, `[N, D]`, and what it gives in the sparse one: a token at a time where a
    kernel decodes, and all at once."""
    module = found_ffn(sparse, part.path, part.up) if part.up else sparse.get_submodule(part.path)
    if not isinstance(module, SparseModule):
        whole = _first(sparse.get_submodule(part.path)(*part.args, **part.kwargs))
        return part.output.flatten(0, -2), [whole.flatten(0, -2)]
    x, y = (part.x, part.y) if part.up else (part.args[0], part.output)
    rows = x.flatten(0, -2)
    outputs = [torch.cat([module(row) for row in rows.split(1)])]
    if module.mode != "predicted":  # a prompt is computed under the exact rule, whatever is predicted
        outputs.append(module(rows))
    return y.flatten(0, -2), outputs


def _differ(errors: Tensor) -> float:
    """Share of the outputs that rounding alone does not explain, those that are no numbers among them."""
    return (~(errors <= SAME)).double().mean().item()


@torch.no_grad()
def replay(sparse: Any, parts: list[Part], what: str) -> dict[str, Any]:
    """Give the parts of a sparse model what was recorded.

    Returns: `outputs` that were compared, `other_masks`, the share of them that differs by more than rounding, and
        `median` and `worst` relative difference.

    Raises: MoyuError where more of them do than neurons on their thresholds explain.
    """
    found: dict[str, Tensor] = {}
    for part in track(parts, f"{what}: kernels, block by block"):
        expected, outputs = _again(sparse, part)
        scale = expected.norm(dim=-1).clamp_min(1e-30)
        found[part.path] = torch.cat([(one - expected).norm(dim=-1) / scale for one in outputs])
    errors = torch.cat(list(found.values()))
    other = _differ(errors)
    if other * len(errors) > max(FEW, OTHER_MASKS * len(errors)):
        worst = max(found, key=lambda path: _differ(found[path]))
        raise MoyuError(
            f"on the same inputs, {other:.1%} of the outputs of the sparse model's parts differ from the masked "
            f"model's by more than {SAME:g}, in {worst} {_differ(found[worst]):.1%}: the kernels, the rule or the "
            "weights are not those of the checkpoint; compare the backend 'reference', and report it"
        )
    return {
        "outputs": len(errors),
        "other_masks": other,
        "median": errors.median().item(),
        "worst": errors.max().item(),
    }
