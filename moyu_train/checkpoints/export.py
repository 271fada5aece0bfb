"""Writes a sparse checkpoint (docs/checkpoint-format.md) and checks what it wrote before it says done."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.loading import FORMAT_VERSION, MANIFEST, STATE
from safetensors.torch import load_file, save_file
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.files import sha256, write_json
from moyu_train.models.blocks import (
    activation_field,
    base_activation,
    clear_marker,
    ffn_sha256,
    find_blocks,
    set_marker,
)
from moyu_train.models.state import (
    predictors_from_tensors,
    predictors_to_tensors,
    thresholds_from_tensors,
    thresholds_to_tensors,
)


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    rule: str,
    thresholds: list[Tensor],
    predictors: list[dict[str, Tensor]] | None,
    family: str | None,
    selected: float | None = None,
) -> None:
    """Write `model` (already in the export's dtype) with its rule and predictors, complete or not at all.

    selected: share of the neurons that the predictors selected on the calibration text, for the density guard.

    Raises: MoyuError where the family has no activation field, or values are not finite.
    """
    blocks = find_blocks(model)
    tensors = thresholds_to_tensors(thresholds) | (predictors_to_tensors(predictors) if predictors else {})
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MoyuError(f"{name} holds values that are not finite; calibrate or fit again on more text")
    config = model.config
    base, field, stock = base_activation(config), activation_field(config), [type(model).__name__]
    clear_marker(config)
    digest = ffn_sha256(model)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        set_marker(config, rule)
        config.architectures = [f"Moyu{name}" for name in stock]
        config.moyu = {
            "format_version": FORMAT_VERSION,
            "rule": rule,
            "activation": base,
            "activation_field": field,
            "architectures": stock,
            "blocks": [block.describe() for block in blocks],
            "predictor": {"family": family, "ffn_sha256": digest, "selected": selected} if predictors else None,
        }
        config.save_pretrained(temporary)
        (temporary / "moyu").mkdir()
        save_file(tensors, temporary / STATE)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "format_version": FORMAT_VERSION,
            "files": {path.relative_to(temporary).as_posix(): sha256(path) for path in files},
            "ffn_sha256": digest,
        }
        write_json(temporary / MANIFEST, manifest)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_state(folder: Path) -> tuple[list[Tensor], list[dict[str, Tensor]] | None]:
    """Thresholds and predictors (None where there are none) of a sparse checkpoint."""
    tensors = load_file(folder / STATE)
    return thresholds_from_tensors(tensors), predictors_from_tensors(tensors) or None
