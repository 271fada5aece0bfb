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


def kl_sum(logits: Tensor, parent: Tensor, labels: Tensor) -> Tensor:
    """KL(parent || student) at the scored positions, fp32 sum. logits, parent `[B, T, V]`, labels as in `lm_sum`."""
    scored = labels[:, 1:] != -100
    student, teacher = logits[:, :-1][scored], parent[:, :-1][scored]
    return torch.stack(
        [
            functional.kl_div(
                functional.log_softmax(s.float(), dim=-1),
                functional.log_softmax(t.float(), dim=-1),
                log_target=True,
                reduction="sum",
            )
            for s, t in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True)
        ]
    ).sum()
