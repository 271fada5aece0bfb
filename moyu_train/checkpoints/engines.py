"""GGUF files for llama.cpp and PowerInfer. What an engine would compute otherwise is refused by name.

llama.cpp's graph of the Llama kind is dense and SiLU-gated whatever the config says. PowerInfer's is ReLU-gated and
computes the neurons that its predictors select (docs/engines.md).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter

from moyu_train.checkpoints.export import check_whole, read_inputs, read_rules, read_weights
from moyu_train.checkpoints.gguf_model import DENSE, Entry, check_family, entries, head_size, write_gguf
from moyu_train.checkpoints.gguf_vocab import SPLITS, add_vocabulary
from moyu_train.checkpoints.powerinfer import THRESHOLD, matrices
from moyu_train.errors import MoyuError
from moyu_train.models.loading import load_dense, resolve_source, skeleton
from moyu_train.models.marker import base_activation, marked_rule

# PowerInfer's architecture by what stands for the activated gate and for up.
RELU_GATED = {("relu", "stock"): "llama", ("relu", "relu"): "bamboo"}


def export_gguf(source: str, out: Path, engine: str) -> dict[str, Any]:
    """Write `source` (a folder, or what a recipe's `model` may name) as a GGUF file for an engine.

    Raises: MoyuError where the engine would compute another function, or the file reads back otherwise.
    """
    folder = Path(resolve_source(source))
    if not folder.is_dir():
        raise MoyuError(f"{source!r} is no folder; give one with config.json, weights and tokenizer")
    if out.exists():
        raise MoyuError(f"{str(out)!r} exists; give another file")
    check_family(skeleton(folder).config, engine)
    write = {"llama.cpp": _for_llamacpp, "powerinfer": _for_powerinfer}[engine]
    return {"file": str(out), "engine": engine, **write(folder, out)}


def _for_llamacpp(folder: Path, out: Path) -> dict[str, Any]:
    if (folder / "moyu").is_dir():
        _refuse_sparse(folder)
    model = load_dense(folder, "auto", device="cpu")
    config, activation = model.config, marked_rule(model.config) or base_activation(model.config)
    if activation not in DENSE:
        raise MoyuError(f"{str(folder)!r} computes {activation} in its FFN, and {_nonsense(config)}")
    write_gguf(out, model, entries(model, model.dtype), _vocabulary(folder, config, tuple(SPLITS.values())))
    return {"dtype": str(model.dtype).removeprefix("torch."), "computes": "the dense model"}


def _refuse_sparse(folder: Path) -> None:
    rule = read_rules(folder)[0]
    if rule.substitutes:
        raise MoyuError(
            f"{str(folder)!r} has another activation than its family ({rule.describe()}), and "
            f"{_nonsense(skeleton(folder).config)}"
        )
    raise MoyuError(
        f"{str(folder)!r} is a sparse checkpoint, and llama.cpp would compute all neurons of every token: another "
        f"function than was trained. Where that will do: moyu export-dense {folder} OUT, then export-gguf of OUT"
    )


def _nonsense(config: Any) -> str:
    return (
        f"llama.cpp computes SiLU for every {config.model_type} model, whatever its config says: it would answer "
        "nonsense. Decode it with moyu_kernels, or, a relu model with predictors, write it --for powerinfer"
    )


def _for_powerinfer(folder: Path, out: Path) -> dict[str, Any]:
    if not (folder / "moyu").is_dir():
        raise MoyuError(f"{str(folder)!r} is no sparse checkpoint, and PowerInfer computes no FFN without predictors")
    check_whole(folder)
    rules = read_rules(folder)
    rule = rules[0]
    arch = RELU_GATED.get((rule.gate, rule.up))
    if arch is None or rule.keep != "nonzero" or any(rule.threshold.any() for rule in rules):
        raise MoyuError(
            f"PowerInfer computes relu(gate) * up, or both under relu, and {str(folder)!r} has {rule.describe()}: use "
            "the sparsifier 'relu' or 'drelu', or decode it with moyu_kernels"
        )
    if read_inputs(folder) or read_weights(folder) == "int8":
        raise MoyuError(
            f"{str(folder)!r} has sparse inputs of linear layers or int8 weights, which PowerInfer has not; export it "
            "with inputs: null and export.weights: stored"
        )
    model = load_dense(folder, "auto", device="cpu")
    layers, tensors = matrices(folder, model), entries(model, torch.float16)
    _check_graph(model.config, tensors)
    if model.config.tie_word_embeddings:
        tensors["output.weight"] = tensors["token_embd.weight"]
    for index, (fc1, fc2) in enumerate(layers):
        down = tensors.pop(f"blk.{index}.ffn_down.weight")
        tensors[f"blk.{index}.ffn_down_t.weight"] = Entry(down.tensor, torch.float16, transposed=True)
        tensors[f"blk.{index}.fc1.weight"] = Entry(fc1, torch.float16)
        tensors[f"blk.{index}.fc2.weight"] = Entry(fc2, torch.float16)
    vocabulary = _vocabulary(folder, model.config, ("gpt-2",))
    write_gguf(out, model, tensors, vocabulary, arch, b"PWRI", {"powerinfer.sparse_threshold": THRESHOLD})
    return {"dtype": "float16", "computes": "the neurons that the predictors select"}


def _check_graph(config: Any, tensors: dict[str, Entry]) -> None:
    """Raises: MoyuError for what PowerInfer's loader has no place for."""
    more = [name for name in tensors if name.endswith(".bias") or name == "rope_freqs.weight"]
    if more:
        raise MoyuError(f"PowerInfer's graph has no {', '.join(more[:3])}, which this model needs; it is not written")
    if head_size(config) * config.num_attention_heads != config.hidden_size:
        raise MoyuError(f"PowerInfer's heads share out the hidden size, and here they are {head_size(config)} wide")


def _vocabulary(folder: Path, config: Any, splits: tuple[str, ...]) -> Callable[[GGUFWriter], None]:
    return lambda writer: add_vocabulary(writer, folder, config.vocab_size, splits)
