"""Times the ops one by one against dense ones, every call on weights that no cache holds.

Copies of the weights, together 8 times the last-level cache, take turns, and each call has an input of its own, so with
it its own active set. All settings of one size take turns within a round, after a reading of the bandwidth.
"""

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from moyu_kernels.ops import cpu
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_cases import INPUTS, Case, Setting, Weights
from moyu_train.evaluation.bench_rows import make_row
from moyu_train.evaluation.shapes import Shape
from moyu_train.progress import track

TURN = 0.03  # seconds of a setting in each round, at least


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_settings(
    settings: list[Setting], copies: int, rounds: int, buffer: Tensor, counter: Iterator[int]
) -> list[float]:
    """Fills `seconds` of every setting, per call and one a round. Returns the bandwidth of each round in GB/s."""
    calls = []
    most = max(setting.threads for setting in settings)
    for setting in settings:
        with using_threads(setting.threads):
            setting.call(next(counter) % copies, 0)
            started = time.perf_counter()
            setting.call(next(counter) % copies, 1)
        calls.append(max(3, min(round(TURN / (time.perf_counter() - started)), 1000)))
    rates = []
    for _ in range(rounds):
        with using_threads(most):
            rates.append(cpu.read_bandwidth(buffer))
        for setting, count in zip(settings, calls, strict=True):
            turns = [next(counter) for _ in range(count)]
            with using_threads(setting.threads):
                started = time.perf_counter()
                for turn in turns:
                    setting.call(turn % copies, turn % INPUTS)
                setting.seconds.append((time.perf_counter() - started) / count)
    return rates


def bench_ops(
    name: str,
    shape: Shape,
    dtypes: Sequence[torch.dtype],
    densities: Sequence[float],
    batches: Sequence[int],
    rounds: int,
    threads: Sequence[int],
) -> list[dict[str, Any]]:
    """Rows of every op at every dtype, batch and density, dense ones among them (docs/kernels.md).

    Raises: MoyuError without native kernels or with too little memory.
    """
    if not cpu.load():
        raise MoyuError("the native kernels could not be built (the warning says why), so there is nothing to time")
    buffer = torch.ones(2**28, dtype=torch.int32)  # 1 GiB
    load_average = os.getloadavg()[0]
    rows = []
    for dtype in dtypes:
        weights, counter = Weights(shape, dtype), itertools.count()
        cases = [
            (batch, masks, density)
            for batch in batches
            for masks in (("independent", "identical") if batch > 1 else ("independent",))
            for density in densities
        ]
        what = f"bench ops: {name}, {str(dtype).removeprefix('torch.')}"
        for batch, masks, density in track(cases, what):
            generator = torch.Generator().manual_seed(batch)
            x = torch.randn(INPUTS, 1 if masks == "identical" else batch, shape.hidden, generator=generator)
            x = x.expand(INPUTS, batch, shape.hidden).reshape(-1, shape.hidden)
            x = x.to(torch.bfloat16 if dtype == torch.int8 else dtype)
            case = Case(weights, x, density, threads)
            groups = (case.dense(), list(case.sparse())), case.plain(), case.linear()
            settings = [setting for dense, sparse in groups for setting in dense + sparse]
            rates = time_settings(settings, weights.count, rounds, buffer, counter)
            for rivals, setting in [(dense, setting) for dense, sparse in groups for setting in dense + sparse]:
                best = min(rivals, key=lambda other: statistics.median(other.seconds))
                moved = sum(setting.moved) / INPUTS
                rows.append(
                    {
                        "op": setting.op,
                        "backend": setting.backend,
                        "dtype": str(dtype).removeprefix("torch."),
                        "D": shape.hidden,
                        "F": shape.neurons,
                        "batch": batch,
                        "density": setting.density,
                        **make_row(setting.seconds, moved, best.moved[0], best.seconds, rates),
                        "union_density": setting.union,
                        "masks": masks,
                        "threads": setting.threads,
                        "shape": name,
                        "weights": "random",
                        "rounds": rounds,
                        "cold_bytes": weights.count * weights.bytes,
                        "load_average": load_average,
                    }
                )
        del weights
    return rows
