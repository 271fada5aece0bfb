"""Token losses, as sums: the trainer divides them by the token count of the whole optimizer step.

The vocabulary is the widest thing in a step: of a small model, autograd through log-softmaxes over it costs more than
all the layers. So the gradient is written down, and taken with the loss, a few rows at a time, while they are in cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 32  # tokens at a time: their fp32 probabilities over a usual vocabulary stay in a core's cache


@dataclass(frozen=True)
class Weights:
    """Of KL(parent || student) and of the next-token loss; top_k: see `kl_target`."""

    kl: float
    lm: float
    top_k: int | None = None


def token_loss(logits: Tensor, labels: Tensor, weights: Weights, parent: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weighted loss over scored positions, fp32 sum with its gradient, and its parts (KL, LM) fp32 `[2]` without.

    logits and parent `[B, T, V]`, parent only where `weights.kl` is not 0; labels int64 `[B, T]`, -100 where unscored.
    """
    loss, parts = _TokenLoss.apply(logits, labels, weights, parent if weights.kl else None)
    return loss, parts


def kl_target(log_p: Tensor, log_q: Tensor, top_k: int) -> Tensor:
    """Where a student is drawn to when of the parent's tokens only the likeliest `top_k` count one by one.

    All others are one event: within it, the student keeps its own shares. All are log-probabilities, fp32 `[N, V]`.
    """
    log_top, places = log_p.topk(min(top_k, log_p.shape[-1] - 1), dim=-1)
    rest_p = (1 - log_top.exp().sum(-1, keepdim=True)).clamp_min(1e-7)
    rest_q = (1 - log_q.gather(-1, places).exp().sum(-1, keepdim=True)).clamp_min(1e-7)
    return (log_q + (rest_p / rest_q).log()).scatter_(-1, places, log_top)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Weights, parent: Tensor | None) -> Any:
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
        rows = logits.flatten(0, 1).split(ROWS)
        parents = parent.flatten(0, 1).split(ROWS) if parent is not None else [None] * len(rows)
        # Contiguous, or `flatten` would copy it.
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        gradients = gradient.flatten(0, 1).split(ROWS) if gradient is not None else [None] * len(rows)
        parts = torch.zeros(len(rows), 2, device=logits.device)
        for part, row, parent_row, out, target in zip(
            parts, rows, parents, gradients, targets.split(ROWS), strict=True
        ):
            scored, place = target != -100, target.clamp_min(0)[:, None]
            log_q = row.float().log_softmax(-1)
            slope = log_q.exp()
            part[1] = -log_q.gather(-1, place)[:, 0].where(scored, 0.0).sum()
            if parent_row is not None:
                log_p = parent_row.float().log_softmax(-1)
                if weights.top_k is not None:
                    log_p = kl_target(log_p, log_q, weights.top_k)
                p = log_p.exp()
                part[0] = log_p.sub_(log_q).mul_(p).sum(-1).where(scored, 0.0).sum()
            if out is None:
                continue
            slope *= weights.lm + (weights.kl if parent_row is not None else 0.0)
            if parent_row is not None:
                slope.sub_(p, alpha=weights.kl)
            slope.scatter_add_(-1, place, slope.new_full(place.shape, -weights.lm))
            out.copy_(slope.masked_fill_(~scored[:, None], 0.0))
        total = parts.sum(0)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(total)
        return weights.kl * total[0] + weights.lm * total[1], total

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> Any:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("token_loss keeps its gradient for one backward only; compute the loss again")
        return gradient.mul_(slope), None, None, None
