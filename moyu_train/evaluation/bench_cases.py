"""What `moyu bench ops` calls: cold random weights, inputs of a given density, and for each call the bytes it reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as functional
from moyu_kernels.modules import resolve_backend
from moyu_kernels.ops.ffn import naive
from moyu_kernels.ops.ffn.int8 import quantise_rows
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import line_bytes
from moyu_train.evaluation.shapes import Shape

COLD = 8  # copies of the weights are together so many times the last-level cache
INPUTS = 31  # of different calls; prime, so that a copy of the weights meets another one whenever its turn comes
PREDICTOR_SHARE = 0.03  # of the FFN's bytes, for the low-rank predictor
RULES = ("threshold", "topk", "gate_threshold")
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


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache.

    Raises: MoyuError where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    if not sizes:
        raise MoyuError("the system does not say how large its caches are, so no weights are known to be cold")
    return max(int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]] for size in sizes)


class Weights:
    """Copies of random FFN weights: gate, up and down of each are contiguous `[F, D]`, in int8 with their scales.

    On a CPU the same numbers are there once more as a block with a predictor stores them.

    Raises: MoyuError where the memory does not hold as many as it takes.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        d, f = shape.hidden, shape.neurons
        self.bytes = 3 * f * d * dtype.itemsize + (4 * (3 * f + d) if dtype == torch.int8 else 0)
        count = -(-COLD * cache_bytes(device) // self.bytes)
        self.count = count + (count % INPUTS == 0)
        on_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
        need = self.count * self.bytes * (1 if on_gpu else 2) + 2**31
        if need > free:
            raise MoyuError(
                f"{self.count} copies of the weights, {COLD} times the last-level cache, and the rest take "
                f"{need / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB; close other programs"
            )
        generator = torch.Generator().manual_seed(0)
        first = (torch.randn(3, f, d, generator=generator) / d**0.5).to(device)
        self.scales, self.columns = None, None
        if dtype == torch.int8:
            rows = [quantise_rows(matrix) for matrix in first]
            first, self.scales = torch.stack([codes for codes, _ in rows]), torch.stack([scale for _, scale in rows])
            self.columns = torch.ones(d, device=device)
        self.copies = torch.empty(self.count, 3, f, d, dtype=dtype, device=device)
        self.copies[:] = first.to(dtype)
        self.stored = self.copies if on_gpu else self.copies.transpose(1, 2).contiguous().transpose(1, 2)
        factors = (1.0, 1.0) if self.scales is None else self.scales[:2, :, None]
        self.gate, self.up = (self.copies[0, i].float() * factors[i] for i in range(2))

    def __getitem__(self, copy: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = self.copies[copy]
        return gate, up, down

    def as_stored(self, copy: int, predictor: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As a block with this predictor, or with none, has its rows in memory."""
        gate, up, down = self.stored[copy] if predictor else self.copies[copy]
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
        self.itemsize = weights.copies.element_size()
        self.row = line_bytes(self.d * self.itemsize)
        self.x, self.g, self.u = x, x.float() @ weights.gate.T, x.float() @ weights.up.T
        self.backend = resolve_backend("auto", x.device)
        self.gated_ffn, self.plain_ffn, self.sparse_linear = _ops(self.backend)

    def _full(self, size: int, value: float) -> Tensor:
        return torch.full((size,), value, device=self.x.device)

    def dense(self) -> list[Setting]:
        """PyTorch's linear layers, on a GPU also compiled, our linear ops and our FFN op that keeps all, at each thread
        count."""
        zero, scales = self._full(self.f, 0.0), self.weights.scales
        # Random weights are as good in any shape: here down is [D, F], as stock models store it.
        own = None if scales is None else (scales[:2].flatten(), self._full(self.d, 0.01))
        each = [None] * 3 if own is None else [scale.to(self.x.dtype) for scale in (*own[0].chunk(2), own[1])]

        def torch_linears(copy: int, i: int) -> Tensor:
            gate, up, down = self.weights[copy]
            return _torch_ffn(self.calls[i], gate, up, down.view(self.d, self.f), each)

        fused = torch.compile(_torch_ffn, dynamic=False)

        def torch_compiled(copy: int, i: int) -> Tensor:
            gate, up, down = self.weights[copy]
            result: Tensor = fused(self.calls[i], gate, up, down.view(self.d, self.f), each)
            return result

        def our_linears(copy: int, i: int) -> Tensor:
            gate, up, down = self.weights[copy]
            scale, down_scale = own or (None, None)
            g, u = torch.ops.moyu.linears.default(self.calls[i], [gate, up], [], scale).chunk(2, dim=1)
            return torch.ops.moyu.linear.default(functional.silu(g) * u, down.view(self.d, self.f), None, down_scale)

        def our_ffn(copy: int, i: int) -> Any:
            return self.gated_ffn(
                self.calls[i], *self.weights[copy], zero, "silu", [], "threshold", 0, scales, self.weights.columns
            )

        moved = [float(self.weights.bytes)] * INPUTS
        on_cpu = self.backend == "cpu"
        kinds = (
            ("ffn_dense", "torch", torch_linears),
            ("ffn_linears", "cpu", our_linears) if on_cpu else ("ffn_dense", "torch_compile", torch_compiled),
            ("ffn_dense", self.backend, our_ffn),
        )
        return [Setting(op, backend, n, call, moved) for op, backend, call in kinds for n in self.threads]

    def sparse(self) -> Iterator[Setting]:
        """Every rule and every family of predictors, its threshold or bias set so that `density` is kept."""
        silu = naive.ACTIVATIONS["silu"]
        for rule in RULES if self.backend == "cpu" else ("threshold", "topk"):
            ranked = (silu(self.g) if rule == "gate_threshold" else silu(self.g) * self.u).abs()
            if rule == "topk":
                level, keep = 1.0, max(round(self.density * self.f), 1)
                kept = ranked >= ranked.topk(keep).values[:, -1:]
            else:
                level, keep = _level(ranked, self.density), 0
                kept = ranked >= level
            yield self._setting(f"ffn_{rule}", kept, self._full(self.f, level), [], rule, keep)
        for family in FAMILIES:
            predictor = self._predictor(family)
            scores = naive.predictor_scores(self.x, predictor, silu)
            level = _level(scores, self.density)
            predictor[-1] -= level
            yield self._setting(f"ffn_{family}", scores > level, self._full(self.f, 0.0), predictor, "threshold")

    def _predictor(self, family: str) -> list[Tensor]:
        return [tensor.to(self.x.device) for tensor in random_predictor(family, self.d, self.f, self.itemsize)]

    def plain(self) -> tuple[list[Setting], list[Setting]]:
        """A plain FFN dense, by PyTorch and by the op that keeps all, and beside it the op under a threshold and with a
        predictor. Its up is gate."""
        silu, zero = naive.ACTIVATIONS["silu"], self._full(self.f, 0.0)
        scales = self.weights.scales
        each = [None] * 2 if scales is None else [scales[0].to(self.x.dtype), self._full(self.d, 0.01).to(self.x.dtype)]

        def torch_linears(copy: int, i: int) -> Tensor:
            up, _, down = self.weights[copy]
            return _torch_linear(silu(_torch_linear(self.calls[i], up, each[0])), down.view(self.d, self.f), each[1])

        dense = [2.0 * self.f * self.d * self.itemsize + self._scale_bytes(2)] * INPUTS
        kinds = (("torch", torch_linears), (self.backend, self._plain_call(zero, [])))
        rivals = [Setting("plain_dense", backend, n, call, dense) for backend, call in kinds for n in self.threads]
        sparse = []
        for family in (None, "lowbit_up"):
            predictor = self._predictor(family) if family else []
            ranked = naive.predictor_scores(self.x, predictor, silu) if family else silu(self.g).abs()
            kept = ranked > (level := _level(ranked, self.density))
            threshold = zero if family else self._full(self.f, level)
            if family:
                predictor[-1] -= level
            union = kept.view(INPUTS, -1, self.f).any(1).sum(-1)
            selected = union if family else torch.full_like(union, self.f)
            constant = sum(t.numel() * t.element_size() for t in (threshold, *predictor)) + self._scale_bytes(2)
            moved = (self.row * (selected + union).double() + constant).tolist()
            call = self._plain_call(threshold, predictor)
            shares = kept.float().mean().item(), (union / self.f).mean().item()
            sparse.append(
                Setting(f"plain_{family or 'threshold'}", self.backend, max(self.threads), call, moved, *shares)
            )
        return rivals, sparse

    def _scale_bytes(self, matrices: int) -> int:
        return 4 * (matrices * self.f + self.d) if self.weights.scales is not None else 0

    def _plain_call(self, threshold: Tensor, predictor: list[Tensor]) -> Callable[[int, int], Any]:
        int8: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.weights.scales is not None:
            int8 = (self.weights.scales[::2].contiguous(), self.weights.columns)

        def call(copy: int, i: int) -> Any:
            up, _, down = self.weights[copy]
            rest = "threshold", 0, None, None, *int8
            return self.plain_ffn(self.calls[i], up, down, threshold, "silu", predictor, *rest)

        return call

    def linear(self) -> tuple[list[Setting], list[Setting]]:
        """Dense linear layers, and beside them one with sparse inputs, but not in int8, which it does not take.

        Any matrix of a copy serves, as `[F, D]` or `[D, F]`.
        """
        level = _level(self.x.abs().float(), self.density)
        kept = self.x.abs().float() >= level
        union = kept.view(INPUTS, -1, self.d).any(1).sum(-1)
        row, threshold = line_bytes(self.f * self.itemsize), self._full(self.d, level)
        scale = None if self.weights.scales is None else self.weights.scales[0]
        rounded = None if scale is None else scale.to(self.x.dtype)

        def torch_linear(copy: int, i: int) -> Tensor:
            return _torch_linear(self.calls[i], self.weights[copy][i % 3], rounded)

        def our_linear(copy: int, i: int) -> Tensor:
            return torch.ops.moyu.linear.default(self.calls[i], self.weights[copy][i % 3], None, scale)

        def sparse_linear(copy: int, i: int) -> Any:
            weight = self.weights[copy][i % 3].view(self.d, self.f)
            return self.sparse_linear(self.calls[i], weight, None, threshold)

        dense = [float(self.weights.bytes // 3)] * INPUTS
        kinds = (("torch", torch_linear), ("cpu", our_linear))[: 2 if self.backend == "cpu" else 1]
        settings = [Setting("linear", backend, n, call, dense) for backend, call in kinds for n in self.threads]
        if scale is not None:
            return settings, []
        moved = (row * union.double() + 4 * self.d).tolist()
        density, together = kept.float().mean().item(), (union / self.d).mean().item()
        return settings, [
            Setting("sparse_linear", self.backend, max(self.threads), sparse_linear, moved, density, together)
        ]

    def _setting(
        self, op: str, kept: Tensor, threshold: Tensor, predictor: list[Tensor], rule: str, keep: int = 0
    ) -> Setting:
        """kept: bool `[INPUTS * batch, F]`."""
        union = kept.view(INPUTS, -1, self.f).any(1).sum(-1)
        selected = union if predictor or rule == "gate_threshold" else torch.full_like(union, self.f)
        gates = union if predictor else torch.full_like(union, self.f)
        int8 = (self.weights.scales, self.weights.columns)
        constant = sum(t.numel() * t.element_size() for t in (threshold, *predictor)) + self._scale_bytes(3)

        def call(copy: int, i: int) -> Any:
            weights = self.weights.as_stored(copy, predictor)
            return self.gated_ffn(self.calls[i], *weights, threshold, "silu", predictor, rule, keep, *int8)

        moved = (self.row * (gates + selected + union).double() + constant).tolist()
        return Setting(
            op, self.backend, max(self.threads), call, moved, kept.float().mean().item(), (union / self.f).mean().item()
        )


def _ops(backend: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """gated_ffn, plain_ffn and sparse_linear."""
    if backend == "triton":
        from moyu_kernels.ops.ffn import triton
        from moyu_kernels.ops.linear import triton as linear

        return triton.gated_ffn, triton.plain_ffn, linear.sparse_linear
    ops = torch.ops.moyu
    return ops.gated_ffn.default, ops.plain_ffn.default, ops.sparse_linear.default


def _torch_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, scales: Sequence[Tensor | None]) -> Tensor:
    """A gated FFN of PyTorch's own products; down `[D, F]`."""
    g, u = (_torch_linear(x, rows, scale) for rows, scale in ((gate, scales[0]), (up, scales[1])))
    return _torch_linear(functional.silu(g) * u, down, scales[2])


def _torch_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """PyTorch's own product; with int8 rows and their scale in x's dtype what torchao's weight-only int8 runs, on a GPU
    what torch.compile fuses into one kernel."""
    if scale is None:
        return functional.linear(x, weight)
    if x.is_cuda:
        return functional.linear(x, weight.to(x.dtype)) * scale
    return torch._weight_int8pack_mm(x, weight, scale)


def _level(values: Tensor, density: float) -> float:
    """What a share `density` of the values lies above."""
    count = max(round((1 - density) * values.numel()), 1)
    return values.flatten().kthvalue(count).values.item()


def random_predictor(family: str, hidden: int, neurons: int, itemsize: int) -> list[Tensor]:
    """Tensors of a predictor as `naive.PREDICTORS` names them, their bias 0; low rank: about 3 % of the FFN's bytes, in
    a multiple of 16, for rows that loads of 16 bytes divide."""
    generator = torch.Generator().manual_seed(1)
    if family == "lowrank":
        rank = 16 * max(round(PREDICTOR_SHARE * 3 * hidden * neurons * itemsize / (hidden + neurons) / 16), 1)
        w1, w2 = (
            torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
            for size in ((rank, hidden), (neurons, rank))
        )
        s1, s2 = torch.full((rank,), 0.01 / hidden**0.5), torch.full((neurons,), 0.01 / rank**0.5)
        return [w1, s1, w2, s2, torch.zeros(neurons)]
    size, parts = (neurons, -(-hidden // 4)), list[Tensor]()
    for _ in range(1 if family == "lowbit_up" else 2):
        codes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        parts += [codes, torch.full((2, neurons), 0.5 / hidden**0.5)]
    return [*parts, torch.ones(neurons), torch.zeros(neurons)]
