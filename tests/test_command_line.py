"""Verbs by the real command line that need no finished run: step cost, plain and simulated blocks, deltas, recipes."""

import json
from pathlib import Path

import pytest
from command import ROOT, moyu, prepare
from peft import PeftConfig

from moyu_train.files import sha256
from moyu_train.recipe import load_recipe


def test_step_cost_compares_with_the_plain_trainer(tmp_path: Path) -> None:
    recipe = prepare(tmp_path)
    moyu("step-cost", str(recipe), "--penalty", "{name: hoyer, coefficient: 0.1}", "--json", str(tmp_path / "c.json"))
    figures = json.loads((tmp_path / "c.json").read_text())
    assert figures["tokens_per_step"] == 128
    assert figures["time_ratio_least"] <= figures["time_ratio"] <= figures["time_ratio_most"]
    assert figures["memory_ratio"] == figures["sparse_peak_bytes"] / figures["plain_peak_bytes"]


def test_blocks_without_a_kernel_train_and_are_called_simulated(tmp_path: Path) -> None:
    recipe = prepare(tmp_path, "mixtral")
    for left in (["--bench", "null"], ["--predictor", "null"]):
        error = moyu("run", str(recipe), "--sparsifier", "{name: topk}", *left, code=1).stderr
        assert (
            "the kernels cannot skip anything in model.layers.0.mlp.experts, since layout 'experts' has no op" in error
        )
    options = ["--sparsifier", "{name: topk}", "--predictor", "null", "--bench", "null"]
    out = moyu("run", str(recipe), *options)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["bytes_skipped"] is None
    assert result["mask_path"].startswith("simulated")
    assert result["neurons_off"] == pytest.approx(0.5)
    assert result["ppl"]["sparse"] == result["ppl"]["rule"]
    assert "simulated, nothing is skipped" in (tmp_path / "run" / "report.html").read_text()
    assert "stage 'bench' is not part of this recipe" in moyu("bench", str(recipe), *options, code=1).stderr
    plot = tmp_path / "routes.png"
    table = moyu("collect", str(tmp_path / "run"), "--json", str(tmp_path / "rows.json"), "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "simulated" in table.stdout
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    for name in ("route", "tokens", "neurons_off", "bytes_skipped", "ppl", "ppl_over_control", "ppl_over_dense"):
        assert name in row
    assert row["ppl_over_dense"] == pytest.approx(result["ppl"]["sparse"] / result["ppl"]["dense"])
    assert "has no finished stage 'finetune'" in moyu("collect", str(tmp_path), code=1).stderr
    assert out.returncode == 0


def test_a_plain_ffn_goes_all_the_way(tmp_path: Path) -> None:
    """Predictors of up alone, kernels in the loop, speed; GPT-2's weights are stored transposed."""
    moyu("run", str(prepare(tmp_path, "gpt2")))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["mask_path"].startswith("through moyu_kernels")
    assert 0 < result["bytes_skipped"] < 1
    assert result["decode_tokens_per_second"]["sparse"] > 0
    config = json.loads((tmp_path / "run" / "export" / "checkpoint" / "config.json").read_text())
    assert config["moyu"]["predictor"]["family"] == "lowbit_up"


def test_a_delta_rebuilds_the_model_and_a_control_is_reused(tmp_path: Path) -> None:
    recipe = prepare(tmp_path)
    options = ["--predictor", "null", "--bench", "null", "--finetune.lora", "{rank: 4}"]
    options += ["--finetune.dtype", "bfloat16"]  # the trainer's autocast must not reach the merge
    moyu("run", str(recipe), *options)
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    delta = tmp_path / "run" / "finetune" / "delta"
    assert sum(file.stat().st_size for file in delta.iterdir()) < 60_000
    again = [
        *options,
        "--run",
        str(tmp_path / "again"),
        "--delta",
        str(delta),
        "--control.reuse",
        str(tmp_path / "run"),
    ]
    moyu("run", str(recipe), *again)
    second = json.loads((tmp_path / "again" / "result.json").read_text())
    assert second["ppl"] == first["ppl"]
    assert second["hashes"]["ffn"] == first["hashes"]["ffn"]
    with pytest.raises(KeyError, match="MOYU_LORA"):  # stock peft must not take it without the masks
        PeftConfig.from_pretrained(delta)
    other = moyu("control", str(recipe), *again, "--finetune.weight_decay", "0.1", code=1)
    assert "holds no finished control of the same model" in other.stderr
    assert json.loads((tmp_path / "again" / "finetune" / "stage.json").read_text())["figures"]["tokens"] == 1024
    third = [*options, "--run", str(tmp_path / "third"), "--delta", str(delta)]
    moyu("calibrate", str(recipe), *third, "--target_sparsity", "0.6")
    other = moyu("finetune", str(recipe), *third, "--target_sparsity", "0.6", code=1)
    assert "and the recipe asks for" in other.stderr
    (delta / "moyu.safetensors").write_bytes(b"x")
    moyu("calibrate", str(recipe), *third)
    assert "missing, or changed since the delta was written" in moyu("finetune", str(recipe), *third, code=1).stderr


def test_the_released_delta_is_whole() -> None:
    recipe = load_recipe(str(ROOT / "recipes" / "smollm2-135m" / "released.yaml"))
    folder = ROOT / recipe.delta
    manifest = json.loads((folder / "delta.json").read_text())
    for name, expected in manifest["files"].items():
        assert sha256(folder / name) == expected
    assert sum(file.stat().st_size for file in folder.iterdir()) < 25_000_000


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    assert "smollm2-135m/quickstart" in moyu("recipes").stdout
    target = tmp_path / "mine.yaml"
    moyu("recipes", "--copy", "smollm2-135m/quickstart", str(target))
    moyu("run", str(target), "--dry-run")
    assert (
        "did you mean 'smollm2-135m/quickstart'"
        in moyu("recipes", "--copy", "smollm2-135m/quickstrt", str(tmp_path / "x"), code=1).stderr
    )


def test_env_names_versions_and_kernels() -> None:
    out = moyu("env").stdout
    assert "transformers" in out
    assert "cpu kernels" in out
