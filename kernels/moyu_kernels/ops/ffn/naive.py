"""Gated FFN with a dynamic mask in plain PyTorch: the definition that every backend is tested against.

Shapes: N rows (tokens), D hidden size, F neurons, R predictor rank. `gate`, `up` and `down` are
neuron-contiguous `[F, D]` (`down` is the transposed stock weight), so that one neuron is one row of each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda g: functional.gelu(g, approximate="tanh"),
}


def predictor_scores(x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, bias: Tensor) -> Tensor:
    """Score of each neuron; a neuron is selected where its score is above zero.

    `score = s2 * (w2 @ (s1 * (w1 @ x))) + bias`, all in fp32: two matrices, no non-linearity between them.

    Args: x `[N, D]` model dtype; w1 `[R, D]` int8; s1 `[R]` fp32; w2 `[F, R]` int8; s2 `[F]` fp32; bias `[F]` fp32.
    Returns: `[N, F]` fp32.
    """
    hidden = x.float() @ w1.float().T * s1
    return hidden @ w2.float().T * s2 + bias


def gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """`y = a @ down` with `a = act(x @ gate.T) * (x @ up.T)`, set to zero where it is not kept.

    A neuron is kept where `abs(a) >= threshold` (the rule) and, if a predictor is given, where its score is above
    zero. Everything after the dtype of the weights is fp32; the output is cast back to the dtype of `x`.

    Args: x `[N, D]`; gate, up, down `[F, D]` of x's dtype; threshold `[F]` fp32 (0 keeps all);
        act a name from `ACTIVATIONS`; predictor `[]` or `[w1, s1, w2, s2, bias]` as in `predictor_scores`.
    Returns: y `[N, D]` of x's dtype, counts `[N, 2]` int32: neurons selected (F without a predictor), neurons kept.
    """
    a = ACTIVATIONS[act](x.float() @ gate.float().T) * (x.float() @ up.float().T)
    selected = predictor_scores(x, *predictor) > 0 if predictor else torch.ones_like(a, dtype=torch.bool)
    kept = selected & (a.abs() >= threshold) & (a != 0)
    y = torch.where(kept, a, 0.0) @ down.float()
    counts = torch.stack([selected.sum(-1), kept.sum(-1)], dim=-1).to(torch.int32)
    return y.to(x.dtype), counts
