"""The whole path on a tiny model through the real command line: figures, reuse, kill and resume, two processes."""

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
import yaml
from peft import PeftConfig
from tiny import save_tiny, tiny_settings

from moyu_train.files import sha256
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import STAGES
from moyu_train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
OF_HEADS = ("fit-heads", "refit-heads")  # stages that only `heads` of a recipe asks for
TIMINGS = (
    "decode_tokens_per_second",
    "bandwidth_gb_s",
    "bandwidth_share",
    "over_best_transformers",
    "over_dense_runner",
    "bench",
)


def moyu(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "moyu_train", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def prepare(folder: Path, family: str = "llama") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def without_timings(result: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in result.items() if name not in TIMINGS}
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
    rows = json.loads((tmp_path / "m.json").read_text())
    assert [row["op"] for row in rows] == ["decode_dense_eager", "decode_dense_runner", "decode_sparse"]
    assert (rows[2]["D"], rows[2]["F"], rows[2]["dtype"], rows[2]["layers"]) == (32, 96, "float32", 2)
    assert 0 < rows[2]["density"] < 1 < rows[2]["limit_speedup"]
    generated = moyu(
        "generate", folder, "--prompt", "the cat", "--max-new-tokens", "8", "--json", str(tmp_path / "g.json")
    )
    assert generated.stdout.startswith("the cat")
    assert "tokens per second" in generated.stdout
    figures = json.loads((tmp_path / "g.json").read_text())
    assert 0 < figures["kept"] <= figures["selected"] <= 1


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
