"""Decodes with a transformers causal LM, sparse or dense, at little more cost per token than reading its weights.

The single-token step is compiled as one graph over a static cache (compiled.py), with the native ops in it: linear
layers and attention are swapped for the `moyu` ops on the same parameters.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .attention import ATTENTION, register_attention
from .compiled import CompiledStep
from .dense import Linear
from .dispatch import choose
from .modules import MAX_ROWS, SparseModule
from .ops import cpu
from .prompt import follow, prompt_states
from .prompt_ffn import PromptFFN

logger = logging.getLogger(__name__)


class Runner:
    """Token-by-token decoding of one model: greedy or sampled with `generate`, or step by step.

    Prefill applies the rule's exact mask, a step the model's own mode. The model keeps its parameters, but runs with
    the runner's linear layers and attention until `close`.

    Args:
        model: a transformers causal LM that supports StaticCache, on one device, in eval mode.
        max_length: most tokens of prompt and answer together: the size of the cache.
        batch: sequences decoded side by side, 1 to 8.
        compile: False runs every step eagerly, for debugging.

    `compile_seconds` is what the first step took, compilation included.

    A model that was loaded with `dispatch="measure"` gets the modes that are faster at this batch.

    Raises: ValueError for a batch outside 1 to 8.
    """

    def __init__(self, model: Any, max_length: int, batch: int = 1, compile: bool = True) -> None:
        if not 1 <= batch <= MAX_ROWS:
            raise ValueError(f"batch is {batch}, the decode ops take 1 to {MAX_ROWS} rows; decode in smaller batches")
        self._sparse = [module for module in model.modules() if isinstance(module, SparseModule)]
        self._prompts = prompt_states(model)
        if compile and len(self._prompts) > sum(isinstance(module, PromptFFN) for module in self._sparse):
            logger.warning("moyu: steps are not compiled, since this model's masks from the prompt are simulated")
            compile = False
        self.model, self.max_length, self.batch, self._compile = model, max_length, batch, compile
        self.device = next(model.parameters()).device
        if getattr(model, "_moyu_dispatch", False):
            choose(model, batch)
        self._undo: list[tuple[nn.Module, str, nn.Module]] = []
        self._attention = model.config._attn_implementation
        self._steps: dict[Any, CompiledStep] = {}
        self._places: list[int] = []  # of the model's tensors in memory
        self._told = False
        if self.device.type == "cpu":
            self._swap()
        self.cache = _static_cache(model.config, max_length)
        self.position = 0
        token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        counts = [module.counts.clone() for module in self._sparse]
        # The cache takes its shapes from the first call, which must not be a compiled one. Masks from the prompt are
        # compiled once they are there.
        first = max((state.tokens for state in self._prompts), default=1)
        self.prefill(token.expand(batch, max(min(first, max_length - 1), 1)))
        start = time.perf_counter()
        if max_length > 1:
            self.step(token)
        self.compile_seconds = time.perf_counter() - start
        for module, count in zip(self._sparse, counts, strict=True):
            module.counts.copy_(count)
        self.reset()

    def _swap(self) -> None:
        cpu.load()
        for parent in list(self.model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear and not isinstance(parent, SparseModule):
                    self._undo.append((parent, name, child))
                    setattr(parent, name, Linear(child))
        if self._attention == "sdpa":
            register_attention()
            self.model.set_attn_implementation(ATTENTION)

    def close(self) -> None:
        """Give the model its own linear layers and attention back."""
        for parent, name, child in self._undo:
            twin = getattr(parent, name)
            child.weight, child.bias = twin.weight, twin.bias  # which may have been assigned anew
            setattr(parent, name, child)
        self._undo.clear()
        if self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self._attention)

    def reset(self) -> None:
        """Forget all tokens."""
        self.cache.reset()
        self.position = 0
        for state in self._prompts:
            state.begin()

    def seek(self, position: int) -> None:
        """Go back to `position`: what was decoded from there on is written over by the next steps.

        Raises: ValueError for a position that was not reached, or among the tokens that masks are taken from, or for a
            model with recurrent layers.
        """
        if any(position < state.seen for state in self._prompts):
            raise ValueError(
                f"position {position} is within the {self._prompts[0].seen} tokens that this model's masks are taken "
                "from; prefill anew"
            )
        if not 0 <= position <= self.position:
            raise ValueError(f"position {position} is not between 0 and {self.position}, where the runner stands")
        if not self._stand(position):
            raise ValueError("this model's cache has layers that cannot go back (recurrent ones); prefill anew")

    def _stand(self, position: int) -> bool:
        """Whether the cache could be put there."""
        from transformers.cache_utils import StaticLayer

        if any(type(layer) is not StaticLayer for layer in self.cache.layers):
            return False
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(position)
        self.position = position
        return True

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start anew with a prompt, under the rule's exact mask.

        Args: ids int64 `[batch, T]`. Returns: logits of the last position `[batch, V]`.
        Parameters whose memory was replaced since the last prompt are the model's new ones from here on.

        Raises: ValueError where the prompt does not fit.
        """
        self._check(ids)
        self.reset()
        places = [tensor.data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())]
        if places != self._places:  # a compiled step keeps to those that it was made with
            self._steps.clear()
            self._places = places
        modes = [module.mode for module in self._sparse]
        try:
            for module in self._sparse:
                if module.mode == "predicted":
                    module.set_mode("rule")
            with self._advancing(ids.shape[1]):
                ids = ids.to(self.device, torch.int64)
                logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[:, -1]
        finally:
            for module, mode in zip(self._sparse, modes, strict=True):
                module.set_mode(mode)
        if self._watching and not self._told:
            logger.warning(
                "moyu: masks are taken from the first %d tokens, and here are %d: steps until then read all neurons "
                "and are not compiled",
                self._prompts[0].tokens,
                ids.shape[1],
            )
            self._told = True
        return logits

    @property
    def _watching(self) -> bool:
        """Whether blocks still take their masks from the prompt, which happens in Python."""
        return any(state.active and not state.complete for state in self._prompts)

    @torch.no_grad()
    def step(self, token: Tensor | int) -> Tensor:
        """Decode one token per sequence.

        Args: token int64 `[batch, 1]`, or an int for batch 1. Returns: logits for the next one `[batch, V]`.
        Raises: ValueError where the cache is full, or where masks from the prompt have since become those of a sequence
            that was decoded elsewhere.
        """
        ids = torch.as_tensor(token, device=self.device).reshape(-1, 1)
        self._check(ids)
        for state in self._prompts:
            follow(state, self.cache, self.position)
        with self._advancing(1):  # of one dtype and contiguous, since a compiled step reads what it was compiled for
            return self._decode(ids.to(torch.int64).contiguous())

    def _decode(self, ids: Tensor) -> Tensor:
        if not self._compile or self._watching:
            return _step(self.model, self.cache, ids)
        # A compiled step has no guards, so what they would have watched is part of the key.
        key = (torch.get_num_threads(), *((module.mode, module.backend) for module in self._sparse))
        if key not in self._steps:
            # What watches for new sequences is not compiled: `follow` has looked.
            self._steps[key] = CompiledStep(_bare_step if self._prompts else _step, self.model, self.cache)
        return self._steps[key](ids)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos: int | list[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one, for batch 1.

        Args: ids int64 `[1, T]`; temperature 0 is greedy; top_p keeps the likeliest tokens of that much probability;
            eos ends the text, yielded too; generator of the sampling.
        """
        if self.batch != 1:
            raise ValueError(f"generate takes batch 1, the runner has {self.batch}; use prefill and step")
        ends = {eos} if isinstance(eos, int) else set(eos or ())
        logits = self.prefill(ids)
        for index in range(max_new_tokens):
            token = _choose(logits[0].float(), temperature, top_p, generator)
            yield token
            if token in ends or index + 1 == max_new_tokens:
                return
            logits = self.step(token)

    def _check(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.shape[0] != self.batch:
            raise ValueError(f"ids have shape {list(ids.shape)}, the runner was made for [{self.batch}, T]")
        if ids.is_floating_point():
            raise ValueError(f"ids are {ids.dtype}, and token ids are whole numbers: pass int64")

    @contextmanager
    def _advancing(self, tokens: int) -> Iterator[None]:
        """What fails leaves the runner, and its cache, where they stood, or at the start where that cannot be."""
        if self.position + tokens > self.max_length:
            raise ValueError(
                f"{self.position + tokens} tokens do not fit max_length={self.max_length}; make a runner with a larger "
                "one"
            )
        try:
            yield
        except BaseException:
            if not self._stand(self.position):
                self.reset()
            raise
        self.position += tokens


def _static_cache(config: Any, max_length: int) -> Any:
    """A static cache in which sliding-window layers keep all positions too: their mask hides what is out of the window.

    transformers' own sliding layers count tokens in Python, so that a compiled step would be compiled anew each time.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=config, max_cache_len=max_length)
    cache.layers = [
        StaticLayer(max_cache_len=max_length) if type(layer) is StaticSlidingWindowLayer else layer
        for layer in cache.layers
    ]
    return cache


def _step(model: Any, cache: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


def _bare_step(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """`_step` without the model's hooks."""
    return model.forward(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
