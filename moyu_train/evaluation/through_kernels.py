"""A sparse checkpoint's kernels against the masked multi-token path: block by block, and token by token over a text.

Predicted masks are chaotic under rounding: one neuron more or less, and later layers see other inputs. So single tokens
of two ways to compute them cannot be compared. Blocks can, on the inputs that the masked path gave them; and means over
many tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import moyu_kernels
import torch
from moyu_kernels.rules import Rule
from torch import Tensor
from torch.nn.functional import cross_entropy

from moyu_train.checkpoints.export import stored_dtype
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.blocks import FFNBlock, device_of
from moyu_train.progress import track
from moyu_train.training.losses import ROWS

AGREEMENT = 0.01  # largest relative difference of perplexity, unless chance makes as large a one
STANDARD_ERRORS = 3.0  # of the mean difference of a token's loss, which chance is allowed
REPLAYED = 64  # tokens that each block is given again
SAME = 1e-4  # largest relative difference of a block's output for one token under the same mask
OTHER_MASKS = 0.005  # largest share of outputs that may differ by more, where a score stands on its cut to the last bit


def through_kernels(
    folder: Path,
    model: Any,
    rules: list[Rule],
    predictors: list[dict[str, Tensor]] | None,
    inputs: dict[str, Rule],
    ids: Tensor,
) -> dict[str, Any]:
    """Decode `ids` `[T]` one by one, in fp32 and as stored, and compare with the masked path of `model` in fp32.

    Returns: `perplexity` as stored, since rounding moves activations over thresholds, `fp32_perplexity`,
        `masked_perplexity`, `tokens`; with predictors `blocks`, as of `replay`, else None.

    Raises: MoyuError where the two paths do not agree in fp32.
    """
    with SparseMasks(model, rules, predictors, inputs=inputs) as masks, recorded(masks.blocks) as seen:
        masked = masked_losses(model, ids)
    sparse = moyu_kernels.from_pretrained(folder, dtype=torch.float32)
    blocks = replay(sparse, seen) if predictors else None
    exact = stored = decoded_losses(sparse, ids)
    del sparse
    if stored_dtype(folder) != torch.float32:
        stored = decoded_losses(moyu_kernels.from_pretrained(folder), ids)
    check_agreement(exact, masked)
    return {
        "perplexity": perplexity(stored),
        "tokens": len(ids),
        "fp32_perplexity": perplexity(exact),
        "masked_perplexity": perplexity(masked),
        "blocks": blocks,
    }


Seen = dict[str, tuple[Tensor, Tensor]]  # by a block's path its input and output, fp32 `[N, D]` each


@contextmanager
def recorded(blocks: list[FFNBlock]) -> Iterator[Seen]:
    """What blocks get and give for the first tokens of one forward, with the masks that are on the model."""
    seen: Seen = {}

    def recorder(path: str) -> Callable[..., None]:
        def record(module: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            x = args[0]
            seen[path] = x.flatten(0, -2)[:REPLAYED].clone(), y.flatten(0, -2)[:REPLAYED].clone()

        return record

    handles = [block.module.register_forward_hook(recorder(block.path)) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay(sparse: Any, seen: Seen) -> dict[str, Any]:
    """Give the blocks of a sparse model the inputs that the masked path saw, token by token.

    Returns: `tokens` a block, `other_masks`, the share of outputs that differ by more than rounding (`SAME`), and
        `median` and `worst` relative difference.

    Raises: MoyuError where that share is larger than scores on their cut explain.
    """
    errors: dict[str, Tensor] = {}
    for path, (xs, ys) in track(list(seen.items()), "evaluate: kernels, block by block"):
        block = sparse.get_submodule(path)
        found = torch.cat([block(x) for x in xs.to(device_of(sparse)).split(1)]).to(ys.device)
        errors[path] = (found - ys).norm(dim=-1) / ys.norm(dim=-1).clamp_min(1e-30)
    every = torch.cat(list(errors.values()))
    other = (every > SAME).double().mean().item()
    if other > OTHER_MASKS:
        worst = max(errors, key=lambda path: (errors[path] > SAME).sum().item())
        raise MoyuError(
            f"on the same inputs, {other:.1%} of the outputs of the kernels' FFN blocks differ from the masked path's "
            f"by more than {SAME:g}, in {worst} {(errors[worst] > SAME).double().mean():.1%}; report it with the "
            "checkpoint, and compare `moyu_kernels.set_mode(model, mode, backend='reference')`"
        )
    figures = {"median": every.median().item(), "worst": every.max().item()}
    return {"tokens": len(next(iter(seen.values()))[0]), "other_masks": other, **figures}


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
