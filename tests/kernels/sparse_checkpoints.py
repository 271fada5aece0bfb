"""Writes sparse checkpoints in the documented format, without moyu_train."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.ops.ffn.naive import PREDICTORS
from predictors import random_predictor
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HIDDEN, NEURONS, RANK = 64, 192, 16


def tiny_llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **changes,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def write_checkpoint(
    folder: Path,
    model: Any,
    blocks: list[dict[str, Any]] | None = None,
    threshold: float = 0.05,
    family: str | None = "lowrank",
    selected: float | None = None,
    seal: bool = True,
    field: str = "hidden_act",
) -> Path:
    """Export a model; `seal` writes the manifest; field: of the config, that holds the activation."""
    config = model.config
    if blocks is None:
        blocks = [
            {
                "path": f"model.layers.{i}.mlp",
                "layout": "gated",
                "gate": "gate_proj",
                "up": "up_proj",
                "down": "down_proj",
                "neurons": config.intermediate_size,
                "hidden": config.hidden_size,
            }
            for i in range(config.num_hidden_layers)
        ]
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for i, block in enumerate(blocks):
        module = model.get_submodule(block["path"])
        for name in (block["gate"], block["up"], block["down"]):
            if name:
                weight = getattr(module, name)
                weight = weight if isinstance(weight, Tensor) else weight.weight
                digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        shape = (block["experts"], block["neurons"]) if block["layout"] == "experts" else (block["neurons"],)
        state[f"blocks.{i}.threshold"] = torch.full(shape, threshold)
        if family:
            tensors = random_predictor(family, block["hidden"], block["neurons"], RANK)
            for name, tensor in zip(PREDICTORS[family], tensors, strict=True):
                state[f"blocks.{i}.predictor.{name}"] = tensor
    model.save_pretrained(folder)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    data["moyu"] = {
        "format_version": 1,
        "rule": "contribution",
        "activation": data[field],
        "activation_field": field,
        "architectures": data["architectures"],
        "blocks": blocks,
        "predictor": {"family": family, "ffn_sha256": digest.hexdigest(), "selected": selected} if family else None,
    }
    data[field] = f"moyu:contribution:{data[field]} (load with moyu_kernels.from_pretrained)"
    data["architectures"] = [f"Moyu{name}" for name in data["architectures"]]
    path.write_text(json.dumps(data))
    (folder / "moyu").mkdir()
    save_file(state, folder / "moyu/state.safetensors")
    if seal:
        write_manifest(folder, digest.hexdigest())
    return folder


def write_manifest(folder: Path, ffn_sha256: str) -> None:
    names = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    files = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
    data = {"format_version": 1, "files": files, "ffn_sha256": ffn_sha256}
    (folder / "moyu/manifest.json").write_text(json.dumps(data))
