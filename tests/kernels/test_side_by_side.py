"""Rows of a neuron that lie side by side in memory: what the ops and the blocks make of them, and what is saved."""

import copy
import pickle
from typing import Any

import pytest
import torch
from moyu_kernels.gated import SparseGatedFFN
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from moyu_kernels.ops.ffn.int8 import quantise_down, quantise_rows
from moyu_kernels.quantised import Int8GatedFFN
from moyu_kernels.sparse_ffn import side_by_side
from predictors import random_predictor
from torch import Tensor, nn

D, F = 65, 193
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES = ["threshold", "gate_threshold", "drelu", "topk"]


def matrices(dtype: torch.dtype, count: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    return [(torch.randn(F, D) / D**0.5).to(dtype) for _ in range(count)]


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert expected[1][:, 1].min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_op_reads_the_same_numbers(rows: int, dtype: torch.dtype) -> None:
    weights, threshold = matrices(dtype), torch.full((F,), 0.02)
    x = torch.randn(rows, D).to(dtype)
    mask = torch.randint(0, 2**rows, (F,), dtype=torch.uint8)
    for predictor in ([], [mask], random_predictor("lowrank", D, F, 17), random_predictor("lowbit", D, F, 17)):
        for rule in RULES if not predictor else RULES[:3]:
            rest = (threshold, "silu", predictor, rule, 50)
            same(cpu.gated_ffn(x, *side_by_side(weights), *rest), cpu.gated_ffn(x, *weights, *rest))


def test_the_op_reads_the_same_codes() -> None:
    *front, down = matrices(torch.float32)
    rounded = [*map(quantise_rows, front)]
    down_codes, down_scale, columns = quantise_down(down)
    codes = [*(codes for codes, _ in rounded), down_codes]
    scales = torch.stack([*(scale for _, scale in rounded), down_scale])
    x, rest = torch.randn(2, D), (torch.zeros(F), "silu", random_predictor("lowbit", D, F, 17), "threshold", 0)
    same(
        cpu.gated_ffn(x, *side_by_side(codes), *rest, scales, columns),
        cpu.gated_ffn(x, *codes, *rest, scales, columns),
    )


def test_the_plain_op_reads_the_same_numbers() -> None:
    weights, x = matrices(torch.bfloat16, 2), torch.randn(1, D).bfloat16()
    for predictor in ([], random_predictor("lowrank", D, F, 17)):
        for rule in ("threshold", "relu", "topk") if not predictor else ("threshold", "relu"):
            rest = (torch.full((F,), 0.02), "relu", predictor, rule, 50)
            same(cpu.plain_ffn(x, *side_by_side(weights), *rest), cpu.plain_ffn(x, *weights, *rest))


def projections(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    linears = {
        name: nn.Linear(D, F, bias=False, dtype=dtype).requires_grad_(False) for name in ("gate_proj", "up_proj")
    }
    linears["down_proj"] = nn.Linear(F, D, bias=False, dtype=dtype).requires_grad_(False)
    torch.manual_seed(0)
    for linear in linears.values():
        nn.init.normal_(linear.weight, std=0.1)
    return linears


def predicted(kind: type[SparseGatedFFN] = SparseGatedFFN, dtype: torch.dtype = torch.float32) -> SparseGatedFFN:
    return kind(
        projections(dtype), "silu", torch.full((F,), 0.001), random_predictor("lowbit", D, F, 17), backend="cpu"
    )


def together(block: SparseGatedFFN) -> bool:
    """Whether each neuron's rows follow each other in one copy; if not, each matrix must be contiguous."""
    weights = block.weights
    starts = [weight.data_ptr() - weights[0].data_ptr() for weight in weights]
    if starts == [i * D * weights[0].element_size() for i in range(3)]:
        assert all(weight.stride() == (3 * D, 1) for weight in weights)
        return True
    assert all(weight.is_contiguous() for weight in weights)
    return False


@pytest.mark.parametrize("kind", [SparseGatedFFN, Int8GatedFFN])
def test_the_layout_follows_what_reads_it(kind: type[SparseGatedFFN]) -> None:
    block, x = predicted(kind), torch.randn(2, D)
    assert together(block)
    y = block(x)
    long = block(x.repeat(8, 1))  # prefill, dense under the rule's mask
    block.set_mode("predicted", "reference")
    assert not together(block)
    torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block(x.repeat(8, 1)), long, rtol=1e-4, atol=1e-5)
    block.set_mode("predicted", "cpu")
    assert together(block)
    assert torch.equal(block(x), y)
    without = kind(projections(), "silu", torch.full((F,), 0.001), [], "rule", "cpu")
    assert not together(without)  # its rule reads the gate alone


@pytest.mark.parametrize("kind", [SparseGatedFFN, Int8GatedFFN])
@pytest.mark.parametrize("pickled", [False, True])
def test_copies_are_laid_out_too(kind: type[SparseGatedFFN], pickled: bool) -> None:
    block, x = predicted(kind), torch.randn(1, D)
    twin = pickle.loads(pickle.dumps(block)) if pickled else copy.deepcopy(block)
    assert together(twin)
    assert twin.weights[0].data_ptr() != block.weights[0].data_ptr()
    assert torch.equal(twin(x), block(x))
    half = twin.to(torch.bfloat16)
    assert together(half)
    assert half.threshold.dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), block(x), rtol=0.05, atol=0.05)


def test_what_is_saved_is_stock() -> None:
    stock, block = projections(), predicted()
    held = sum(storage.nbytes() for storage in {p.untyped_storage() for p in block.parameters()})
    assert held == 3 * D * F * 4
    state = block.state_dict()
    assert state.keys() == {f"{name}.weight" for name in stock}
    for name, projection in stock.items():
        assert state[f"{name}.weight"].is_contiguous()
        assert torch.equal(state[f"{name}.weight"], projection.weight)
    changed = {name: torch.randn_like(value) for name, value in state.items()}
    block.load_state_dict(changed)
    assert together(block)
    assert torch.equal(block.weights[2], changed["down_proj.weight"].T)


def test_a_fused_block_keeps_its_tensor() -> None:
    fused = nn.Linear(D, 2 * F, bias=False).requires_grad_(False)
    down = nn.Linear(F, D, bias=False).requires_grad_(False)
    before, x = fused.weight.data_ptr(), torch.randn(1, D)
    predictor = random_predictor("lowbit", D, F, 17)
    arguments = ("silu", torch.zeros(F), predictor)
    block = SparseGatedFFN({"gate_up_proj": fused, "down_proj": down}, *arguments, backend="cpu")
    assert fused.weight.data_ptr() == before
    expected, _ = naive.gated_ffn(x, *(w.detach() for w in block.weights), torch.zeros(F), "silu", predictor)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["predicted", "rule"])
@pytest.mark.parametrize("only", ["", "down"])
def test_assigned_weights_lie_as_copied_ones_do(mode: str, only: str) -> None:
    predictor = random_predictor("lowbit", D, F, 17) if mode == "predicted" else []
    blocks = [SparseGatedFFN(projections(), "silu", torch.full((F,), 0.001), predictor, mode) for _ in range(2)]
    state = {name: torch.randn_like(weight) for name, weight in blocks[0].state_dict().items() if only in name}
    x = torch.randn(2, D)
    outputs = []
    for block, assign in zip(blocks, (False, True), strict=True):
        block.load_state_dict(state, strict=False, assign=assign)
        assert together(block) == (mode == "predicted")
        outputs.append(block(x))
    assert torch.equal(*outputs)
