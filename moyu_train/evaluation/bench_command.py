"""`moyu bench ops` and `moyu bench model`: their settings, and what they print and write."""

import argparse
from pathlib import Path
from typing import Any

import torch

from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_model import bench_folder_rows, bench_shape_rows
from moyu_train.evaluation.bench_ops import bench_ops
from moyu_train.evaluation.bench_rows import check_shares, console, plot, tables
from moyu_train.evaluation.shapes import SHAPES
from moyu_train.files import write_json
from moyu_train.recipe import load_recipe
from moyu_train.settings_export import Bench

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int8")}
FULL: dict[str, Any] = {"densities": [0.05, 0.1, 0.2, 0.5], "batches": [1, 4], "rounds": 7}
QUICK: dict[str, Any] = {"densities": [0.1], "batches": [1], "rounds": 5}


def bench_ops_or_model(known: argparse.Namespace, rest: list[str]) -> None:
    """Prints the rows as tables, and writes them to the `--json` file with a plot beside it.

    Args: known: of the command line; rest: overrides of recipe settings, which `model` on a folder takes.
    Raises: MoyuError for settings that are out of range or do not go together, at the end for timings that cannot be.
    """
    asked = {name: getattr(known, name) for name in ("dtypes", "densities", "batches", "threads", "rounds")}
    given = {name: value for name, value in asked.items() if value is not None}
    _check(known, given, rest)
    settings: dict[str, Any] = {"dtypes": ["bfloat16"], "threads": [1, 2]} | (QUICK if known.quick else FULL) | given
    dtypes = [DTYPES[name] for name in settings["dtypes"]]
    densities, threads, rounds = settings["densities"], settings["threads"], settings["rounds"]
    if known.recipe == "ops":
        name = known.shape or "smollm2-135m"
        rows = bench_ops(name, SHAPES[name], dtypes, densities, settings["batches"], rounds, threads)
    else:
        changes = {"rounds": rounds, "threads": tuple(threads)} | ({"compiled": False} if known.quick else {})
        if known.folder:
            recipe = load_recipe(known.folder, rest)
            rows = bench_folder_rows(Path(known.folder), recipe, (recipe.bench or Bench()).model_copy(update=changes))
        else:
            bench = Bench().model_copy(update=changes)
            rows = bench_shape_rows(known.shape, SHAPES[known.shape], dtypes, densities, bench)
    for table in tables(rows):
        console.print(table)
    if known.json:
        write_json(Path(known.json), rows)
        plot(rows).savefig(Path(known.json).with_suffix(".png"), dpi=120)
    check_shares(rows)


def _check(known: argparse.Namespace, given: dict[str, Any], rest: list[str]) -> None:
    if known.recipe == "ops" and (known.folder or rest):
        extra = " ".join([known.folder] * bool(known.folder) + rest)
        raise MoyuError(f"bench ops takes no {extra!r}; it times random weights of a --shape")
    if known.recipe == "model" and bool(known.folder) == bool(known.shape):
        raise MoyuError("bench model takes either a sparse checkpoint's folder or a --shape; give one of the two")
    if known.recipe == "model" and not known.folder and rest:
        raise MoyuError(f"bench model of a --shape has no recipe that {' '.join(rest)!r} could set")
    if known.recipe == "model" and given.get("batches", [1]) != [1]:
        raise MoyuError(f"--batches {given['batches']}: bench model decodes one sequence; leave it out")
    if known.folder and ("dtypes" in given or "densities" in given):
        raise MoyuError("--dtypes and --densities are the checkpoint's own; leave them out, or give a --shape")
    for name, kind, least, most in (
        ("densities", "share of the neurons", 0.001, 0.999),
        ("batches", "batch", 1, 8),
        ("threads", "number of threads", 1, 128),
    ):
        for value in given.get(name, []):
            if not least <= value <= most:
                raise MoyuError(f"--{name} {value} is no {kind} from {least} to {most}")
    if given.get("rounds", 5) < 5:
        raise MoyuError(f"--rounds {given['rounds']}: a median of fewer than 5 says little; give 5 or more")
    unknown = [name for name in given.get("dtypes", []) if name not in DTYPES]
    if unknown:
        raise MoyuError(f"--dtypes {','.join(unknown)} is unknown; known: {', '.join(DTYPES)}")
