"""Parts of a sparse model on the very inputs that those of a masked stock model had: FFN blocks, linear layers.

Hard masks are chaotic under rounding: one neuron more or less, and later layers see other inputs, on which more neurons
come or go. So two ways to compute a whole model may differ, and both be right; blocks on the same inputs may not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from moyu_kernels.modules import SparseModule
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, device_of
from moyu_train.progress import track

SAME = 1e-4  # largest relative difference (norms) of a block's output for one token under the same mask
OTHER_MASKS = 0.005  # largest share of outputs that may differ by more: a neuron is on its threshold to the last bit
FEW = 2  # or so many of them


@dataclass(frozen=True)
class Call:
    """What a module got, and what it gave: fp32 `[..., D]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def blocks_of(blocks: list[FFNBlock]) -> dict[str, nn.Module]:
    return {block.path: block.module for block in blocks}


@torch.no_grad()
def record(model: Any, modules: dict[str, nn.Module], ids: Tensor) -> dict[str, Call]:
    """The calls of modules, by path, in one forward over ids `[B, T]`, with the masks that are on the model."""
    seen: dict[str, Call] = {}

    def recorder(path: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen[path] = Call(*tree_map_only(Tensor, torch.clone, (args, kwargs, _first(output))))

        return see

    handles = [module.register_forward_hook(recorder(path), with_kwargs=True) for path, module in modules.items()]
    try:
        model(input_ids=ids.to(device_of(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@torch.no_grad()
def replay(sparse: Any, seen: dict[str, Call], what: str) -> dict[str, Any]:
    """Give modules of a sparse model what was recorded: one token at a time where a kernel decodes, and all at once.

    Returns: `outputs` that were compared, `other_masks`, the share of them that differs by more than rounding, and
        `median` and `worst` relative difference.

    Raises: MoyuError where more of them do than neurons on their thresholds explain.
    """
    found: dict[str, Tensor] = {}
    for path, call in track(list(seen.items()), f"{what}: kernels, block by block"):
        block = sparse.get_submodule(path)
        outputs = []
        if isinstance(block, SparseModule):
            (x,) = call.args
            outputs.append(torch.cat([block(row) for row in x.flatten(0, -2).split(1)]))
        if not outputs or block.mode != "predicted":  # a prompt is computed under the exact rule, whatever is predicted
            outputs.append(_first(block(*call.args, **call.kwargs)))
        expected = call.output.flatten(0, -2)
        scale = expected.norm(dim=-1).clamp_min(1e-30)
        found[path] = torch.cat([(one.view_as(expected) - expected).norm(dim=-1) / scale for one in outputs])
    errors = torch.cat(list(found.values()))
    other = (errors > SAME) | errors.isnan()
    if other.sum() > max(FEW, OTHER_MASKS * len(errors)):
        shares = {path: (one > SAME).double().mean().item() for path, one in found.items()}
        worst = max(shares, key=lambda path: shares[path])
        raise MoyuError(
            f"on the same inputs, {other.double().mean():.1%} of the outputs of the sparse model's parts differ from "
            f"the masked model's by more than {SAME:g}, in {worst} {shares[worst]:.1%}: the kernels, the rule or the "
            "weights are not those of the checkpoint; compare the backend 'reference', and report it"
        )
    return {
        "outputs": len(errors),
        "other_masks": other.double().mean().item(),
        "median": errors.median().item(),
        "worst": errors.max().item(),
    }
