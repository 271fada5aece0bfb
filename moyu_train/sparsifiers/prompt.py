"""The neurons that the first tokens of a sequence use stand for all later ones: nothing is chosen token by token.

GRIFFIN (arXiv 2404.01365) keeps a fixed share of them, TDA (arXiv 2408.11393) those above a level per layer that is
calibrated once and then stays. The statistic is defined in `moyu_kernels/prompt.py`. The first tokens keep all their
neurons, and count so in every density.
"""

from typing import Any

from moyu_kernels.rules import Rule
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moyu_train.sparsifiers.base import Sparsifier


class PromptOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    prompt: int = Field(128, ge=1, description="tokens at the start of a sequence that the mask is taken from")


class Griffin(Sparsifier):
    """GRIFFIN (arXiv 2404.01365): the neurons that are largest over the first tokens stand for all later ones."""

    name = "griffin"
    Options = PromptOptions
    layouts = ("gated", "fused", "plain")
    options: Any

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, keep="prompt_topk", share=self.density, prompt=self.options.prompt)


class TDA(Sparsifier):
    """TDA (arXiv 2408.11393): neurons that reach their layer's level over the first tokens stand for all later ones."""

    name = "tda"
    Options = PromptOptions
    calibrates = "prompt"
    layouts = ("gated", "fused", "plain")
    options: Any

    def rule(self, threshold: Tensor) -> Rule:
        return Rule(threshold, keep="prompt_threshold", prompt=self.options.prompt)
