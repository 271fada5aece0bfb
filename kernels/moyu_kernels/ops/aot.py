"""Triton launches as data: run them here, or compile them for a GPU that is not here and read what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[grid](*args, **constants, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Tensor | int | None, ...]
    constants: dict[str, int | str]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, **self.options)


@dataclass(frozen=True)
class Report:
    """What a compiled kernel takes: registers per thread, bytes spilled per thread, bytes of shared memory."""

    kernel: CompiledKernel
    registers: int
    spills: int
    shared: int
    assembly: str


def compile_launch(launch: Launch, target: GPUTarget) -> Report:
    """Compiles a launch as Triton's JIT would at its first run on `target`; tensors may be on the meta device."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[str, int | str | None] = dict(launch.constants)
    hints = {}
    for index, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        aligned = True  # as every tensor that PyTorch allocates
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name], aligned = "i32", value % 16 == 0
        if aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, {name: signature[name] for name in names}, constants, hints)
    kernel = triton.compile(source, target=target, options=launch.options)
    return _cuda_report(kernel) if target.backend == "cuda" else _hip_report(kernel)


def _cuda_report(kernel: CompiledKernel) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage, assembly = (
            subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    return Report(kernel, registers, stack + local, kernel.metadata.shared, assembly)


def _hip_report(kernel: CompiledKernel) -> Report:
    assembly = kernel.asm["amdgcn"]
    registers, spilled, scalars, scratch = (
        _number(rf"\.{key}: +(\d+)", assembly)
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return Report(kernel, registers, 4 * (spilled + scalars) + scratch, kernel.metadata.shared, assembly)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} not found in the compiler's report: its format has changed")
    return int(match[1])
