"""Times the ops one by one against dense ones, every call on weights that no cache holds.

Copies of the weights, together 8 times the last-level cache, take turns, and each call has an input of its own, so with
it its own active set. All settings of one size take turns within a round, after a reading of the bandwidth.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as functional
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_rows import make_row
from moyu_train.evaluation.inloop import line_bytes
from moyu_train.evaluation.shapes import Shape
from moyu_train.progress import track

COLD = 8  # copies of the weights are together so many times the last-level cache
INPUTS = 31  # of different calls; prime, so that a copy of the weights meets another one whenever its turn comes
TURN = 0.03  # seconds of a setting in each round, at least
PREDICTOR_SHARE = 0.03  # of the FFN's bytes, for the low-rank predictor
RULES = ("threshold", "gate_threshold")
FAMILIES = ("lowrank", "lowbit")


@dataclass
class Setting:
    """One row to come: `call(copy, input)`, and what it reads and keeps for each of the inputs."""

    op: str
    backend: str
    threads: int
    call: Callable[[int, int], Any]
    moved: list[float]
    density: float = 1.0
    union: float = 1.0
    seconds: list[float] = field(default_factory=list)


def cache_bytes() -> int:
    """Size of the last-level cache.

    Raises: MoyuError where the system does not say.
    """
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    if not sizes:
        raise MoyuError("the system does not say how large its caches are, so no weights are known to be cold")
    return max(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes)


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Weights:
    """Copies of random FFN weights: gate, up and down of each are contiguous `[F, D]`.

    Raises: MoyuError where the memory does not hold as many as it takes.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        d, f = shape.hidden, shape.neurons
        self.bytes = 3 * f * d * dtype.itemsize
        count = -(-COLD * cache_bytes() // self.bytes)
        self.count = count + (count % INPUTS == 0)
        need, free = self.count * self.bytes + 2**31, psutil.virtual_memory().available
        if need > free:
            raise MoyuError(
                f"{self.count} copies of the weights, {COLD} times the last-level cache, and the rest take "
                f"{need / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB; close other programs"
            )
        generator = torch.Generator().manual_seed(0)
        first = (torch.randn(3, f, d, generator=generator) / d**0.5).to(dtype)
        self.copies = torch.empty(self.count, 3, f, d, dtype=dtype)
        self.copies[:] = first
        self.gate, self.up = (first[i].float() for i in range(2))

    def __getitem__(self, copy: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = self.copies[copy]
        return gate, up, down


class Case:
    """All settings of one size, dtype, batch and density, with their inputs.

    Args: x: `[INPUTS * batch, D]`, the inputs of all calls; threads: of the dense settings; the largest is that of the
        sparse ones and of the bandwidth.
    """

    def __init__(self, weights: Weights, x: Tensor, density: float, threads: Sequence[int]) -> None:
        self.weights, self.density, self.threads = weights, density, threads
        self.calls = x.view(INPUTS, -1, x.shape[-1]).unbind()
        self.f, self.d = weights.gate.shape
        self.row = line_bytes(self.d * x.element_size())
        self.x, self.g, self.u = x, x.float() @ weights.gate.T, x.float() @ weights.up.T

    def dense(self) -> list[Setting]:
        """PyTorch's linear layers, our linear ops and our FFN op that keeps all, at each thread count."""
        zero = torch.zeros(self.f)

        def torch_linears(copy: int, i: int) -> Tensor:
            gate, up, down = self.weights[copy]
            x = self.calls[i]
            # Random weights are as good in any shape: here down is [D, F], as stock models store it.
            return functional.linear(
                functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down.view(self.d, self.f)
            )

        def our_linears(copy: int, i: int) -> Tensor:
            gate, up, down = self.weights[copy]
            g, u = torch.ops.moyu.linears.default(self.calls[i], [gate, up], []).chunk(2, dim=1)
            return torch.ops.moyu.linear.default(functional.silu(g) * u, down.view(self.d, self.f), None)

        def our_ffn(copy: int, i: int) -> Any:
            return torch.ops.moyu.gated_ffn.default(self.calls[i], *self.weights[copy], zero, "silu", [])

        moved = [float(self.weights.bytes)] * INPUTS
        kinds = (
            ("ffn_dense", "torch", torch_linears),
            ("ffn_linears", "cpu", our_linears),
            ("ffn_dense", "cpu", our_ffn),
        )
        return [Setting(op, backend, n, call, moved) for op, backend, call in kinds for n in self.threads]

    def sparse(self) -> Iterator[Setting]:
        """Every rule and every family of predictors, its threshold or bias set so that `density` is kept."""
        silu = naive.ACTIVATIONS["silu"]
        for rule in RULES:
            ranked = (silu(self.g) * self.u if rule == "threshold" else silu(self.g)).abs()
            level = _level(ranked, self.density)
            kept = ranked >= level
            yield self._setting(f"ffn_{rule}", kept, torch.full((self.f,), level), [], rule)
        for family in FAMILIES:
            predictor = random_predictor(family, self.d, self.f, self.x.element_size())
            scores = naive.predictor_scores(self.x, predictor, silu)
            level = _level(scores, self.density)
            predictor[-1] -= level
            yield self._setting(f"ffn_{family}", scores > level, torch.zeros(self.f), predictor, "threshold")

    def _setting(self, op: str, kept: Tensor, threshold: Tensor, predictor: list[Tensor], rule: str) -> Setting:
        """kept: bool `[INPUTS * batch, F]`."""
        union = kept.view(INPUTS, -1, self.f).any(1).sum(-1)
        selected = union if predictor or rule == "gate_threshold" else torch.full_like(union, self.f)
        gates = union if predictor else torch.full_like(union, self.f)
        constant = sum(t.numel() * t.element_size() for t in (threshold, *predictor))

        def call(copy: int, i: int) -> Any:
            return torch.ops.moyu.gated_ffn.default(
                self.calls[i], *self.weights[copy], threshold, "silu", predictor, rule
            )

        moved = (self.row * (gates + selected + union).double() + constant).tolist()
        return Setting(
            op, "cpu", max(self.threads), call, moved, kept.float().mean().item(), (union / self.f).mean().item()
        )


def _level(values: Tensor, density: float) -> float:
    """What a share `density` of the values lies above."""
    count = max(round((1 - density) * values.numel()), 1)
    return values.flatten().kthvalue(count).values.item()


def random_predictor(family: str, hidden: int, neurons: int, itemsize: int) -> list[Tensor]:
    """Tensors of a predictor as `naive.PREDICTORS` names them, their bias 0; low rank: 3 % of the FFN's bytes."""
    generator = torch.Generator().manual_seed(1)
    if family == "lowrank":
        rank = max(round(PREDICTOR_SHARE * 3 * hidden * neurons * itemsize / (hidden + neurons)), 1)
        w1, w2 = (
            torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
            for size in ((rank, hidden), (neurons, rank))
        )
        return [
            w1,
            torch.full((rank,), 0.01 / hidden**0.5),
            w2,
            torch.full((neurons,), 0.01 / rank**0.5),
            torch.zeros(neurons),
        ]
    codes = [
        torch.randint(0, 256, (neurons, -(-hidden // 4)), generator=generator, dtype=torch.uint8) for _ in range(2)
    ]
    scale = torch.full((neurons,), 0.5 / hidden**0.5)
    return [codes[0], scale, codes[1], scale.clone(), torch.ones(neurons), torch.zeros(neurons)]


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
            x = x.expand(INPUTS, batch, shape.hidden).reshape(-1, shape.hidden).to(dtype)
            case = Case(weights, x, density, threads)
            dense, sparse = case.dense(), list(case.sparse())
            rates = time_settings(dense + sparse, weights.count, rounds, buffer, counter)
            best = min(dense, key=lambda setting: statistics.median(setting.seconds))
            for setting in dense + sparse:
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
