"""Bad input: what was given, why it fails, what to change; exit status 1 and no traceback."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, randomised, save_text, save_tiny, tiny_settings, tokenizer

from moyu_train.cli import main


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return tiny_settings(tmp_path, save_tiny(tmp_path / "model"))


def write(tmp_path: Path, settings: dict[str, Any]) -> str:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return str(recipe)


def fails(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    assert main([*(verb or ("analyze",)), write(tmp_path, settings)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_missing_text(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["data"]["train"] = str(tmp_path / "nothing.jsonl")
    assert "nothing.jsonl' does not exist; give a JSON lines file" in fails(tmp_path, settings, capsys)


def test_empty_text(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").touch()
    settings["data"]["train"] = str(tmp_path / "empty.txt")
    assert "is empty" in fails(tmp_path, settings, capsys)


def test_text_that_is_not_utf8(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    settings["data"]["train"] = str(tmp_path / "latin.txt")
    assert "is not UTF-8 text" in fails(tmp_path, settings, capsys)


def test_a_dot_does_not_make_a_hub_id_a_file(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["data"]["train"] = "someone/corpus-v1.5"
    assert "data 'someone/corpus-v1.5' could not be read" in fails(tmp_path, settings, capsys)


def test_text_shorter_than_a_window(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    settings["data"]["train"] = str(tmp_path / "short.txt")
    assert "has 9 tokens, less than one window of 32" in fails(tmp_path, settings, capsys)


def test_too_few_documents(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["data"]["validation_documents"] = 12
    assert "asks to hold back 12" in fails(tmp_path, settings, capsys)


def test_wrong_field(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["data"]["text_field"] = "body"
    assert "has no field 'body' (it has text)" in fails(tmp_path, settings, capsys)


def test_unknown_builtin(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["data"]["test"] = "builtin:moon"
    assert "shipped texts: builtin:state-union-train" in fails(tmp_path, settings, capsys)


def test_folder_that_cannot_be_written(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    settings["run"] = str(tmp_path / "file" / "run")
    assert "cannot be written" in fails(tmp_path, settings, capsys)
    settings["run"] = "/proc/moyu"  # read-only even for root
    assert "cannot be written" in fails(tmp_path, settings, capsys)


def test_full_disk(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": -1})())
    assert "has -0.0 GB free" in fails(tmp_path, settings, capsys)


@pytest.mark.parametrize("model", ["nowhere/at-all", "missing.gguf", "package:no_such_package", "EMPTY"])
def test_models_that_are_not_there(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (tmp_path / "empty").mkdir()
    settings["model"] = str(tmp_path / "empty") if model == "EMPTY" else model
    error = fails(tmp_path, settings, capsys)
    assert any(
        text in error
        for text in ("could not be loaded", "does not exist", "is not installed", "no config.json", "no tokenizer")
    )


def test_unknown_layout(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from tiny import tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer().save_pretrained(tmp_path / "bloom")
    settings["model"] = str(tmp_path / "bloom")
    error = fails(tmp_path, settings, capsys)
    assert "no FFN block found" in error
    assert "transformer.h.*.mlp.dense_h_to_4h.weight [128, 32] x 1" in error
    described = {"path": "transformer.h.*.mlp", "up": "dense_h_to_4h", "down": "dense_4h_to_h", "act": "gelu_impl"}
    assert "\n".join(f"{key}: {value}" for key, value in described.items()) in error.replace("    ", "")
    settings["blocks"] = [described]
    assert "BloomConfig has no activation field" in fails(tmp_path, settings, capsys)


def test_more_memory_than_there_is(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in ("calibrate", "fit-predictors", "calibrate-in-loop"):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(yaml.safe_dump(settings))
        assert main([stage, str(recipe)]) == 0
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**5})())
    error = fails(tmp_path, settings, capsys, "finetune")
    assert "GB of memory are there; lower finetune.batch" in error


def test_more_tokens_than_the_text_holds(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["finetune"]["tokens"] = 10**7
    assert "more than the training text holds" in fails(tmp_path, settings, capsys, "control")


def test_half_written_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sparse" / "moyu").mkdir(parents=True)
    (tmp_path / "sparse" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for verb in ("verify", "evaluate", "bench"):
        assert main([verb, str(tmp_path / "sparse")]) == 1
        assert "not written to its end" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "sparse"), "--prompt", "x"]) == 1
    assert "not written to its end" in capsys.readouterr().err


def test_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sparse"
    (folder / "moyu").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    manifest = {"format_version": 1, "files": {"config.json": "0" * 64}, "ffn_sha256": "0" * 64}
    (folder / "moyu" / "manifest.json").write_text(json.dumps(manifest))
    for verb in (["verify"], ["evaluate"], ["bench"], ["generate", "--prompt", "x"]):
        assert main([verb[0], str(folder), *verb[1:]]) == 1
        assert "config.json was changed or damaged after the export" in capsys.readouterr().err


def test_combinations_are_checked_before_weights_load(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    settings["predictor"] = {"name": "lowrank", "rank": 33}
    assert "rank 33 is above the hidden size 32" in fails(tmp_path, settings, capsys)
    settings["sparsifier"] = {"name": "statistical_topk"}
    settings["predictor"]["rank"] = 32
    assert "compares all neurons of a token" in fails(tmp_path, settings, capsys)
    settings["sparsifier"] = {"name": "threshold"}
    settings["calibrate"]["bytes_skipped"] = 0.9
    assert "the predictors alone are" in fails(tmp_path, settings, capsys)


def save_like(folder: Path, family: str, **changes: int) -> str:
    """A model whose config differs, with the tokenizer of all."""
    config = CONFIGS[family].to_dict() | changes
    randomised(type(CONFIGS[family]).from_dict(config)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_of_few_positions(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["model"] = save_like(tmp_path / "short", "gpt2", n_positions=40)
    settings |= {name: settings[name] | {"window": 40} for name in ("fit", "evaluate")} | {"bench": None}
    for name in ("finetune", "fit", "evaluate"):
        given = settings | {name: settings[name] | {"window": 41}}
        assert f"{name}.window is 41, and the model has 40 positions; lower {name}.window" in fails(
            tmp_path, given, capsys
        )
    for verb in ("analyze", "calibrate", "fit-predictors", "calibrate-in-loop"):
        assert main([verb, write(tmp_path, settings)]) == 0, (
            "where no setting names the window it is as long as the model"
        )


def test_a_tokenizer_of_another_model(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["model"] = save_like(
        tmp_path / "other", "llama", vocab_size=80, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    found = fails(tmp_path, settings, capsys)
    assert "of the text, and the model has 80: they do not belong together" in found


def test_two_commands_in_one_run_folder(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another command is at work in" in fails(tmp_path, settings, capsys, "calibrate")
    assert main(["calibrate", str(tmp_path / "r.yaml")]) == 0


def test_weights_that_are_not_numbers(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert "activations of layer 1 are not numbers (NaN)" in fails(tmp_path, settings, capsys, "calibrate")


def test_a_quantised_model(tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "is quantised (gptq), so its FFN has no plain weights" in fails(tmp_path, settings, capsys)


def test_text_shorter_than_a_window_of_fit(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings["fit"]["window"] = 2048
    settings["data"]["train"] = str(save_text(tmp_path / "few.jsonl", 3, 60))
    assert main(["calibrate", write(tmp_path, settings)]) == 0
    assert "less than one fit.window of 2048" in fails(tmp_path, settings, capsys, "fit-predictors")


def test_damaged_weights_of_a_finished_stage(
    tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"predictor": None, "bench": None, "control": None}
    for verb in ("calibrate", "finetune"):
        assert main([verb, write(tmp_path, settings)]) == 0
    weights = tmp_path / "run" / "finetune" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = fails(tmp_path, settings, capsys, "export")
    assert f"Delete {str(tmp_path / 'run' / 'finetune')!r}, and the stage runs again" in error


def test_files_that_could_not_be_written_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, message in ((tmp_path / "no" / "x.json", "there is no folder"), (tmp_path, "is a folder")):
        assert main(["compare-predictors", "no-model", "--plot", str(file)]) == 1
        assert f"--plot {str(file)!r}" in (error := capsys.readouterr().err)
        assert message in error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up(
    tmp_path: Path,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("moyu_train.training.stages.save_file", full)
    found = fails(tmp_path, settings, capsys, "calibrate")
    assert "No space left on device" in found
    assert "free some room, and the same command goes on from here" in found


@pytest.mark.parametrize("verb", ["run", "export", "verify", "evaluate", "bench", "report"])
def test_what_runs_in_one_process(
    tmp_path: Path,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert f"`moyu {verb}` runs in one process; launch the training stages" in fails(tmp_path, settings, capsys, verb)


@pytest.mark.parametrize(("option", "value"), [("--max-new-tokens", "0"), ("--temperature", "-1")])
def test_numbers_of_generate(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "folder", "--prompt", "x", option, value])
    assert f"argument {option}: {value} is not a number from" in capsys.readouterr().err
