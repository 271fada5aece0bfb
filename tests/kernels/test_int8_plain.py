"""Int8 weight rows of a plain FFN: the ops under every rule and predictor, the block, models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same_on_any_number_of_threads
from moyu_kernels import Runner, dispatch, from_pretrained
from moyu_kernels.ffn import installed_ffn
from moyu_kernels.ops import cpu
from moyu_kernels.ops.ffn import naive
from moyu_kernels.ops.ffn.int8 import dequantise_rows, quantise_down, quantise_rows
from moyu_kernels.quantised import Int8PlainFFN
from predictors import PLAIN_FAMILIES
from safetensors.torch import load_file
from test_cpu_ops import DTYPES, ODD, assert_same
from test_plain_ffn import FAMILIES, model_of, module
from test_plain_op import PREDICTABLE, RULES, plain_arguments

Factory = Callable[..., Path]


def in_int8(arguments: list[Any]) -> list[Any]:
    """The same arguments of plain_ffn with their weights rounded to int8."""
    x, up, down, *rest = arguments
    (up_codes, up_scale), (down_codes, down_scale, columns) = quantise_rows(up), quantise_down(down)
    return [x, up_codes, down_codes, *rest, torch.stack([up_scale, down_scale]), columns]


def cases(rows: int, dtype: torch.dtype, sizes: tuple[int, int, int] = ODD, rules: Any = RULES) -> Iterator[list[Any]]:
    """Arguments of each rule, without a predictor and with one of each kind where the rule takes one."""
    for index, rule in enumerate(rules):
        yield in_int8(plain_arguments(rows, dtype, rule, sizes=sizes, biases=index % 2 == 0))
        for family in PLAIN_FAMILIES if rule in PREDICTABLE else ():
            yield in_int8(plain_arguments(rows, dtype, rule, sizes=sizes, family=family))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_equals_naive(rows: int, dtype: torch.dtype) -> None:
    for sizes in (ODD, (3, 5, 1), (160, 300, 40)):
        for arguments in cases(rows, dtype, sizes):
            found, expected = cpu.plain_ffn(*arguments), naive.plain_ffn(*arguments)
            moved = (found[1] - expected[1]).abs().sum()
            assert moved <= 1, arguments[4:7]
            if not moved:
                assert_same(found, expected)


def test_naive_is_the_op_on_what_the_rows_stand_for() -> None:
    for arguments in cases(3, torch.float32):
        *stored, scales, columns = arguments
        stored[1] = dequantise_rows(stored[1], scales[0], torch.float32)
        stored[2] = dequantise_rows(stored[2], scales[1], torch.float32, columns)
        found, expected = naive.plain_ffn(*arguments), naive.plain_ffn(*stored)
        assert (found[1] - expected[1]).abs().sum() <= 1
        if torch.equal(found[1], expected[1]):
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_that_of_its_batch_of_one_with_any_number_of_threads(dtype: torch.dtype) -> None:
    for arguments in cases(5, dtype):
        y, counts = cpu.plain_ffn(*arguments)
        for n in range(5):
            alone = cpu.plain_ffn(arguments[0][n : n + 1], *arguments[1:])
            assert torch.equal(alone[0][0], y[n])
            assert torch.equal(alone[1][0], counts[n])
    for arguments in cases(2, dtype, (160, 1000, 40), ("threshold", "topk")):
        same_on_any_number_of_threads(cpu.plain_ffn, arguments)


def test_refuses_what_does_not_fit() -> None:
    *rest, scales, columns = in_int8(plain_arguments(1, torch.float32))
    for op, error in ((cpu.plain_ffn, RuntimeError), (naive.plain_ffn, ValueError)):
        with pytest.raises(error, match=r"int8 weights go with scales \[2, F\]"):
            op(*rest)
        with pytest.raises(error, match=r"int8 weights go with scales \[2, F\]"):
            op(*rest, scales)
    with pytest.raises(RuntimeError, match=r"scales has shape \[3, 193\], expected \[2, 193\]"):
        cpu.plain_ffn(*rest, torch.ones(3, 193), columns)
    rest[2] = rest[2].float()
    with pytest.raises(RuntimeError, match="down is float32, expected int8"):
        cpu.plain_ffn(*rest, scales, columns)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("part", [2**22, 65 * 5])
def test_block_equals_a_block_on_the_rounded_weights(conv1d: bool, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and prefill, also where that widens the rows in many parts."""
    monkeypatch.setattr("moyu_kernels.quantised.PART", part)
    arguments = plain_arguments(2, torch.float32)
    block = module(arguments, conv1d, cls=Int8PlainFFN)
    up, down = block.widened()
    assert torch.equal(up, dequantise_rows(*quantise_rows(arguments[1]), torch.float32))
    rounded = module([arguments[0], up, down, *arguments[3:]], conv1d)
    for rows in (1, 8, 9, 40):
        x = torch.randn(rows, 65)
        torch.testing.assert_close(block(x), rounded(x), rtol=1e-4, atol=1e-5)
    assert (block.counts - rounded.counts).abs().max() <= 1
    assert 0.1 < block.counts[2] / block.counts[0] / 193 < 0.9


@pytest.mark.parametrize(
    "family", [name if name == "gpt2" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_model_decodes_and_saves_what_its_rows_stand_for(checkpoint: Factory, tmp_path: Path, family: str) -> None:
    stock, blocks, field = model_of(family)
    folder = checkpoint(stock, blocks=blocks, field=field, threshold=0.2, family="lowbit_up")
    model = from_pretrained(folder, weights="int8", dtype=torch.float32)
    ffn = installed_ffn(model, blocks[0]["path"], blocks[0]["up"])
    assert isinstance(ffn, Int8PlainFFN)
    names = {f"{block['path']}.{block[part]}.weight" for block in blocks for part in ("up", "down")}
    assert names.isdisjoint(name for name, _ in model.named_parameters())
    assert all(weight.dtype == torch.int8 and weight.stride(1) == 1 for weight in ffn.weights)
    ids = torch.randint(128, (1, 9))
    stored = from_pretrained(folder, dtype=torch.float32)
    logits = model(ids).logits
    assert 1e-4 < (logits - stored(ids).logits).norm() / logits.norm() < 0.2
    runner = Runner(model, max_length=12)
    found = [runner.prefill(ids[:, :6]), *(runner.step(token) for token in ids[0, 6:])]
    runner.close()
    eager = Runner(model, max_length=12, compile=False)
    expected = [eager.prefill(ids[:, :6]), *(eager.step(token) for token in ids[0, 6:])]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    eager.close()
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert names == {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    for name in names:
        torch.testing.assert_close(after[name].float(), before[name].float(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_are_timed_on_inputs_that_go_with_the_biases(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "ROUNDS", 1)
    block = module(plain_arguments(2, dtype, family="lowbit_up"), mode="predicted", cls=Int8PlainFFN)
    assert block.input_dtype == dtype
    assert min(dispatch.time_ways([block], 2).values()) > 0
    assert block.to(torch.float32).input_dtype == block.widened()[0].dtype == torch.float32
