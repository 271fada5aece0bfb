"""LoRA (arXiv 2106.09685) through peft, under a sparsifier's masks: wrap, and merge with proof that nothing changed."""

from typing import Any

import torch
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import device_of
from moyu_train.recipe import Lora
from moyu_train.training.control import SparsityControl

MERGE_GAP = 1e-3  # largest relative difference of logits; a mask that flips at its threshold makes a little of it


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
    """The model with its deltas added to the weights, and how far logits and density moved by that.

    Args: ids: int64 `[T]`, text to measure on.
    Raises: MoyuError where the logits changed by more than `MERGE_GAP`.
    """
    adapted.eval()

    def measure(model: Any) -> tuple[Tensor, float]:
        logits = model(input_ids=ids[None].to(device_of(model)), use_cache=False).logits.float()
        return logits, sparsity.take_density() if sparsity else 1.0

    if sparsity:
        sparsity.take_density()
        sparsity.counting = True
    before, density_before = measure(adapted)
    model = adapted.merge_and_unload()
    after, density_after = measure(model)
    gap = ((after - before).norm() / before.norm()).item()
    if not gap < MERGE_GAP:
        raise MoyuError(
            f"merging the LoRA deltas changed the logits by {gap:.1e} (relative); the masks have to act at the same "
            "place before and after, so this is a fault of moyu: please report it"
        )
    if sparsity is None:
        return model, {"merge_gap": gap}
    return model, {"merge_gap": gap, "density_before_merge": density_before, "density_after_merge": density_after}
