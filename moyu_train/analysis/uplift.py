"""The oracle: per token and layer the neurons of largest contribution; and the over-activation statistics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moyu_train.data import Documents
from moyu_train.evaluation.perplexity import score
from moyu_train.models.blocks import find_blocks
from moyu_train.models.masking import Masking


def largest(contribution: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` largest entries of each row; ties at the last place are all kept.

    Args: contribution `[..., F]` non-negative; count int64 `[...]`, 0 keeps none.
    """
    ranked = contribution.topk(max(int(count.max()), 1), dim=-1).values  # sorted, [..., K]
    last = ranked.gather(-1, (count - 1).clamp_min(0)[..., None])
    return (contribution >= last) & (count > 0)[..., None]


def uplift_curve(model: Any, documents: Documents, tokens: int, sparsities: Sequence[float]) -> dict[str, Any]:
    """Over-activation of a model: zero share, concentration, and perplexity under oracle masks.

    Participation ratio is `(sum n)^2 / (F sum n^2)` of the contributions n (1: all neurons equal; square Hoyer);
    `half_mass` the share of neurons that carry half of the contribution. Means over tokens, per layer.
    """
    blocks = find_blocks(model)
    norms = [block.down_norms() for block in blocks]
    sums = torch.zeros(len(blocks), 4, dtype=torch.float64)  # zero share, participation, half-mass share, tokens

    def observe(layer: int, a: Tensor, expert: int | None) -> None:
        n = a.abs().float() * (norms[layer] if expert is None else norms[layer][expert])
        total = n.sum(-1)
        sorted_mass = n.sort(-1, descending=True).values.cumsum(-1)
        half = (sorted_mass < 0.5 * total[..., None]).sum(-1) + 1
        values = [
            (a == 0).double().mean(-1),
            total.square() / (n.square().sum(-1).clamp_min(1e-30) * n.shape[-1]),
            half / n.shape[-1],
            torch.ones_like(total),
        ]
        sums[layer] += torch.stack([value.double().sum().cpu() for value in values])

    with Masking(blocks, observe):
        dense = score(model, documents, None, "analyze: dense", tokens).perplexity
    curve = [{"sparsity": 0.0, "perplexity": dense}]
    for sparsity in sparsities:

        def keep(layer: int, a: Tensor, expert: int | None) -> Tensor:
            n = a.abs().float() * (norms[layer] if expert is None else norms[layer][expert])
            count = round((1 - sparsity) * n.shape[-1])  # noqa: B023 - the hook lives no longer than this pass
            return largest(n, torch.full(n.shape[:-1], count, device=n.device))

        with Masking(blocks, keep):
            perplexity = score(model, documents, None, f"analyze: oracle {sparsity:.0%} off", tokens).perplexity
        curve.append({"sparsity": sparsity, "perplexity": perplexity})
    means = (sums[:, :3] / sums[:, 3:]).tolist()
    layers = [
        {"block": block.path, "zero_share": zero, "participation": participation, "half_mass": half}
        for block, (zero, participation, half) in zip(blocks, means, strict=True)
    ]
    return {"tokens": int(sums[0, 3]), "layers": layers, "uplift": curve}
