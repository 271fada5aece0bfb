"""How much memory fine-tuning takes on each device, by formula, from the model's config alone.

Shape letters as everywhere; N tokens of a micro-batch, P parameters, T trainable ones, n processes. Bytes throughout.
Weights and moments are exact, the rest is an estimate: what autograd saves was read off Llama-like layers on a CPU, and
`tests/test_plan.py` holds the peak to what a real step allocates.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.structure import freeze_embeddings, sizes
from moyu_train.settings import SHARED, Optimise
from moyu_train.training.launch import asked_engine
from moyu_train.training.lora import BLOCK, adapt
from moyu_train.training.losses import ROWS

LAUNCHERS = ("single", "ddp", "fsdp2", "zero2", "zero3")
FULL, HALF = 4, 2  # bytes of fp32 and bf16
LIVE = 10**9  # parameters that ZeRO-3 keeps gathered: the default of stage3_max_live_parameters


@dataclass(frozen=True)
class Sizes:
    """What a model's config says about its size, in numbers of parameters and widths.

    Args:
        parameters, trainable: P and T, shared ones once; linear: of linear layers and the head; wrapped: of linear
            layers that LoRA wraps; layer: of the largest decoder layer; root: of what is in no layer.
        hidden, vocabulary, layers: D, V, L; keys: width of keys and values together.
        neurons: F of each FFN block, of those that one token goes through; gated: whether it has a gate.
    """

    parameters: int
    trainable: int
    linear: int
    wrapped: int
    layer: int
    root: int
    hidden: int
    vocabulary: int
    layers: int
    keys: int
    neurons: tuple[int, ...]
    gated: tuple[bool, ...]
    routed: tuple[int, ...]


def measure_sizes(model: Any, settings: Optimise) -> Sizes:
    """model: on the meta device; it is wrapped or frozen, so give one that nobody else uses."""
    text, blocks = model.config.get_text_config(), find_blocks(model)
    parameters = sum(p.numel() for p in model.parameters())
    layers = _layers(model, blocks)
    linear = sum(m.weight.numel() for m in model.modules() if sizes(m))
    linear += sum(p.numel() for block in blocks if block.layout == "experts" for p in block.stored())
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    found = {
        "parameters": parameters,
        "linear": linear,
        "layer": max(layers),
        "root": parameters - sum(layers),
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
        "layers": len(layers),
        "keys": 2 * (getattr(text, "num_key_value_heads", None) or heads) * size,
        "neurons": tuple(block.neurons for block in blocks),
        "gated": tuple(block.layout != "plain" for block in blocks),
        "routed": tuple(getattr(text, "num_experts_per_tok", 1) if b.layout == "experts" else 0 for b in blocks),
    }
    if not settings.embeddings:
        freeze_embeddings(model)
    if not settings.lora:
        return Sizes(trainable=trainable(model), wrapped=0, **found)
    with torch.device("meta"):
        adapted = adapt(model, settings.lora.model_copy(update={"quantise": None}))
    wrapped = [m for m in adapted.modules() if hasattr(m, "lora_A") and sizes(m)]
    return Sizes(
        trainable=trainable(adapted),
        wrapped=sum(m.get_base_layer().weight.numel() for m in wrapped),
        **found,
    )


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _layers(model: Any, blocks: list[FFNBlock]) -> list[int]:
    """Parameters of each decoder layer: of the modules in the list that the FFN blocks are in."""
    paths = {".".join(block.path.split(".")[: _number(block.path) + 1]) for block in blocks}
    return [sum(p.numel() for p in model.get_submodule(path).parameters()) for path in sorted(paths)]


def _number(path: str) -> int:
    parts = path.split(".")
    return next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)


def layer_activations(found: Sizes, block: int, half: bool) -> int:
    """Bytes that autograd saves per token in the layer of an FFN block under a mask.

    In fp32: the residual, the normed residual and the norm's output at each of two norms, queries and attention output,
    8 D; keys and values; gate, its activation, up and the masked activation, 4 F (2 F without a gate); F of mask.
    Under bf16 autocast norms stay fp32 (4 D), and each of the five projections that read a norm has its own copy. Of
    experts a token goes through several, each with a gathered input and output beside, 3 D.
    """
    d, f, width = found.hidden, found.neurons[block], HALF if half else FULL
    wide = 4 if found.gated[block] else 2
    times = found.routed[block] or 1
    gathered = 3 * d * found.routed[block]
    norms = FULL * 4 * d + HALF * 7 * d if half else FULL * 8 * d
    return norms + width * (found.keys + gathered) + times * f * (wide * width + 1)


def activation_bytes(found: Sizes, tokens: int, half: bool, checkpointing: bool) -> tuple[int, int]:
    """Saved activations of a micro-batch of N tokens, and of the layer that is computed again in the backward.

    Of all layers and the last norm (3 D); with checkpointing of each layer's input in fp32 alone, and the last norm.
    """
    layers = [layer_activations(found, block, half) for block in range(len(found.neurons))]
    kept = found.layers * found.hidden * FULL if checkpointing else sum(layers)
    return tokens * (kept + 3 * found.hidden * FULL), tokens * max(layers) if checkpointing else 0


def logit_bytes(found: Sizes, tokens: int, half: bool, parent: bool) -> int:
    """Logits fp32 and their gradient, `2 * 4 N V`; the parent's, `4 N V` or in bf16 half of it; one chunk of the loss.

    A chunk is `ROWS` tokens with four fp32 tensors over the vocabulary (training/losses.py).
    """
    whole = 2 * FULL + ((HALF if half else FULL) if parent else 0)
    return found.vocabulary * (tokens * whole + 4 * FULL * min(ROWS, tokens))


def model_bytes(found: Sizes, launcher: str, n: int, settings: Optimise) -> dict[str, float]:
    """Weights, gradients, moments of AdamW, and what is gathered for a while, per device.

    | launcher | weights | gradients | optimiser | gathered |
    |---|---|---|---|---|
    | single | 4 P, copies of linear layers in bf16 autocast 2 P | 4 T | 8 T | |
    | ddp | the same | 8 T, with DDP's buckets | 8 T | |
    | fsdp2 | 4 P / n | 4 T / n | 8 T / n | w (root + 2 layers) + 4 of a layer's trainable |
    | zero2 | w P | w T | (4 + 4 + 8) T / n | |
    | zero3 | w P / n | | (4 + 4 + 8) T / n | w (min(P, 1e9) + a layer's trainable) |

    w is 2 in bf16, else 4. ZeRO holds an fp32 copy and fp32 gradients beside the moments: with T = P and bf16 that is
    DeepSpeed's own estimate, 4 P + 16 P / n and 18 P / n. 4-bit weights (QLoRA) take 0.5 + 4 / 64 bytes in place of 4.
    """
    p, t, half = found.parameters, found.trainable, settings.dtype == "bfloat16"
    w = HALF if half else FULL
    whole = FULL * float(p)
    copied = found.linear
    if settings.lora and settings.lora.quantise:
        whole -= found.wrapped * (FULL - 0.5 - FULL / BLOCK)
        copied -= found.wrapped
    if settings.lora and settings.activation_checkpointing:
        copied = min(copied, found.layer)  # copies of frozen weights live as long as what was saved with them
    if settings.lora:
        whole += FULL * t
    if launcher in ("single", "ddp"):
        gradients = FULL * t * (2 if launcher == "ddp" else 1)
        return _parts(whole + (HALF * copied if half else 0), gradients, 2 * FULL * t, 0)
    share = t / p  # trainable of a layer
    if launcher == "fsdp2":
        gathered = w * (found.root + 2 * found.layer) + FULL * found.layer * min(share, 1)
        return _parts(whole / n, FULL * t / n, 2 * FULL * t / n, gathered)
    optimiser = 16 * t / n
    if launcher == "zero2":
        return _parts(w * p, w * t, optimiser, 0)
    return _parts(w * p / n, 0, optimiser, w * (min(p, LIVE) + found.layer * min(share, 1)))


def _parts(weights: float, gradients: float, optimiser: float, gathered: float) -> dict[str, float]:
    return {"weights": weights, "gradients": gradients, "optimiser": optimiser, "gathered": gathered}


def training_memory(
    found: Sizes, settings: Optimise, launcher: str, n: int = 1, parent: int = 0, checkpointing: bool | None = None
) -> dict[str, float]:
    """Bytes per device by what they are for, and their `peak`.

    parent: parameters of the frozen parent of the KL, whole on every device: no engine shares it out, but where it is
    offloaded only its largest part; 0 without one; checkpointing: default as the recipe has it.

    The peak is the sum. In one process without accumulation, gradients come as activations and logits go: there it has
    the larger of the two. With checkpointing a layer is computed again when the logits are gone: the larger again.
    """
    half, tokens = settings.dtype == "bfloat16", settings.batch * settings.window
    if checkpointing is None:
        checkpointing = settings.activation_checkpointing
    else:
        settings = settings.model_copy(update={"activation_checkpointing": checkpointing})
    parts = model_bytes(found, launcher, n, settings)
    held = max(found.root, found.layer) if settings.parent_offload and parent else parent
    parts["parent"] = held * (HALF if half else FULL)
    parts["activations"], again = activation_bytes(found, tokens, half, checkpointing)
    shared = settings.parent == SHARED and settings.kl_weight > 0
    parts["logits"] = logit_bytes(found, tokens, half, parent > 0 or shared)
    peak = sum(parts.values()) + max(again - parts["logits"], 0)
    if launcher == "single" and settings.accumulation == 1:
        peak -= min(parts["gradients"], parts["activations"] + max(parts["logits"], again))
    return parts | {"peak": peak}


def launcher_of_this() -> tuple[str, int]:
    """Name in `LAUNCHERS` of what this process was launched with, and the number of processes."""
    engine, n = asked_engine(), PartialState().num_processes
    if engine == "DEEPSPEED":
        settings = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text(encoding="utf-8"))
        return f"zero{settings['zero_optimization']['stage']}", n
    return "fsdp2" if engine == "FSDP" else "ddp" if n > 1 else "single", n
