"""Times the ops one by one against dense ones, every call on weights that no cache holds.

Copies of the weights, together 8 times the last-level cache, take turns, and each call has an input of its own, so with
it its own active set. All settings of one size take turns within a round, after a reading of the bandwidth.
"""

import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from moyu_kernels.dispatch import now
from moyu_kernels.ops import cpu
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_cases import INPUTS, Case, Setting, Weights
from moyu_train.evaluation.bench_rows import make_row
from moyu_train.evaluation.shapes import Shape
from moyu_train.evaluation.yardstick import bandwidth_buffer, gpu_seconds, read_bandwidth
from moyu_train.models.loading import compute_device
from moyu_train.progress import track

TURN = 0.03  # seconds of a setting in each round, at least
LEAST_CALLS = 2 * INPUTS  # of a round on a GPU, in one CUDA graph: launches from Python are no part of the time


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
    if buffer.device.type == "cuda":
        return _time_graphs(settings, copies, rounds, buffer, counter)
    calls = []
    most = max(setting.threads for setting in settings)
    for setting in settings:
        with using_threads(setting.threads):
            setting.call(next(counter) % copies, 0)
            started = now(buffer.device)
            setting.call(next(counter) % copies, 1)
        calls.append(max(3, min(round(TURN / (now(buffer.device) - started)), 1000)))
    rates = []
    for _ in range(rounds):
        with using_threads(most):
            rates.append(read_bandwidth(buffer))
        for setting, count in zip(settings, calls, strict=True):
            turns = [next(counter) for _ in range(count)]
            with using_threads(setting.threads):
                started = now(buffer.device)
                for turn in turns:
                    setting.call(turn % copies, turn % INPUTS)
                setting.seconds.append((now(buffer.device) - started) / count)
    return rates


def _time_graphs(
    settings: list[Setting], copies: int, rounds: int, buffer: Tensor, counter: Iterator[int]
) -> list[float]:
    count = max(LEAST_CALLS, copies)
    graphs = []
    for setting in settings:
        setting.call(0, 0)  # compiles
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for turn in [next(counter) for _ in range(count)]:
                setting.call(turn % copies, turn % INPUTS)
    rates = []
    for _ in range(rounds):
        rates.append(read_bandwidth(buffer))
        for setting, graph in zip(settings, graphs, strict=True):
            setting.seconds.append(gpu_seconds(graph.replay, 1) / count)
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
    device = compute_device()
    if device.type == "cpu" and not cpu.load():
        raise MoyuError("the native kernels could not be built (the warning says why), so there is nothing to time")
    buffer, threads = bandwidth_buffer(device), threads if device.type == "cpu" else (1,)
    load_average = os.getloadavg()[0]
    rows = []
    for dtype in dtypes:
        weights, counter = Weights(shape, dtype, device), itertools.count()
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
            x = x.to(device, torch.bfloat16 if dtype == torch.int8 else dtype)
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
