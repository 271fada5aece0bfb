"""`moyu compare-predictors` on a tiny model: what it writes, and that its figures are what they say."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import save_tiny, tiny_settings

from moyu_train.cli import main
from moyu_train.evaluation.compare import mass_gains
from moyu_train.evaluation.inloop import Counts

ROW = [
    "family",
    "bytes_share",
    "recall",
    "precision",
    "mass_kept",
    "bytes_skipped",
    "ppl_over_oracle",
    "ppl_over_dense",
]
FAMILIES = [{"name": "lowrank", "rank": 4}, {"name": "history", "rank": 3}, {"name": "lowbit", "bits": 1}]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("compare")
    settings = tiny_settings(folder, save_tiny(folder / "model"))
    settings |= {"predictor": None, "control": None, "bench": None}
    settings["compare"] = {"predictors": FAMILIES, "bytes_skipped": [0.2, 0.35]}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = ["compare-predictors", str(recipe), "--json", str(folder / "rows.json"), "--plot", str(folder / "f.png")]
    assert main(command) == 0
    return recipe, json.loads((folder / "rows.json").read_text())


def test_rows(compared: tuple[Path, dict]) -> None:
    recipe, figures = compared
    assert (recipe.parent / "f.png").is_file()
    rows, points = figures["rows"], figures["points"]
    assert [list(row) for row in rows] == [ROW] * 6
    assert [row["family"] for row in rows[:3]] == ["lowrank rank=4", "history rank=3", "lowbit bits=1"]
    for row, point in zip(rows, points, strict=True):
        assert abs(point["would_skip"] - point["target"]) < 0.06
        simulated = row["family"].startswith("history")
        assert point["simulated"] == simulated
        assert row["bytes_skipped"] == (None if simulated else point["would_skip"])
        assert 0 < row["recall"] < 1
        assert 0 < row["mass_kept"] < 1
        assert row["ppl_over_dense"] == point["ppl"] / figures["ppl"]["dense"]
    assert rows[0]["recall"] > rows[3]["recall"]
    assert rows[0]["bytes_share"] == (4 * (32 + 96) + 4 * (4 + 2 * 96)) / (3 * 32 * 96 * 4)
    assert all(gain["gain"] == gain["low"] == gain["high"] == 0 for gain in points[0]["mass_gain_on_first"])


def test_a_second_run_reads_the_sums_of_the_first(compared: tuple[Path, dict]) -> None:
    recipe, figures = compared
    again = recipe.parent / "again.json"
    assert main(["compare-predictors", str(recipe), "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == figures


def test_the_untouched_model_can_be_compared_too(compared: tuple[Path, dict]) -> None:
    recipe, figures = compared
    out = recipe.parent / "dense.json"
    assert main(["compare-predictors", str(recipe), "--json", str(out), "--compare.model", "dense"]) == 0
    assert json.loads(out.read_text())["ffn_sha256"] != figures["ffn_sha256"]


def test_a_target_out_of_reach_and_an_unknown_family_are_refused(
    compared: tuple[Path, dict], capsys: pytest.CaptureFixture
) -> None:
    recipe, _ = compared
    assert main(["compare-predictors", str(recipe), "--compare.bytes_skipped", "[0.99]"]) == 1
    assert "compare.bytes_skipped 0.99 cannot be reached" in capsys.readouterr().err
    assert main(["compare-predictors", str(recipe), "--compare.predictors", "[{name: lowrnk}]"]) == 1
    assert "compare.predictors.name 'lowrnk' is unknown; did you mean 'lowrank'?" in capsys.readouterr().err


def test_mass_gains_are_paired_over_documents() -> None:
    def counts(kept: list[float]) -> Counts:
        found = Counts.zeros(2)
        found.mass_kept[:] = torch.tensor(kept)
        found.mass_rule[:] = 10.0
        return found

    ours, theirs = [counts([8, 5]), counts([6, 7])], [counts([7, 6]), counts([5, 6])]
    first, second = mass_gains(ours, theirs)
    assert first == pytest.approx({"gain": 0.1, "low": 0.1, "high": 0.1})
    assert second["low"] == pytest.approx(-0.1)
    assert second["gain"] == pytest.approx(0.0)
    assert second["high"] == pytest.approx(0.1)
