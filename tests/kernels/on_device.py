"""Where the Triton ops' tests run: on the GPU where there is one, else on CPU tensors through Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter tests run in a process of their own
(`run_interpreted`) and leave the other tests of a session alone.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

computed = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="run by test_under_the_interpreter")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")

# One unit in the last place: the interpreter truncates to bf16 where a GPU rounds.
RTOL = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def run_interpreted(file: str, marked: str = "not slow") -> None:
    """Runs a file's tests of a mark in a process with the interpreter."""
    if INTERPRETED:
        pytest.skip("this is the process with the interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, file]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def moved(value: Any) -> Any:
    """`value` on `DEVICE`: a tensor, or what a list of them holds."""
    if isinstance(value, list):
        return [moved(part) for part in value]
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def run_on_device(op: Callable[..., Any], *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """What `op` gives for these CPU tensors on `DEVICE`, back on the CPU."""
    y, counts = op(*moved(list(args)), **{name: moved(value) for name, value in named.items()})
    return y.cpu(), counts.cpu()


def check_op(op: Any, arguments: list[Any]) -> None:
    """`torch.library.opcheck` on `DEVICE`."""
    torch.library.opcheck(op, tuple(moved(arguments)))


def agree(
    found: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    atol: float,
    equal_nan: bool = False,
) -> None:
    """The y of a kernel, of `dtype`, is its naive twin's in fp32, and the counts are its counts."""
    y, counts = found
    assert torch.equal(counts, expected[1])
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected[0], rtol=RTOL[dtype], atol=atol, equal_nan=equal_nan)
