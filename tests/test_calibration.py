"""Calibration to each goal, with the model in the loop: met, shared out among layers, counted at a batch, resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels.loading import CheckpointError, from_pretrained
from pydantic import ValidationError
from tiny import save_tiny, tiny_model, tiny_settings

from moyu_train.analysis.plots import calibration
from moyu_train.cli import main
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks, bytes_skipped
from moyu_train.evaluation.perplexity import score, side_by_side
from moyu_train.models.blocks import ffn_sha256, find_blocks
from moyu_train.models.loading import load_dense
from moyu_train.predictors.lowbit import LowBit
from moyu_train.settings import Calibrate
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.cuts import find_cuts
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.loop import Loop, calibrate_in_loop, meet, miss
from moyu_train.training.rule import calibrate_rule

TOKENS = 1200


@torch.no_grad()
def model_and_text() -> tuple[Any, Documents]:
    """A tiny model whose second layer matters far less than its first, and text of its own, which it knows best."""
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.mul_(20)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    model.model.norm.weight.mul_(8)  # surer of its next token
    generator = torch.Generator().manual_seed(0)
    ids, cache = torch.tensor([[1], [2], [3], [4]]), None
    for _ in range(TOKENS // 4 - 1):
        found = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        ids = torch.cat([ids, torch.multinomial(found.logits[:, -1].softmax(-1), 1, generator=generator)], dim=1)
    return model, Documents(list(ids))


MODEL, DOCUMENTS = model_and_text()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list, list]:
    """A model, its rules and its fitted predictors."""
    model = MODEL
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.5, DOCUMENTS, TOKENS, passes=1)
    trainer = PredictorTrainer(model, rule.rules, LowBit, LowBit.Options(), tmp_path_factory.mktemp("fit"))
    return model, rule.rules, trainer.fit(DOCUMENTS.packed(50, 0), save_every=100)


def calibrated(parts: tuple[Any, list, list], log: Path | None = None, **goal: Any) -> tuple[list, dict[str, Any]]:
    return calibrate_in_loop(*parts, DOCUMENTS, Calibrate(tokens=TOKENS, **goal), itemsize=4, log=log)


@pytest.mark.parametrize("goal", [{"bytes_skipped": 0.3}, {"ppl_over_rule": 1.05}, {"recall": 0.9}])
def test_every_goal_is_met_by_the_predictors_that_come_back(parts: tuple, goal: dict[str, float]) -> None:
    model, rules, _ = parts
    predictors, figures = calibrated(parts, **goal)
    with SparseMasks(model, rules, predictors) as masks:
        sparse = score(model, DOCUMENTS, 1024, "test").perplexity
    with SparseMasks(model, rules, None):
        rule = score(model, DOCUMENTS, 1024, "test").perplexity
    found = {
        "bytes_skipped": bytes_skipped(masks.blocks, masks.counts, predictors, 4),
        "ppl_over_rule": sparse / rule,
        "recall": sum(row["recall"] for row in masks.per_layer()) / 2,
    }
    for name, value in found.items():
        assert figures[name] == pytest.approx(value, rel=1e-5)
    assert figures["goal"] == goal
    ((name, value),) = goal.items()
    within = {"bytes_skipped": (-0.002, 0.002), "ppl_over_rule": (-0.0025, 0), "recall": (0, 0.005)}[name]
    assert within[0] <= figures[name] - value <= within[1]


def test_a_cut_is_taken_as_it_is(parts: tuple) -> None:
    predictors, figures = calibrated(parts, cut=0.25)
    for before, after in zip(parts[2], predictors, strict=True):
        torch.testing.assert_close(after["bias"], before["bias"] - 0.25)
    assert [layer["cut"] for layer in figures["layers"]] == [0.25, 0.25]
    assert (figures["rounds"], figures["goal"]) == (1, {"cut": 0.25})
    assert Calibrate(cut=0).goal == ("cut", 0)
    assert len(calibration(figures).axes[0].collections) == 2
    with pytest.raises(ValidationError, match="leaves nothing to search"):
        Calibrate(cut=0, search=3)


def test_layers_that_matter_little_give_their_bytes(parts: tuple) -> None:
    _, even = calibrated(parts, bytes_skipped=0.4)
    _, searched = calibrated(parts, bytes_skipped=0.4, search=8)
    assert abs(searched["bytes_skipped"] - 0.4) <= 0.002
    assert searched["even"] == {name: even[name] for name in searched["even"]}
    assert searched["ppl_over_rule"] < even["ppl_over_rule"] - 0.001
    assert searched["layers"][1]["selected"] < searched["layers"][0]["selected"] - 0.1
    assert {point["even"] for point in searched["frontier"]} == {True, False}


def test_bytes_at_a_batch_are_those_of_the_union(parts: tuple) -> None:
    model, rules, predictors = parts
    windows = DOCUMENTS.windows(256)
    groups = side_by_side(windows, 3)
    assert [[document for document, _ in group] for group in groups] == [[0, 1, 2], [3, 0, 1]]
    assert [{len(piece) for _, piece in group} for group in groups] == [{256}, {44}]
    with SparseMasks(model, rules, predictors, [1.0, 1.0], batch=3) as masks:
        score(model, DOCUMENTS, 256, "test", batch=3)
    unions = torch.zeros(2)
    seen: list[torch.Tensor] = []
    for group in groups:
        for _, piece in group:
            with SparseMasks(model, rules, predictors, [1.0, 1.0], observe=lambda _, s: seen.append(s > 1)) as single:
                score(model, Documents([piece]), 256, "test")
            assert single.counts.steps[0] == single.counts.tokens[0] == len(piece)
    for start in range(0, len(seen), 6):  # three windows of two layers
        for layer in (0, 1):
            unions[layer] += torch.cat(seen[start + layer : start + 6 : 2]).any(0).sum()
    assert masks.counts.selected_rows.tolist() == unions.tolist()
    assert (masks.counts.selected > masks.counts.selected_rows).all()
    assert masks.counts.steps.tolist() == [300, 300]
    _, one = calibrated(parts, recall=0.8)
    _, three = calibrated(parts, recall=0.8, batch=3)
    assert three["bytes_skipped"] < one["bytes_skipped"] - 0.05
    assert three["recall"] == pytest.approx(one["recall"], abs=0.01)


def test_a_search_goes_on_where_it_was_broken_off(
    parts: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = {"recall": 0.85, "search": 3}
    _, whole = calibrated(parts, **goal)
    measure, runs = Loop._measure, []

    def broken(self: Loop, cuts: list[float], what: str) -> dict[str, Any]:
        if len(runs) == 6:
            raise KeyboardInterrupt
        runs.append(what)
        return measure(self, cuts, what)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_measure", broken)
        with pytest.raises(KeyboardInterrupt):
            calibrated(parts, tmp_path / "search.jsonl", **goal)
    with (tmp_path / "search.jsonl").open("a") as file:
        file.write('{"cuts": [0.1')  # killed while it wrote
    again: list[str] = []
    monkeypatch.setattr(Loop, "_measure", lambda self, cuts, what: again.append(what) or measure(self, cuts, what))
    _, resumed = calibrated(parts, tmp_path / "search.jsonl", **goal)
    assert resumed == whole
    assert len(again) == whole["rounds"] - 6


def test_the_guide_expects_the_bytes_of_its_own_pass(parts: tuple) -> None:
    model, rules, predictors = parts
    (cuts,), found = find_cuts(model, rules, [predictors], DOCUMENTS, {})
    with SparseMasks(model, rules, None):
        assert score(model, DOCUMENTS, 1024, "test").perplexity == pytest.approx(found.perplexity)
    blocks = find_blocks(model)
    shares = cuts.shared_out(blocks, 0.4)
    assert sum(shares) / 2 == pytest.approx(0.4)
    levels = cuts.all.levels([0.3, 0.3])
    with SparseMasks(model, rules, predictors, levels) as masks:
        find_cuts(model, rules, [predictors], DOCUMENTS, {})
    assert masks.counts.selected[0] / masks.counts.tokens[0] / 96 == pytest.approx(0.3, abs=0.002)
    assert cuts.bytes_skipped(blocks, predictors, [0.3, 0.3], 4) > cuts.bytes_skipped(blocks, predictors, [0.5, 0.5], 4)


@pytest.mark.parametrize(
    ("goal", "curve"),
    [
        (("bytes_skipped", 0.5), lambda s: {"bytes_skipped": 0.9 - s**0.5 * 0.8}),
        (("ppl_over_rule", 1.01), lambda s: {"ppl_over_rule": 1 + 0.3 * (1 - s) ** 6, "bytes_skipped": 1 - s}),
        (("recall", 0.97), lambda s: {"recall": 1 - (1 - s) ** 4, "bytes_skipped": 1 - s}),
    ],
)
def test_goals_are_met_in_a_few_runs_from_one_point(goal: tuple, curve: Any) -> None:
    runs: list[float] = []
    level, point = meet(lambda s: runs.append(s) or curve(s), goal, [(0.3, curve(0.3))])
    assert abs(miss(*goal, point)) <= 1
    assert curve(level) == point
    assert len(runs) <= 7


def test_goals_out_of_reach_say_what_was_reached() -> None:
    with pytest.raises(MoyuError, match=r"recall 0\.9 was not reached in the loop: 0\.5000 .* lower it"):
        meet(lambda s: {"recall": 0.5, "bytes_skipped": 1 - s}, ("recall", 0.9), [(0.3, {"recall": 0.5})])
    flat = {"ppl_over_rule": 1.2, "bytes_skipped": 0.3}
    with pytest.raises(MoyuError, match=r"ppl_over_rule 1\.1 was not reached .* 1\.2000 .* raise it"):
        meet(lambda s: flat, ("ppl_over_rule", 1.1), [(0.3, flat)])


def test_one_goal_and_no_other_name() -> None:
    assert Calibrate().goal == ("bytes_skipped", 0.45)
    assert Calibrate(recall=0.9).goal == ("recall", 0.9)
    assert Calibrate(bytes_skipped=None, ppl_over_rule=1.02).goal == ("ppl_over_rule", 1.02)
    with pytest.raises(ValidationError, match=r"bytes_skipped 0\.4 and recall 0\.9 are given; set all but one to null"):
        Calibrate(bytes_skipped=0.4, recall=0.9)


def test_wrong_goals_are_refused_before_a_model_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": "nowhere", "calibrate": {"bytes_skipped": 0.4}}))
    assert main(["calibrate-in-loop", str(recipe), "--calibrate.recal", "0.9"]) == 1
    assert "unknown key 'calibrate.recal'; did you mean 'recall'?" in capsys.readouterr().err
    assert main(["calibrate-in-loop", str(recipe), "--calibrate.recall", "0.9"]) == 1
    assert "calibrate takes one goal" in capsys.readouterr().err
    assert main(["calibrate-in-loop", str(recipe), "--calibrate.tokens_per_second", "50"]) == 1
    assert "unknown key 'calibrate.tokens_per_second'" in capsys.readouterr().err


def test_too_few_windows_for_the_batch_are_refused(parts: tuple) -> None:
    with pytest.raises(MoyuError, match=r"calibrate\.batch 8 needs as many windows .* there are 2 of up to 256 tokens"):
        calibrate_in_loop(*parts, DOCUMENTS, Calibrate(tokens=512, recall=0.9, batch=8), itemsize=4)


def test_predictors_of_a_checkpoint_are_fitted_again_on_changed_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: a run for a recall at a batch, its weights changed, refused, fitted again."""
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings |= {"control": None, "bench": None, "predictor": {"name": "svd", "rank": 6}}
    settings["calibrate"] = {"tokens": 256, "recall": 0.8, "search": 1}
    recipe, run = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(settings))
    for stage in ("calibrate", "fit-predictors", "calibrate-in-loop", "finetune", "refit-predictors", "recalibrate"):
        assert main([stage, str(recipe)]) == 0
    assert "Calibration on validation text for recall 0.8, at batch 1" in capsys.readouterr().out
    assert main(["export", str(recipe)]) == 0
    folder = run / "export" / "checkpoint"
    figures = json.loads((run / "recalibrate" / "stage.json").read_text())["figures"]
    assert figures["recall"] >= 0.8
    assert (run / "recalibrate" / "calibration.png").is_file()
    about = json.loads((folder / "config.json").read_text())["moyu"]["predictor"]
    assert about["calibration"]["frontier"] == figures["frontier"]
    assert about["selected"] == figures["selected_share"]

    model = load_dense(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.add_(torch.randn(96, 32))
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="where you changed weights, fit predictors for them with") as error:
        from_pretrained(folder)
    assert f"moyu fit-predictors --from {folder}" in str(error.value)
    text = ["--data.train", settings["data"]["train"], "--data.validation_documents", "2"]
    assert main(["fit-predictors", "--from", str(run), *text, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["family"] == "svd"
    assert figures["goal"] == {"recall": 0.8}
    assert figures["tokens"] == 1024
    assert figures["ffn_sha256"] == ffn_sha256(model) != about["ffn_sha256"]
    assert not (run / "export" / "checkpoint.refit").exists()
    loaded = from_pretrained(folder)
    assert loaded.model.layers[0].mlp.mode == "predicted"
    again = json.loads((folder / "config.json").read_text())
    assert again["architectures"] == ["MoyuLlamaForCausalLM"]
    assert again["moyu"]["predictor"]["settings"] == about["settings"]


def test_checkpoints_that_cannot_be_fitted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit-predictors", "--from", str(tmp_path)]) == 1
    assert "is neither a sparse checkpoint" in capsys.readouterr().err
    (tmp_path / "moyu").mkdir()
    (tmp_path / "moyu" / "state.safetensors").touch()
    config = {"moyu": {"predictor": {"family": "lowrank"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["fit-predictors", "--from", str(tmp_path)]) == 1
    assert "does not record how predictors are fitted; it says that their family is stored as 'lowrank'" in (
        capsys.readouterr().err
    )
    config["moyu"]["predictor"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["fit-predictors", "--from", str(tmp_path)]) == 1
    assert "has no predictors to fit again" in capsys.readouterr().err
