"""Rows of `moyu bench model`: whole models, a sparse checkpoint's or with random weights of a real model's sizes."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.gated import SparseGatedFFN
from moyu_kernels.modules import resolve_backend
from moyu_kernels.ops.ffn import naive
from moyu_kernels.quantised import Int8GatedFFN
from torch import Tensor, nn

from moyu_train.checkpoints.export import read_weights
from moyu_train.checkpoints.folder import bench_folder
from moyu_train.evaluation.bench import make_decoders, of_device, rival_files, time_decoders
from moyu_train.evaluation.bench_cases import random_predictor
from moyu_train.evaluation.bench_llamacpp import KINDS
from moyu_train.evaluation.bench_rows import make_row
from moyu_train.evaluation.shapes import Shape
from moyu_train.evaluation.yardstick import bandwidth_buffer
from moyu_train.files import read_json
from moyu_train.models.blocks import find_blocks
from moyu_train.models.int8 import int8_twin
from moyu_train.models.loading import compute_device
from moyu_train.recipe import Recipe
from moyu_train.settings_export import Bench

FAMILY = "lowbit"  # of the predictors of random models
BACKENDS = {
    "dense_eager": "torch",
    "dense_compiled": "torch_compile",
    **dict.fromkeys(KINDS, "llama.cpp"),
}


def bench_folder_rows(folder: Path, recipe: Recipe, settings: Bench) -> list[dict[str, Any]]:
    """A sparse checkpoint on held-out text, as it decodes."""
    load_average = os.getloadavg()[0]
    found = bench_folder(folder, recipe.model_copy(update={"bench": settings}))
    config = read_json(folder / "config.json")
    blocks = config["moyu"]["blocks"]
    described = {
        "dtype": "int8" if read_weights(folder) == "int8" else config["dtype"],
        "D": blocks[0]["hidden"],
        "F": blocks[0]["neurons"],
        "layers": len(blocks),
        "layers_of_model": len(blocks),
        "shape": folder.name,
        "weights": str(folder),
        "load_seconds": found["load_seconds"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "load_average": load_average,
    }
    return [row | described for row in decode_rows(found["rows"], settings, compute_device())]


def bench_shape_rows(
    name: str, shape: Shape, dtypes: Sequence[torch.dtype], densities: Sequence[float], settings: Bench
) -> list[dict[str, Any]]:
    """A model with random weights and predictors, whose cuts keep each of `densities` of random text."""
    load_average, before = os.getloadavg()[0], torch.get_num_threads()
    device = compute_device()
    settings, buffer = of_device(settings, device), bandwidth_buffer(device)
    context = settings.contexts[0]
    length = context + settings.new_tokens + 1
    text = torch.randint(shape.vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    rows = []
    try:
        for dtype in dtypes:
            dense, runners = random_models(shape, dtype, device)
            inputs, sparse = ffn_inputs(dense, text), runners["sparse"]
            with rival_files(dense) as files:
                decoders = make_decoders(dense, runners, length, settings, files)
            described = {
                "dtype": str(dtype).removeprefix("torch."),
                "D": shape.hidden,
                "F": shape.neurons,
                "layers": shape.built or shape.layers,
                "layers_of_model": shape.layers,
                "shape": name,
                "weights": "random",
                "load_average": load_average,
            }
            for density in densities:
                set_density(sparse, inputs, density)
                found = time_decoders(decoders, sparse, dense, text, context, settings, buffer)
                rows += [row | described for row in decode_rows(found, settings, device)]
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()
    return rows


def decode_rows(found: list[dict[str, Any]], settings: Bench, device: torch.device) -> list[dict[str, Any]]:
    """Rows of `time_decoders` under the names of docs/kernels.md, each beside the best dense one of its context."""
    rows = []
    for row in found:
        dense = [other for other in found if other["context"] == row["context"] and other["setting"] != "sparse"]
        best = max(dense, key=lambda other: other["tokens_per_second"])
        rows.append(
            {
                "op": f"decode_{row['setting']}",
                "backend": BACKENDS.get(row["setting"], resolve_backend("auto", device)),
                "batch": 1,
                "density": row["density"],
                **make_row(
                    row["seconds_per_token"],
                    row["bytes"],
                    best["bytes"],
                    best["seconds_per_token"],
                    [row["bandwidth_gb_s"]],
                ),
                "threads": row["threads"],
                "context": row["context"],
                "bytes_skipped": row["bytes_skipped"],
                "weights_over_dtype": row["weights_over_dtype"],
                "first_token_seconds": row["first_token_seconds"],
                "rounds": settings.rounds,
            }
        )
    return rows


def random_models(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """One model dense, and for our runner, by setting; on the same parameters but for the sparse one's FFN.

    dtype: int8 has the FFN of a bfloat16 model in int8 rows, and a dense one of these beside the sparse one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }
    config, model = kinds[shape.family]
    itemsize, kind = dtype.itemsize, Int8GatedFFN if dtype == torch.int8 else SparseGatedFFN
    dtype = torch.bfloat16 if dtype == torch.int8 else dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            dense = model(config(**shape.config(), dtype=dtype)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    shared = [*dense.parameters()]
    dense_runner, sparse = (copy.deepcopy(dense, {id(parameter): parameter for parameter in shared}) for _ in range(2))
    for block in find_blocks(sparse):
        mlp: Any = block.module
        predictor = random_predictor(FAMILY, shape.hidden, shape.neurons, itemsize)
        projections = {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
        for projection in projections.values():  # which the sparse block stores otherwise
            projection.weight = nn.Parameter(projection.weight.detach().clone(), requires_grad=False)
        ffn = kind(projections, "silu", torch.zeros(shape.neurons), predictor, backend="auto")
        parent, _, name = block.path.rpartition(".")
        setattr(sparse.get_submodule(parent), name, ffn)
    runners = {"dense_runner": dense_runner, "sparse": sparse}
    return dense, runners | ({"dense_int8": int8_twin(dense)} if kind is Int8GatedFFN else {})


@torch.no_grad()
def ffn_inputs(model: Any, text: Tensor) -> list[Tensor]:
    """What each FFN block reads, `[T, D]` a block, on `text` `[T]`."""
    found: list[Tensor] = []
    hooks = [
        block.module.register_forward_pre_hook(lambda _, args: found.append(args[0][0])) for block in find_blocks(model)
    ]
    model(input_ids=text[None].to(model.device))
    for hook in hooks:
        hook.remove()
    return found


def set_density(sparse: Any, inputs: list[Tensor], density: float) -> None:
    """Move the predictors' biases, in place, so that they select `density` of the neurons on these inputs."""
    blocks = [module for module in sparse.modules() if isinstance(module, SparseGatedFFN)]
    for block, x in zip(blocks, inputs, strict=True):
        predictor = block.predictor
        predictor[-1].zero_()
        scores = naive.predictor_scores(x, predictor, naive.ACTIVATIONS["silu"]).flatten()
        predictor[-1].fill_(-scores.kthvalue(max(round((1 - density) * len(scores)), 1)).values.item())
