"""Gated and plain FFN with a dynamic mask in Triton: the rows of neurons that are not needed are never loaded.

Shapes: N rows (tokens, 1 to 8), D hidden size, F neurons, R rank of a low-rank predictor. Two launches, three with a
predictor that computes scores, four under "topk"; nothing is read back by the host. `triton_kernels.py` tells how the
work is split, and why a row does not depend on its batch.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..aot import Launch
from .naive import ACTIVATIONS, GIVEN, PREDICTORS, check_rule, check_scales, code_bits, op_family, predictor_shapes
from .triton_kernels import down_kernel, gate_up_kernel
from .triton_lists import THREADS, Lists, options_of
from .triton_select import hidden_kernel, round_kernel
from .triton_topk import least_kernel, list_kernel

MAX_ROWS = 8
RULES = ("threshold", "topk")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW_BYTES = 512  # of a gate or up row per step: 32 threads with a 16-byte load each; 16 threads for int8
CODES = 512  # of a predictor in a load of all threads
RANKED = 16384  # keys that a program of `least_kernel` counts at once
RANKING = 512  # its threads
OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)


def plan(
    x: Tensor,
    fronts: Sequence[Tensor],
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    target: GPUTarget,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    keep: int = 0,
    scales: Tensor | None = None,
    column_scales: Tensor | None = None,
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of one call with their scratch, and the outputs y and counts that they fill.

    fronts: gate and up, or up alone; keep: of the rule "topk", else 0; scales, column_scales: of int8 rows.
    """
    (n, d), f = x.shape, len(down)
    gate, up = fronts[0], fronts[1] if len(fronts) == 2 else None
    family = op_family(predictor) if predictor else None
    lowbit = family in ("lowbit", "lowbit_up")
    planes = 8 // code_bits(predictor[0], d) if lowbit else 4
    r = predictor[0].shape[0] if family == "lowrank" else triton.cdiv(d, planes)
    lists, columns = Lists.empty(n, down), ROW_BYTES // max(down.element_size(), 2)
    blocks, tiles = len(lists.lengths), len(lists.tickets)
    # Where steps divide the rows the loads need no mask: it takes registers, enough of them to make ptxas spill.
    # Long rows come in short pieces, so that more programs, each with less in flight, take turns (docs/log.md 50).
    long = n <= 2 and d > 8 * columns
    wished = range(4, 9) if long or n > 4 else range(8, 3, -1)
    steps = next((s for s in wished if d % (s * columns) == 0), min(wished[0], triton.cdiv(d, columns)))
    slots = THREADS * 16 // (columns * down.element_size())  # neurons in work at once, each thread with a load of one
    if up is None or steps < 3:
        slots *= 2  # as many loads in flight of one matrix, or of short rows
    # Then 3 programs fit an SM, as rows of few steps need them to have enough loads in flight; else 2.
    options = options_of(target, 168 if long or (n <= 2 and steps < 4) else 255)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    keys = empty(n, f, dtype=torch.int32) if keep else None

    launches: list[Launch] = []
    score: tuple[Tensor | None, ...] = (None,) * 13
    width = min(2048, max(2, triton.next_power_of_2(d)))
    if family == "lowrank":
        hidden, (w1, s1, w2, s2, bias) = empty(n, r), predictor
        launches.append(Launch(hidden_kernel, (r,), (x, w1, s1, hidden, d, r), {"N": n, "COLUMNS": width}, options))
        score = (hidden, w2, s2, *(None,) * 8, bias, None)
    elif lowbit:
        rounded = empty(n, planes * r, dtype=torch.int8), empty(n, 2), empty(n, dtype=torch.int32)
        launches.append(Launch(round_kernel, (n,), (x, *rounded, d), {"PLANES": planes, "COLUMNS": width}, options))
        codes = predictor if family == "lowbit" else [*predictor[:2], None, None, *predictor[2:]]
        score = (None, None, None, *rounded, *codes, None)
    elif family == "given":
        score = (*(None,) * 12, *predictor)
    words = lowbit and r % 4 == 0
    if words:
        r //= 4
        score = tuple(None if part is None else _words(part) for part in score)
    packed = (target.backend if isinstance(gate_up_kernel, triton.JITFunction) else "any") if words else "no"
    # Rows of x that a predictor's row is read for at once, and loads of it ahead: as many as registers are left for.
    group = min(n, 16 // planes) if lowbit else n
    ahead = 2 ** (3 - (group - 1) // 2)
    if target.backend == "hip" or planes == 8 or scales is not None:
        ahead = max(ahead // 2, 1)
    even_codes = f % lists.block == 0 and r % (CODES // lists.block * ahead) == 0
    constants = {"PACKED": packed, "GROUP": group, "AHEAD": ahead, "CODES": CODES, "EVEN_CODES": even_codes}
    constants |= {"SLOTS": slots, "COLUMNS": columns, "STEPS": steps}
    constants |= lists.constants | {"EVEN": d % (columns * steps) == 0, "PARTS": 8 if down.dtype == torch.int8 else 4}
    launches.append(
        Launch(
            gate_up_kernel,
            (blocks,),
            (x, gate, up, up_bias, scales, threshold, *score, keys, *lists.tensors, f, d, r, tiles),
            {"ACT": act, "PLANES": planes, **constants},
            options,
        )
    )
    if keys is not None:
        least, wide = empty(n, dtype=torch.int32), min(RANKED, triton.next_power_of_2(f))
        ranking = options_of(target, 128) | {"num_warps": RANKING // target.warp_size}
        held = {"COLUMNS": wide, "HELD": f <= wide}
        launches.append(Launch(least_kernel, (n,), (keys, least, f, keep), held, ranking))
        ranked = (keys, least, None if scales is None else scales[-1], *lists.tensors[:-1], f)
        launches.append(Launch(list_kernel, (blocks,), ranked, lists.constants, options))
    launch, y, counts = lists.sum_rows(down, down_bias, options, x.dtype, column_scales)
    return [*launches, launch], y, counts


def _words(part: Tensor) -> Tensor:
    """Bytes of a row four by four."""
    return part.view(torch.int32) if part.element_size() == 1 else part


@cache
def _target(device: torch.device) -> GPUTarget:
    """What Triton compiles for on `device`, the current one."""
    return GPUTarget("cuda", 0, 32) if device.type == "cpu" else triton.runtime.driver.active.get_current_target()


def _check(
    x: Tensor,
    weights: dict[str, Tensor],
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str,
    keep: int,
    biases: dict[str, Tensor | None],
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Refuses what the kernels do not compute exactly; weights and biases by name, those of down last."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} has no triton op yet; use the backend cpu or reference")
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}: the triton backend supports {', '.join(ACTIVATIONS)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}: the triton backend supports bfloat16, float16 and float32")
    if x.dim() != 2 or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ValueError(
            f"x has shape {list(x.shape)}: the triton backend takes [N, D] with N from 1 to {MAX_ROWS}; "
            "run larger batches and prefill through the reference backend"
        )
    first, gate = next(iter(weights.items()))
    if gate.dim() != 2 or 0 in gate.shape:
        raise ValueError(f"{first} has shape {list(gate.shape)}: expected [F, D]")
    check_rule(rule, keep, predictor, len(gate), gated=first == "gate")
    names = (GIVEN | PREDICTORS)[op_family(predictor)] if predictor else ()
    if any(0 in part.shape for part in predictor):
        raise ValueError(f"predictor has shapes {[list(part.shape) for part in predictor]}: none of them may be empty")
    f, d = gate.shape
    check_scales(first, gate, scales, columns, len(weights))
    held = x.dtype if scales is None else torch.int8
    expected = {
        "x": (x, (x.shape[0], d), x.dtype),
        **{name: (weight, (f, d), held) for name, weight in weights.items()},
        **{n: (b, (d if n == "down_bias" else f,), x.dtype) for n, b in biases.items() if b is not None},
        "threshold": (threshold, (f,), torch.float32),
    }
    if scales is not None and columns is not None:
        expected |= {"scales": (scales, (len(weights), f), torch.float32), "columns": (columns, (d,), torch.float32)}
    if predictor:
        needed = predictor_shapes(predictor, d, f)
        expected |= {name: (part, *want) for name, part, want in zip(names, predictor, needed, strict=True)}
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}: expected {dtype} {list(shape)} "
                "(weights neuron-contiguous [F, D], down transposed)"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}: move the module to one device")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} has strides {tensor.stride()}: pass it contiguous, a copy here would hide its cost"
            )


@torch.library.custom_op("moyu::gated_ffn_triton", mutates_args=())
def gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.gated_ffn` for 1 to 8 rows under the rules "threshold", 2 launches, 3 with a predictor, and "topk", 4.

    Args: x `[N, D]` bf16, fp16 or fp32; gate, up, down `[F, D]` of x's dtype, or int8 beside scales `[3, F]` and
        columns `[D]` fp32; threshold `[F]` fp32; act a name from `ACTIVATIONS`; predictor `[]`, `[mask]` or the tensors
        of a family in `naive.PREDICTORS`. All contiguous, on one device.
    Returns: y `[N, D]` of x's dtype, counts `[N, 2]` int32: neurons selected (F without a predictor), neurons kept.
    """
    _check(x, {"gate": gate, "up": up, "down": down}, threshold, act, predictor, rule, keep, {}, scales, columns)
    fronts, ranked = (gate, up), keep if rule == "topk" else 0

    def planned(target: GPUTarget) -> tuple[list[Launch], Tensor, Tensor]:
        return plan(x, fronts, down, threshold, act, predictor, target, None, None, ranked, scales, columns)

    return run_on(x, planned)


def run_on(x: Tensor, planned: Callable[[GPUTarget], tuple[list[Launch], Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Runs what is planned for the device of x; returns its outputs.

    Raises: ValueError where it is no GPU, or Triton is one that compiles the kernels wrongly.
    """
    if x.device.type != "cuda" and isinstance(down_kernel, triton.JITFunction):
        raise ValueError(
            f"x is on {x.device}: the triton backend needs a GPU (or TRITON_INTERPRET=1 before the import)"
        )
    if x.is_cuda and OLD_TRITON:
        raise ValueError(
            f"triton {triton.__version__} compiles these kernels to misaligned loads, which end the process; install "
            "3.7 or later (with a torch that goes with it), or use the backend reference"
        )
    with torch.cuda.device_of(x):
        launches, y, counts = planned(_target(x.device))
        for launch in launches:
            launch.run()
    return y, counts


@gated_ffn.register_fake
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, {"gate": gate, "up": up, "down": down}, threshold, act, predictor, rule, keep, {}, scales, columns)
    return torch.empty_like(x), x.new_empty((x.shape[0], 2), dtype=torch.int32)


@torch.library.custom_op("moyu::plain_ffn_triton", mutates_args=())
def plain_ffn(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.plain_ffn` for 1 to 8 rows under the rules "threshold" and "topk"; launches as in `gated_ffn`.

    Args: as there, but scales `[2, F]`; up_bias `[F]` and down_bias `[D]` of x's dtype. All contiguous, on one device.
    Returns: as there.
    """
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    _check(x, {"up": up, "down": down}, threshold, act, predictor, rule, keep, biases, scales, columns)
    ranked = keep if rule == "topk" else 0

    def planned(target: GPUTarget) -> tuple[list[Launch], Tensor, Tensor]:
        weights = (up,), down, threshold
        return plan(x, *weights, act, predictor, target, up_bias, down_bias, ranked, scales, columns)

    return run_on(x, planned)


@plain_ffn.register_fake
def _(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str = "threshold",
    keep: int = 0,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    scales: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    _check(x, {"up": up, "down": down}, threshold, act, predictor, rule, keep, biases, scales, columns)
    return torch.empty_like(x), x.new_empty((x.shape[0], 2), dtype=torch.int32)
