"""The linear layer with sparse inputs: weight rows of inputs that no row keeps are not read."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from checks import same_on_any_number_of_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from moyu_kernels import Runner
from moyu_kernels.inputs import SparseLinear
from moyu_kernels.modules import set_mode
from moyu_kernels.ops import cpu
from moyu_kernels.ops.linear import naive
from sparse_checkpoints import tiny_llama
from test_cpu_ops import DTYPES, TOLERANCE, cut, run_python
from torch import Tensor, nn

SIZES = ((65, 193), (64, 128), (3, 1), (300, 37), (1, 40))


def arguments(
    rows: int, dtype: torch.dtype, sizes: tuple[int, int] = SIZES[0], bias: bool = True, density: float = 0.4
) -> list:
    torch.manual_seed(rows)
    inputs, outputs = sizes
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    level = cut(x.float().abs(), 1 - density) if rows * inputs > 40 else 0.5
    return [x, weight, b, level * (torch.rand(inputs) * 0.2 + 0.9)]


def close(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9)
    return found.dtype == expected.dtype and bool(error < TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_naive(bias: bool, rows: int, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        args = arguments(rows, dtype, sizes, bias)
        (y, counts), (expected, counts_naive) = cpu.sparse_linear(*args), naive.sparse_linear(*args)
        assert close(y, expected)
        assert torch.equal(counts, counts_naive)
    x, weight, b, threshold = arguments(rows, dtype, bias=bias)
    masked = torch.where(x.abs().float() >= threshold, x, 0.0)
    y = functional.linear(masked.float(), weight.T.float(), None if b is None else b.float())
    assert close(cpu.sparse_linear(x, weight, b, threshold)[0], y.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_equal_batch_of_one_bitwise(dtype: torch.dtype) -> None:
    for rows in range(2, 9):
        x, *rest = arguments(rows, dtype, (300, 70))
        y, counts = cpu.sparse_linear(x, *rest)
        for n in range(rows):
            alone = cpu.sparse_linear(x[n : n + 1], *rest)
            assert torch.equal(alone[0][0], y[n])
            assert torch.equal(alone[1][0], counts[n])


def test_any_number_of_threads_bitwise() -> None:
    args = arguments(2, torch.bfloat16, (1000, 160))
    same_on_any_number_of_threads(cpu.sparse_linear, args)


PROTECTED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from checks import reads_only
from moyu_kernels.ops import cpu
from test_sparse_linear import arguments
args = arguments(2, torch.float32, (80, 1024))
kept = (args[0].abs() >= args[3]).any(0)
assert 0 < kept.sum() < 80
reads_only(cpu.sparse_linear, args, {{1: kept}})
"""


def test_rows_that_are_not_needed_are_not_read() -> None:
    process = run_python(PROTECTED)
    assert process.communicate()[1] == ""
    assert process.returncode == 0


def test_nothing_and_everything_kept_and_values_that_are_no_numbers() -> None:
    x, weight, bias, threshold = arguments(3, torch.float32)
    for op in (cpu.sparse_linear, naive.sparse_linear):
        y, counts = op(x, weight, bias, torch.full_like(threshold, 1e9))
        assert torch.equal(y, bias.expand(3, -1))
        assert not counts.any()
        y, counts = op(x, weight, bias, torch.zeros_like(threshold))
        torch.testing.assert_close(y, functional.linear(x, weight.T, bias), rtol=1e-4, atol=1e-5)
        assert (counts == 65).all()
    before = cpu.sparse_linear(x, weight, bias, threshold)
    for value in (float("nan"), float("inf")):
        x[1, 5] = value
        (y, counts), expected = (
            cpu.sparse_linear(x, weight, bias, threshold),
            naive.sparse_linear(x, weight, bias, threshold),
        )
        assert torch.equal(y[::2], before[0][::2])
        assert torch.equal(counts, expected[1])
        assert y[1].isfinite().all() == (value != float("inf"))
    x, weight, bias, threshold = arguments(3, torch.float32)
    x[0, 3] = threshold[3]  # is kept
    assert torch.equal(
        cpu.sparse_linear(x, weight, bias, threshold)[1], naive.sparse_linear(x, weight, bias, threshold)[1]
    )


