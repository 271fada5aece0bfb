"""The FFN op under a mask that is known before the call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from moyu_kernels.ops.ffn.int8 import quantise_down, quantise_rows
from test_cpu_ops import DTYPES, assert_same, run_python
from torch import Tensor


def arguments(rows: int, dtype: torch.dtype, density: float = 0.3, neurons: int = 193) -> tuple[list[Any], Tensor]:
    """Of `gated_ffn`, and the mask `[N, F]`."""
    g = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 65, generator=g).to(dtype)
    weights = [(torch.randn(neurons, 65, generator=g) / 8).to(dtype) for _ in range(3)]
    keep = torch.rand(rows, neurons, generator=g) < density
    return [x, *weights, torch.zeros(neurons), "silu", [naive.pack_mask(keep)]], keep


def test_packing_is_undone() -> None:
    for rows in range(1, 9):
        keep = torch.rand(rows, 40) < 0.5
        mask = naive.pack_mask(keep)
        assert torch.equal(naive.unpack_mask(mask, rows), keep)
        assert torch.equal(naive.unpack_mask(mask, 1), keep[:1])


def test_the_naive_twin_masks_each_row() -> None:
    args, keep = arguments(3, torch.float32)
    x, gate, up, down = args[:4]
    y, counts = naive.gated_ffn(*args)
    for n in range(3):
        rows = keep[n].nonzero()[:, 0]
        a = torch.nn.functional.silu(gate[rows] @ x[n]) * (up[rows] @ x[n])
        torch.testing.assert_close(y[n], a @ down[rows])
        assert counts[n].tolist() == [len(rows)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equals_naive_and_reads_kept_rows_alone(rows: int, dtype: torch.dtype, density: float) -> None:
    for neurons in (1, 193):
        args, keep = arguments(rows, dtype, density, neurons)
        found = cpu.gated_ffn(*args)
        assert_same(found, naive.gated_ffn(*args))
        assert found[1][:, 0].tolist() == keep.sum(1).tolist()
        for weight in args[1:4]:
            weight[~keep.any(0)] = torch.nan
        assert torch.equal(cpu.gated_ffn(*args)[0], found[0])


@pytest.mark.parametrize("rule", ["gate_threshold", "relu"])
def test_goes_with_other_rules(rule: str) -> None:
    args, _ = arguments(3, torch.float32)
    args[4] = torch.full((193,), 0.1)
    assert_same(cpu.gated_ffn(*args, rule), naive.gated_ffn(*args, rule))


def test_int8_rows() -> None:
    args, _ = arguments(3, torch.bfloat16)
    gate, up = (quantise_rows(weight) for weight in args[1:3])
    down, down_scale, columns = quantise_down(args[3])
    args[1:4] = gate[0], up[0], down
    rest = ("threshold", 0, torch.stack([gate[1], up[1], down_scale]), columns)
    assert_same(cpu.gated_ffn(*args, *rest), naive.gated_ffn(*args, *rest))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype) -> None:
    args, keep = arguments(8, dtype)
    y, counts = cpu.gated_ffn(*args)
    for n in range(8):
        alone = cpu.gated_ffn(args[0][n : n + 1], *args[1:-1], [naive.pack_mask(keep[n : n + 1])])
        assert torch.equal(alone[0][0], y[n])
        assert torch.equal(alone[1][0], counts[n])


def test_bad_masks_are_refused() -> None:
    args, _ = arguments(1, torch.float32)
    for mask, message in (
        (torch.zeros(192, dtype=torch.uint8), r"mask has shape \[192\], expected \[193\]"),
        (torch.zeros(193, dtype=torch.bool), "mask is bool, expected uint8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu.gated_ffn(*args[:-1], [mask])
    with pytest.raises(RuntimeError, match="needs the gates of all neurons"):
        cpu.gated_ffn(*args, "topk", 5)


def test_opcheck() -> None:
    args, _ = arguments(2, torch.bfloat16)
    torch.library.opcheck(torch.ops.moyu.gated_ffn.default, args)


def test_without_a_compiler_no_row_is_multiplied_that_was_never_written(tmp_path: Path) -> None:
    code = """
import torch
from moyu_kernels.ops import cpu
from moyu_kernels.prompt_ffn import PromptGatedFFN
from moyu_kernels.rules import Rule
torch.use_deterministic_algorithms(True)  # fills memory that is not written with nan
names = ("gate", "up", "down")
sizes = ((32, 96), (32, 96), (96, 32))
projections = {name: torch.nn.Linear(*size, bias=False) for name, size in zip(names, sizes)}
rule = Rule(torch.zeros(96), keep="prompt_topk", share=0.3, prompt=8)
block = PromptGatedFFN(projections, "silu", rule)
assert not cpu.load()
with torch.no_grad():
    block(torch.randn(1, 8, 32))
    x = torch.randn(1, 1, 32)
    found = block(x)
    torch.testing.assert_close(found, block.set_mode("rule", "reference")(x))
    assert block.counts[1] - 8 * 96 == 2 * 29
"""
    process = run_python(code, CXX="/no/such/compiler", MOYU_CACHE=str(tmp_path))
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
