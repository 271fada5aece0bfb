"""Whom fine-tuning distils from: the model itself, its dense control, or another model of the same vocabulary."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny import CONFIGS, save_tiny, tiny_model, tiny_settings, tokenizer
from transformers import LlamaForCausalLM

from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe
from moyu_train.training.finetune import training_windows
from moyu_train.training.stages import read, sparsifier_of
from moyu_train.training.trainer import SparsityTrainer


def settings_in(folder: Path, parent: str) -> dict:
    settings = tiny_settings(folder, save_tiny(folder / "model")) | {"predictor": None, "bench": None}
    settings["finetune"] |= {"parent": parent, "kl_weight": 1.0, "learning_rate": 1e-12}
    settings["control"] = {"learning_rates": [1e-2]}
    settings["sparsifier"] = {"gain": 0.0}  # so that the student stays what it is
    return settings


def kl_of_all_steps(run: Run) -> float:
    lines = (run.stage_folder("finetune") / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8
    return sum(json.loads(line)["kl"] for line in lines) / 8


@torch.no_grad()
def expected_kl(run: Run, parent: torch.nn.Module) -> float:
    """Over all windows, by the definition."""
    ids, student = training_windows(run, run.recipe.finetune), run.dense()
    thresholds, _ = read(run.stage_folder("calibrate"))
    with SparseMasks(student, sparsifier_of(run.recipe, thresholds).rules, None):
        log_q = student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    log_p = parent(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def test_the_control_can_be_the_parent(tmp_path: Path) -> None:
    run = Run(Recipe.model_validate(settings_in(tmp_path, "control")))
    run_stage(run, "calibrate")
    with pytest.raises(MoyuError, match="stage 'control' is not finished"):
        run_stage(run, "finetune")
    run_stage(run, "control")
    run_stage(run, "finetune")
    control = load_dense(run.stage_folder("control") / run.figures("control")["model"])
    assert kl_of_all_steps(run) == pytest.approx(expected_kl(run, control), rel=1e-3)
    assert expected_kl(run, control) != pytest.approx(expected_kl(run, run.dense()), rel=0.05)


def test_the_control_can_say_the_learning_rate(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, "")
    settings["finetune"]["learning_rate"] = "control"
    settings["control"] = {"learning_rates": [1e-12, 3e-3]}
    run = Run(Recipe.model_validate(settings))
    run_stage(run, "calibrate")
    with pytest.raises(MoyuError, match="stage 'control' is not finished"):
        run_stage(run, "finetune")
    run_stage(run, "control")
    run_stage(run, "finetune")
    assert run.figures("control")["best_learning_rate"] == "0.003"
    lines = (run.stage_folder("finetune") / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["learning_rate"] for line in lines) == pytest.approx(3e-3, rel=0.1)
    with pytest.raises(ValidationError, match="learning_rate 'control' is the dense control's, and control is null"):
        Recipe.model_validate(settings | {"control": None})


def test_another_model_can_be_the_parent(tmp_path: Path) -> None:
    other = tmp_path / "other"
    bigger = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "num_hidden_layers": 3})
    torch.manual_seed(1)
    LlamaForCausalLM(bigger).save_pretrained(other)
    tokenizer().save_pretrained(other)
    run = Run(Recipe.model_validate(settings_in(tmp_path, str(other))))
    run_stage(run, "calibrate")
    run_stage(run, "finetune")
    assert kl_of_all_steps(run) == pytest.approx(expected_kl(run, load_dense(other)), rel=1e-3)
    LlamaForCausalLM(bigger).save_pretrained(other)
    assert Run(run.recipe).finished("finetune") is None
    assert Run(run.recipe).finished("calibrate") is not None


def test_a_parent_that_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["llama"].__class__(**{**CONFIGS["llama"].to_dict(), "vocab_size": 300})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(MoyuError, match="vocabulary of 300 tokens and the model one of 259"):
        Run(Recipe.model_validate(settings_in(tmp_path, str(tmp_path / "other"))))
    with pytest.raises(MoyuError, match=r"finetune\.parent: model 'no/such/folder' could not be loaded"):
        Run(Recipe.model_validate(settings_in(tmp_path, "no/such/folder")))
    with pytest.raises(ValueError, match="control is null"):
        Recipe.model_validate(settings_in(tmp_path, "control") | {"control": None})
    assert tiny_model().config.vocab_size == 259


@pytest.mark.parametrize("method", [{"name": "threshold"}, {"name": "relu"}])
def test_a_lora_student_can_be_its_own_parent(tmp_path: Path, method: dict) -> None:
    """The same losses, step by step, as with a copy of the model; and no copy is loaded."""
    lines = {}
    for parent in ("", "shared"):
        settings = settings_in(tmp_path, parent) | {"sparsifier": method, "run": str(tmp_path / f"run-{parent}")}
        settings["finetune"] |= {
            "lora": {"rank": 4, "dropout": 0.1},
            "learning_rate": 1e-2,
            "activation_checkpointing": True,
        }
        run = Run(Recipe.model_validate(settings))
        run_stage(run, "calibrate")
        if parent:
            run.parent = lambda: pytest.fail("a second model was loaded")  # type: ignore[method-assign]
        run_stage(run, "finetune")
        text = (run.stage_folder("finetune") / "metrics.jsonl").read_text()
        lines[parent] = [json.loads(line) for line in text.splitlines()]
    for own, shared in zip(lines[""], lines["shared"], strict=True):
        for name in ("kl", "loss", "grad_norm", "sparsity"):
            assert shared[name] == pytest.approx(own[name], rel=1e-4), name
    assert lines[""][-1]["kl"] != pytest.approx(lines[""][0]["kl"], rel=0.01)  # the deltas did something


def test_a_shared_parent_is_refused_where_there_is_none(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, "shared")
    with pytest.raises(ValueError, match="is the student without its deltas"):
        Recipe.model_validate(settings)


def test_a_shared_parent_is_refused_under_an_engine_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path, "shared")
    settings["finetune"] |= {"lora": {"rank": 4}}
    monkeypatch.setattr("moyu_train.training.shared_parent.asked_engine", lambda: "ZeRO-3")
    monkeypatch.setattr("moyu_train.pipeline.Run.dense", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(MoyuError, match="which ZeRO-3 shares out among processes"):
        Run(Recipe.model_validate(settings))


@pytest.mark.parametrize("embeddings", [True, False])
def test_embeddings_train_only_where_asked(tmp_path: Path, embeddings: bool) -> None:
    settings = settings_in(tmp_path, "")
    settings["finetune"] |= {"learning_rate": 1e-2, "embeddings": embeddings}
    run = Run(Recipe.model_validate(settings))
    for stage in ("calibrate", "finetune"):
        run_stage(run, stage)
    before, after = run.dense().state_dict(), load_dense(run.stage_folder("finetune") / "model").state_dict()
    kept = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert kept == (set() if embeddings else {"model.embed_tokens.weight", "lm_head.weight"})


@pytest.mark.parametrize("changes", [{}, {"block_weight": 0.5}])
def test_an_offloaded_parent_says_the_same(tmp_path: Path, changes: dict) -> None:
    logs = []
    for offload in (False, True):
        folder = tmp_path / str(offload)
        settings = settings_in(folder, "")
        settings["finetune"] |= {"learning_rate": 1e-3, "parent_offload": offload, **changes}
        run = Run(Recipe.model_validate(settings))
        run_stage(run, "calibrate")
        run_stage(run, "finetune")
        logs.append((run.stage_folder("finetune") / "metrics.jsonl").read_text())
    assert logs[0] == logs[1]
    assert '"kl"' in logs[0]


def test_nothing_of_an_offloaded_parent_stays_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    train = SparsityTrainer.train
    monkeypatch.setattr(SparsityTrainer, "train", lambda self, **k: (seen.append(self.parent), train(self, **k))[1])
    settings = settings_in(tmp_path, "")
    settings["finetune"]["parent_offload"] = True
    run = Run(Recipe.model_validate(settings))
    run_stage(run, "calibrate")
    run_stage(run, "finetune")
    assert all(weight.is_meta for weight in seen[0].parameters())


@pytest.mark.parametrize(
    "changes", [{"kl_weight": 0.0, "lm_weight": 1.0}, {"parent": "shared", "lora": {"rank": 2, "alpha": 4}}]
)
def test_no_parent_to_offload_is_refused(tmp_path: Path, changes: dict) -> None:
    settings = settings_in(tmp_path, "")
    settings["finetune"] |= {"parent_offload": True, **changes}
    with pytest.raises(ValidationError, match="the CPU's memory, and there is none with parent"):
        Recipe.model_validate(settings)
