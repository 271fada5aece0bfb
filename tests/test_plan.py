"""`moyu plan` against numbers worked out by hand, real files, and what a real training step allocates."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from allocated import Allocated
from tiny import save_tiny, tiny_model, tiny_settings
from transformers import LlamaConfig

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import bytes_per_token
from moyu_train.evaluation.shapes import SHAPES
from moyu_train.pipeline import Run
from moyu_train.plan import plan
from moyu_train.recipe import Recipe
from moyu_train.step_cost import Stepper, step_cost

D, F, L, V, KV = 32, 96, 2, 259, 32  # tests/tiny.py's Llama; KV: keys and values of 2 heads of 8
ATTENTION, FFN = 2 * D * D + KV * D, 3 * D * F
TINY = V * D + L * (ATTENTION + FFN + 2 * D) + D  # tied head


def settings_of(folder: Path, family: str = "llama", **finetune: Any) -> dict[str, Any]:
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    settings["finetune"] |= finetune
    return settings


def shaped(folder: Path, **settings: Any) -> Recipe:
    shape = SHAPES["llama-2-7b"]
    LlamaConfig(**shape.config() | {"num_hidden_layers": shape.layers}).save_pretrained(folder)
    return Recipe.model_validate({"model": str(folder), **settings})


def test_a_tiny_model_by_hand(tmp_path: Path) -> None:
    figures = plan(Recipe.model_validate(settings_of(tmp_path)), processes=2, tokens_per_second=64.0)
    assert figures["parameters"] == {"total": TINY, "ffn": L * FFN, "trainable": TINY, "parent": TINY}
    run = figures["run"]
    assert (run["tokens"], run["control_tokens"], run["tokens_per_step"]) == (1024, 2 * 1024, 32 * 4)
    assert (run["steps"], run["steps_on_processes"]) == (8, 4)
    assert figures["time"]["finetune_seconds"] == 1024 / 64
    assert figures["time"]["finetune_seconds_on_processes"] == 1024 / 128
    single, tokens = figures["memory"]["single"], 32 * 4
    assert single["weights"] == single["gradients"] == single["parent"] == 4 * TINY
    assert single["optimiser"] == 8 * TINY
    assert single["logits"] == 3 * 4 * tokens * V + 4 * 4 * 32 * V
    assert single["activations"] == tokens * (L * (4 * (8 * D + KV + 4 * F) + F) + 3 * 4 * D)
    memory = figures["memory"]
    assert memory["ddp"]["gradients"] == 8 * TINY
    assert memory["zero2"]["optimiser"] == memory["zero3"]["optimiser"] == 16 * TINY / 2
    assert memory["zero3"]["weights"] == memory["fsdp2"]["weights"] == 4 * TINY / 2
    assert {parts["parent"] for parts in memory.values()} == {4 * TINY}, "no engine shares the parent out"


def test_embeddings_that_do_not_train_need_no_gradients(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    settings["finetune"] = {**settings["finetune"], "embeddings": False}
    figures = plan(Recipe.model_validate(settings), processes=2)
    rest = TINY - V * D  # tied head
    assert figures["parameters"]["trainable"] == rest
    assert figures["memory"]["single"]["gradients"] == 4 * rest
    assert figures["memory"]["single"]["weights"] == 4 * TINY


def test_a_known_shape(tmp_path: Path) -> None:
    """Llama-2-7b: 6,738,415,616 parameters; DeepSpeed's estimates for ZeRO in bf16 are 4 P + 16 P / n and 18 P / n."""
    recipe = shaped(
        tmp_path, finetune={"dtype": "bfloat16", "kl_weight": 0, "lm_weight": 1}, export={"dtype": "float16"}
    )
    figures = plan(recipe, processes=8, wished=1.5)
    p = 6_738_415_616
    assert figures["parameters"]["total"] == p
    assert figures["parameters"]["ffn"] == 32 * 3 * 4096 * 11_008
    zero2, zero3 = figures["memory"]["zero2"], figures["memory"]["zero3"]
    assert zero2["weights"] + zero2["gradients"] + zero2["optimiser"] == 4 * p + 16 * p / 8
    assert zero3["weights"] + zero3["gradients"] + zero3["optimiser"] == 18 * p / 8
    assert zero2["parent"] == 0
    decode = figures["decode"]
    cache = 2 * 32 * 4096 * 128 * 2
    assert decode["dense_bytes"] == 2 * (p - 32_000 * 4096) + cache  # the input embedding is not read
    share = 2 * figures["parameters"]["ffn"] / decode["dense_bytes"]
    assert decode["limit"] == pytest.approx(1 / (1 - share))
    assert decode["wished"]["bytes_skipped"] == pytest.approx((1 / 3) / share)
    assert 1 / (1 - share * decode["wished"]["bytes_skipped"]) == pytest.approx(1.5)
    lowbit = 11_008 * (2 * 4096 // 4 + 24)
    assert decode["predictor_share"] == pytest.approx(lowbit / (2 * 3 * 4096 * 11_008))
    thresholds = 4 * 11_008 / (2 * 3 * 4096 * 11_008)
    assert decode["kept"]["bytes_skipped"] == pytest.approx(0.6 - decode["predictor_share"] - thresholds)
    off = decode["wished"]["neurons_off"]
    assert off == pytest.approx(decode["wished"]["bytes_skipped"] + decode["predictor_share"] + thresholds)


@pytest.mark.parametrize(("sparsifier", "read"), [("threshold", 1 + 1 + 0.25), ("gate_threshold", 1 + 0.25 + 0.25)])
def test_rules_without_a_predictor_read_whole_matrices(tmp_path: Path, sparsifier: str, read: float) -> None:
    recipe = shaped(tmp_path, predictor=None, sparsifier={"name": sparsifier}, target_sparsity=0.75)
    decode = plan(recipe, wished=3.0)["decode"]
    assert decode["kept"]["bytes_skipped"] == pytest.approx(1 - read / 3 - 4 / (2 * 3 * 4096))
    assert decode["calibrated"] is None
    assert decode["wished"]["neurons_off"] is None
    assert plan(recipe, wished=50.0)["decode"]["wished"]["bytes_skipped"] is None


@pytest.mark.parametrize("rank", [None, 8])
def test_scales_of_int8_rows_are_read_and_compensations_stay_wide(tmp_path: Path, rank: int | None) -> None:
    compensation = rank and {"rank": rank}
    recipe = shaped(tmp_path, export={"weights": "int8"}, finetune={"compensation": compensation}, target_sparsity=0.75)
    weights, scales = 3 * 4096 * 11_008, 4 * (3 * 11_008 + 4096)
    lowbit = 11_008 * (2 * 4096 // 4 + 24)
    added = 4 * 4096 * (2 * rank + 1) if rank else 0
    read = 0.25 * weights + scales + lowbit + 4 * 11_008 + added
    assert plan(recipe)["decode"]["kept"]["bytes_skipped"] == pytest.approx(1 - read / (weights + scales))


def test_a_compensation_is_read_by_every_token(tmp_path: Path) -> None:
    kept = [
        plan(shaped(tmp_path, finetune={"compensation": compensation}))["decode"]["kept"]["bytes_skipped"]
        for compensation in (None, {"rank": 8})
    ]
    assert kept[0] - kept[1] == pytest.approx(4096 * (2 * 8 + 1) / (3 * 4096 * 11_008))


def test_bytes_are_those_that_the_benchmark_counts(tmp_path: Path) -> None:
    decode = plan(Recipe.model_validate(settings_of(tmp_path)))["decode"]
    weights, cache = bytes_per_token(tiny_model(), 8)
    assert (decode["dense_bytes"], decode["cache_bytes"]) == (weights + cache, cache)


def test_layouts_without_an_op_have_no_speed(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "mixtral") | {"predictor": None, "bench": None}
    decode = plan(Recipe.model_validate(settings), wished=1.1)["decode"]
    assert decode["kept"] is None
    assert "layout 'experts' has no op" in decode["simulated_because"]
    model = tiny_model("mixtral")
    unrouted = 2 * 2 * 3 * 32 * 48 * 4  # 2 of 4 experts in each of 2 layers are not read
    assert decode["dense_bytes"] - decode["cache_bytes"] == bytes_per_token(model, 8)[0] - unrouted


@pytest.mark.parametrize(
    ("family", "finetune", "tolerance"),
    [
        ("llama", {}, 0.1),
        ("llama", {"dtype": "bfloat16"}, 0.1),
        ("llama", {"lora": {"rank": 4}}, 0.1),
        ("llama", {"dtype": "bfloat16", "lora": {"rank": 4}, "activation_checkpointing": True}, 0.1),
        ("llama", {"activation_checkpointing": True}, 0.1),
        ("llama", {"activation_checkpointing": True, "compensation": {"rank": 2, "tokens": 64}}, 0.1),
        ("phi3", {}, 0.1),
        ("mixtral", {}, 0.1),
        ("gpt2", {}, 0.25),  # its activation is written out in Python, and saves its steps
    ],
)
def test_memory_is_what_a_real_step_allocates(
    tmp_path: Path, family: str, finetune: dict[str, Any], tolerance: float
) -> None:
    """Measured: bytes of all tensors alive at once in the third step of the recipe's own training, by operation."""
    settings = settings_of(tmp_path, family, window=64, batch=4, tokens=2048, **finetune)
    recipe = Recipe.model_validate(settings | {"predictor": None, "bench": None, "control": None})
    stepper = Stepper(Run(recipe), "recipe", str(tmp_path / "steps"))
    stepper.step()
    stepper.step()
    trainer = stepper.trainer
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    with Allocated([*trainer.model.parameters(), *trainer.parent.parameters(), *moments]) as allocated:
        stepper.step()
    parts = plan(recipe)["memory"]["single"]
    peak = parts["peak_checkpointing" if finetune.get("activation_checkpointing") else "peak"]
    assert peak == pytest.approx(allocated.peak, rel=tolerance)


def test_files_are_as_large_as_planned(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, lora={"rank": 4}) | {
        "control": None,
        "bench": None,
        "predictor": {"name": "lowrank", "rank": 8},
    }
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    for stage in (
        "calibrate",
        "fit-predictors",
        "calibrate-in-loop",
        "finetune",
        "refit-predictors",
        "recalibrate",
        "export",
    ):
        assert main([stage, str(recipe)]) == 0
    files = plan(Recipe.model_validate(settings))["files"]
    run = tmp_path / "run"
    for name, folder in (("delta", run / "finetune" / "delta"), ("checkpoint", run / "export" / "checkpoint")):
        written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        header = 150 * 40  # names and places of tensors
        assert files[name] <= written <= files[name] + header, name


def test_the_verb_prints_one_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(settings_of(tmp_path)))
    options = ["--probe", "--speedup", "1.2", "--processes", "4", "--target_sparsity", "0.7"]
    assert main(["plan", str(recipe), *options, "--json", str(tmp_path / "plan.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Plan: LlamaForCausalLM") == 1
    assert "limits of the byte model, not measured" in " ".join(printed.split())
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["time"]["measured"]
    assert figures["time"]["tokens_per_second"] > 0
    assert figures["decode"]["kept"]["bytes_skipped"] < 0.7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"processes": 0}, {"wished": 1.0}, {"tokens_per_second": -1.0}])
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(MoyuError, match="is no"):
        plan(Recipe.model_validate(settings_of(tmp_path)), **wrong)


def killed(recipe: Recipe, variant: str) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_step_cost_does_not_wait_for_a_process_that_was_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moyu_train.step_cost._peak", killed)
    with pytest.raises(MoyuError, match="was killed, for want of memory most likely"):
        step_cost(Recipe.model_validate(settings_of(tmp_path)))


def test_an_offloaded_parent_takes_its_largest_part_alone(tmp_path: Path) -> None:
    whole, offloaded = (
        plan(Recipe.model_validate(settings_of(tmp_path, parent_offload=offload)), processes=2)["memory"]["single"]
        for offload in (False, True)
    )
    assert whole["parent"] == 4 * TINY
    largest = max(V * D + D, (TINY - V * D - D) // L)  # embeddings, which are the head too, and the norm; or a layer
    assert offloaded["parent"] == 4 * largest
    assert whole["peak"] > offloaded["peak"]
