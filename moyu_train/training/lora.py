"""LoRA (arXiv 2106.09685) through peft, under a sparsifier's masks: wrap, and merge with proof that nothing changed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.settings import Lora
from moyu_train.training.anchor import first_tensor
from moyu_train.training.control import SparsityControl

MERGE_GAP = 1e-4  # in fp32


def adapt(model: Any, settings: Lora) -> Any:
    """The model with low-rank deltas on its targets, all else frozen. The masks act as before, on what peft wraps.

    Raises: MoyuError where no module matches the targets.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise MoyuError(f"finetune.lora.targets {settings.targets!r}: {error}") from error


@torch.no_grad()
def merge(adapted: Any, sparsity: SparsityControl | None, ids: Tensor) -> tuple[Any, dict[str, float]]:
    """The model with its deltas added to the weights, and what that changed.

    Every FFN block gets the very inputs again that it had before. Whole forwards would not do: where rounding moves one
    activation across its threshold in an early layer, all later ones differ.

    Args: ids: int64 `[T]`, text to measure on.
    Returns: the model; `merge_gap`, the relative change of a block's output, median over tokens, of the block where it
        is largest; and with a mask the density before and after.
    Raises: MoyuError where the gap is above `MERGE_GAP`.
    """
    adapted.eval()
    blocks = find_blocks(adapted)
    seen: dict[int, tuple[Any, Any, Tensor]] = {}

    def recorder(layer: int) -> Callable[..., None]:
        # A copy, since some layers add to their FFN's output in place.
        return lambda module, args, kwargs, output: seen.update({layer: (args, kwargs, first_tensor(output).clone())})

    handles = [b.module.register_forward_hook(recorder(i), with_kwargs=True) for i, b in enumerate(blocks)]
    if sparsity:
        sparsity.take_density()
        sparsity.counting = True
    adapted(input_ids=ids[None].to(device_of(adapted)), use_cache=False)
    before = sparsity.take_density() if sparsity else 1.0
    for handle in handles:
        handle.remove()
    model, gap = adapted.merge_and_unload(), 0.0
    for layer, block in enumerate(blocks):
        args, kwargs, expected = seen.pop(layer)
        change = (first_tensor(block.module(*args, **kwargs)).float() - expected.float()).norm(dim=-1)
        gap = max(gap, (change / expected.float().norm(dim=-1).clamp_min(1e-12)).median().item())
    if not gap < MERGE_GAP:
        raise MoyuError(
            f"merging the LoRA deltas changed the FFN blocks' outputs by {gap:.1e} (relative); the masks have to act "
            "at the same place before and after, so this is a fault of moyu: please report it"
        )
    if sparsity is None:
        return model, {"merge_gap": gap}
    return model, {
        "merge_gap": gap,
        "density_before_merge": before,
        "density_after_merge": sparsity.take_density(),
    }
