"""`moyu fit-predictors --from FOLDER`: predictors and routers of a sparse checkpoint again, on its present weights."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from moyu_kernels.checkpoint import MANIFEST, STATE
from moyu_kernels.heads import HeadRouters
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from torch import Tensor

from moyu_train import data, own_text
from moyu_train.checkpoints.export import RECORDED, read_inputs, read_rules, read_weights, write_manifest
from moyu_train.checkpoints.stage import CHECKPOINT, recorded
from moyu_train.errors import MoyuError
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.files import read_json, read_tensors, reading, write_json
from moyu_train.models.blocks import ffn_sha256
from moyu_train.models.heads import attention_sha256, find_attention
from moyu_train.models.loading import load_dense, load_tokenizer
from moyu_train.models.masking import InputMasks
from moyu_train.models.state import family_of, predictors_to_tensors, routers_to_tensors, stored_bytes
from moyu_train.predictors import PREDICTORS
from moyu_train.recipe import Recipe, load_recipe
from moyu_train.registry import resolve
from moyu_train.training.fit import PredictorTrainer, fit_windows
from moyu_train.training.heads import fit_under
from moyu_train.training.loop import calibrate_in_loop


def checkpoint_of(folder: Path) -> Path:
    """The sparse checkpoint at `folder`, or that of the run there.

    Raises: MoyuError where neither is there.
    """
    for path in (folder, folder / "export" / CHECKPOINT):
        if (path / STATE).is_file() and (path / "config.json").is_file():
            return path
    raise MoyuError(
        f"{str(folder)!r} is neither a sparse checkpoint (it has no {STATE}) nor a run with one in "
        f"export/{CHECKPOINT}; give the folder that `moyu export` wrote"
    )


def recipe_of(folder: Path, overrides: list[str]) -> Recipe:
    """The settings that a checkpoint records of its predictors, with overrides; all others at their defaults.

    Raises: MoyuError where it has no predictors, or does not say how they were fitted and `predictor` is not given.
    """
    config = _config(folder)
    predictor = config["moyu"]["predictor"]
    if predictor is None:
        raise MoyuError(f"{str(folder)!r} has no predictors to fit again; its rule's exact mask is what decodes")
    settings = predictor.get(RECORDED)
    if settings is None and not any(word.startswith("--predictor") for word in overrides):
        raise MoyuError(
            f"{str(folder)!r} was written by an older moyu, which does not record how predictors are fitted; it says "
            f"that their family is stored as {predictor['family']!r}: name it with its options, as in "
            "--predictor '{name: lowbit, bits: 2}'"
        )
    stored = {"export": {"dtype": config.get("dtype", "float32"), "weights": read_weights(folder)}}
    return load_recipe(str(folder), overrides, (settings or {}) | stored)


def refit(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Fit the predictors of a sparse checkpoint on its present weights, calibrate them, and write them into it.

    Routers of attention heads, where it has some, are fitted again too. The rule stays as it is. Sums of an interrupted
    fit are kept beside the folder, under the hash of the weights.

    Raises: MoyuError where the goal of the calibration is out of reach; the checkpoint is then as it was.
    """
    if PartialState().num_processes > 1:
        raise MoyuError("fit-predictors --from runs in one process; start it without a launcher")
    if recipe.predictor is None:
        raise MoyuError("predictor: null leaves nothing to fit; leave --predictor away, or name a family")
    cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
    if own_text.SELF in recipe.data.sources:
        raise MoyuError("data.train 'self' needs the dense model, which a sparse checkpoint does not hold; give a text")
    tokenizer = load_tokenizer(folder)
    train, validation = data.training_text(recipe.data, tokenizer, recipe.fit.window, recipe.data.sources)
    model = load_dense(folder, getattr(torch, recipe.export.dtype))
    config = _config(folder)
    digest, heads = ffn_sha256(model), config["moyu"].get("heads")
    with reading(folder):
        attention = attention_sha256(model, heads["paths"]) if heads else None
    model.float()
    rules, inputs = read_rules(folder), read_inputs(folder)
    settings = recipe.digest("predictor", "fit", "calibrate", "seed")
    key = [digest, attention or "", train.digest(), settings, recipe.export.dtype]
    work = folder.with_name(f"{folder.name}.refit") / hashlib.sha256("\n".join(key).encode()).hexdigest()[:12]
    work.mkdir(parents=True, exist_ok=True)
    windows = fit_windows(recipe, train)
    trainer = PredictorTrainer(model, rules, cls, options, work)
    with InputMasks(model, inputs):
        fitted = trainer.fit(windows, recipe.fit.save_every)
    routers = None
    if heads:
        with reading(folder):
            routers = _routers_again(model, rules, inputs, heads, windows, work / "heads", recipe.fit.save_every)
    with HeadMasks.of(model, routers):
        predictors, figures = calibrate_in_loop(
            model, rules, fitted, validation, recipe.calibrate, recipe.export.itemsize, inputs, work / "search.jsonl"
        )
    stored = read_tensors(folder / STATE)
    tensors = {name: t for name, t in stored.items() if ".predictor." not in name and not name.startswith("heads.")}
    if routers:
        tensors |= routers_to_tensors(routers.routers.values())
        config["moyu"]["heads"] = heads | {"attention_sha256": attention}
    config["architectures"] = [f"Moyu{name}" for name in config["moyu"]["architectures"]]
    config["moyu"]["predictor"] = {"family": family_of(predictors), "ffn_sha256": digest, **recorded(recipe, figures)}
    (folder / MANIFEST).unlink(missing_ok=True)  # until it is whole again, it is no checkpoint
    save_file(tensors | predictors_to_tensors(predictors), folder / STATE)
    write_json(folder / "config.json", config)
    write_manifest(folder, digest, attention)
    shutil.rmtree(work.parent)
    return {
        "checkpoint": str(folder),
        "family": cls.name,
        "predictor_bytes": sum(map(stored_bytes, predictors)),
        "ffn_sha256": digest,
        "tokens": windows.numel(),
        **figures,
    }


def _routers_again(
    model: Any,
    rules: list[Rule],
    inputs: dict[str, Rule],
    heads: dict[str, Any],
    windows: Tensor,
    work: Path,
    save_every: int,
) -> HeadRouters:
    """heads: as the config has it; work: for the sums of an interrupted fit."""
    work.mkdir(exist_ok=True)
    found = {attention.block.path: attention for attention in find_attention(model)}
    attentions = [found[path] for path in heads["paths"]]
    fitted = fit_under(model, rules, inputs, attentions, heads["unit"], windows, work, save_every)
    by_path = dict(zip(heads["paths"], fitted, strict=True))
    return HeadRouters(heads["unit"], heads["keep"], heads["output"], by_path)


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if "moyu" not in config:
        raise MoyuError(f"{str(folder / 'config.json')!r} has no block 'moyu' any more; export the checkpoint again")
    return config
