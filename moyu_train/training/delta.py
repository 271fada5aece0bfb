"""Deltas: a LoRA adapter with the thresholds that it was trained under, small enough to keep beside a recipe.

The folder has peft's files, but names a `peft_type` that stock peft does not know: without the masks the adapter would
give a model that nobody trained. `delta.json`, written last, holds the hash of each file and of the dense FFN weights.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.files import read_json, read_tensors, reading, sha256, write_json
from moyu_train.models.state import thresholds_to_tensors

PEFT_TYPE = "MOYU_LORA"
CONFIG, WEIGHTS, STATE, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "moyu.safetensors", "delta.json"


@torch.no_grad()
def round_delta(adapted: Any) -> None:
    """Round the trained matrices to fp16, as a delta stores them, so that the model merged now is the one rebuilt."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.half())


def save_delta(
    adapted: Any,
    thresholds: list[Tensor],
    inputs: dict[str, Tensor],
    ffn: str,
    trained: dict[str, Any],
    tokens: int,
    folder: Path,
) -> None:
    """Write a delta.

    Args: adapted: after `round_delta`; inputs: of other layers' inputs, as `input_tensors` names them; ffn: SHA-256 of
        the FFN weights that it belongs to; trained: the rule that it was trained under, as data; tokens: of its
        training.
    """
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / WEIGHTS)
    save_file(thresholds_to_tensors(thresholds) | inputs, folder / STATE)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"peft_type": PEFT_TYPE, "base_model_name_or_path": None}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # peft's is a set, in another order each time
    write_json(folder / CONFIG, config)
    files = {name: sha256(folder / name) for name in (CONFIG, WEIGHTS, STATE)}
    write_json(folder / MANIFEST, {"files": files, "ffn_sha256": ffn, "trained": trained, "tokens": tokens})


def load_delta(model: Any, ffn: str, trained: dict[str, Any], folder: Path) -> tuple[Any, dict[str, Tensor], int]:
    """The dense model with the delta on it, the thresholds as `save_delta` names them, and the tokens of its training.

    Args: ffn: SHA-256 of the model's FFN weights; trained: the rule of this recipe, as `save_delta` took it.
    Raises: MoyuError where a file is missing or changed, or the delta belongs to other weights or another rule.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    path = folder / MANIFEST
    if not path.is_file():
        raise MoyuError(f"delta {str(folder)!r} has no {MANIFEST}; give a folder `finetune/delta` of a finished run")
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or set(files) != {CONFIG, WEIGHTS, STATE}:
        raise MoyuError(f"{path} lists {files!r} in place of {CONFIG}, {WEIGHTS} and {STATE}; copy the folder again")
    if lacking := {"ffn_sha256", "trained", "tokens"} - set(manifest):
        raise MoyuError(f"{path} lacks {', '.join(sorted(lacking))}; copy the folder `finetune/delta` again")
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or sha256(file) != expected:
            raise MoyuError(f"{file} is missing, or changed since the delta was written; copy the folder again")
    if manifest["ffn_sha256"] != ffn:
        raise MoyuError(
            f"delta {str(folder)!r} belongs to other weights (FFN SHA-256 {str(manifest['ffn_sha256'])[:12]}…, this "
            f"model has {ffn[:12]}…); set `model` to the one that it was trained on"
        )
    if manifest["trained"] != trained:
        raise MoyuError(
            f"delta {str(folder)!r} was trained under {manifest['trained']}, and the recipe asks for {trained}; set "
            "sparsifier, target_sparsity, finetune.lora.quantise and finetune.compensation to the delta's"
        )
    config, state = read_json(folder / CONFIG), read_tensors(folder / STATE)
    tensors = {name: tensor.float() for name, tensor in read_tensors(folder / WEIGHTS).items()}
    names = ("r", "lora_alpha", "target_modules", "modules_to_save")
    with reading(folder):
        adapted = get_peft_model(model, LoraConfig(**{name: config[name] for name in names}))
        try:
            found: Any = set_peft_model_state_dict(adapted, tensors)
        except RuntimeError as error:  # torch says so of shapes that do not fit
            raise ValueError(str(error)) from error
    if found.unexpected_keys:
        raise MoyuError(
            f"{folder / WEIGHTS} holds matrices that the model has no place for: {found.unexpected_keys[:3]}"
        )
    return adapted, state, manifest["tokens"]
