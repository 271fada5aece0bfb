"""Prompt masks: the neurons that the first tokens of a sequence use stand for all later ones.

Statistic of a neuron over those tokens (GRIFFIN, arXiv 2404.01365): the root mean square of `a_ti / norm(a_t)`. GRIFFIN
keeps the neurons where it is largest, TDA (arXiv 2408.11393) those where it reaches a level. The first tokens
themselves keep all.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn


def squares(a: Tensor) -> Tensor:
    """Sum over tokens of `(a_ti / norm(a_t)) ** 2`, fp32 `[B, F]` of a `[B, T, F]`."""
    a = a.detach().float()
    return (a.square() / a.square().sum(-1, keepdim=True).clamp_min(1e-30)).sum(1)


def prompt_statistic(a: Tensor) -> Tensor:
    """Of the tokens in `a` `[B, T, F]`, fp32 `[B, 1, F]`."""
    return (squares(a) / a.shape[1]).sqrt()[:, None]


class PromptState:
    """What one block has seen of a sequence that is decoded in pieces: gives the mask of each piece as it comes.

    `complete` once all tokens that the mask is taken from were seen; `active` while the block uses its mask.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.active = tokens, True
        self.begin()

    def begin(self) -> None:
        """A new sequence."""
        self.seen, self.complete = 0, False
        self.sum: Tensor | None = None
        self.cache: weakref.ref[Any] | None = None

    def take(self, a: Tensor) -> int:
        """a `[B, T, F]`, the next tokens. Returns: how many of them are among the first ones, which keep all."""
        self.check(a)
        first = min(self.tokens - self.seen, a.shape[1])
        if first > 0:
            added = squares(a[:, :first])
            self.sum = added if self.sum is None else self.sum + added
            self.seen += first
            self.complete = self.seen == self.tokens
        return first

    def check(self, x: Tensor) -> None:
        """Raises: ValueError where x `[B, ...]` is of another number of sequences than were watched."""
        if self.sum is not None and len(x) != len(self.sum):
            raise ValueError(f"masks were taken from {len(self.sum)} prompts, and here are {len(x)}; start anew")

    @property
    def statistic(self) -> Tensor:
        """Of the first tokens, fp32 `[B, 1, F]`."""
        assert self.sum is not None
        return (self.sum / self.seen).sqrt()[:, None]


def watch_sequences(model: nn.Module, states: list[PromptState]) -> None:
    """Start the states anew whenever `model` is called on a new sequence: without a cache, or with an empty one.

    The model then refuses padding, whose tokens the blocks could not tell from the prompt's, and a cache whose tokens
    the masks were not taken from.
    """

    @torch.compiler.disable
    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        length = 0 if cache is None else int(cache.get_seq_length())
        for state in module._moyu_prompt_states:
            follow(state, cache, length)
        whole = all(state.complete for state in module._moyu_prompt_states)
        if not whole and mask is not None and mask.ndim == 2 and not mask.bool().all():
            raise ValueError(
                "masks taken from the prompt cannot tell padding from text; decode prompts of one length at a time"
            )

    @torch.compiler.disable
    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The cache that the model made for a sequence that began without one."""
        if kwargs.get("past_key_values") is not None:
            return
        parts = output if isinstance(output, tuple) else output.values()
        for cache in (part for part in parts if hasattr(part, "get_seq_length")):
            for state in module._moyu_prompt_states:
                state.cache = weakref.ref(cache)

    model._moyu_prompt_states = states  # type: ignore[assignment]
    model.register_forward_pre_hook(look, with_kwargs=True)
    model.register_forward_hook(keep, with_kwargs=True)


def follow(state: PromptState, cache: Any, length: int) -> None:
    """Start the state anew where the cache, of `length` tokens, is empty.

    Raises: ValueError where it holds another sequence than the one that the state is of.
    """
    if length == 0:
        state.begin()
        state.cache = None if cache is None else weakref.ref(cache)
    elif state.active and not state.complete and state.seen != length:
        raise ValueError(
            f"the cache holds {length} tokens and masks from the prompt have seen {state.seen} of them: start the "
            "sequence anew, without a cache"
        )
    elif state.active and (state.cache is None or state.cache() is not cache):
        raise ValueError(
            "the cache is not that of the sequence whose prompt the masks were taken from: decode one batch at a time, "
            "each from its start"
        )


def prompt_states(model: nn.Module) -> list[PromptState]:
    """Of all blocks whose masks are taken from the prompt."""
    states: list[PromptState] = getattr(model, "_moyu_prompt_states", [])
    return states
