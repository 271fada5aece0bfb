"""LoRA (arXiv 2106.09685) through peft, under a sparsifier's masks: wrap, and merge with proof that nothing changed.

With QLoRA (arXiv 2305.14314) the wrapped projections hold 4-bit weights by bitsandbytes while they train; merging adds
the deltas to what these stand for, so that the merged model is the one that was trained.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from moyu_kernels.compensation import ATTRIBUTE
from torch import Tensor, nn

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import device_of, find_blocks
from moyu_train.models.compensation import compensation_rank
from moyu_train.settings import Lora
from moyu_train.training.anchor import first_tensor
from moyu_train.training.control import SparsityControl
from moyu_train.training.launch import asked_engine

MERGE_GAP = 1e-4  # in fp32
BLOCK = 64  # 4-bit weights with one scale


def adapt(model: Any, settings: Lora) -> Any:
    """The model with low-rank deltas on its targets, all else but compensations frozen.

    The masks act as before, on what peft wraps.

    Raises: MoyuError where no module matches the targets.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=[ATTRIBUTE] if compensation_rank(model) else None,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise MoyuError(f"finetune.lora.targets {settings.targets!r}: {error}") from error
    if settings.quantise:
        quantise(adapted)
    return adapted


def check_quantise(settings: Lora | None) -> None:
    """Raises: MoyuError for 4-bit weights without bitsandbytes, or under an engine that would share them out."""
    if not settings or not settings.quantise:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MoyuError(
            f"finetune.lora.quantise {settings.quantise!r} needs bitsandbytes: pip install 'moyu[qlora]', or set it to "
            "null"
        )
    if asked_engine():
        raise MoyuError(
            f"finetune.lora.quantise {settings.quantise!r} holds packed 4-bit weights, which {asked_engine()} cannot "
            "share out among processes; use accelerate_configs/ddp.yaml or single.yaml, or set it to null"
        )


def _wrapped(adapted: Any) -> Iterator[Any]:
    """peft's layers around plain linear ones, and around their 4-bit twins."""
    from peft.tuners.lora import LoraLayer

    return (m for m in adapted.modules() if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), nn.Linear))


@torch.no_grad()
def quantise(adapted: Any) -> None:
    """4-bit weights (nf4, a scale per 64) in place of the frozen ones of every wrapped linear layer.

    Raises: MoyuError where there is none, or rows cannot be cut into whole blocks, which bitsandbytes rounds badly.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    layers = list(_wrapped(adapted))
    uneven = sorted(
        {layer.get_base_layer().in_features for layer in layers if layer.get_base_layer().in_features % BLOCK}
    )
    if uneven or not layers:
        found = f"layers of {uneven[0]} inputs" if uneven else "no plain linear layers"
        raise MoyuError(
            f"finetune.lora.quantise needs linear layers whose inputs are a multiple of {BLOCK}; finetune.lora.targets "
            f"names {found}: narrow them, or set quantise to null"
        )
    for layer in layers:
        base = layer.get_base_layer()
        twin = Linear4bit(base.in_features, base.out_features, base.bias is not None, quant_type="nf4", device="meta")
        twin.weight = Params4bit(base.weight.detach(), requires_grad=False, quant_type="nf4", module=twin)
        twin.bias = base.bias
        twin.support_avx512bf16_for_cpu = False  # it would repack the weights in eval mode, with their scales in bf16
        layer.base_layer = twin.to(base.weight.device)


@torch.no_grad()
def dequantise(adapted: Any) -> None:
    """Plain linear layers again, with the weights that the 4-bit ones stand for."""
    for layer in _wrapped(adapted):
        twin = layer.get_base_layer()
        if not hasattr(twin.weight, "quant_state"):
            continue
        from bitsandbytes.functional import dequantize_4bit

        plain = nn.Linear(twin.in_features, twin.out_features, twin.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantize_4bit(twin.weight.data, twin.weight.quant_state), requires_grad=False)
        plain.bias = twin.bias
        layer.base_layer = plain


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
    dequantise(adapted)
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
