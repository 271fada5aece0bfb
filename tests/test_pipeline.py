"""The whole path on a tiny model through the real command line: figures, reuse, kill and resume, two processes."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from command import ROOT, moyu, prepare

from moyu_train.models.loading import load_dense
from moyu_train.stages import STAGES

OF_HEADS = ("fit-heads", "refit-heads")  # stages that only `heads` of a recipe asks for
TIMINGS = ("decode_tokens_per_second", "bandwidth_gb_s", "bandwidth_share", "over_", "bench")  # how their names begin


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in result.items() if not name.startswith(TIMINGS)}
    kept["hashes"] = {name: value for name, value in kept["hashes"].items() if name != "recipe"}  # holds the folder
    return kept


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all stages."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = prepare(folder)
    moyu("run", str(recipe), "--json", str(folder / "figures.json"))
    return folder


def test_result_has_the_documented_names(finished: Path) -> None:
    result = json.loads((finished / "run" / "result.json").read_text())
    assert json.loads((finished / "figures.json").read_text()) == result
    for name in (
        "model",
        "tokens_trained",
        "bytes_skipped",
        "neurons_off",
        "predictor_bytes_share",
        "bandwidth_gb_s",
        "bandwidth_share",
    ):
        assert name in result
    for name in ("dense", "control", "oracle", "sparse", "rule", "untouched"):
        assert result["ppl"][name] > 1
    for name in ("dense_eager", "sparse", "dense_runner"):
        assert result["decode_tokens_per_second"][name] > 0
    documented = (ROOT / "docs" / "results.md").read_text()
    for name in result:
        assert f"`{name}" in documented, f"result.json has {name}, docs/results.md does not explain it"


def test_figures_are_true(finished: Path) -> None:
    result = json.loads((finished / "run" / "result.json").read_text())
    assert result["tokens_trained"] == 1024
    assert abs(result["bytes_skipped"] - 0.2) < 0.05
    assert result["ppl"]["control"] < result["ppl"]["dense"]
    assert result["kernels"]["perplexity"] == pytest.approx(result["kernels"]["masked_perplexity"], rel=1e-3)
    sparse = next(row for row in result["bench"] if row["setting"] == "sparse")
    dense = next(row for row in result["bench"] if row["setting"] == "dense_runner")
    ffn = 2 * 3 * 32 * 96 * 4
    assert dense["bytes"] - sparse["bytes"] == pytest.approx(sparse["bytes_skipped"] * ffn, rel=1e-6)


def test_report_opens_offline(finished: Path) -> None:
    page = (finished / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.replace("http-equiv", "")
    assert "dense control" in page
    for name in ("uplift.png", "layers.png", "calibration.png", "quality.png", "training.png"):
        assert (finished / "run" / name).stat().st_size > 5000


def test_second_run_reuses_and_another_recipe_does_not(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished / "run", folder)
    recipe = str(finished / "tiny.yaml")
    again = moyu("run", recipe, "--run", str(folder))
    assert again.stderr.count("reused") == len(STAGES) - len(OF_HEADS)
    other = moyu("run", recipe, "--run", str(folder), "--calibrate.bytes_skipped", "0.15", "--bench.new_tokens", "3")
    assert other.stderr.count("reused") == 2  # analyze and control do not depend on it; calibrate reads its section
    assert json.loads((folder / "result.json").read_text())["bytes_skipped"] == pytest.approx(0.15, abs=0.05)


def test_stage_verbs_need_their_predecessors(tmp_path: Path) -> None:
    recipe = prepare(tmp_path)
    result = moyu("finetune", str(recipe), code=1)
    assert "stage 'calibrate-in-loop' is not finished" in result.stderr
    assert "moyu calibrate-in-loop" in result.stderr


def kill_in(stage: str, recipe: Path, delay: float) -> None:
    """SIGKILL a run shortly after it has started a stage."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moyu_train", "run", str(recipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        start_new_session=True,
    )
    marker = recipe.parent / "run" / stage / "key"
    deadline = time.monotonic() + 120
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("stages", [[("finetune", 2.5), ("export", 0.05)]])
def test_killed_and_started_again_ends_the_same(finished: Path, tmp_path: Path, stages: list[Any]) -> None:
    recipe = prepare(tmp_path)
    for stage, delay in stages:
        kill_in(stage, recipe, delay)
    moyu("run", str(recipe))
    whole = json.loads((finished / "run" / "result.json").read_text())
    resumed = json.loads((tmp_path / "run" / "result.json").read_text())
    whole["model"] = resumed["model"]
    assert without_timings(resumed) == without_timings(whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [name for name in STAGES if name not in OF_HEADS])
@pytest.mark.parametrize("delay", [0.05, 1.5])
def test_killed_at_any_stage_ends_the_same(finished: Path, tmp_path: Path, stage: str, delay: float) -> None:
    test_killed_and_started_again_ends_the_same(finished, tmp_path, [(stage, delay)])


