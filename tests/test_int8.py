"""A recipe with `export.weights: int8`: every stage after fine-tuning is on the rounded weights, and says so."""

import copy
import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
import yaml
from moyu_kernels.ops.ffn.int8 import quantise_down
from moyu_kernels.quantised import Int8GatedFFN
from moyu_kernels.rules import Rule
from tiny import CONFIGS, randomised, save_tiny, tiny_settings, tokenizer

from moyu_train.analysis.tables import quality_table, speed_table
from moyu_train.checkpoints.export import export
from moyu_train.checks import check_model
from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_llamacpp import KINDS
from moyu_train.models.blocks import ffn_bytes, ffn_sha256, find_blocks
from moyu_train.models.int8 import int8_twin, round_ffn
from moyu_train.models.loading import load_dense, skeleton
from moyu_train.recipe import load_recipe
from moyu_train.settings_export import Export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rows that are a cache line each."""
    folder = tmp_path_factory.mktemp("int8")
    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_size = 64
    randomised(config).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    settings = tiny_settings(folder, folder / "model")
    settings |= {"control": None, "analyze": {"tokens": 128, "sparsities": [0.5], "measures": []}}
    settings["calibrate"]["bytes_skipped"] = 0.1
    settings["finetune"]["tokens"] = 256
    settings["export"] = {"dtype": "bfloat16", "weights": "int8"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    assert main(["run", str(folder / "tiny.yaml")]) == 0
    return folder / "run"


def figures(run: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / stage / "stage.json").read_text())["figures"]
    return found


def test_the_stages_agree(run: Path) -> None:
    result, exported = json.loads((run / "result.json").read_text()), figures(run, "export")
    assert (result["weights"], result["dtype"], exported["weights"]) == ("int8", "bfloat16", "int8")
    ffn = 3 * 96 * (64 + 4) + 4 * 64
    assert result["weights_over_dtype"] == pytest.approx(ffn / (3 * 96 * 64 * 2))
    predictor = 2 * 96 * 16 + 6 * 4 * 96
    assert result["predictor_bytes_share"] == pytest.approx(predictor / ffn)
    tuned = load_dense(run / "finetune" / "model")
    trained = ffn_sha256(tuned)
    assert figures(run, "refit-predictors")["ffn_sha256"] == ffn_sha256(round_ffn(tuned)) != trained
    assert figures(run, "verify")["logits_relative_error"] < 1e-4
    assert result["kernels"]["fp32_perplexity"] == pytest.approx(result["kernels"]["masked_perplexity"], rel=1e-4)
    ppl = result["ppl"]
    assert 0 < abs(ppl["dense_int8"] / ppl["dense"] - 1) < 0.02
    assert result["ratio"] == pytest.approx(ppl["sparse"] / ppl["dense"])
    assert result["bytes_skipped"] == pytest.approx(0.1, abs=0.05)
    text = str(quality_table(result).columns[-1]._cells)
    assert "int8, 0.54 of the bytes" in text
    assert "over it on int8 weights" in str(speed_table(result).caption)


def test_bench_counts_int8_bytes(run: Path) -> None:
    rows = {row["setting"]: row for row in figures(run, "bench")["rows"]}
    assert set(rows) - set(KINDS) == {"dense_eager", "dense_runner", "dense_int8", "sparse"}
    plain, int8 = 2 * 3 * 96 * 64 * 2, 2 * (3 * 96 * (64 + 4) + 4 * 64)
    assert rows["dense_runner"]["bytes"] - rows["dense_int8"]["bytes"] == plain - int8
    skipped = rows["dense_int8"]["bytes"] - rows["sparse"]["bytes"]
    assert skipped == pytest.approx(rows["sparse"]["bytes_skipped"] * int8)
    assert rows["sparse"]["weights_over_dtype"] == pytest.approx(int8 / plain)


def test_the_checkpoint_by_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "export" / "checkpoint"
    assert main(["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0
    assert "3 tokens" in capsys.readouterr().out
    model = moyu_kernels.from_pretrained(folder)
    block = model.model.layers[0].mlp
    assert isinstance(block, Int8GatedFFN)
    stored = load_dense(run / "finetune" / "model", torch.bfloat16)
    assert torch.equal(block.down_codes, quantise_down(stored.model.layers[0].mlp.down_proj.weight.T)[0])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_twin_reads_int8_rows_and_shares_the_rest(family: str) -> None:
    model = randomised(CONFIGS[family]).requires_grad_(False)
    twin, ids = int8_twin(model), torch.arange(12)[None]
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    expected = model(ids).logits
    torch.testing.assert_close(twin(ids).logits, round_ffn(model)(ids).logits, rtol=1e-3, atol=1e-3)
    assert (twin(ids).logits - expected).norm() / expected.norm() > 1e-4


def test_gate_and_up_in_one_matrix_decode_and_round_as_two(tmp_path: Path) -> None:
    """Phi-3: its int8 rows, its stock state dict and its logits are those of a rounded model."""
    model = load_dense(save_tiny(tmp_path / "model", "phi3"))
    block = find_blocks(model)[0]
    gate, up, _ = block.matrices()
    assert (gate.data_ptr(), gate.shape, up.shape) == (block.module.gate_up_proj.weight.data_ptr(), (96, 32), (96, 32))
    ids = torch.arange(6)[None]
    stock = set(model.state_dict())
    for weights in ("stored", "int8"):
        rules = [Rule(torch.zeros(96)) for _ in range(2)]
        export(model, tokenizer(), tmp_path / weights, "threshold", rules, None, None, weights=weights)
        sparse = moyu_kernels.from_pretrained(tmp_path / weights)
        assert sum(isinstance(m, moyu_kernels.SparseGatedFFN) for m in sparse.modules()) == 2
        expected = round_ffn(copy.deepcopy(model)) if weights == "int8" else model
        assert set(sparse.state_dict()) == stock
        for name, value in sparse.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name])
        with torch.no_grad():
            torch.testing.assert_close(sparse(ids).logits, expected(ids).logits, rtol=1e-3, atol=1e-3)


def test_bytes_of_int8_have_their_scales() -> None:
    (block, _) = find_blocks(randomised(CONFIGS["llama"]))
    assert [ffn_bytes(block, size) for size in (4, 2, 1)] == [36864, 18432, 9216 + 4 * (3 * 96 + 32)]
    assert [Export(dtype=dtype).itemsize for dtype in ("float32", "float16")] == [4, 2]
    assert Export(weights="int8").itemsize == 1


def test_what_has_no_op_is_refused(tmp_path: Path) -> None:
    options = ["--export.weights", "int8", "--sparsifier.name", "threshold", "--predictor", "null", "--bench", "null"]
    recipe = load_recipe(str(save_tiny(tmp_path / "model", "mixtral")), options)
    with pytest.raises(
        MoyuError, match=r"export\.weights 'int8'.*layout 'experts' has no op.*--export\.weights stored"
    ):
        check_model(recipe, skeleton(recipe.model))
    check_model(load_recipe(recipe.model, [*options, "--export.weights", "stored"]), skeleton(recipe.model))
