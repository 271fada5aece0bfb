"""Scores of the predictors that no op computes yet, in plain PyTorch. What they are: docs/predictors.md.

Shapes: T tokens of a sequence, D hidden size, F neurons, R rank. Scores are fp32 `[..., F]`.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def signs_scores(x: Tensor, signs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`score = weight * mean(sign(x) * sign(gate)) + bias`: a count of equal sign bits (SparseInfer, arXiv 2411.12692).

    Args: x `[..., D]`; signs `[F, ceil(D / 8)]` uint8, bit k of byte j set where column 8j + k of the gate is not
        negative; weight and bias `[F]` fp32. Zero counts as positive.
    """
    columns = x.shape[-1]
    gate = ((signs[:, :, None] >> torch.arange(8, device=signs.device)) & 1).flatten(1)[:, :columns]
    return sign(x) @ (2.0 * gate.float() - 1).T / columns * weight + bias


def sign(x: Tensor) -> Tensor:
    """1 where x is zero or above, else -1, fp32."""
    return (x >= 0).float() * 2 - 1


def pack_signs(weight: Tensor) -> Tensor:
    """The bits that `signs_scores` reads: uint8 `[F, ceil(D / 8)]` of weight `[F, D]`."""
    bits = torch.nn.functional.pad((weight >= 0).to(torch.uint8), (0, -weight.shape[1] % 8))
    powers = 2 ** torch.arange(8, device=weight.device)
    return (bits.unflatten(1, (-1, 8)) * powers).sum(-1).to(torch.uint8)


def mlp_scores(
    x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, b1: Tensor, scale: Tensor, bias: Tensor
) -> Tensor:
    """`score = scale * s2 * (w2 @ relu(s1 * (w1 @ x) + b1)) + bias`.

    Args: x `[..., D]`; w1 `[R, D]` and w2 `[F, R]` int8; s1, b1 `[R]`, s2, bias `[F]`, scale `[1]` fp32.
    """
    hidden = torch.relu(x.float() @ w1.float().T * s1 + b1)
    return hidden @ w2.float().T * (scale * s2) + bias


def history_scores(
    x: Tensor,
    w1: Tensor,
    s1: Tensor,
    m1: Tensor,
    t1: Tensor,
    w2: Tensor,
    s2: Tensor,
    start: Tensor,
    decay: Tensor,
    bias: Tensor,
) -> Tensor:
    """`score = s2 * (w2 @ (s1 * (w1 @ x_t) + t1 * (m1 @ m_t))) + bias`, with `m_t` of `past_means`.

    The second term is known before x_t is.

    Args: x `[..., T, D]`: consecutive tokens from the start of a sequence; w1, m1 `[R, D]` and w2 `[F, R]` int8; s1, t1
        `[R]`, s2, bias `[F]`, start `[D]` and decay `[1]` fp32.
    """
    past = past_means(x.float(), decay.item(), start)
    hidden = x.float() @ w1.float().T * s1 + past @ m1.float().T * t1
    return hidden @ w2.float().T * s2 + bias


def past_means(x: Tensor, decay: float, start: Tensor) -> Tensor:
    """Weighted mean of the tokens before each one: `m_t = sum(decay^(t-1-i) x_i) / sum(decay^(t-1-i))` over `i < t`.

    `decay` 0 gives the previous token, 1 the plain mean of all; `m_0` is `start`.

    Args: x fp32 `[..., T, D]`; start fp32 `[D]`. Returns: fp32 like x.
    """
    tokens = torch.arange(x.shape[-2], device=x.device)
    age = tokens[:, None] - 1 - tokens
    weights = torch.where(age >= 0, torch.tensor(decay, device=x.device) ** age.clamp_min(0), 0.0)
    means = weights @ x / weights.sum(-1, keepdim=True).clamp_min(1.0)
    return torch.cat([start.to(means).expand_as(means[..., :1, :]), means[..., 1:, :]], dim=-2)


class PastMean:
    """`past_means` of one sequence, token by token: its state is one vector `[D]` and a number.

    Args: decay, start as for `past_means`.
    """

    def __init__(self, decay: float, start: Tensor) -> None:
        self._decay, self._start = decay, start
        self.reset()

    def reset(self) -> None:
        """Start a new sequence."""
        self._total, self._weight = torch.zeros_like(self._start), 0.0

    def value(self) -> Tensor:
        """m_t `[D]` of the next token."""
        return self._total / self._weight if self._weight else self._start

    def push(self, x: Tensor) -> None:
        """Take token x_t `[D]` into the mean."""
        self._total = self._decay * self._total + x.float()
        self._weight = self._decay * self._weight + 1.0


SCORES: dict[str, Callable[..., Tensor]] = {"signs": signs_scores, "mlp": mlp_scores, "history": history_scores}
