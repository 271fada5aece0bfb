"""A sparse checkpoint's kernels against the masked multi-token path, token by token over a text.

Predicted masks are chaotic under rounding (`replay.py`), so single tokens of two ways to compute them cannot be
compared; means over many can, and blocks.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import moyu_kernels
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moyu_train.checkpoints.export import read_heads, read_inputs, read_state, stored_dtype
from moyu_train.errors import MoyuError
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.replay import parts_of, record, replay
from moyu_train.models.blocks import device_of
from moyu_train.models.loading import load_sparse
from moyu_train.progress import track
from moyu_train.training.losses import ROWS

AGREEMENT = 0.01  # largest relative difference of perplexity, unless chance makes as large a one
STANDARD_ERRORS = 3.0  # of the mean difference of a token's loss, which chance is allowed
REPLAYED = 64  # tokens that each block is given again


def through_kernels(folder: Path, model: Any, ids: Tensor, predicted: bool = True) -> dict[str, Any]:
    """Decode `ids` `[T]` one by one, in fp32 and as stored, and compare with the masked path in fp32.

    model: the stock model with the checkpoint's weights; predicted: False for predictors that no op computes.

    Returns: `perplexity` as stored, since rounding moves activations over thresholds, `fp32_perplexity`,
        `masked_perplexity`, `tokens`; with predictors `blocks`, as of `replay`, else None.

    Raises: MoyuError where the two paths do not agree in fp32.
    """
    rules, predictors = read_state(folder)
    inputs, heads = read_inputs(folder), read_heads(folder)
    predictors = predictors if predicted else None
    with SparseMasks(model, rules, predictors, inputs=inputs) as masks, HeadMasks.of(model, heads):
        masked = masked_losses(model, ids)
        parts = parts_of(masks.blocks) if predictors else []
        if parts:
            record(model, parts, ids[None, :REPLAYED])
    sparse = load_sparse(folder, dtype=torch.float32)
    blocks = replay(sparse, parts, "evaluate") if parts else None
    exact = stored = decoded_losses(sparse, ids)
    del sparse
    check_agreement(exact, masked)
    if stored_dtype(folder) != torch.float32:
        stored = decoded_losses(load_sparse(folder), ids)
    return {
        "perplexity": perplexity(stored),
        "tokens": len(ids),
        "fp32_perplexity": perplexity(exact),
        "masked_perplexity": perplexity(masked),
        "blocks": blocks,
    }


def check_agreement(kernels: Tensor, masked: Tensor) -> None:
    """Losses of the same tokens, `[T - 1]` each, may differ in the mean by rounding or by chance, no more.

    Raises: MoyuError where they do.
    """
    differences = kernels - masked
    error = (differences.std() / math.sqrt(len(differences))).item() if len(differences) > 1 else 0.0
    if not abs(differences.mean().item()) <= max(math.log1p(AGREEMENT), STANDARD_ERRORS * error):
        raise MoyuError(
            f"decoding through the kernels in fp32 gives perplexity {perplexity(kernels):.3f}, the masked path "
            f"{perplexity(masked):.3f} on the same {len(kernels) + 1} tokens: they differ by more than {AGREEMENT:.0%} "
            f"and than {STANDARD_ERRORS:g} standard errors"
        )


def perplexity(losses: Tensor) -> float:
    return losses.mean().exp().item()


@torch.no_grad()
def masked_losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each of ids `[T]` but the first, in one forward: `[T - 1]`."""
    logits = model(input_ids=ids[None].to(device_of(model)), use_cache=False).logits[0, :-1]
    pairs = zip(logits.split(ROWS), ids[1:].split(ROWS), strict=True)
    return torch.cat([_losses(*pair) for pair in pairs])


@torch.no_grad()
def decoded_losses(model: Any, ids: Tensor) -> Tensor:
    """The same, decoded token by token through the kernels, predictors on, from position 0."""
    runner = moyu_kernels.Runner(model, max_length=len(ids))
    runner.reset()
    pairs = track(list(pairwise(ids)), "evaluate: kernels, token by token")
    return torch.cat([_losses(runner.step(token.view(1, 1)), after[None]) for token, after in pairs])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """logits `[N, V]`, targets int64 `[N]`: fp64 `[N]`, on the CPU."""
    return cross_entropy(logits.float(), targets.to(logits.device), reduction="none").double().cpu()
