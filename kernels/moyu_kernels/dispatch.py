"""Which way decode steps go: by the predictor, or under the rule's exact mask where that is faster on this machine.

A predictor pays while few neurons are selected. At which density it stops to, timing tells: the same blocks in both
modes, kept in the cache folder by what it depends on.
"""

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .modules import MAX_ROWS
from .ops import cpu
from .ops.cpu.build import cache_folder, library_key, this_processor
from .ops.ffn import naive
from .prompt_ffn import PromptFFN
from .sparse_ffn import SparseFFN

logger = logging.getLogger(__name__)

DISPATCH = ("off", "measure")
BATCHES = (1, 2, 4, MAX_ROWS)  # what is timed; a batch between two counts as the larger
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ROUNDS = 5
COLD_BYTES = 2**30  # weights that are read in turns, as far as the model has so many
FAR = 1e9  # a bias that no score reaches

Times = dict[str, float]  # seconds a call: "rule", and of each of `DENSITIES` as a string


def start_dispatch(model: Any) -> None:
    """`choose` now for batch 1, and in every `Runner` of the model for its batch.

    Raises: ValueError where no block decodes by a predictor and an op.
    """
    blocks = [block for blocks in _kinds(model).values() for block in blocks]
    if not blocks or any(block.mode != "predicted" or block.backend == "reference" for block in blocks):
        raise ValueError(
            "dispatch 'measure' chooses between a predictor and the exact rule, and this model has no predictors that "
            "an op computes, or was asked for another mode or for the backend reference; use dispatch='off'"
        )
    choose(model)
    model._moyu_dispatch = True


def choose(
    model: Any, batch: int = 1, selected: float | None = None, timer: Callable[..., Times] | None = None
) -> dict[str, Any]:
    """Put every block with a predictor into mode "predicted" or "rule", whichever decodes faster at `batch`.

    Blocks in mode "dense" stay in it.

    The neurons that a step reads are those that any of its rows selects: `1 - (1 - selected) ** batch` of them, as if
    rows chose independently, which is the most that is to be expected. Nothing is read back from the device.

    Args:
        selected: share of the neurons that a token selects, such as `moyu_kernels.density(model)[0]` of text that was
            decoded; default what was calibrated.
        timer: `(blocks, batch) -> Times` in place of timing and the cache.

    Returns: `batch`, `union`, and for each distinct kind of block its `blocks`, `break_even` density and `mode`.
    Raises: ValueError for a batch that the ops do not take, or where nothing is known of what is selected.
    """
    if not 1 <= batch <= MAX_ROWS:
        raise ValueError(f"batch is {batch}, the decode ops take 1 to {MAX_ROWS} rows; decode in smaller batches")
    if selected is None:
        selected = ((getattr(model.config, "moyu", None) or {}).get("predictor") or {}).get("selected")
    if selected is None:
        raise ValueError(
            "the checkpoint does not say what share of the neurons its predictors select; decode some text and pass "
            "selected=moyu_kernels.density(model)[0]"
        )
    union = 1 - (1 - selected) ** batch
    bucket = next(size for size in BATCHES if size >= batch)
    found: dict[str, Any] = {"batch": batch, "union": union, "kinds": []}
    for kind, blocks in _kinds(model).items():
        times = timer(blocks, bucket) if timer else _cached(kind, blocks, bucket)
        least = break_even(times)
        mode = "predicted" if union <= least else "rule"
        for block in blocks:
            block.set_mode(mode)
        found["kinds"].append({"kind": kind, "blocks": len(blocks), "break_even": least, "mode": mode})
        if mode == "rule":
            logger.warning(
                "moyu: %d blocks (%s) decode under the rule's exact mask and without their predictors at batch %d: "
                "about %.0f%% of the neurons are selected by any row, and here predictors pay up to %.0f%%",
                len(blocks),
                kind,
                batch,
                100 * union,
                100 * least,
            )
    return found


def break_even(times: Times) -> float:
    """The largest density up to which every timed one is faster with the predictor; 0 where none is."""
    least = 0.0
    for density in DENSITIES:
        if times[str(density)] >= times["rule"]:
            break
        least = density
    return least


def _kinds(model: Any) -> dict[str, list[SparseFFN]]:
    """Blocks with a predictor that are not in mode "dense", by all that their speed depends on."""
    kinds: dict[str, list[SparseFFN]] = {}
    for block in model.modules():
        if not isinstance(block, SparseFFN) or isinstance(block, PromptFFN):
            continue
        if block.predictor and block.mode != "dense":
            family, dtype = naive.op_family(block.predictor), str(block.weights[0].dtype).removeprefix("torch.")
            bits = f" {naive.code_bits(block.predictor[0], block.hidden)} bit" if family == "lowbit" else ""
            rank = f" {len(block.predictor[0])}" if family == "lowrank" else ""
            shape = f"D {block.hidden}, F {block.neurons}, {dtype}, {block.act}" + ("" if block.gated else ", plain")
            apart = ", rows apart" if block.apart else ""
            name = f"{shape}, {family}{bits}{rank}, {block.rule}, {block.backend}{apart}"
            kinds.setdefault(name, []).append(block)
    return kinds


def _cached(kind: str, blocks: Sequence[SparseFFN], batch: int) -> Times:
    """`time_ways`, or what an earlier call found on this machine with these kernels, this torch and as many threads."""
    machine = f"{_processor(blocks[0].threshold.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    about = f"{kind}, {len(blocks)} blocks, batch {batch}, {machine}, kernels {_kernels(blocks[0].backend)}"
    path = cache_folder() / f"dispatch-{hashlib.sha256(about.encode()).hexdigest()[:20]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["about"] == about:
            return {name: float(kept["seconds"][name]) for name in ("rule", *map(str, DENSITIES))}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measured anew
    logger.info("moyu: timing %s", about)
    times = time_ways(blocks, batch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"about": about, "seconds": times}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        logger.warning("moyu: timings cannot be kept (%s); set MOYU_CACHE to a writable folder", error)
    return times


@torch.no_grad()
def time_ways(blocks: Sequence[SparseFFN], batch: int) -> Times:
    """Seconds of a call under the exact rule and with the predictor at each density, medians of interleaved rounds.

    blocks: alike but for their values; each call takes the next one's weights, so that they come from memory.
    """
    first = blocks[0]
    size = sum(weight.numel() * weight.element_size() for weight in first.weights)
    blocks = blocks[: max(COLD_BYTES // size, 1)]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, first.hidden, generator=g).to(first.threshold.device, first.input_dtype)
    order = torch.rand(first.neurons, generator=g).argsort().argsort().to(x.device)
    ways: dict[str, Tensor | None] = {"rule": None}
    for density in DENSITIES:  # a bias that decides alone selects just so many, at the predictor's full cost
        ways[str(density)] = torch.where(order < density * first.neurons, FAR, -FAR)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, bias in ways.items():
            started = now(x.device)
            for block in blocks:
                predictor = [] if bias is None else [*block.predictor[:-1], bias]
                block.run_op(x, predictor)
            seconds[name].append((now(x.device) - started) / len(blocks))
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}  # the first one warms up


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _kernels(backend: str) -> str:
    """Hash of the code that runs, of another value wherever its speed may be another."""
    if backend == "cpu" and cpu.load():
        return library_key()
    sources = sorted(Path(naive.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:20]


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return this_processor().get("model name") or platform.machine()
