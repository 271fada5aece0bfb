"""Calibrates a sparsifier's levels on text: the quantile of its statistic that keeps the target density."""

from typing import Any

import torch
from torch import Tensor

from moyu_train.analysis.histogram import Histogram
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, device_of, find_blocks
from moyu_train.models.masking import Masking
from moyu_train.progress import track

LOG2_RANGE = (-40.0, 24.0)  # 1.1 % a bin


@torch.no_grad()
def calibrate_rule(
    model: Any,
    cls: Any,
    options: Any,
    density: float,
    documents: Documents,
    tokens: int,
    passes: int,
    blocks: list[FFNBlock] | None = None,
) -> Any:
    """A sparsifier whose rule keeps `density` of the neurons of every layer on this text, where the method calibrates.

    The first pass sees dense activations; each later one sees what the layers before it produce under the mask of the
    pass before, which is what the rule will meet. blocks: default the FFN blocks.
    """
    blocks = blocks or find_blocks(model)
    cls.check(blocks)
    if not cls.calibrates:
        return cls.start(options, blocks, density)
    scales = [cls.statistic(options, block) for block in blocks]
    at_gate = cls.calibrates == "gate"
    sparsifier: Any = None
    for number in range(passes):
        histogram = Histogram(len(blocks), *LOG2_RANGE)

        def keep(layer: int, a: Tensor, expert: int | None) -> Tensor | None:
            scale = scales[layer] if expert is None else scales[layer][expert]
            value = masking.gate(layer) if at_gate else a  # noqa: B023 - the hook lives no longer than this pass
            histogram.add(layer, (value.abs().float() * scale).clamp_min(1e-30).log2())  # noqa: B023
            return sparsifier.rules[layer].mask(a, expert) if sparsifier else None  # noqa: B023

        rules = sparsifier.rules if sparsifier else cls.start(options, blocks, density).rules
        masking = Masking(blocks, keep, rules=rules, gates=at_gate)
        with masking:
            for _, ids in track(documents.first(tokens).windows(1024), f"calibrate rule {number + 1}/{passes}"):
                model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)
        silent = [
            block.path for block, counts in zip(blocks, histogram.counts, strict=True) if counts[0] == counts.sum()
        ]
        if silent:
            raise MoyuError(
                f"every activation of {', '.join(silent)} is zero on the calibration text, so no threshold can be set; "
                "check the weights, or give other text"
            )
        sparsifier = cls.calibrated(options, blocks, [2.0**level for level in histogram.levels(density)], density)
    return sparsifier
