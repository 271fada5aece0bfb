"""find → mask → export → marker → verify for every layout, and what a damaged checkpoint says."""

import functools
import json
from pathlib import Path

import moyu_kernels
import pytest
import torch
from moyu_kernels.checkpoint import FORMAT_VERSION, CheckpointError
from moyu_kernels.ops.ffn.int8 import dequantise_rows, quantise_down
from moyu_kernels.rules import Rule
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, tiny_model, tokenizer
from transformers import AutoModelForCausalLM

from moyu_train.checkpoints.export import MANIFEST, STATE, export, read_state
from moyu_train.checkpoints.verify import decode_logits, marker_of, verify
from moyu_train.cli import main
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import Counts, bytes_skipped
from moyu_train.models.blocks import find_blocks
from moyu_train.models.loading import load_dense
from moyu_train.registry import resolve
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.rule import calibrate_rule

DOCUMENTS = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))])
IDS = DOCUMENTS.tokens[0][None, :16]


def exported(folder: Path, family: str = "llama", density: float = 0.4, weights: str = "stored") -> Path:
    model = tiny_model(family)
    rule = calibrate_rule(model, Threshold, Threshold.Options(), density, DOCUMENTS, 200, passes=1)
    export(model, tokenizer(), folder, "threshold", rule.rules, None, None, weights=weights)
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layout_goes_all_the_way(tmp_path: Path, family: str) -> None:
    folder = exported(tmp_path / "sparse", family)
    figures = verify(folder)
    assert figures["logits_relative_error"] < 1e-4
    assert figures["stock_refuses"]
    sparse = moyu_kernels.from_pretrained(folder, mode="rule")(IDS).logits
    dense = tiny_model(family)(IDS).logits
    assert (sparse - dense).norm() / dense.norm() > 0.01, "the mask does nothing"
    again = load_dense(folder)  # our own loader reads it, and keeps the marker on the live config
    torch.testing.assert_close(again(IDS).logits, dense, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "resaved")
    with pytest.raises(KeyError, match="load with moyu_kernels"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "resaved")


