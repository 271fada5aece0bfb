"""What a sparse checkpoint's folder holds (docs/checkpoint-format.md), read and checked."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .heads import HeadRouters
from .ops.ffn.naive import PREDICTORS, SIMULATED
from .reading import CheckpointError, inside, read_json

FORMAT_VERSION = 8
# 1 has no formula, its rule is a threshold on a; 1 and 2 have no inputs; 4 says `weights`, 5 `heads`, 6 `centred`,
# 7 `compensation`, 8 how far the copies of a predictor `lowbit` are off.
READS = (1, 2, 3, 4, 5, 6, 7, 8)
MANIFEST, STATE = "moyu/manifest.json", "moyu/state.safetensors"
UNITS = ("head", "group")
LAYOUTS = ("gated", "fused", "plain", "experts")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint; every file is hashed.

    Raises: CheckpointError.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a sparse checkpoint, or was not written to its end; export it again"
        )
    manifest = read_json(path)
    _check_version(path, manifest)
    for name in ("files", "ffn_sha256"):
        if name not in manifest:
            raise CheckpointError(f"{path} lacks {name!r}; export the checkpoint again")
    for name, expected in manifest["files"].items():
        file = inside(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{file} is in the manifest but missing; copy the whole folder again")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{file} was changed or damaged after the export (SHA-256 {found[:12]}…, manifest {expected[:12]}…); "
                "copy it again, or export the changed model again; where you changed weights, fit predictors for "
                f"them with `moyu fit-predictors --from {folder}`"
            )
    for name in sorted({"config.json", STATE} - set(manifest["files"])):
        raise CheckpointError(f"{path} does not list {name}, so nothing says that it is the one; export it again")
    _refuse_strangers(folder, manifest["files"])
    return manifest


def _refuse_strangers(folder: Path, known: Any) -> None:
    """Raises: CheckpointError for files beside the listed ones that transformers would load unasked, or run."""
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.json", "*.py"):
        for file in folder.glob(pattern):
            if file.name not in known:
                raise CheckpointError(
                    f"{file} is not in the manifest, and transformers may load it beside the checkpoint; remove it"
                )


def _check_version(path: Path, data: dict[str, Any]) -> None:
    version = data.get("format_version")
    if version not in READS:
        raise CheckpointError(
            f"{path} has format version {version!r}, this moyu_kernels reads versions {READS[0]} to {READS[-1]}; "
            "use the moyu_kernels that matches it, or export the checkpoint again"
        )


def read_config(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    path = folder / "config.json"
    raw = read_json(path) if path.is_file() else {}
    settings = raw.get("moyu")
    if settings is None:
        raise CheckpointError(f"{path} has no block 'moyu'; export the checkpoint again")
    _check_version(path, settings)
    missing = [
        name
        for name in ("activation", "activation_field", "architectures", "blocks", "predictor")
        if name not in settings
    ]
    if missing or not settings.get("blocks"):
        raise CheckpointError(f"{path}: the block 'moyu' lacks {', '.join(missing) or 'blocks'}; export it again")
    for block in settings["blocks"]:
        if block["layout"] not in LAYOUTS:
            raise CheckpointError(
                f"{path}: layout {block['layout']!r} of {block['path']} is unknown; update moyu_kernels"
            )
    return raw, settings["blocks"], settings


def current(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `STATE` as this version names them: copies of before 8 are taken as exact, as they were then."""
    old = {name for name in state if name.endswith((".predictor.gate_scale", ".predictor.up_scale"))}
    scales = {name + "s": torch.stack([state[name], torch.zeros_like(state[name])]) for name in old}
    return {name: tensor for name, tensor in state.items() if name not in old} | scales


def predictor_names(folder: Path, settings: dict[str, Any], manifest: dict[str, Any]) -> tuple[str, ...]:
    """Names of the predictor's tensors, none where there is no predictor or no op computes it."""
    predictor = settings["predictor"]
    if predictor is None:
        return ()
    if predictor["family"] not in PREDICTORS | SIMULATED:
        raise CheckpointError(
            f"{folder}: the predictor family {predictor['family']!r} is unknown (known: {', '.join(PREDICTORS)}); "
            "update moyu_kernels"
        )
    if predictor["ffn_sha256"] != manifest["ffn_sha256"]:
        raise CheckpointError(
            f"{folder}: the predictor is stale: it was fitted for FFN weights {predictor['ffn_sha256'][:12]}…, the "
            f"folder holds {manifest['ffn_sha256'][:12]}…; fit them on these weights with "
            f"`moyu fit-predictors --from {folder}`"
        )
    return PREDICTORS.get(predictor["family"], ())


def read_heads(
    folder: Path, settings: dict[str, Any], manifest: dict[str, Any], state: dict[str, Tensor]
) -> HeadRouters | None:
    """The routers of attention heads; None where there are none.

    Raises: CheckpointError where they are stale, or cannot be.
    """
    heads = settings.get("heads")
    if heads is None:
        return None
    unit, keep, output, paths = (heads[name] for name in ("unit", "keep", "output", "paths"))
    texts = all(isinstance(text, str) for text in (unit, output, *paths))
    if not texts or type(keep) is not int or not 0 < len(set(paths)) == len(paths):
        raise CheckpointError(f"{folder}: the block 'heads' is not as moyu writes it; export the checkpoint again")
    if unit not in UNITS:
        raise CheckpointError(f"{folder}: heads come by {unit!r} (known: {', '.join(UNITS)}); update moyu_kernels")
    inputs = (settings.get("inputs") or {"paths": []})["paths"]
    if both := [path for path in inputs if path.rpartition(".")[0] in paths]:
        raise CheckpointError(
            f"{folder}: {both[0]} is under routers of heads and has sparse inputs too, which no op computes; export "
            "the checkpoint again with one of them"
        )
    if heads["attention_sha256"] != manifest.get("attention_sha256"):
        raise CheckpointError(
            f"{folder}: the routers of heads are stale: they were fitted for attention weights "
            f"{heads['attention_sha256'][:12]}…, the folder holds {str(manifest.get('attention_sha256'))[:12]}…; fit "
            f"them on these weights with `moyu fit-predictors --from {folder}`, or export the model again"
        )
    parts = ("weight", "scale", "bias")
    routers = {
        path: {part: tensor_of(folder, state, f"heads.{index}.{part}") for part in parts}
        for index, path in enumerate(paths)
    }
    return HeadRouters(unit, keep, output, routers)


def tensor_of(folder: Path, state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{folder / STATE} lacks the tensor {name!r}; export the checkpoint again")
    return state[name]
