"""Token losses, as sums: the trainer divides each by its own token count over the whole optimizer step."""

import torch
import torch.nn.functional as functional
from torch import Tensor

CHUNK = 256  # tokens at a time: the fp32 softmax of a large vocabulary is the largest tensor of a step


def lm_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy, fp32 sum. logits `[B, T, V]`, labels int64 `[B, T]` with -100 where not scored."""
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.stack(
        [
            functional.cross_entropy(row.float(), target, ignore_index=-100, reduction="sum")
            for row, target in zip(rows.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
    ).sum()


def kl_sum(logits: Tensor, parent: Tensor, labels: Tensor, top_k: int | None = None) -> Tensor:
    """KL(parent || student) at the scored positions, fp32 sum. logits, parent `[B, T, V]`, labels as in `lm_sum`.

    top_k: of the parent's distribution only the likeliest so many tokens one by one, and all others as one event.
    """
    scored = labels[:, 1:] != -100
    student, teacher = logits[:, :-1][scored], parent[:, :-1][scored]
    sums = []
    for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        log_q, log_p = functional.log_softmax(s.float(), dim=-1), functional.log_softmax(t.float(), dim=-1)
        if top_k is not None:
            log_p, places = log_p.topk(min(top_k, log_p.shape[-1] - 1), dim=-1)
            log_p, log_q = _with_rest(log_p), _with_rest(log_q.gather(-1, places))
        sums.append(functional.kl_div(log_q, log_p, log_target=True, reduction="sum"))
    return torch.stack(sums).sum()


def _with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities `[N, K]` and that of everything else, `[N, K + 1]`."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)
