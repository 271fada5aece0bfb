"""The verbs that tell about this installation: `recipes` and `env`. Imports no torch until it tells of it."""

import argparse
from pathlib import Path
from typing import Any

from moyu_train.errors import MoyuError
from moyu_train.recipe import nearest, shipped_recipes


def recipes(known: argparse.Namespace) -> dict[str, Any]:
    import shutil

    found = shipped_recipes()
    if known.copy:
        name, target = known.copy
        if name not in found:
            raise MoyuError(f"recipe {name!r} is unknown{nearest(name, found)}; known: {', '.join(found)}")
        if Path(target).exists():
            raise MoyuError(f"{target!r} exists; give another file")
        shutil.copyfile(found[name], target)
        print(target)
    else:
        for name, path in found.items():
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"{name:<36} {first}")
    return {"recipes": list(found)}


def env(known: argparse.Namespace) -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    from moyu_kernels.ops.cpu import status

    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    for package in (
        "moyu",
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "safetensors",
        "triton",
        "lm_eval",
    ):
        try:
            figures[package] = version(package)
        except PackageNotFoundError:
            figures[package] = "not installed"
    figures["cpu kernels"] = status()
    for name, value in figures.items():
        print(f"{name:<14} {value}")
    return figures
