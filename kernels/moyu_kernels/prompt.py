"""Prompt masks: the neurons that the first tokens of a sequence use stand for all later ones.

Statistic of a neuron over those tokens (GRIFFIN, arXiv 2404.01365): the root mean square of `a_ti / norm(a_t)`. GRIFFIN
keeps the neurons where it is largest, TDA (arXiv 2408.11393) those where it reaches a level. The first tokens
themselves keep all.
"""

from typing import Any

from torch import Tensor, nn


def squares(a: Tensor) -> Tensor:
    """Sum over tokens of `(a_ti / norm(a_t)) ** 2`, fp32 `[B, F]` of a `[B, T, F]`."""
    a = a.detach().float()
    return (a.square() / a.square().sum(-1, keepdim=True).clamp_min(1e-30)).sum(1)


def prompt_statistic(a: Tensor) -> Tensor:
    """Of the tokens in `a` `[B, T, F]`, fp32 `[B, 1, F]`."""
    return (squares(a) / a.shape[1]).sqrt()[:, None]


class PromptState:
    """What one block has seen of a sequence that is decoded in pieces: gives the mask of each piece as it comes."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seen = tokens, 0
        self.sum: Tensor | None = None

    def reset(self) -> None:
        self.seen, self.sum = 0, None

    def take(self, a: Tensor) -> tuple[int, Tensor | None]:
        """a `[B, T, F]`, the next tokens. Returns: how many of them are among the first ones, and the statistic
        `[B, 1, F]` that holds for the rest; None where there is no rest.
        """
        first = min(self.tokens - self.seen, a.shape[1])
        if first > 0:
            added = squares(a[:, :first])
            self.sum = added if self.sum is None else self.sum + added
            self.seen += first
        if first == a.shape[1] or self.sum is None:
            return first, None
        return first, (self.sum / self.seen).sqrt()[:, None]


def watch_sequences(model: nn.Module, state: PromptState) -> None:
    """Start the state anew whenever `model` is called on a new sequence: without a cache, or with an empty one.

    The model then refuses padding, whose tokens the blocks could not tell from the prompt's.
    """

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and mask.ndim == 2 and not mask.bool().all():
            raise ValueError(
                "masks taken from the prompt cannot tell padding from text; decode prompts of one length at a time"
            )
        if cache is None or int(cache.get_seq_length()) == 0:
            state.reset()

    model.register_forward_pre_hook(look, with_kwargs=True)
    model._moyu_prompt_masks = True  # type: ignore[assignment]


def has_prompt_masks(model: nn.Module) -> bool:
    """Whether steps of `model` keep state in Python, which a compiled step would not see change."""
    return getattr(model, "_moyu_prompt_masks", False)
