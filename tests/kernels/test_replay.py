"""Compiled CPU steps that are recorded once and replayed without Python."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moyu_kernels import Runner, from_pretrained
from moyu_kernels import replay as module
from sparse_checkpoints import tiny_llama
from test_runner import decode, prompt
from torch import nn

Factory = Callable[..., Path]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one a replayed step."""
    found: list[int] = []
    run = module._Tape.run

    def counted(tape: module._Tape, ids: torch.Tensor) -> torch.Tensor:
        found.append(1)
        return run(tape, ids)

    monkeypatch.setattr(module._Tape, "run", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("predictor", ["lowbit", pytest.param(None, marks=pytest.mark.slow)])
def test_steps_are_replayed_and_equal_eager_ones(
    checkpoint: Factory, replays: list[int], predictor: str | None
) -> None:
    model = from_pretrained(checkpoint(tiny_llama(torch.float32), threshold=0.1, family=predictor))
    ids = prompt(16, batch=2)
    eager = Runner(model, max_length=16, batch=2, compile=False)
    expected = decode(eager, ids, 6)
    eager.close()
    counts = [block.mlp.counts.clone() for block in model.model.layers]
    runner = Runner(model, max_length=16, batch=2)
    for turn in range(2):
        for block in model.model.layers:
            block.mlp.counts.zero_()
        found = decode(runner, ids, 6)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert len(replays) == (9, 19)[turn], "the first step is recorded"
        for block, count in zip(model.model.layers, counts, strict=True):
            assert torch.equal(block.mlp.counts, count)


def test_a_token_outside_the_vocabulary_is_an_error(replays: list[int]) -> None:
    runner, ids = Runner(tiny_llama(torch.float32), max_length=8), prompt(8)
    expected = decode(runner, ids, 5)
    with pytest.raises(RuntimeError, match="index out of bounds"):
        decode(runner, torch.tensor([[1, 2, 3, 4, 5, 10**6]]), 5)
    assert replays
    torch.testing.assert_close(decode(runner, ids, 5), expected, rtol=0, atol=0)


@torch.no_grad()
def test_tokens_of_another_dtype(replays: list[int]) -> None:
    runner, ids = Runner(tiny_llama(torch.float32), max_length=10), prompt(10)
    expected = decode(runner, ids, 5)
    for dtype in (torch.int32, torch.uint8):
        assert all(map(torch.equal, decode(runner, ids.to(dtype), 5), expected))
    assert len(replays) == 4 + 5 + 5
    first = Runner(tiny_llama(torch.float32), max_length=10)  # whose recording is of another dtype
    assert all(map(torch.equal, decode(first, ids.to(torch.int32), 5), expected))


@torch.no_grad()
def test_parameters_that_are_replaced(replays: list[int]) -> None:
    """Until the next prompt steps read the old ones, whose memory is kept."""
    model, ids = tiny_llama(torch.float32), prompt(10)
    runner = Runner(model, max_length=10)
    old = decode(runner, ids, 5)
    runner.prefill(ids[:, :5])
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1
    after = [torch.full_like(parameter, 1e6) for parameter in model.parameters()]  # where the old ones would have been
    steps = [runner.step(ids[:, i : i + 1]) for i in range(5, 10)]
    assert all(map(torch.equal, steps, old[1:]))
    del after
    new = decode(runner, ids, 5)
    torch.testing.assert_close(torch.cat(new), model(ids).logits[0, 4:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(new[-1], old[-1], atol=1e-3)
    assert len(replays) == 4 + 5 + 3, "compiled and recorded anew"


class OtherLinear(nn.Linear):
    """Not swapped for the runner's, so the step calls an op of PyTorch's."""


@torch.no_grad()
def test_what_is_not_all_recorded_is_not_replayed(replays: list[int]) -> None:
    model, ids = tiny_llama(torch.float32), prompt(12)
    for layer in model.model.layers:
        other = OtherLinear(*reversed(layer.self_attn.o_proj.weight.shape), bias=False)
        other.weight = layer.self_attn.o_proj.weight
        layer.self_attn.o_proj = other
    expected = model(ids).logits
    found = decode(Runner(model, max_length=12), ids, 6)
    torch.testing.assert_close(torch.cat(found), expected[0, 5:], rtol=1e-4, atol=1e-4)
    assert not replays


def test_code_that_asks_for_numbers_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("def call(args):\n    return args\n")
    (tmp_path / "asks.py").write_text("def call(args):\n    if args[0].item():\n        return args\n")
    step = torch.Tensor.clone
    for name, same in (("asks", True), ("plain", False)):
        written = SimpleNamespace(__globals__={"__file__": str(tmp_path / f"{name}.py")})
        code = SimpleNamespace(current_callable=SimpleNamespace(__func__=written))
        assert (module.replay(step, code) is step) == same
    assert module.replay(step, SimpleNamespace()) is step


def test_the_module_is_left_as_it_was() -> None:
    """Also where a step that is recorded fails."""
    names = {"__file__": __file__, "torch": torch, "aten": torch.ops.aten, "cpp_fused_0": step_zero}
    before = dict(names)
    recorder = module._Recorder(names)

    def step() -> None:
        with recorder.recording():
            assert names["torch"].bfloat16 is torch.bfloat16
            assert names["torch"].ops.moyu is torch.ops.moyu
            assert recorder.whole
            assert names["aten"].mm is torch.ops.aten.mm
            assert not recorder.whole
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert names == before
    for touch in (lambda: names["torch"].ops.aten.mm, lambda: names["torch"].mm, lambda: names["cpp_fused_0"](1)):
        recorder = module._Recorder(names)
        with recorder.recording():
            touch()
        assert not recorder.whole


def test_a_kernel_of_another_thread_is_not_recorded() -> None:
    library = module._library()
    assert not library.moyu_tape_kernel(None, None, 1)
    library.moyu_tape_begin()
    tape = library.moyu_tape_end()
    assert library.moyu_tape_replay(tape) is None
    library.moyu_tape_free(tape)


def step_zero(*args: int) -> None:
    """A kernel that is no C function."""
