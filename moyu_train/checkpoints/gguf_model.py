"""Writes a model of the Llama kind as a GGUF file, and reads it back before it takes its name."""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.files import check_writable
from moyu_train.progress import track

TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}
# By transformers' model type: the architecture in the file, and whether its rotary embedding turns neighbours, where
# transformers turns halves. llama.cpp's graphs of all of them are SiLU-gated.
FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
DENSE = ("silu", "swish")


@dataclass
class Entry:
    """A tensor of the file, made when it is written.

    Args: dtype: in the file; heads: of q or k whose rows are put in the order for a rotation of neighbours.
    """

    tensor: Tensor
    dtype: torch.dtype
    heads: int = 0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.T.shape if self.transposed else self.tensor.shape)

    def data(self) -> np.ndarray[Any, Any]:
        """Its bytes, uint8."""
        value = self.tensor.detach()
        if self.heads:  # [heads, 2, size / 2, ...] -> [heads, size / 2, 2, ...]
            value = value.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        value = (value.T if self.transposed else value).to(self.dtype).contiguous()
        if not torch.isfinite(value).all():
            raise MoyuError(f"weights do not fit {self.dtype}, or are not finite; the model cannot be written in it")
        return value.flatten().view(torch.uint8).numpy()


def check_family(config: Any, engine: str) -> None:
    """Raises: MoyuError for an architecture or a setting that the engine's graph is not known to compute."""
    if config.model_type not in FAMILIES:
        raise MoyuError(
            f"no GGUF file of the architecture {config.model_type!r} is written for {engine}: what it computes has "
            f"been checked for {', '.join(FAMILIES)}"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise MoyuError(f"the model attends to the last {window} tokens, and {engine} to all; it is not written")
    if config.model_type == "qwen3" and config.attention_bias:
        raise MoyuError(
            f"the model's attention has biases, which {engine} knows no place for in Qwen3; it is not written"
        )
    if _rope(config)["rope_type"] not in ("default", "linear", "llama3"):
        raise MoyuError(f"positions are of type {_rope(config)['rope_type']!r}, which is not written for {engine}")


def _rope(config: Any) -> dict[str, Any]:
    rope: dict[str, Any] = config.rope_parameters
    return rope


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def entries(model: Any, dtype: torch.dtype) -> dict[str, Entry]:
    """All tensors by their names in the file: vectors in fp32, matrices in `dtype`; none for a tied output."""
    config = model.config
    arch, neighbours = FAMILIES[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if neighbours else {}
    found = {}
    for path, tensor in model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MoyuError(f"{path} has no place in a GGUF file of the architecture {config.model_type!r}")
        kind = dtype if tensor.ndim > 1 else torch.float32
        found[name] = Entry(tensor, kind, heads.get(path.split(".")[-2], 0))
    if config.tie_word_embeddings:
        del found["output.weight"]
    factors = _rope_factors(model)
    if factors is not None:
        found["rope_freqs.weight"] = Entry(factors, torch.float32)
    return found


def _rope_factors(model: Any) -> Tensor | None:
    """What the frequencies of the plain rotary embedding are divided by, fp32 `[size / 2]`; None where they are plain.

    Raises: MoyuError where the architecture in the file has none.
    """
    rope, size = _rope(model.config), head_size(model.config)
    if rope["rope_type"] == "default":
        return None
    if FAMILIES[model.config.model_type][0] != gguf.MODEL_ARCH.LLAMA:
        raise MoyuError(f"positions are of type {rope['rope_type']!r}, which is written for llama and mistral alone")
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    frequencies: Tensor = model.get_decoder().rotary_emb.inv_freq
    return (plain / frequencies.double()).float()


def write_gguf(
    path: Path,
    model: Any,
    tensors: dict[str, Entry],
    add_vocabulary: Callable[[gguf.GGUFWriter], None],
    arch: str = "",
    magic: bytes = b"GGUF",
    more: dict[str, float] | None = None,
) -> None:
    """Write the file under a temporary name, compare every value and every byte with what should be there, rename it.

    Args: arch: its name in the file, default that of the family; magic: the first four bytes; more: fp32 metadata.
    Raises: MoyuError where the file reads back otherwise; it is gone then.
    """
    check_writable(path.parent, sum(entry.tensor.numel() * entry.dtype.itemsize for entry in tensors.values()))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        writer = gguf.GGUFWriter(temporary, arch or gguf.MODEL_ARCH_NAMES[FAMILIES[model.config.model_type][0]])
        writer.add_name(path.stem)
        _add_sizes(writer, model.config)
        writer.add_file_type(FILE_TYPES[max((e.dtype for e in tensors.values() if len(e.shape) > 1), key=str)])
        for key, value in (more or {}).items():
            writer.add_float32(key, value)
        add_vocabulary(writer)
        for name, entry in tensors.items():
            size = entry.tensor.numel() * entry.dtype.itemsize
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), size, TYPES[entry.dtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in track([*tensors.values()], f"write {path.name}"):
            writer.write_tensor_data(entry.data())
        writer.close()
        _check(temporary, tensors, writer.kv_data[0])
        with temporary.open("r+b") as file:
            file.write(struct.pack("4s", magic))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _check(path: Path, tensors: dict[str, Entry], metadata: dict[str, Any]) -> None:
    """Raises: MoyuError where the file is not what was written."""
    reader = gguf.GGUFReader(path)
    for key, wanted in metadata.items():
        field = reader.get_field(key)
        if field is None or not _same(field.contents(), wanted.value):
            raise MoyuError(f"{path.name} does not read back {key} as it was written; is the disk sound?")
    read = {tensor.name: tensor for tensor in reader.tensors}
    for name, entry in track([*tensors.items()], f"check {path.name}"):
        found = read.pop(name, None)
        shape = None if found is None else tuple(int(size) for size in reversed(found.shape))
        if (
            found is None
            or (shape, found.tensor_type) != (entry.shape, TYPES[entry.dtype])
            or not np.array_equal(found.data.view(np.uint8).ravel(), entry.data())
        ):
            raise MoyuError(f"{path.name} does not read back the tensor {name} as it was written; is the disk sound?")
    if read:
        raise MoyuError(f"{path.name} holds the tensors {', '.join(read)}, which nobody wrote")


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return bool(np.float32(found) == np.float32(wanted)) if isinstance(wanted, float) else bool(found == wanted)
