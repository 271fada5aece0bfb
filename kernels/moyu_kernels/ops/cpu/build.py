"""Compiles the CPU kernels at first use and keeps the library in a cache folder.

The sources use only torch's stable ABI headers, so a build takes seconds and needs nothing but a C++ compiler.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = (
    "ops.cpp",
    "ffn.h",
    "gate.h",
    "down.h",
    "predict.h",
    "rules.h",
    "inputs.h",
    "heads.h",
    "dense.h",
    "common.h",
    "simd.h",
    "tape.h",
)
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fno-math-errno", "-ffp-contract=fast")


def this_processor() -> dict[str, str]:
    """What Linux tells of the first processor, by name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def machine_flags(processor: dict[str, str]) -> tuple[str, ...]:
    """What the compiler is told of this machine. Waits for loads pay on AMD's family 26, not on Intel's (log 59)."""
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    waits = (processor.get("vendor_id"), processor.get("cpu family")) == ("AuthenticAMD", "26")
    return (native, "-DMOYU_WAITS") if waits else (native,)


MACHINE_FLAGS = machine_flags(this_processor())


class BuildError(RuntimeError):
    """The CPU kernels could not be compiled; the message says why."""


def cache_folder() -> Path:
    """`$MOYU_CACHE`, else `$XDG_CACHE_HOME/moyu`, else `~/.cache/moyu`.

    Raises: BuildError where none is known.
    """
    if folder := os.environ.get("MOYU_CACHE"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moyu"
    except RuntimeError as error:  # a user without a home
        raise BuildError(f"{error} set MOYU_CACHE to a writable folder") from error


def build_library() -> Path:
    """Path of the compiled library, taken from the cache or built now.

    Raises: BuildError when there is no compiler, the compilation fails or the cache cannot be written.
    """
    target = cache_folder() / f"cpu-{library_key()}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise BuildError("no C++ compiler was found; install g++ or set CXX to one")
    root = Path(torch.__file__).parent
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            source = str(Path(__file__).parent / SOURCES[0])
            command = [compiler, *FLAGS, *MACHINE_FLAGS, f"-I{root / 'include'}", source]
            command += ["-o", str(built), f"-L{root / 'lib'}", "-ltorch_cpu"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
            # Two processes may build at once: each renames a whole file, and either one is right.
            built.replace(target)
    except OSError as error:
        raise BuildError(f"{error}; set CXX to a C++ compiler and MOYU_CACHE to a writable folder") from error
    return target


def library_key() -> str:
    """Hash of all that the binary depends on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    machine = (torch.__version__, platform.machine(), _cpu_flags())
    for text in (*FLAGS, *MACHINE_FLAGS, os.environ.get("CXX", ""), *machine):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:20]


def _cpu_flags() -> str:
    """Instruction sets of this machine: a home folder may be shared by machines that differ."""
    processor = this_processor()
    return processor.get("flags") or processor.get("Features") or platform.processor()
