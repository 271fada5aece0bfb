"""Times decoding: stock transformers (eager, compiled) and llama.cpp at each thread count, our runner dense and sparse.

All decode the same forced tokens, interleaved round by round with a reading of the machine's bandwidth, in one dtype.
A row says what it had to read and what share of the bandwidth of that minute it reached.
"""

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import moyu_kernels
import torch
from moyu_kernels.dispatch import now
from moyu_kernels.modules import SparseModule
from moyu_kernels.ops.ffn.naive import SIMULATED, predictor_family
from torch import Tensor
from transformers import StaticCache

from moyu_train.checkpoints.export import read_state, read_weights
from moyu_train.checkpoints.stage import CHECKPOINT
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_bytes import bytes_per_token, ffn_read, heads_skipped, inputs_skipped
from moyu_train.evaluation.bench_llamacpp import KINDS, LlamaCpp, llamacpp_files, load
from moyu_train.evaluation.yardstick import bandwidth_buffer, read_bandwidth
from moyu_train.models.blocks import ffn_bytes, find_blocks
from moyu_train.models.context import check_window
from moyu_train.models.int8 import int8_twin
from moyu_train.models.loading import load_dense, load_sparse
from moyu_train.progress import track
from moyu_train.settings_export import Bench

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


class Decoder(Protocol):
    """Something that decodes one forced token at a time at a growing position."""

    def prefill(self, ids: Tensor) -> Any: ...
    def seek(self, position: int) -> None: ...
    def step(self, token: Tensor) -> Any: ...


