"""Writes a sparse checkpoint (docs/checkpoint-format.md) and checks what it wrote before it says done."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import moyu_kernels.checkpoint
import torch
from moyu_kernels.checkpoint import FORMAT_VERSION, MANIFEST, STATE, CheckpointError, read_manifest
from moyu_kernels.compensation import ATTRIBUTE
from moyu_kernels.heads import HeadRouters, simulated_because
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.files import read_json, read_tensors, reading, sha256, write_json
from moyu_train.models.blocks import describe_blocks, ffn_sha256, find_blocks
from moyu_train.models.compensation import compensation_rank, save, taken_off
from moyu_train.models.heads import attention_sha256
from moyu_train.models.marker import activation_field, base_activation, clear_marker, set_activation, set_marker
from moyu_train.models.state import (
    predictors_from_tensors,
    predictors_to_tensors,
    routers_to_tensors,
    thresholds_from_tensors,
    thresholds_to_tensors,
)

CARD = "README.md"  # which anyone may edit
RECORDED = "settings"  # in what the config tells of the predictors: how they were fitted


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    name: str,
    rules: list[Rule],
    predictors: list[dict[str, Tensor]] | None,
    family: str | None,
    recorded: dict[str, Any] | None = None,
    inputs: dict[str, Rule] | None = None,
    weights: str = "stored",
    heads: HeadRouters | None = None,
) -> None:
    """Write `model` (already in the export's dtype) with its rule and predictors, complete or not at all.

    name: of the sparsifier; rules: one a block, alike but for their thresholds;
    recorded: what else the checkpoint tells of its predictors: `selected`, the share of the neurons that they selected
        on the calibration text, for the density guard; the calibration's figures; settings to fit them again;
    inputs: rules of the inputs of other linear layers, by path, alike but for their thresholds;
    weights: of the FFN as they decode, "stored" or "int8", to which loading rounds what is stored;
    heads: routers of attention heads, fitted on these weights.

    Raises: MoyuError where the family has no activation field, values are not finite, or no op skips the model's heads.
    """
    blocks, paths = find_blocks(model), list(inputs or {})
    tensors = thresholds_to_tensors([rule.threshold for rule in rules]) | (
        predictors_to_tensors(predictors) if predictors else {}
    )
    centred = bool(inputs) and all(rule.centre is not None for rule in (inputs or {}).values())
    for i, rule in enumerate((inputs or {}).values()):
        tensors[f"inputs.{i}.threshold"] = rule.threshold
        if rule.centre is not None:
            tensors[f"inputs.{i}.centre"] = rule.centre
    if heads:
        check_heads(model, heads.routers, heads.output, inputs or {})
        tensors |= routers_to_tensors(heads.routers.values())
    added = {f"{b.path}.{name}": p for b in blocks for name, p in b.module.named_parameters() if ATTRIBUTE in name}
    for key, tensor in (tensors | added).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise MoyuError(f"{key} holds values that are not finite; calibrate or fit again on more text")
    config = model.config
    base, field, stock = base_activation(config), activation_field(config), [type(model).__name__]
    clear_marker(config)
    # Where stock code computes this very function, it may; routers, as predictors, are no part of it.
    known = None if inputs or weights == "int8" else rules[0].stock_activation
    digest, of_heads, rank = ffn_sha256(model), _describe_heads(model, heads), compensation_rank(model)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with taken_off(model) as compensations:
            model.save_pretrained(temporary)
            save(temporary, compensations)
        tokenizer.save_pretrained(temporary)
        if known:
            set_activation(config, known)
        else:
            set_marker(config, name)
        config.architectures = [f"Moyu{architecture}" for architecture in stock]
        described = (getattr(config, "moyu", None) or {}).get("described", ())
        config.moyu = {
            "format_version": FORMAT_VERSION,
            "rule": name,
            "formula": rules[0].describe(),
            "activation": known or base,
            "activation_field": field,
            "architectures": stock,
            "blocks": [block.describe() for block in blocks],
            "weights": weights,
            "inputs": {"formula": inputs[paths[0]].describe(), "centred": centred, "paths": paths} if inputs else None,
            "predictor": {"family": family, "ffn_sha256": digest, **(recorded or {})} if predictors else None,
            "heads": of_heads,
            "compensation": {"rank": rank} if rank else None,
        }
        describe_blocks(config, described)
        config.save_pretrained(temporary)
        (temporary / "moyu").mkdir(exist_ok=True)
        save_file(tensors, temporary / STATE)
        write_manifest(temporary, digest, of_heads["attention_sha256"] if of_heads else None)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_heads(model: Any, paths: Iterable[str], output: str, inputs: Iterable[str] = ()) -> None:
    """Whether heads of the attention modules at `paths` can be skipped; inputs: paths of layers with sparse inputs.

    model: without weights will do. Raises: MoyuError where not.
    """
    modules = set(paths)
    for path in paths:
        if reason := simulated_because(model, path, output):
            raise MoyuError(
                f"heads: no op can skip the heads of {path}, since {reason}; use heads.keep: null (--heads.keep null)"
            )
    if both := [path for path in inputs if path.rpartition(".")[0] in modules]:
        raise MoyuError(
            f"heads: {both[0]} would have sparse inputs beside heads that are off, which no op computes; use "
            "heads.keep: null (--heads.keep null), or leave these layers out of inputs.modules"
        )


def _describe_heads(model: Any, heads: HeadRouters | None) -> dict[str, Any] | None:
    """What the config tells of heads."""
    if heads is None:
        return None
    return {
        "unit": heads.unit,
        "keep": heads.keep,
        "output": heads.output,
        "paths": list(heads.routers),
        "attention_sha256": attention_sha256(model, heads.routers),
    }


def write_manifest(folder: Path, digest: str, attention: str | None) -> None:
    """The last file of a checkpoint, with the hashes of all others but the model card.

    digest: of the FFN weights; attention: of those that routers of heads are tied to, None without routers.
    """
    others = {folder / CARD, folder / MANIFEST}
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in others)
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {path.relative_to(folder).as_posix(): sha256(path) for path in files},
        "ffn_sha256": digest,
        "attention_sha256": attention,
    }
    write_json(folder / MANIFEST, manifest)


def check_whole(folder: Path) -> None:
    """Raises: MoyuError where the folder is not a complete, undamaged sparse checkpoint; every file is hashed."""
    try:
        read_manifest(folder)
    except CheckpointError as error:
        raise MoyuError(str(error)) from error


def read_inputs(folder: Path) -> dict[str, Rule]:
    """Rules of the inputs of linear layers of a sparse checkpoint, by path; mostly none."""
    config, tensors = read_json(folder / "config.json"), read_tensors(folder / STATE)
    with reading(folder):
        inputs = config["moyu"].get("inputs") or {"paths": []}
        paths = enumerate(inputs["paths"])
        return {
            path: Rule(tensors[f"inputs.{i}.threshold"], **inputs["formula"], centre=tensors.get(f"inputs.{i}.centre"))
            for i, path in paths
        }


def read_heads(folder: Path) -> HeadRouters | None:
    """Routers of the attention heads of a sparse checkpoint; mostly none.

    Raises: MoyuError where they are stale.
    """
    files = (read_json(folder / "config.json"), read_json(folder / MANIFEST), read_tensors(folder / STATE))
    with reading(folder):
        config, manifest, tensors = files
        try:
            return moyu_kernels.checkpoint.read_heads(folder, config["moyu"], manifest, tensors)
        except CheckpointError as error:
            raise MoyuError(str(error)) from error


def read_rules(folder: Path) -> list[Rule]:
    """The rule of each block of a sparse checkpoint."""
    config, tensors = read_json(folder / "config.json"), read_tensors(folder / STATE)
    with reading(folder):
        return _rules(config, tensors)


def _rules(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[Rule]:
    formula = config["moyu"].get("formula", {})
    return [Rule(threshold, **formula) for threshold in thresholds_from_tensors(tensors)]


def read_weights(folder: Path) -> str:
    """How a sparse checkpoint decodes its FFN weights: "stored" or "int8"."""
    config = read_json(folder / "config.json")
    with reading(folder):
        weights: str = config["moyu"].get("weights", "stored")
        return weights


def stored_dtype(folder: Path) -> torch.dtype:
    """Of the weights of a sparse checkpoint, but for int8 rows."""
    config = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        dtype: torch.dtype = getattr(torch, config["dtype"])
        return dtype


def read_state(folder: Path) -> tuple[list[Rule], list[dict[str, Tensor]] | None]:
    """Rules and predictors (None where there are none) of a sparse checkpoint.

    Raises: MoyuError where the predictors were fitted for other FFN weights.
    """
    config, manifest, tensors = (
        read_json(folder / "config.json"),
        read_json(folder / MANIFEST),
        read_tensors(folder / STATE),
    )
    with reading(folder):
        fitted_for = (config["moyu"]["predictor"] or {}).get("ffn_sha256")
        rules, predictors = _rules(config, tensors), predictors_from_tensors(tensors)
        written = manifest["ffn_sha256"]
    if fitted_for not in (None, written):
        raise MoyuError(
            f"{str(folder)!r}: the predictors are stale, they were fitted for other FFN weights; fit them on these "
            f"with `moyu fit-predictors --from {folder}`"
        )
    return rules, predictors or None
