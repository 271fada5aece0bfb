"""Files that a stranger may have written: every reader says what is wrong with them, and runs nothing of them.

The readers: recipes (YAML), text (JSON lines, plain, gzip), model folders, GGUF, sparse checkpoints (manifest, config,
state), deltas, states and training checkpoints of stages, stage records, and task files.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from moyu_kernels.loading import CheckpointError, read_manifest
from moyu_kernels.reading import read_json as read_json_of_kernels
from moyu_kernels.rules import Rule
from safetensors.torch import save_file
from tiny import save_tiny, tiny_model, tokenizer

from moyu_train.analysis.collect import row
from moyu_train.checkpoints.export import MANIFEST, STATE, export, read_inputs, read_state
from moyu_train.checkpoints.verify import marker_of
from moyu_train.cli import main
from moyu_train.errors import MoyuError, is_told
from moyu_train.evaluation.stage import weight_itemsize
from moyu_train.evaluation.tasks import find_tasks
from moyu_train.files import read_json, read_tensors, sha256, write_json
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source, skeleton
from moyu_train.pipeline import _clear_others, _weights
from moyu_train.recipe import RecipeError, load_recipe
from moyu_train.settings_export import Evaluate
from moyu_train.texts import read_texts
from moyu_train.training import stages
from moyu_train.training.delta import load_delta
from moyu_train.training.trainer import last_complete_checkpoint

FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5)
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)

DEEP = b"[" * 100_000
HEADERS: dict[str, bytes] = {
    "empty": b"",
    "truncated": struct.pack("<Q", 200) + b'{"blocks.0.threshold":{"dtype":"F32"',
    "magic": b"PK\x03\x04" + bytes(40),
    "pickle": b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.",
    "giant header": struct.pack("<Q", 2**62) + b"{}",
    "wrong dtype": struct.pack("<Q", 66)
    + b'{"blocks.0.threshold":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'[:66]
    + bytes(4),
    "not UTF-8": struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
    "deep": struct.pack("<Q", len(DEEP)) + DEEP,
}
TEXTS: dict[str, bytes] = {
    **HEADERS,
    "deep": DEEP,
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
    "latin": "é".encode("latin-1"),
    "nothing": b"{}",
}


def tells(read: Callable[[], Any]) -> str:
    """The message of the clear error that `read` ends with; "" where it does not fail."""
    try:
        read()
    except Exception as error:
        if not is_told(error):
            raise
        return str(error)
    return ""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model = tiny_model()
    export(
        model,
        tokenizer(),
        folder / "sparse",
        "threshold",
        [Rule(torch.full((96,), 0.01)) for _ in range(2)],
        None,
        None,
    )
    save_tiny(folder / "dense")
    return folder


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def rehash(folder: Path) -> None:
    """What a forger does: makes the manifest fit the files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: sha256(folder / name) for name in manifest["files"]}
    write_json(folder / MANIFEST, manifest)


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_json_readers(tmp_path: Path, content: bytes) -> None:
    for name in (
        "moyu/manifest.json",
        "config.json",
        "finetune/stage.json",
        "delta.json",
        "checkpoint-1/moyu_complete.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    readers = [
        lambda: read_manifest(tmp_path),
        lambda: read_json(tmp_path / "config.json"),
        lambda: read_json_of_kernels(tmp_path / "config.json"),
        lambda: row(tmp_path),
        lambda: marker_of(tmp_path),
        lambda: weight_itemsize(tmp_path),
        lambda: load_delta(None, "", {}, tmp_path),
        lambda: last_complete_checkpoint(tmp_path),
        lambda: skeleton(tmp_path),
        lambda: load_dense(tmp_path),
    ]
    for read in readers[1:3] if content == b"{}" else readers:
        assert bool(tells(read)) == (content != b"{}")


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_tensor_readers(good: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    assert tells(lambda: read_tensors(path))
    assert tells(lambda: stages.read(tmp_path))
    sparse = copied(good / "sparse", tmp_path / "sparse")
    (sparse / STATE).write_bytes(content)
    rehash(sparse)
    assert tells(lambda: moyu_kernels.from_pretrained(sparse))
    assert tells(lambda: read_state(sparse))
    assert tells(lambda: read_inputs(sparse))
    dense = copied(good / "dense", tmp_path / "dense")
    (dense / "model.safetensors").write_bytes(content)
    assert tells(lambda: load_dense(dense))
    (tmp_path / "model.gguf").write_bytes(content)
    assert tells(lambda: resolve_source(str(tmp_path / "model.gguf")))
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "tensors", [{}, {"blocks.1.threshold": torch.ones(96)}, {f"blocks.{i}.threshold": torch.ones(5) for i in range(2)}]
)
def test_states_that_do_not_fit_the_model(good: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    sparse = copied(good / "sparse", tmp_path / "sparse")
    save_file(tensors, sparse / STATE)
    rehash(sparse)
    assert tells(lambda: moyu_kernels.from_pretrained(sparse))


@FEW
@given(
    key=st.sampled_from(
        (
            "blocks",
            "formula",
            "activation",
            "activation_field",
            "architectures",
            "inputs",
            "predictor",
            "heads",
            "format_version",
        )
    ),
    value=DATA,
)
@example(key="architectures", value=["Trainer"])
@example(key="architectures", value=["pipeline"])
@example(key="activation", value=None)
@example(key="activation_field", value="__class__")
def test_forged_configs_of_checkpoints(
    good: Path, tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    sparse = copied(good / "sparse", tmp_path_factory.getbasetemp() / "forged")
    config = json.loads((sparse / "config.json").read_text())
    config["moyu"][key] = value
    (sparse / "config.json").write_text(json.dumps(config))
    rehash(sparse)
    tells(lambda: moyu_kernels.from_pretrained(sparse))
    tells(lambda: read_state(sparse))
    tells(lambda: marker_of(sparse))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "moyu/../../secret", "a\0b"])
