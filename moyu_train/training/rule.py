"""Calibrates a sparsifier's levels on text: the quantile of its statistic that keeps the target density."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from moyu_kernels.prompt import prompt_statistic
from moyu_kernels.rules import Rule
from torch import Tensor

from moyu_train.analysis.histogram import Histogram
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import FFNBlock, device_of, find_blocks
from moyu_train.models.context import longest_window
from moyu_train.models.masking import Masking
from moyu_train.progress import track

LOG2_RANGE = (-40.0, 24.0)  # 1.1 % a bin


# see(layer, statistic, a, expert) -> mask of `a`, or None to leave it. The statistic is fp32 of a's shape; where masks
# are taken from the prompt, `[B, 1, F]`.
See = Callable[[int, Tensor, Tensor, int | None], Tensor | None]


@torch.no_grad()
def watch(
    model: Any,
    cls: Any,
    options: Any,
    blocks: list[FFNBlock],
    documents: Documents,
    rules: list[Rule],
    label: str,
    see: See,
) -> None:
    """One pass over the text, in which `see` gets every block's activations with the statistic that `cls` calibrates.

    rules: whose gate and up stand in the blocks; what is masked is what `see` says.
    """
    scales = [cls.statistic(options, block) for block in blocks]
    at_gate = cls.calibrates == "gate"

    def keep(layer: int, a: Tensor, expert: int | None) -> Tensor | None:
        if cls.calibrates == "prompt":  # of sequences that go on behind it
            first = options.prompt
            return see(layer, prompt_statistic(a[:, :first]), a, expert) if a.shape[1] > first else None
        scale = scales[layer] if expert is None else scales[layer][expert]
        value = masking.gate(layer) if at_gate else rules[layer].distance(a)
        return see(layer, value.abs().float() * scale, a, expert)

    masking = Masking(blocks, keep, rules=rules, gates=at_gate)
    with masking:
        for _, ids in track(documents.windows(longest_window(model)), label):
            model(input_ids=ids[None].to(device_of(model)), use_cache=False, logits_to_keep=1)


def calibrate_rule(
    model: Any,
    cls: Any,
    options: Any,
    density: float | Sequence[float],
    documents: Documents,
    tokens: int,
    passes: int,
    blocks: list[FFNBlock] | None = None,
    centres: Sequence[Tensor | None] = (),
) -> Any:
    """A sparsifier whose rule keeps `density` of the neurons of every layer on this text, where the method calibrates.

    The first pass sees dense activations; each later one sees what the layers before it produce under the mask of the
    pass before, which is what the rule will meet. density: one for all layers, or one a layer; blocks: default the FFN
    blocks; centres: of their rules.
    """
    blocks = blocks or find_blocks(model)
    cls.check(blocks)
    mean = density if isinstance(density, float) else sum(density) / len(density)
    sparsifier: Any = cls.start(options, blocks, mean)
    sparsifier.centres = centres = centres or [None] * len(blocks)
    if not cls.calibrates:
        return sparsifier
    for number in range(passes):
        histogram = Histogram(len(blocks), *LOG2_RANGE)

        def see(layer: int, statistic: Tensor, a: Tensor, expert: int | None) -> Tensor | None:
            # A prompt's statistic counts as often as it masks a token.
            weights = torch.full_like(statistic, a.shape[1] - options.prompt) if cls.calibrates == "prompt" else None
            histogram.add(layer, statistic.clamp_min(1e-30).log2(), weights)  # noqa: B023 - used within this pass alone
            return sparsifier.rules[layer].mask(a, expert) if number else None  # noqa: B023

        label = f"calibrate rule {number + 1}/{passes}"
        watch(model, cls, options, blocks, documents.first(tokens), sparsifier.rules, label, see)
        if not histogram.counts.any():
            raise MoyuError(
                f"no sequence of the calibration text goes on behind the {options.prompt} tokens that masks are taken "
                "from; lower sparsifier.prompt, or give longer documents"
            )
        silent = [
            block.path for block, counts in zip(blocks, histogram.counts, strict=True) if counts[0] == counts.sum()
        ]
        if silent:
            raise MoyuError(
                f"every activation of {', '.join(silent)} is zero on the calibration text, so no threshold can be set; "
                "check the weights, or give other text"
            )
        levels = [2.0**level for level in histogram.levels(density)]
        sparsifier = cls.calibrated(options, blocks, levels, mean)
        sparsifier.centres = centres
    return sparsifier
