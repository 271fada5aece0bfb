"""The verbs that take a sparse checkpoint's folder. Imports no torch until one of them needs it."""

import argparse
from pathlib import Path
from typing import Any

from moyu_train.errors import MoyuError
from moyu_train.recipe import load_recipe


def on_folder(verb: str, folder: Path, rest: list[str]) -> dict[str, Any]:
    from moyu_train.analysis.tables import print_figures
    from moyu_train.checkpoints.folder import bench_folder, evaluate_folder, verify_folder

    recipe = load_recipe(str(folder), rest)
    actions = {"verify": verify_folder, "evaluate": evaluate_folder, "bench": bench_folder}
    figures = actions[verb](folder, recipe)
    print_figures(verb, figures)
    return figures


def refit(folder: Path, rest: list[str]) -> dict[str, Any]:
    from moyu_train.analysis.tables import calibration_table, console
    from moyu_train.checkpoints.refit import checkpoint_of, recipe_of, refit

    folder = checkpoint_of(folder)
    figures = refit(folder, recipe_of(folder, rest))
    console.print(calibration_table(figures))
    console.print(f"predictors of {folder.resolve()} fitted again ({figures['family']})")
    return figures


def generate(known: argparse.Namespace) -> dict[str, Any]:
    from moyu_train.evaluation.generate import generate

    return generate(
        Path(known.folder),
        known.prompt,
        max_new_tokens=known.max_new_tokens,
        temperature=known.temperature,
        chat=known.chat,
        mode=known.mode,
        backend=known.backend,
    )


def export_predictors(known: argparse.Namespace) -> dict[str, Any]:
    from moyu_train.checkpoints.powerinfer import export_powerinfer
    from moyu_train.checkpoints.refit import checkpoint_of

    figures = export_powerinfer(checkpoint_of(Path(known.folder)), Path(known.out))
    print(f"{figures['layers']} layers in {figures['folder']}; powerinfer.sparse_threshold is {figures['threshold']}")
    return figures


def export_dense(known: argparse.Namespace) -> dict[str, Any]:
    from moyu_train.analysis.tables import print_figures
    from moyu_train.checkpoints.dense import export_dense

    figures = export_dense(Path(known.folder), Path(known.out))
    print_figures("export-dense", figures)
    return figures


def export_gguf(known: argparse.Namespace) -> dict[str, Any]:
    from moyu_train.analysis.tables import print_figures

    try:
        from moyu_train.checkpoints.engines import export_gguf
    except ImportError as error:
        raise MoyuError("export-gguf needs the package gguf: pip install 'moyu[gguf]'") from error
    figures = export_gguf(known.folder, Path(known.out), known.engine)
    print_figures("export-gguf", figures)
    return figures