def test_bad_arguments_are_refused() -> None:
    x, weight, bias, threshold = arguments(1, torch.float32)
    for changed, message in [
        ((torch.randn(9, 65), weight, bias, threshold), r"x has shape \[9, 65\].*N from 1 to 8"),
        ((x, weight[1:], bias, threshold), r"weight has shape \[64, 193\], expected \[65, 193\]"),
        ((x, weight.T.contiguous().T, bias, threshold), "weight .* is not contiguous"),
        ((x, weight, bias.half(), threshold), "bias is float16, expected float32"),
        ((x, weight, bias, threshold.bfloat16()), "threshold is bfloat16, expected float32"),
        ((x.double(), weight.double(), None, threshold), "x is float64, supported are"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            cpu.sparse_linear(*changed)
    with pytest.raises(ValueError, match=r"threshold is torch.float32 \[64\], the layer needs torch.float32 \[65\]"):
        SparseLinear(nn.Linear(65, 193), torch.zeros(64))
    with pytest.raises(ValueError, match="mode 'sparse' is unknown"):
        SparseLinear(nn.Linear(65, 193), threshold, mode="sparse")


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.moyu.sparse_linear.default, arguments(2, torch.bfloat16))
    torch.library.opcheck(torch.ops.moyu.sparse_linear.default, arguments(1, torch.float32, bias=False))


def sparse_layer(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, SparseLinear]:
    torch.manual_seed(0)
    stock = nn.Linear(65, 193).to(dtype).requires_grad_(False)
    twin = nn.Linear(65, 193).to(dtype).requires_grad_(False)
    twin.load_state_dict(stock.state_dict())
    return stock, SparseLinear(twin, torch.full((65,), 0.7))


def test_the_layer_prefills_decodes_and_counts() -> None:
    stock, sparse = sparse_layer()
    x = torch.randn(2, 10, 65)
    kept = x.abs() >= 0.7
    expected = stock(torch.where(kept, x, 0.0))
    torch.testing.assert_close(sparse(x), expected, rtol=1e-4, atol=1e-5)
    assert sparse.counts.tolist() == [20, kept.sum()]
    for backend in ("cpu", "reference"):
        sparse.set_mode("rule", backend)
        torch.testing.assert_close(sparse(x[:, :4]), expected[:, :4], rtol=1e-4, atol=1e-5)
    assert sparse.counts.tolist() == [36, kept.sum() + 2 * kept[:, :4].sum()]
    sparse.set_mode("dense")
    torch.testing.assert_close(sparse(x[:, :4]), stock(x[:, :4]), rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.state_dict()["weight"], stock.state_dict()["weight"])
    assert sparse.state_dict().keys() == stock.state_dict().keys()
    sparse.to(torch.bfloat16)
    assert (sparse.threshold.dtype, sparse.counts.dtype) == (torch.float32, torch.int64)
    assert sparse(x[:, :1].bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_runner_decodes_with_it_compiled(checkpoint: Callable[..., Path]) -> None:
    model, ids = tiny_llama(torch.float32), torch.randint(128, (1, 9), generator=torch.Generator().manual_seed(1))
    for layer in model.model.layers:
        for name in ("q_proj", "o_proj"):
            stock = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, SparseLinear(stock, torch.full((64,), 0.5)))
    expected = model(ids).logits
    runner = Runner(model, max_length=9)
    sparse = model.model.layers[0].self_attn.q_proj
    assert sparse.counts.tolist()[0] == 9  # the runner's own first steps do not count
    found = [runner.prefill(ids[:, :5]), *(runner.step(ids[:, i : i + 1]) for i in range(5, 9))]
    torch.testing.assert_close(torch.cat(found), expected[0, 4:], rtol=1e-4, atol=1e-4)
    assert sparse.counts.tolist()[0] == 18
    set_mode(model, "dense")
    runner.prefill(ids[:, :5])
    dense = runner.step(ids[:, 5:6])
    torch.testing.assert_close(dense, tiny_llama(torch.float32)(ids[:, :6]).logits[:, -1], rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.tuples(st.integers(1, 300), st.integers(1, 80)), st.sampled_from(DTYPES), st.integers(0, 99)
)
def test_properties(rows: int, sizes: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    """Two runs are alike to the bit, a row is as it is alone, and the order of the inputs does not matter."""
    x, weight, bias, threshold = arguments(rows, dtype, sizes)
    y, counts = cpu.sparse_linear(x, weight, bias, threshold)
    again = cpu.sparse_linear(x, weight, bias, threshold)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], counts)
    n = seed % rows
    assert torch.equal(cpu.sparse_linear(x[n : n + 1], weight, bias, threshold)[0][0], y[n])
    order = torch.randperm(sizes[0], generator=torch.Generator().manual_seed(seed))
    other = cpu.sparse_linear(x[:, order], weight[order], bias, threshold[order])
    assert torch.equal(other[1], counts)
    assert close(other[0], y)


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_and_their_centre(assign: bool) -> None:
    x, weight, bias, threshold = arguments(2, torch.float32)
    layers = [nn.Linear(*SIZES[0]).requires_grad_(False) for _ in range(2)]
    centre = torch.randn(len(threshold))
    with torch.no_grad():
        layers[0].weight.copy_(weight.T)
        layers[0].bias.copy_(bias)
    expected = SparseLinear(copy.deepcopy(layers[0]), threshold, centre=centre)
    found = SparseLinear(layers[1], threshold, centre=centre)
    found.load_state_dict(layers[0].state_dict(), assign=assign)
    for rows in (x, torch.randn(9, len(threshold))):
        assert torch.equal(found(rows), expected(rows))
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again(x), expected(x))


def test_few_tokens_have_gradients() -> None:
    x, weight, bias, threshold = arguments(2, torch.float32)
    stock = nn.Linear(*SIZES[0])
    with torch.no_grad():
        stock.weight.copy_(weight.T)
        stock.bias.copy_(bias)
    layer = SparseLinear(copy.deepcopy(stock), threshold)
    with torch.no_grad():
        y = layer(x)
    masked = torch.where(x.abs() >= threshold, x, 0.0).requires_grad_()
    stock(masked).sum().backward()
    found = layer(x)
    found.sum().backward()
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, stock.weight.grad)
    x.requires_grad_()
    layer.requires_grad_(False)(x).sum().backward()
    assert masked.grad is not None
    torch.testing.assert_close(x.grad, torch.where(masked != 0, masked.grad, 0.0))
