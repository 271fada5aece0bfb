"""Where a predictor stops to pay, from timings that are given, and what is kept of those that are taken."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_kernels import Runner, SparseGatedFFN, dispatch, from_pretrained
from moyu_kernels.dispatch import DENSITIES, break_even, choose, time_ways
from moyu_kernels.modules import set_mode
from moyu_kernels.ops.cpu import build
from predictors import FAMILIES, random_predictor
from sparse_checkpoints import NEURONS, tiny_llama, write_checkpoint
from torch import nn


def times(rule: float, slope: float = 1.0) -> dict[str, float]:
    """Seconds of the exact rule, and of a predictor in proportion to its density."""
    return {"rule": rule} | {str(density): slope * density for density in DENSITIES}


def modes(model: torch.nn.Module) -> list[str]:
    return [module.mode for module in model.modules() if isinstance(module, SparseGatedFFN)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dispatch, "cache_folder", lambda: tmp_path / "cache")
    return write_checkpoint(tmp_path / "sparse", tiny_llama(torch.float32), selected=0.2)


def test_break_even_is_the_end_of_what_is_faster_throughout() -> None:
    assert break_even(times(rule=0.45)) == 0.4
    assert break_even(times(rule=0.01)) == 0.0
    assert break_even(times(rule=2.0)) == 0.9
    assert break_even(times(rule=0.45) | {"0.2": 0.5}) == 0.1


@pytest.mark.parametrize(
    ("batch", "bucket", "union", "mode"),
    [(1, 1, 0.2, "predicted"), (2, 2, 0.36, "predicted"), (3, 4, 0.488, "rule"), (5, 8, 0.67232, "rule")],
)
def test_modes_follow_the_union_of_a_batch(
    folder: Path, caplog: pytest.LogCaptureFixture, batch: int, bucket: int, union: float, mode: str
) -> None:
    model, asked = from_pretrained(folder), []

    def timer(blocks: Sequence[Any], size: int) -> dict[str, float]:
        asked.append((len(blocks), size))
        return times(rule=0.45)

    found = choose(model, batch, timer=timer)
    assert asked == [(2, bucket)], "blocks that are alike are timed once"
    assert found["union"] == pytest.approx(union)
    assert [kind["mode"] for kind in found["kinds"]] == [mode]
    assert modes(model) == [mode] * 2
    assert caplog.text.count("without their predictors at batch") == (mode == "rule")
    assert choose(model, batch, selected=0.9, timer=timer)["kinds"][0]["mode"] == "rule"
    choose(model, batch, selected=0.05, timer=timer)
    assert modes(model) == ["predicted"] * 2, "and back"


def test_what_is_measured_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def timer(blocks: Sequence[Any], batch: int) -> dict[str, float]:
        calls.append(batch)
        return times(rule=0.1 if batch > 1 else 0.5)

    monkeypatch.setattr(dispatch, "time_ways", timer)
    assert modes(from_pretrained(folder, dispatch="measure")) == ["predicted"] * 2
    model = from_pretrained(folder, dispatch="measure")
    assert calls == [1]
    ids = torch.arange(6).view(2, 3)
    runner = Runner(model, max_length=8, batch=2, compile=False)
    assert calls == [1, 2]
    assert modes(model) == ["rule"] * 2
    assert torch.equal(runner.prefill(ids), runner.prefill(ids))
    assert modes(model) == ["rule"] * 2
    Runner(model, max_length=8, compile=False)
    assert modes(model) == ["predicted"] * 2
    (one, two) = (tmp_path / "cache").iterdir()
    for path in (one, two):
        assert json.loads(path.read_text())["about"].startswith(f"D 64, F {NEURONS}, float32, silu, lowrank 16, ")
        path.write_text("{")
    choose(model)
    assert calls == [1, 2, 1], "what is damaged is measured anew"
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        choose(model)
    finally:
        torch.set_num_threads(before)
    assert calls == [1, 2, 1, 1], "other threads, other times"
    with monkeypatch.context() as other:
        other.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
        choose(model)
    choose(model)
    assert calls == [1, 2, 1, 1, 1], "other kernels, other times"
    calls.pop()
    model.to(torch.bfloat16)
    choose(model)
    assert calls == [1, 2, 1, 1, 1]
    monkeypatch.setattr(dispatch, "cache_folder", lambda: folder / "config.json")
    choose(model)  # a cache that cannot be written costs time and nothing else
    assert calls == [1, 2, 1, 1, 1, 1]


def test_blocks_that_were_set_to_dense_stay_dense(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "time_ways", lambda blocks, batch: times(rule=0.45))
    model = from_pretrained(folder, dispatch="measure")
    set_mode(model, "dense")
    Runner(model, max_length=8, compile=False)
    assert modes(model) == ["dense"] * 2
    set_mode(model, "rule")
    Runner(model, max_length=8, compile=False)
    assert modes(model) == ["predicted"] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["stored", "int8"])
def test_each_density_is_timed_at_just_so_many_neurons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, weights: str
) -> None:
    folder = write_checkpoint(tmp_path / "sparse", tiny_llama(), family=family)
    model = from_pretrained(folder, weights=weights)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SparseGatedFFN)]
    selected, run = [], SparseGatedFFN.run_op

    def watched(self: Any, x: torch.Tensor, predictor: list[torch.Tensor]) -> Any:
        y, counts = run(self, x, predictor)
        selected.append(counts[:, 0].tolist())
        return y, counts

    monkeypatch.setattr(SparseGatedFFN, "run_op", watched)
    found = time_ways(blocks, 3)
    assert set(found) == {"rule", *map(str, DENSITIES)}
    assert all(seconds > 0 for seconds in found.values())
    round_of = [[NEURONS] * 3] * 2
    for density in DENSITIES:
        round_of += [[-int(-density * NEURONS // 1)] * 3] * 2
    assert selected == round_of * (dispatch.ROUNDS + 1)
    assert all(block.counts.sum() == 0 for block in blocks)


def test_blocks_whose_rows_lie_otherwise_are_timed_by_themselves() -> None:
    def block(names: dict[str, int]) -> SparseGatedFFN:
        projections = {name: nn.Linear(16, rows, bias=False) for name, rows in names.items()}
        projections["down"] = nn.Linear(32, 16, bias=False)
        return SparseGatedFFN(projections, "silu", torch.zeros(32), random_predictor("lowbit", 16, 32, 4))

    blocks = [block(names) for names in ({"gate": 32, "up": 32}, {"gate_up": 64}, {"gate": 32, "up": 32})]
    assert [len(found) for found in dispatch._kinds(nn.ModuleList(blocks)).values()] == [2, 1]


def test_what_has_nothing_to_choose_from_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dispatch 'fast' is unknown; use one of off, measure"):
        from_pretrained(folder, dispatch="fast")
    for more in ({"mode": "rule"}, {"backend": "reference"}):
        with pytest.raises(ValueError, match="dispatch 'measure' chooses between a predictor and the exact rule"):
            from_pretrained(folder, dispatch="measure", **more)
    plain = write_checkpoint(tmp_path / "plain", tiny_llama(), family=None)
    with pytest.raises(ValueError, match="this model has no predictors"):
        from_pretrained(plain, dispatch="measure")
    with pytest.raises(ValueError, match="batch is 9"):
        choose(from_pretrained(folder), 9)
    unknown = write_checkpoint(tmp_path / "unknown", tiny_llama())
    with pytest.raises(ValueError, match="does not say what share of the neurons"):
        from_pretrained(unknown, dispatch="measure")
