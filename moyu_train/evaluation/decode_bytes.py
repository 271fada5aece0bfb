"""The byte model of decoding, before anything is trained: what a batch-1 step has to read, and what that can save.

Time is taken to be in proportion to bytes read. That is a limit: what a machine reaches of it, `moyu bench` measures.
"""

from typing import Any

import torch
from moyu_kernels.ffn import simulated_because
from moyu_kernels.ops.ffn.naive import ON_GATE, SIMULATED
from moyu_kernels.rules import Rule

from moyu_train.evaluation.bench_bytes import bytes_per_token
from moyu_train.evaluation.inloop import row_bytes
from moyu_train.models.blocks import FFNBlock, ffn_bytes, find_blocks, scale_bytes
from moyu_train.models.marker import base_activation
from moyu_train.predictors import PREDICTORS
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS


def speedup(share: float, skipped: float) -> float:
    """Amdahl's limit: `1 / (1 - share * skipped)`, share of the FFNs in all bytes, skipped of their bytes."""
    return 1 / (1 - share * skipped)


def needed_share(share: float, wished: float) -> float:
    """Share of the FFNs' bytes to skip for a speed-up: `(1 - 1 / wished) / share`; above 1, none will do."""
    return (1 - 1 / wished) / share


def rows_read(density: float, rule: Rule, predicted: bool, gated: bool = True) -> float:
    """Rows of a gated FFN's three matrices, or a plain one's two, that are read, in units of its neurons.

    With a predictor that names just the kept neurons, or a mask from the prompt, `3 density`; under a rule on the gate,
    exactly, `1 + 2 density`; else gate and up are read and `2 + density`. Of a plain FFN `2 density`, else
    `1 + density`.
    """
    if predicted or rule.prompt:
        return (3 if gated else 2) * density
    if not gated:
        return 1 + density
    return 1 + 2 * density if rule.op in ON_GATE else 2 + density


def decode_plan(recipe: Recipe, model: Any, wished: float | None = None) -> dict[str, Any]:
    """Bytes per token of the model, dense and under the recipe, and the limits they set. model: on the meta device.

    Returns: `dense_bytes`, of which `cache_bytes` are keys and values at `context` and `ffn_bytes` the FFNs' (of
        experts those that a token goes through), `ffn_share`; `limit`, the speed-up if no FFN were read; per operating
        point of the recipe, `kept` (what is read if the predictor named just the neurons that the rule keeps) and
        `calibrated` (where `calibrate.bytes_skipped` puts the cuts), `bytes_skipped`, `bytes` and `speedup`; with
        `wished`, its `bytes_skipped` and the `neurons_off` that this takes, null where none will do. The points are
        null where no op computes the rule or predictor (simulated), for `simulated_because`.
    """
    itemsize, dtype = recipe.export.itemsize, getattr(torch, recipe.export.dtype)
    blocks, context = find_blocks(model), recipe.bench.contexts[0] if recipe.bench else 128
    weights, cache = bytes_per_token(model.to(dtype), context)
    routed = getattr(model.config.get_text_config(), "num_experts_per_tok", 1)
    weights -= sum(b.experts * ffn_bytes(b, dtype.itemsize) for b in blocks)
    ffn = sum(min(routed, b.experts) * ffn_bytes(b, itemsize) for b in blocks)
    total = weights + ffn + cache
    share = ffn / total
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    rule = cls(options, [torch.ones(1)], 1 - recipe.target_sparsity).rules[0]
    # Thresholds, masks from the prompt and scales of int8 rows, then predictors and compensations.
    overhead = sum((5 if rule.prompt else 4) * b.neurons + scale_bytes(b, itemsize) for b in blocks) / ffn
    predictor = 0.0
    if recipe.predictor:
        family, settings = resolve("predictor", recipe.predictor, PREDICTORS)
        predictor = sum(family.planned_bytes(settings, b.hidden, b.neurons, b.layout != "plain") for b in blocks) / ffn
    overhead += predictor
    if added := recipe.finetune.compensation:
        width = 4 if itemsize == 1 else itemsize  # as `compensation_bytes`
        overhead += sum(b.hidden * (2 * added.rank + 1) * width for b in blocks) / ffn
    reason = _simulated(recipe, rule, blocks, model)
    found: dict[str, Any] = {
        "dtype": recipe.export.dtype,
        "context": context,
        "dense_bytes": total,
        "cache_bytes": cache,
        "ffn_bytes": ffn,
        "ffn_share": share,
        "limit": speedup(share, 1.0),
        "predictor_share": predictor,
        "simulated_because": reason,
        "kept": None,
        "calibrated": None,
    }
    density = 1 - recipe.target_sparsity

    def read(density: float) -> float:
        """Share of the FFNs' bytes that is fetched of their rows, in whole cache lines."""
        rows = (rows_read(density, rule, recipe.predictor is not None, b.layout != "plain") for b in blocks)
        return sum(b.neurons * row_bytes(b, itemsize) * n for b, n in zip(blocks, rows, strict=True)) / ffn

    if not reason:
        found["kept"] = _point(1 - read(density) - overhead, share, total)
        if recipe.predictor and recipe.calibrate.bytes_skipped is not None:  # else the goal is another one
            found["calibrated"] = _point(recipe.calibrate.bytes_skipped, share, total)
    if wished:
        skipped = needed_share(share, wished)
        none, all_ = read(0.0), read(1.0)  # it is a straight line
        off = 1 - (1 - skipped - overhead - none) / (all_ - none)
        found["wished"] = {
            "speedup": wished,
            "bytes_skipped": skipped if skipped < 1 else None,
            "neurons_off": off if skipped < 1 and not reason and off < 1 else None,
        }
    return found


def _point(skipped: float, share: float, total: int) -> dict[str, float]:
    return {"bytes_skipped": skipped, "bytes": total * (1 - share * skipped), "speedup": speedup(share, skipped)}


def _simulated(recipe: Recipe, rule: Rule, blocks: list[FFNBlock], model: Any) -> str:
    """Why no op skips anything, as far as the config tells; empty where one does."""
    if recipe.predictor and resolve("predictor", recipe.predictor, PREDICTORS)[0].form in SIMULATED:
        return f"predictor {recipe.predictor.name!r} has no op"
    act = rule.stock_activation or base_activation(model.config)
    reasons = (simulated_because(block.module, block.describe(), act, rule) for block in blocks)
    return next(filter(None, reasons), "")