def test_names_that_lead_out_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    sparse = copied(good / "sparse", tmp_path / "sparse")
    (tmp_path / "secret").write_text("secret")
    manifest = json.loads((sparse / MANIFEST).read_text())
    manifest["files"][name] = sha256(tmp_path / "secret")
    write_json(sparse / MANIFEST, manifest)
    with pytest.raises(CheckpointError, match="leads out of it"):
        read_manifest(sparse)
    write_json(tmp_path / "delta.json", {"files": {name: sha256(tmp_path / "secret")}})
    with pytest.raises(MoyuError, match="in place of"):
        load_delta(None, "", {}, tmp_path)
    if name[0] != "/":
        with pytest.raises(RecipeError, match="leads out of where it starts"):
            load_recipe("model", ["--run", json.dumps(f"runs/../{name}")])


def test_links_are_read_as_what_they_lead_to(good: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links, so they are followed; a hash tells what is there, a device is no file."""
    sparse = copied(good / "sparse", tmp_path / "sparse")
    (sparse / "config.json").rename(tmp_path / "blob")
    (sparse / "config.json").symlink_to(tmp_path / "blob")
    read_manifest(sparse)
    (sparse / "config.json").unlink()
    (sparse / "config.json").symlink_to("/dev/zero")
    assert "missing" in tells(lambda: read_manifest(sparse))


def test_files_that_the_manifest_does_not_list_are_refused(good: Path, tmp_path: Path) -> None:
    sparse = copied(good / "sparse", tmp_path / "sparse")
    (sparse / "adapter_config.json").write_text("{}")
    assert "is not in the manifest" in tells(lambda: read_manifest(sparse))
    (sparse / "adapter_config.json").unlink()
    manifest = json.loads((sparse / MANIFEST).read_text())
    del manifest["files"]["config.json"]
    write_json(sparse / MANIFEST, manifest)
    assert "does not list config.json" in tells(lambda: read_manifest(sparse))


@pytest.mark.parametrize("field", ["hidden_act", "num_hidden_layers", "dtype", "model_type", "rope_parameters"])
@pytest.mark.parametrize("value", [None, [], "x" * 50, -1])
def test_configs_of_models(good: Path, tmp_path: Path, field: str, value: Any) -> None:
    dense = copied(good / "dense", tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {field: value}))
    tells(lambda: skeleton(dense))


def test_remote_code_is_never_run(good: Path, tmp_path: Path) -> None:
    dense = copied(good / "dense", tmp_path / "dense")
    (dense / "evil.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')\n")
    config = json.loads((dense / "config.json").read_text())
    names = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": [None, "evil.Tokenizer"],
    }
    (dense / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    assert tells(lambda: skeleton(dense))
    assert tells(lambda: load_dense(dense))
    tells(lambda: load_tokenizer(dense))
    assert not (tmp_path / "PWNED").exists()


RECIPES = {
    "object": "model: !!python/object/apply:os.system ['touch PWNED']",
    "name": "model: !!python/name:os.system",
    "bomb": "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]",
    "deep": "model: " + "[" * 5000,
    "number key": "1: 2",
    "null key": "~: 2",
    "date": "model: 2020-02-30",
    "binary": "model: !!binary '*'",
    "huge": "model: m\nseed: " + "9" * 5000,
    "NUL": 'model: "a\\0b"\nrun: "a\\0b"',
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_recipes_are_data(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(str(path))
    assert not Path("PWNED").exists()


@FEW
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
def test_any_bytes_as_a_recipe(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    path.write_bytes(content)
    assert tells(lambda: load_recipe(str(path)))


@FEW
@given(
    st.dictionaries(
        st.sampled_from(("model", "data", "finetune", "penalty", "inertia", "compare", "blocks", "x")), DATA, max_size=3
    )
)
def test_any_settings(data: dict[str, Any]) -> None:
    arguments = [f"--{key}={json.dumps(value)}" for key, value in data.items()]
    tells(lambda: load_recipe("m", arguments))
    tells(lambda: load_recipe("m", ["--model", "["]))


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "jsonl.gz", "raw"])
@pytest.mark.parametrize("content", [*TEXTS.values(), b'{"text": 3}', b'{"text": {"a": 1}}', b'{"messages": "x"}'])
def test_texts(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(content)
    said = tells(lambda: list(read_texts(str(path), "text")))
    assert said or suffix in ("txt", "raw")


def test_task_files_call_no_python(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("task: mine\nprocess_docs: !function evil.run\n")
    with pytest.raises(MoyuError, match="calls Python code"):
        find_tasks(Evaluate(task_folder=str(tmp_path)))


def test_the_command_line_tells_what_the_kernels_say(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = copied(good / "sparse", tmp_path / "sparse")
    config = json.loads((sparse / "config.json").read_text())
    config["moyu"]["blocks"] = [3]
    (sparse / "config.json").write_text(json.dumps(config))
    rehash(sparse)
    for verb in (["verify"], ["generate", "--prompt", "x"], ["bench"]):
        assert main([verb[0], str(sparse), *verb[1:]]) == 1
        assert "cannot be read" in capsys.readouterr().err


def test_a_model_without_one_of_its_weights_is_refused(good: Path, tmp_path: Path) -> None:
    folder = copied(good / "dense", tmp_path / "dense")
    tensors = read_tensors(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    save_file(
        {key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    assert name in tells(lambda: load_dense(folder))


def test_a_folder_of_a_model_that_is_not_there() -> None:
    assert "does not exist" in tells(lambda: resolve_source("../nowhere/llama"))


def test_a_stage_leaves_files_of_others_alone(tmp_path: Path) -> None:
    mine = tmp_path / "export" / "thesis.csv"
    mine.parent.mkdir()
    mine.write_text("1")
    assert "files that no stage wrote" in tells(lambda: _clear_others(mine.parent, "key"))
    assert mine.read_text() == "1"
    mine.unlink()
    _clear_others(mine.parent, "key")
    (mine.parent / "model.safetensors").write_text("of another recipe")
    _clear_others(mine.parent, "other key")
    assert [path.name for path in mine.parent.iterdir()] == ["key"]


def test_other_weights_in_bin_files_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    keys = []
    for content in (b"1", b"2"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        keys.append(_weights(str(tmp_path)))
    assert keys[0] != keys[1]


def test_rows_without_the_field_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.JSONL"
    path.write_text('{"text": "one"}\n{"text": null}\n{"txet": "two"}\n')
    assert "row 3 (it has txet)" in tells(lambda: list(read_texts(str(path), "text")))
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    assert list(read_texts(str(path), "text")) == ["one", "two"]
