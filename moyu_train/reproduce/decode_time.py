"""Decode time of one model under several rules: same weights, same runner, round by round."""

import copy
import statistics
import time
from typing import Any

import torch
from moyu_kernels import Runner
from moyu_kernels.ffn import install_ffn, simulated_because, sparse_ffn
from moyu_kernels.prompt import watch_sequences
from moyu_kernels.prompt_ffn import PromptFFN
from moyu_kernels.rules import Rule
from torch import Tensor, nn

from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import paired, short_context
from moyu_train.models.blocks import find_blocks
from moyu_train.models.marker import base_activation
from moyu_train.progress import track
from moyu_train.settings_export import Bench

DENSE = "dense"


def decode_times(model: Any, rules: dict[str, list[Rule]], text: Tensor, settings: Bench) -> dict[str, dict[str, Any]]:
    """Figures of `DENSE` and of each method whose rules an op computes; the others are not among them.

    Args: model: dense, in the dtype that is timed; rules: by method, one a block; text: int64 token ids `[T]`.
    Returns: `seconds_per_token`, one a round, and `speedup`, `least` and `most` of the rounds' ratios to dense.
    Raises: MoyuError where the text is too short, or a mask is taken from more tokens than come before the steps.
    """
    context, steps = settings.contexts[0], settings.new_tokens
    prompt = max(rule.prompt for found in rules.values() for rule in found)
    if prompt > context:
        raise MoyuError(short_context(prompt, [context]))
    if len(text) < context + steps:
        raise MoyuError(
            f"the longest document of the test text has {len(text)} tokens, and {context + steps} are decoded: lower "
            "bench.contexts or bench.new_tokens"
        )
    before, runners = torch.get_num_threads(), {}
    torch.set_num_threads(max(settings.threads))
    try:
        for name in track([DENSE, *rules], "compile and prefill"):
            built = copy.deepcopy(model, _shared(model)) if name == DENSE else _sparse(model, rules[name])
            if built is not None:
                runners[name] = Runner(built, max_length=context + steps)
                runners[name].prefill(text[None, :context])
                runners[name].step(text[context])
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        for _ in track(range(settings.rounds), "decode"):
            for name, runner in runners.items():
                runner.seek(context)
                started = time.perf_counter()
                for token in text[context : context + steps]:
                    runner.step(token)
                seconds[name].append((time.perf_counter() - started) / steps)
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
    rows = {name: {"seconds_per_token": found} for name, found in seconds.items()}
    return {name: row | paired(row, rows[DENSE]) for name, row in rows.items()}


def cell(found: dict[str, Any]) -> str:
    """`1.32 (1.21 to 1.40)` times faster than dense."""
    return f"{found['speedup']:.2f} ({found['least']:.2f} to {found['most']:.2f})"


def milliseconds(found: dict[str, Any]) -> float:
    return 1000 * statistics.median(found["seconds_per_token"])


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a copy does not copy, as `deepcopy` takes it."""
    return {id(parameter): parameter for parameter in model.parameters()}


def _sparse(model: nn.Module, rules: list[Rule]) -> nn.Module | None:
    """A model that shares all weights but those whose layout may change; None where a block has no op."""
    twin, act = copy.deepcopy(model, _shared(model)), base_activation(model.config)
    states = []
    for block, rule in zip(find_blocks(twin), rules, strict=True):
        if simulated_because(block.module, block.describe(), act, rule):
            return None
        for name in (block.up, block.down) if block.layout == "plain" else (block.down,):
            part = getattr(block.module, name)
            part.weight = nn.Parameter(part.weight.detach().clone(), requires_grad=False)
        ffn = sparse_ffn(block.module, block.describe(), act, rule, [], "rule", "cpu")
        install_ffn(twin, block.describe(), ffn)
        states += [ffn.state] if isinstance(ffn, PromptFFN) else []
    if states:
        watch_sequences(twin, states)
    return twin