ENGINES = {"cpu": "MULTI_CPU", "zero2": "DEEPSPEED ZeRO-2", "zero3": "DEEPSPEED ZeRO-3"}


def launch_finetune(engine: str, recipe: Path, *options: str, **process: Any) -> subprocess.Popen:
    """accelerate launch with a shipped configuration: two processes, each with half of the batch."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{engine}.yaml"]
    command += ["--main_process_port", "0", "-m", "moyu_train", "finetune", str(recipe), "--finetune.batch", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment, text=True, **process)


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "finetune" / "metrics.jsonl").read_text().splitlines()]


def prepared(folder: Path) -> Path:
    recipe = prepare(folder)
    for stage in ("calibrate", "fit-predictors", "calibrate-in-loop"):
        moyu(stage, str(recipe))
    return recipe


def same_run(folder: Path, one: list[dict[str, float]], engine: str) -> None:
    figures = json.loads((folder / "run" / "finetune" / "stage.json").read_text())["figures"]
    assert figures["processes"] == 2
    assert figures["engine"] == ENGINES[engine]
    assert figures["tokens"] == 1024
    two = curve(folder)
    assert len(one) == len(two) == 8
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=2e-3)
        assert first["sparsity"] == pytest.approx(second["sparsity"], abs=2e-3)


@pytest.mark.parametrize("engine", ["cpu", pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_two_processes_train_together(finished: Path, tmp_path: Path, engine: str) -> None:
    """The same curve as one process with twice the batch, and whole weights at the end, which the next stage takes."""
    recipe = prepared(tmp_path)
    process = launch_finetune(engine, recipe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    same_run(tmp_path, curve(finished), engine)
    one, two = (load_dense(folder / "run" / "finetune" / "model") for folder in (finished, tmp_path))
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-3, msg=name)  # AdamW turns rounding into steps
    moyu("refit-predictors", str(recipe), "--finetune.batch", "2")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_processes_killed_and_started_again_end_the_same(finished: Path, tmp_path: Path, engine: str) -> None:
    recipe = prepared(tmp_path)
    process = launch_finetune(engine, recipe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run" / "finetune").glob("checkpoints/*/moyu_complete.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:  # workers have sessions of their own
        one.kill()
    process.wait()
    assert not (tmp_path / "run" / "finetune" / "stage.json").exists()
    again = launch_finetune(engine, recipe, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said[-3000:]
    same_run(tmp_path, curve(finished), engine)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "asks for FSDP, and accelerate has none without a GPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"}, "runs as plain data parallel"),
    ],
)
def test_an_engine_that_would_not_run_is_refused(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    recipe = prepare(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "moyu_train", "calibrate", str(recipe)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert message in result.stderr


def test_verbs_on_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    folder = str(finished / "run" / "export" / "checkpoint")
    text = str(finished / "test.jsonl")
    moyu("verify", folder, "--json", str(tmp_path / "v.json"))
    assert json.loads((tmp_path / "v.json").read_text())["stock_refuses"]
    moyu(
        "evaluate",
        folder,
        "--data.test",
        text,
        "--evaluate.window",
        "64",
        "--evaluate.kernel_tokens",
        "16",
        "--json",
        str(tmp_path / "e.json"),
    )
    result = json.loads((finished / "run" / "result.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["ppl"]["sparse"] == pytest.approx(result["ppl"]["sparse"])
    moyu(
        "bench",
        folder,
        "--data.test",
        text,
        "--bench.contexts",
        "[8]",
        "--bench.new_tokens",
        "3",
        "--bench.compiled",
        "false",
        "--json",
        str(tmp_path / "b.json"),
    )
    assert json.loads((tmp_path / "b.json").read_text())["rows"]
    short = ["--data.test", text, "--bench.contexts", "[8]", "--bench.new_tokens", "3", "--quick", "--threads", "1"]
    moyu("bench", "model", folder, *short, "--json", str(tmp_path / "m.json"))
    rows = [row for row in json.loads((tmp_path / "m.json").read_text()) if row["backend"] != "llama.cpp"]
    assert [row["op"] for row in rows] == ["decode_dense_eager", "decode_dense_runner", "decode_sparse"]
    assert (rows[2]["D"], rows[2]["F"], rows[2]["dtype"], rows[2]["layers"]) == (32, 96, "float32", 2)
    assert 0 < rows[2]["density"] < 1
    if importlib.util.find_spec("llama_cpp") is None:  # else the limit is over llama.cpp's files, padded at this size
        assert rows[2]["limit_speedup"] > 1
    generated = moyu(
        "generate", folder, "--prompt", "the cat", "--max-new-tokens", "8", "--json", str(tmp_path / "g.json")
    )
    assert generated.stdout.startswith("the cat")
    assert "tokens per second" in generated.stdout
    figures = json.loads((tmp_path / "g.json").read_text())
    assert 0 < figures["kept"] <= figures["selected"] <= 1
