"""Gated and plain FFN with a dynamic mask in Triton: the rows of neurons that are not needed are never loaded.

Shapes: N rows (tokens, 1 to 8), D hidden size, F neurons, R rank of a low-rank predictor. Two launches, three with a
predictor that computes scores; nothing is read back by the host. `triton_kernels.py` tells how the work is split, and
why a row does not depend on its batch.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..aot import Launch
from .naive import ACTIVATIONS, GIVEN, PREDICTORS, check_rule, code_bits, op_family, predictor_shapes
from .triton_kernels import down_kernel, gate_up_kernel
from .triton_select import hidden_kernel, round_kernel

MAX_ROWS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
THREADS = 128
ROW_BYTES = 512  # of a gate or up row per step: 32 threads with a 16-byte load each
SLOTS = THREADS // 32  # neurons of a gated FFN in work at once; of a plain one twice as many, for as many loads
TILE_BYTES = 256  # of a down row per program: 16 threads with a 16-byte load each
CHAINS = THREADS // 16  # chains in work at once


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
) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches of one call with their scratch, and the outputs y and counts that they fill.

    fronts: gate and up, or up alone.
    """
    (n, d), f = x.shape, len(down)
    gate, up, slots = fronts[0], None, 2 * SLOTS
    if len(fronts) == 2:
        (_, up), slots = fronts, SLOTS
    family = op_family(predictor) if predictor else None
    lowbit = family in ("lowbit", "lowbit_up")
    planes = 8 // code_bits(predictor[0], d) if lowbit else 4
    r = predictor[0].shape[0] if family == "lowrank" else triton.cdiv(d, planes)
    # About 256 blocks and 64 chains, whatever the model: enough programs for a large GPU, few partial sums.
    block = min(128, max(16, triton.next_power_of_2(triton.cdiv(f, 256))))
    blocks = triton.cdiv(f, block)
    links = min(4, triton.next_power_of_2(triton.cdiv(blocks, 64)))
    chains = triton.cdiv(blocks, links)
    columns, tile, vector = (size // x.element_size() for size in (ROW_BYTES, TILE_BYTES, 16))
    tiles = triton.cdiv(d, tile)
    rows = triton.next_power_of_2(n)

    steps = min(8 if n <= 4 else 4, triton.cdiv(d, columns))
    # Left alone, ptxas spills to reach an occupancy that this grid cannot use. Rows of few steps need 3 programs on an
    # SM to have enough loads in flight, longer ones 2.
    registers = {"maxnreg": 168 if n <= 2 and steps < 4 else 255} if target.backend == "cuda" else {}
    # Products and sums are fused where tl.fma says so; the default differs between Triton versions.
    options = {"num_warps": THREADS // target.warp_size, "enable_fp_fusion": False} | registers

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    y, counts = empty(n, d, dtype=x.dtype), empty(n, 2, dtype=torch.int32)
    values, neurons, lengths = empty(n, f), empty(f, dtype=torch.int32), empty(blocks, dtype=torch.int32)
    tallies, tickets = empty(2, n, blocks, dtype=torch.int32), empty(tiles, dtype=torch.int32)
    lists = (values, neurons, lengths, tallies, tickets)

    launches = []
    score: tuple[Tensor | None, ...] = (None,) * 13
    width = min(2048, max(2, triton.next_power_of_2(d)))
    if family == "lowrank":
        hidden, (w1, s1, w2, s2, bias) = empty(n, r), predictor
        launches.append(Launch(hidden_kernel, (r,), (x, w1, s1, hidden, d, r), {"N": n, "COLUMNS": width}, options))
        score = (hidden, w2, s2, *(None,) * 8, bias, None)
    elif lowbit:
        rounded = empty(n, planes * r, dtype=torch.int8), empty(n), empty(n, dtype=torch.int32)
        launches.append(Launch(round_kernel, (n,), (x, *rounded, d), {"PLANES": planes, "COLUMNS": width}, options))
        codes = predictor if family == "lowbit" else [*predictor[:2], None, None, *predictor[2:]]
        score = (None, None, None, *rounded, *codes, None)
    elif family == "given":
        score = (*(None,) * 12, *predictor)
    constants = {"N": n, "ROWS": rows, "BLOCK": block, "RANKS": 128, "SLOTS": slots, "COLUMNS": columns, "STEPS": steps}
    launches.append(
        Launch(
            gate_up_kernel,
            (blocks,),
            (x, gate, up, up_bias, threshold, *score, *lists, f, d, r, tiles),
            {"ACT": act, "PLANES": planes, **constants},
            options,
        )
    )
    constants = {"N": n, "ROWS": rows, "BLOCK": block, "LINKS": links, "CHAINS": CHAINS, "COLUMNS": tile}
    constants |= {"VECTOR": vector, "STEPS": 16 if n <= 4 else 12, "RUNS": min(32, 128 // rows)}
    launches.append(
        Launch(
            down_kernel,
            (triton.cdiv(chains, CHAINS), tiles),
            (down, down_bias, *lists, empty(chains, n, d), y, counts, f, d, blocks, chains),
            constants,
            options,
        )
    )
    return launches, y, counts


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
    biases: dict[str, Tensor | None],
) -> None:
    """Refuses what the kernels do not compute exactly; weights and biases by name, those of down last."""
    if rule != "threshold":
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
    check_rule(rule, 0, predictor, len(gate), gated=first == "gate")
    names = (GIVEN | PREDICTORS)[op_family(predictor)] if predictor else ()
    if any(0 in part.shape for part in predictor):
        raise ValueError(f"predictor has shapes {[list(part.shape) for part in predictor]}: none of them may be empty")
    f, d = gate.shape
    expected = {
        "x": (x, (x.shape[0], d), x.dtype),
        **{name: (weight, (f, d), x.dtype) for name, weight in weights.items()},
        **{n: (b, (d if n == "down_bias" else f,), x.dtype) for n, b in biases.items() if b is not None},
        "threshold": (threshold, (f,), torch.float32),
    }
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
    """`naive.gated_ffn` for 1 to 8 rows under the rule "threshold"; 2 launches, 3 with a predictor.

    Args: x `[N, D]` bf16, fp16 or fp32; gate, up, down `[F, D]` of x's dtype; threshold `[F]` fp32; act a name from
        `ACTIVATIONS`; predictor `[]`, `[mask]` or the tensors of a family in `naive.PREDICTORS`. All contiguous, on one
        device.
    Returns: y `[N, D]` of x's dtype, counts `[N, 2]` int32: neurons selected (F without a predictor), neurons kept.
    """
    _check_gated(x, gate, up, down, threshold, act, predictor, rule, scales)
    return _run(x, (gate, up), down, threshold, act, predictor, None, None)


def _check_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    rule: str,
    scales: Tensor | None,
) -> None:
    if scales is not None:
        raise ValueError("int8 weights have no triton op yet; load the checkpoint with weights='stored'")
    _check(x, {"gate": gate, "up": up, "down": down}, threshold, act, predictor, rule, {})


def _run(
    x: Tensor,
    fronts: Sequence[Tensor],
    down: Tensor,
    threshold: Tensor,
    act: str,
    predictor: list[Tensor],
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if x.device.type != "cuda" and isinstance(down_kernel, triton.JITFunction):
        raise ValueError(
            f"x is on {x.device}: the triton backend needs a GPU (or TRITON_INTERPRET=1 before the import)"
        )
    with torch.cuda.device_of(x):
        target = _target(x.device)
        launches, y, counts = plan(x, fronts, down, threshold, act, predictor, target, up_bias, down_bias)
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
    _check_gated(x, gate, up, down, threshold, act, predictor, rule, scales)
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
) -> tuple[Tensor, Tensor]:
    """`naive.plain_ffn` for 1 to 8 rows under the rule "threshold"; launches as in `gated_ffn`.

    Args: as there; up_bias `[F]` and down_bias `[D]` of x's dtype. All contiguous, on one device.
    Returns: as there.
    """
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    _check(x, {"up": up, "down": down}, threshold, act, predictor, rule, biases)
    return _run(x, (up,), down, threshold, act, predictor, up_bias, down_bias)


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
) -> tuple[Tensor, Tensor]:
    biases = {"up_bias": up_bias, "down_bias": down_bias}
    _check(x, {"up": up, "down": down}, threshold, act, predictor, rule, biases)
    return torch.empty_like(x), x.new_empty((x.shape[0], 2), dtype=torch.int32)