class StockDecoder:
    """transformers with a static cache, its single-token forward eager or compiled, on a GPU with its CUDA graphs."""

    def __init__(self, model: Any, max_length: int, compiled: bool) -> None:
        self.model = model
        self.token, self.position = (torch.zeros(1, 1, dtype=torch.int64, device=model.device) for _ in range(2))
        self.cache = StaticCache(model.config, max_cache_len=max_length)
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        forward = model.forward
        self._forward: Callable[..., Any] = torch.compile(forward, fullgraph=True, mode=mode) if compiled else forward

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> None:
        self.cache.reset()
        self.model(input_ids=ids.to(self.model.device), past_key_values=self.cache, logits_to_keep=1)
        self.position.fill_(ids.shape[1])

    @torch.inference_mode()
    def seek(self, position: int) -> None:
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(position)
        self.position.fill_(position)

    @torch.inference_mode()
    def step(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        logits = self._forward(input_ids=self.token, past_key_values=self.cache, position_ids=self.position).logits
        self.position += 1
        return logits


def bench_checkpoint(folder: Path, text: Tensor, settings: Bench) -> dict[str, Any]:
    """Rows and summary for a sparse checkpoint.

    Args: text: int64 token ids to decode, at least the largest context and `new_tokens` more.
    Raises: MoyuError where the text is too short, or a bandwidth share above 1.02 shows that a timing is wrong.
    """
    need = max(settings.contexts) + settings.new_tokens + 1
    if len(text) < need:
        raise MoyuError(
            f"the held-out text has {len(text)} tokens in its first document, bench needs {need}; lower "
            "bench.contexts or bench.new_tokens"
        )
    rules, predictors = read_state(folder)
    if rules[0].prompt > min(settings.contexts):
        raise MoyuError(short_context(rules[0].prompt, settings.contexts))
    if predictors and predictor_family(list(predictors[0].values())) in SIMULATED:
        raise MoyuError(f"{str(folder)!r} has predictors that no op computes (simulated), so no speed to measure")
    started = time.monotonic()
    sparse = load_sparse(folder)
    if not any(isinstance(module, moyu_kernels.SparseFFN) for module in sparse.modules()):
        raise MoyuError(f"{str(folder)!r} runs simulated (masked after dense matmuls), so it has no speed to measure")
    load_seconds = time.monotonic() - started
    load = partial(load_dense, folder, sparse.dtype, device=sparse.device, compensated=False)
    dense = load()
    check_window(dense, need, "the largest of bench.contexts with bench.new_tokens")
    # The runner swaps linear layers and attention, stock must not.
    runners = {"dense_runner": load(), "sparse": sparse}
    if read_weights(folder) == "int8":
        runners["dense_int8"] = int8_twin(dense)
    settings, buffer = of_device(settings, sparse.device), bandwidth_buffer(sparse.device)
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        with rival_files(dense) as files:
            for context in settings.contexts:
                decoders = make_decoders(dense, runners, context + settings.new_tokens + 1, settings, files)
                rows += time_decoders(decoders, sparse, dense, text, context, settings, buffer)
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
    gc.collect()
    return {
        "rows": rows,
        "load_seconds": load_seconds,
        "peak_memory_bytes": peak_memory(sparse.device),
        **summary(rows, settings),
    }


def of_device(settings: Bench, device: torch.device) -> Bench:
    """On a GPU the threads of the CPU say nothing."""
    return settings if device.type == "cpu" else settings.model_copy(update={"threads": (1,)})


def rival_files(dense: Any) -> AbstractContextManager[dict[str, Path]]:
    """Files of llama.cpp, which is timed on the CPU."""
    return llamacpp_files(dense) if dense.device.type == "cpu" else nullcontext({})


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most, on a GPU those of tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def short_context(prompt: int, contexts: Sequence[int]) -> str:
    return (
        f"masks are taken from the first {prompt} tokens (sparsifier.prompt), which skip nothing, and bench.contexts "
        f"has {min(contexts)}: raise bench.contexts, or lower sparsifier.prompt"
    )


def make_decoders(
    dense: Any, runners: dict[str, Any], length: int, settings: Bench, files: dict[str, Path]
) -> dict[tuple[str, int], Decoder]:
    """Decoders for `length` tokens by (setting, threads); those of our runner, by setting, get the most threads.

    files: of llama.cpp, by setting.
    """
    threads = max(settings.threads)
    decoders: dict[tuple[str, int], Decoder] = {}
    for count in settings.threads:
        decoders["dense_eager", count] = StockDecoder(dense, length, compiled=False)
        if settings.compiled:
            decoders["dense_compiled", count] = StockDecoder(dense, length, compiled=True)
    for name, file in files.items():
        decoders |= {(name, count): decoder for count, decoder in load(file, length, settings.threads).items()}
    for name, model in runners.items():
        decoders[name, threads] = moyu_kernels.Runner(model, max_length=length)
    return decoders


def time_decoders(
    decoders: dict[tuple[str, int], Decoder],
    sparse: Any,
    dense: Any,
    text: Tensor,
    context: int,
    settings: Bench,
    buffer: Tensor,
) -> list[dict[str, Any]]:
    """Rows of all decoders from `context` on, round by round with a reading of the bandwidth.

    Args: text: int64 token ids; buffer: int32 of 1 GiB or more, for the bandwidth.
    Raises: MoyuError for a share of the bandwidth that cannot be.
    """
    threads, blocks, itemsize = max(settings.threads), find_blocks(dense), dense.dtype.itemsize
    device: torch.device = dense.device
    tokens = text[None, context : context + settings.new_tokens].to(device)
    first: dict[tuple[str, int], float] = {}
    for key, decoder in track(list(decoders.items()), f"bench: prefill and warm up at {context}"):
        torch.set_num_threads(key[1])
        started = now(device)
        decoder.prefill(text[None, :context])
        first[key] = now(device) - started
        for offset in range(3):  # compiles
            decoder.step(text[None, context + offset : context + offset + 1])
    for module in sparse.modules():
        if isinstance(module, SparseModule):
            module.counts.zero_()
    times: dict[tuple[str, int], list[float]] = {key: [] for key in decoders}
    bandwidth: list[float] = []
    for _ in track(range(settings.rounds), f"bench: decode at {context}"):
        torch.set_num_threads(threads)
        bandwidth.append(read_bandwidth(buffer))
        for key, decoder in decoders.items():
            torch.set_num_threads(key[1])
            decoder.seek(context)
            started = now(device)
            for offset in range(settings.new_tokens):
                decoder.step(tokens[:, offset : offset + 1])
            times[key].append((now(device) - started) / settings.new_tokens)
    weights, cache = bytes_per_token(dense, context)
    read, ffn_stored = ffn_read(sparse, blocks)
    ffn = sum(ffn_bytes(block, itemsize) for block in blocks)
    moved_by = dict.fromkeys((name for name, _ in times), float(weights + cache))
    moved_by["sparse"] += read - ffn - inputs_skipped(sparse, itemsize) - heads_skipped(sparse, itemsize, context)
    if "dense_int8" in moved_by:
        moved_by["dense_int8"] += ffn_stored - ffn
    stored = {"sparse": ffn_stored, "dense_int8": ffn_stored}
    for (name, _), decoder in decoders.items():
        if isinstance(decoder, LlamaCpp):  # its keys and values are float16
            moved_by[name], stored[name] = decoder.weights + cache * 2 / itemsize, float(decoder.ffn)
    rows = []
    for (name, count), seconds in times.items():
        moved = moved_by[name]
        rate = moved / statistics.median(seconds) / 1e9
        share = rate / statistics.median(bandwidth)
        if share > 1.02:
            raise MoyuError(
                f"bench: {name} reached {share:.2f} of the measured bandwidth, which cannot be; run it again "
                "on a quieter machine"
            )
        rows.append(
            {
                "setting": name,
                "threads": count,
                "context": context,
                "tokens_per_second": 1 / statistics.median(seconds),
                "tokens_per_second_min": 1 / max(seconds),
                "tokens_per_second_max": 1 / min(seconds),
                "seconds_per_token": seconds,
                "first_token_seconds": first[name, count],
                "bytes": moved,
                "gb_s": rate,
                "bandwidth_gb_s": statistics.median(bandwidth),
                "bandwidth_share": share,
                "bytes_skipped": 1 - read / ffn_stored if name == "sparse" else 0.0,
                "weights_over_dtype": stored.get(name, ffn) / ffn,
                "density": moyu_kernels.density(sparse)[1] if name == "sparse" else 1.0,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], settings: Bench) -> dict[str, Any]:
    """Best of each setting at the first context, and paired ratios of sparse against the best dense ones."""
    rows = [row for row in rows if row["context"] == settings.contexts[0]]
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["setting"] not in best or row["tokens_per_second"] > best[row["setting"]]["tokens_per_second"]:
            best[row["setting"]] = row
    sparse = best["sparse"]
    stock = max(
        (best[name] for name in ("dense_eager", "dense_compiled") if name in best),
        key=lambda row: row["tokens_per_second"],
    )
    found = {
        "decode_tokens_per_second": {name: row["tokens_per_second"] for name, row in best.items()},
        "bandwidth_gb_s": sparse["bandwidth_gb_s"],
        "bandwidth_share": sparse["bandwidth_share"],
        "bytes_skipped": sparse["bytes_skipped"],
        "over_best_transformers": {"setting": stock["setting"], "threads": stock["threads"], **paired(sparse, stock)},
        "over_dense_runner": paired(sparse, best["dense_runner"]),
    }
    others = [name for name in ("dense_int8", *KINDS) if name in best]
    return found | {f"over_{name}": paired(sparse, best[name]) for name in others}


def paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """How many times faster `a` is than `b`: median, least and most of the rounds' ratios."""
    ratios = sorted(y / x for x, y in zip(a["seconds_per_token"], b["seconds_per_token"], strict=True))
    return {"speedup": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


def bench(run: "Run", folder: Path) -> dict[str, Any]:
    """Decode speed of the exported checkpoint on held-out text."""
    assert run.recipe.bench  # the pipeline runs this stage only with it
    return bench_checkpoint(run.stage_folder("export") / CHECKPOINT, run.test.longest(), run.recipe.bench)
