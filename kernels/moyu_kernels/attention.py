"""`attn_implementation="moyu"` of transformers: `moyu::attend` for a single token, sdpa for all else."""

from typing import Any

import torch
from torch import Tensor, nn

from .modules import wants_gradient
from .ops import cpu
from .ops.linear import naive

ATTENTION = "moyu"


class OffHeads:
    """A module that stands at `q_proj` and gives zeros for heads that are off, for `attention` to see."""

    @property
    def some_off(self) -> bool:
        """Whether a head whose query is all zeros is off; else it is a head as any other."""
        raise NotImplementedError


def register_attention() -> None:
    """Make the name known to transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        at_query = getattr(module, "q_proj", None)
        off = isinstance(at_query, OffHeads) and at_query.some_off
        extras = any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))
        single = query.shape[2] == 1 and attention_mask is not None and attention_mask.shape[1] == 1
        native = query.device.type == "cpu" and not extras and single and not dropout
        native &= not wants_gradient(query, key, value)
        rows = key.shape == value.shape and key.is_contiguous() and value.is_contiguous()
        if not native or not rows:
            y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
            return (naive.zero_where_off(y, query.transpose(1, 2)) if off else y), None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.moyu.attend.default(query, key, value, attention_mask, scale, off), None

    cpu.load()
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
