"""A predictor that no op computes goes through the pipeline as simulated; a stale one is refused."""

import json
import logging
from pathlib import Path

import moyu_kernels
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_settings
from transformers import AutoConfig, AutoModelForCausalLM

from moyu_train.checkpoints.export import MANIFEST, read_state
from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.files import write_json
from moyu_train.pipeline import Run
from moyu_train.recipe import load_recipe
from moyu_train.training import stages

HISTORY = {"name": "history", "rank": 4, "decay": 0.5}


def prepare(folder: Path, **changes: object) -> Path:
    settings = tiny_settings(folder, save_tiny(folder / "model")) | changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


def test_history_is_called_simulated_all_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = prepare(tmp_path, predictor=HISTORY, control=None)
    assert main(["run", str(recipe)]) == 1
    assert "predictor 'history' has no kernel yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "calibrate").exists()
    assert main(["run", str(recipe), "--bench", "null"]) == 0
    assert "predictor 'history' is simulated" in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bytes_skipped"] is None
    assert result["untouched_bytes_skipped"] is None
    assert result["kernels"] is None
    assert result["ppl"]["sparse"] != result["ppl"]["rule"]
    folder = tmp_path / "run" / "export" / "checkpoint"
    with caplog.at_level(logging.WARNING):
        model = moyu_kernels.from_pretrained(folder)
    assert "simulated predictor (history, which no op computes): mode 'rule'" in caplog.text
    assert model.model.layers[0].mlp.mode == "rule"
    assert main(["bench", str(folder)]) == 1
    assert "predictors that no op computes (simulated)" in capsys.readouterr().err


def test_predictors_of_weights_that_have_changed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepare(tmp_path)
    for verb in ("calibrate", "fit-predictors"):
        assert main([verb, str(recipe)]) == 0
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["calibrate-in-loop", str(recipe)]) == 1
    assert "stage 'fit-predictors' is not finished" in capsys.readouterr().err
    # where the key cannot know, as with a model on a hub, the hash of the weights does
    run = Run(load_recipe(str(recipe)))
    record = json.loads((tmp_path / "run" / "fit-predictors" / "stage.json").read_text())
    monkeypatch.setattr(Run, "figures", lambda self, name: record["figures"])
    with pytest.raises(MoyuError, match="fitted for other weights; delete that folder and run `moyu fit-predictors`"):
        stages.in_loop(run, tmp_path / "out")


def test_stale_predictors_of_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "moyu").mkdir()
    save_file({"blocks.0.threshold": torch.ones(3)}, tmp_path / "moyu" / "state.safetensors")
    write_json(tmp_path / "config.json", {"moyu": {"predictor": {"ffn_sha256": "0" * 64}}})
    write_json(tmp_path / MANIFEST, {"ffn_sha256": "1" * 64})
    with pytest.raises(MoyuError, match=r"the predictors are stale, .* `moyu fit-predictors --from"):
        read_state(tmp_path)


def test_blocks_that_no_op_computes_go_through_to_the_report(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model")) | {
        "predictor": None,
        "control": None,
        "bench": None,
    }
    config = AutoConfig.from_pretrained(tmp_path / "model", mlp_bias=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["bytes_skipped"] is None