def test_marker_architecture_and_block_are_data(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse")
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_act"] == marker_of(folder) == "moyu:threshold:silu (load with moyu_kernels.from_pretrained)"
    assert config["architectures"] == ["MoyuLlamaForCausalLM"]
    assert config["moyu"]["blocks"][1]["path"] == "model.layers.1.mlp"
    assert "auto_map" not in config
    assert "sparsity_config" not in config
    assert not list(folder.glob("*moyu*.safetensors")), "our tensors belong into the subfolder"


def test_verify_catches_a_rule_that_is_not_the_exported_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path / "sparse")
    rules, predictors = read_state(folder)
    wrong = ([Rule(rule.threshold * 1.5) for rule in rules], predictors)
    monkeypatch.setattr("moyu_train.checkpoints.verify.read_state", lambda folder: wrong)
    with pytest.raises(MoyuError, match="on the same inputs"):
        verify(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_may_differ_by_neurons_on_their_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder, calls = exported(tmp_path / "sparse", family), []

    def shaken(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        calls.append(model)
        return decode_logits(model, ids) * (1.01 if len(calls) in wrong else 1)

    monkeypatch.setattr("moyu_train.checkpoints.verify.decode_logits", shaken)
    wrong = {1}  # the rule's logits; those without masks agree, and so does every block
    figures = verify(folder)
    assert figures["logits_relative_error"] > 1e-3
    assert figures["dense_relative_error"] < 1e-4
    assert figures["parts"]["other_masks"] == 0
    wrong = {3, 4}
    with pytest.raises(MoyuError, match="logits are not the rule's"):
        verify(folder)


def test_verify_catches_a_missing_marker(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse")
    config = json.loads((folder / "config.json").read_text())
    config["hidden_act"] = "silu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoyuError, match=r"changed or damaged"):
        verify(folder)


@pytest.mark.parametrize("damage", ["no manifest", "cut state", "other weights", "newer format", "missing file"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, damage: str) -> None:
    folder = exported(tmp_path / "sparse")
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "cut state":
        data = (folder / STATE).read_bytes()
        (folder / STATE).write_bytes(data[: len(data) // 2])
    elif damage == "other weights":
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif damage == "newer format":
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 99}))
    else:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError):
        moyu_kernels.from_pretrained(folder)


def test_an_interrupted_export_leaves_nothing_loadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moyu_train.checkpoints.export.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path / "sparse")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    rules = [Rule(torch.full((96,), float("nan"))), Rule(torch.ones(96))]
    with pytest.raises(MoyuError, match=r"blocks\.0\.threshold holds values that are not finite"):
        export(tiny_model(), tokenizer(), tmp_path / "sparse", "threshold", rules, None, None)


def test_int8_weights_are_what_everything_reads(tmp_path: Path) -> None:
    folder = exported(tmp_path / "sparse", weights="int8")
    config = json.loads((folder / "config.json").read_text())
    assert (config["moyu"]["weights"], config["moyu"]["format_version"]) == ("int8", FORMAT_VERSION)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(stored[name], tiny_model().state_dict()[name]), "what is stored is not rounded"
    figures = verify(folder)  # the kernels on int8 rows against stock code on what they stand for
    assert figures["logits_relative_error"] < 1e-5
    assert figures["stock_refuses"]
    again = load_dense(folder)
    assert not torch.equal(again.state_dict()[name], stored[name])
    torch.testing.assert_close(
        again.state_dict()[name], stored[name], rtol=0, atol=stored[name].abs().max().item() / 254
    )
    down = "model.layers.0.mlp.down_proj.weight"  # a row is a neuron's: scales of the stock matrix's columns
    codes, scale, columns = quantise_down(stored[down].T)
    assert torch.equal(again.state_dict()[down], dequantise_rows(codes, scale, torch.float32, columns).T)
    again.save_pretrained(tmp_path / "resaved")  # plain weights from now on, not rounded once more
    assert torch.equal(load_dense(tmp_path / "resaved").state_dict()[down], again.state_dict()[down])
    int8, plain = (
        moyu_kernels.from_pretrained(folder, mode="rule", weights=kind)(IDS).logits for kind in (None, "stored")
    )
    assert 1e-4 < (int8 - plain).norm() / plain.norm() < 0.1


def test_verify_catches_other_weights_than_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported(tmp_path / "sparse", weights="int8")
    stored = functools.partial(moyu_kernels.from_pretrained, weights="stored")
    monkeypatch.setattr("moyu_kernels.from_pretrained", stored)
    with pytest.raises(MoyuError, match="on the same inputs"):
        verify(folder)


def test_relu_with_int8_weights_is_refused_by_stock_code(tmp_path: Path) -> None:
    """It would load, and compute on the weights as they are stored."""
    rules = [Rule(torch.zeros(96), gate="relu", keep="nonzero") for _ in range(2)]
    for weights, loads in (("stored", True), ("int8", False)):
        folder = tmp_path / weights
        export(tiny_model(), tokenizer(), folder, "relu", rules, None, None, weights=weights)
        assert verify(folder)["stock_refuses"] is not loads


def test_bytes_skipped_of_int8_are_of_int8() -> None:
    (block,) = find_blocks(tiny_model())[:1]
    tokens, selected, kept = 10.0, 480.0, 240.0
    ones = torch.ones(1, dtype=torch.float64)
    counts = Counts.zeros(1)
    counts.selected_rows, counts.kept_rows, counts.steps = selected * ones, kept * ones, tokens * ones
    row, scales, thresholds = 128, 4 * (3 * 96 + 32), 4 * 96  # 32 bytes touch up to two lines
    read = row * (96 + 48 + 24) + scales + thresholds
    assert bytes_skipped([block], counts, None, 1) == pytest.approx(1 - read / (3 * 96 * 32 + scales))


def test_the_dense_folder_is_stock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = exported(tmp_path / "sparse"), tmp_path / "dense"
    assert main(["export-dense", str(folder), str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(model.config, "moyu")
    torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits, rtol=1e-4, atol=1e-4)
    assert main(["export-dense", str(folder), str(out)]) == 1
    assert "exists; give another folder" in capsys.readouterr().err
    (folder / "moyu/manifest.json").unlink()
    assert main(["export-dense", str(folder), str(tmp_path / "other")]) == 1
    assert "not written to its end" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("relu", "use it as it is"), ("drelu", "has another activation")])
def test_rules_without_a_dense_model_are_refused(
    tmp_path: Path, name: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    cls, options = resolve("sparsifier", Method(name=name), SPARSIFIERS)
    model = tiny_model()
    rules = cls.start(options, find_blocks(model), 0.5).rules
    export(model, tokenizer(), tmp_path / "sparse", name, rules, None, None)
    assert main(["export-dense", str(tmp_path / "sparse"), str(tmp_path / "dense")]) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "dense").exists()


def test_relu_on_int8_rows_is_not_called_stock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rules = [Rule(torch.zeros(96), gate="relu", keep="nonzero") for _ in range(2)]
    export(tiny_model(), tokenizer(), tmp_path / "sparse", "relu", rules, None, None, weights="int8")
    assert main(["export-dense", str(tmp_path / "sparse"), str(tmp_path / "dense")]) == 1
    assert "has another activation" in capsys.readouterr().err
