"""`moyu reproduce`: each on a tiny model through the command line, and the statistics on figures with known answers."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from moyu_kernels import Runner
from moyu_kernels.prompt_ffn import PromptFFN
from moyu_kernels.rules import Rule
from tiny import save_text, save_tiny, tiny_model, tiny_settings

from moyu_train.cli import main
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.recipe import shipped_recipes
from moyu_train.reproduce import REPRODUCTIONS
from moyu_train.reproduce.arms import CONTROL, Paired
from moyu_train.reproduce.decode_time import DENSE, cell, decode_times, milliseconds
from moyu_train.reproduce.drift import regress, toy
from moyu_train.reproduce.history import histories
from moyu_train.reproduce.inertia import BASE, PENALTIES, PREDICTED
from moyu_train.reproduce.locality import loss_at
from moyu_train.reproduce.prompt_masks import late_scores
from moyu_train.reproduce.trinity import FAMILIES, METHODS, OURS, reach
from moyu_train.settings_export import Bench


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for all of them."""
    folder = tmp_path_factory.mktemp("reproduce")
    settings = tiny_settings(folder, save_tiny(folder / "model"))
    settings |= {"predictor": None, "bench": None, "target_sparsity": 0.5}
    settings["data"] = {
        "train": str(save_text(folder / "train.jsonl", documents=16, words=90)),
        "test": str(save_text(folder / "test.jsonl", documents=6, words=90)),
        "validation_documents": 2,
    }
    settings["compare"] = {"predictors": [{"name": "lowrank", "rank": 4}], "bytes_skipped": [0.2]}
    settings["analyze"] = {"tokens": 1024, "measures": ["history", "inertia"]}
    settings["finetune"] |= {"tokens": 384}
    settings["control"] = {"learning_rates": [1e-3]}
    settings["fit"] = {"tokens": 1024, "window": 64}
    settings["evaluate"] = {"window": 256, "tokens": 1024}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


def run(name: str, recipe: Path, *more: str) -> dict:
    folder = recipe.parent / name
    assert main(["reproduce", name, str(recipe), "--run", str(folder), *more]) == 0
    assert (folder / f"{name}.png").is_file()
    figures: dict = json.loads((folder / f"{name}.json").read_text())
    assert isinstance(figures["passed"], bool)
    assert figures["conclusion"]
    assert figures["rows"]
    return figures


def test_every_reproduction_has_a_recipe_and_is_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", "list"]) == 0
    out = capsys.readouterr().out
    for name in REPRODUCTIONS:
        assert f"smollm2-135m/reproduce/{name}" in shipped_recipes()
        assert name in out
    assert main(["reproduce", "inertai"]) == 1
    assert "did you mean 'inertia'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["inertia-2x2", "history", "pitfalls", "tda", "drift"])
def test_without_training(name: str, tiny: Path) -> None:
    run(name, tiny)


def test_inertia_and_what_it_takes_from_an_earlier_call(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    figures = run("inertia", tiny, "--seeds", "2")
    assert [row["arm"] for row in figures["rows"]] == [BASE, *PENALTIES, PREDICTED]
    assert figures["seeds"] == [2]
    base = figures["rows"][0]
    assert base["taken away"] == "0.000 (0.000 to 0.000)"
    folder = tiny.parent / "inertia"
    assert not list(folder.rglob("model*.safetensors"))  # no arm's model is kept
    capsys.readouterr()
    (folder / "margin-2" / "measured.json").unlink()
    assert run("inertia", tiny, "--seeds", "2") == figures
    err = capsys.readouterr().err
    assert err.count("measured before, reused") == len(PENALTIES) + 2
    assert "margin, seed 2\n" in err


@pytest.mark.slow
def test_locality_and_prosparse(tiny: Path) -> None:
    figures = run("locality-vs-inertia", tiny)
    assert [row["arm"] for row in figures["rows"]] == ["no penalty", "against inertia", "for locality"]
    relu = ["--sparsifier", "{name: relu}", "--penalty", "{name: l1, coefficient: 0.5}"]
    rows = run("prosparse", tiny, *relu)["rows"]
    off = [row["neurons off"] for row in rows]
    assert off[0] < off[2] < off[1]  # L1 makes zeros, and in so few steps the constant one has had more of it


@pytest.mark.slow
def test_trinity(tiny: Path) -> None:
    bench = "{contexts: [130], new_tokens: 4, rounds: 5, threads: [1], compiled: false}"
    more = ["--predictor", "{name: lowbit}", "--calibrate.bytes_skipped", "0.2", "--bench", bench]
    figures = run("trinity", tiny, *more, "--finetune.window", "160", "--finetune.batch", "1")
    rows = {row["method"]: row for row in figures["rows"]}
    assert list(rows) == list(METHODS)
    assert all(row["speed"] > 0 and row["over dense"] > 0.9 for row in rows.values())
    assert rows["GRIFFIN"]["bytes skipped"] > rows["contribution"]["bytes skipped"] > 0
    assert rows[OURS]["training tokens"] > rows["predicted masks"]["training tokens"] == 0
    assert rows[OURS]["kernel"] == rows["predicted masks"]["kernel"]


def test_reach_tells_kernels_from_masks_and_refusals(tiny: Path) -> None:
    from moyu_train.recipe import load_recipe

    found = reach(load_recipe(str(tiny), []))
    assert list(found) == list(FAMILIES)
    assert [found[name] for name in ("llama", "phi3", "opt", "mixtral")] == [
        "kernel",
        "kernel",
        "kernel",
        "simulated",
    ]
    predicted = reach(load_recipe(str(tiny), ["--predictor", "{name: lowbit}", "--calibrate.bytes_skipped", "0.2"]))
    found = [predicted[name] for name in ("llama", "opt", "gpt2", "gpt_neox", "mixtral")]
    assert found == ["kernel"] * 4 + ["refused"], "predictors need an op"
    griffin = reach(load_recipe(str(tiny), ["--sparsifier", "{name: griffin, prompt: 8}"]))
    assert (griffin["gpt2"], griffin["opt"]) == ("kernel", "refused"), "OPT's blocks do not see sequences"
    drelu = reach(load_recipe(str(tiny), ["--sparsifier", "{name: drelu}"]))
    assert (drelu["llama"], drelu["opt"]) == ("kernel", "refused")


def test_trinity_needs_speed_and_predictors(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", "trinity", str(tiny)]) == 1
    assert "give the recipe `bench` and `predictor`" in capsys.readouterr().err


def test_prosparse_needs_its_penalty(tiny: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", "prosparse", str(tiny)]) == 1
    assert "needs penalty.name l1" in capsys.readouterr().err


def test_paired_excess() -> None:
    tokens = [100, 300]
    rows = [{"arm": CONTROL, "seed": seed, "nll": {CONTROL: [100.0, 330.0]}, "tokens": tokens} for seed in (1, 2)]
    for arm, more in (("base", 0.2), ("better", 0.1)):
        for seed in (1, 2):
            dense = [120.0, 360.0]  # the control is the smaller
            masked = [100.0 + more * 100, 330.0 + more * 300]
            rows.append(
                {"arm": arm, "seed": seed, "nll": {"dense": dense, "rule": masked}, "tokens": tokens, "x": more}
            )
    paired = Paired(rows, "base")
    assert paired.excess("base", "rule")[0].item() == pytest.approx(torch.tensor(0.2).expm1().item())
    expected = 1 - torch.tensor(0.1).expm1().item() / torch.tensor(0.2).expm1().item()
    gain = paired.less_excess("better", "rule")
    assert [gain[key] for key in ("value", "low", "high")] == pytest.approx([expected] * 3)  # alike in all documents
    assert paired.difference("better", "x") == {"value": -0.1, "low": -0.1, "high": -0.1}


def test_the_toy_of_drift_has_slope_one_where_its_theory_holds() -> None:
    found = toy(torch.nn.functional.relu)
    assert found["slope"] == pytest.approx(1, abs=0.1)
    assert found["correlation"] > 0.95


def test_histories_are_nested_and_of_equal_tokens() -> None:
    documents = Documents([torch.full((100,), i) for i in range(32)] + [torch.full((10,), 99)])
    texts = histories(documents, 400, seed=0)
    assert [len(text.tokens) for text in texts] == [4, 11, 32]
    assert all(abs(text.total - 400) < 32 for text in texts)
    ids = [{int(t[0]) for t in text.tokens} for text in texts]
    assert ids[0] < ids[1] < ids[2]


def test_loss_at_reads_a_line() -> None:
    line = [{"loss": 2.0, "density": 0.3}, {"loss": 3.0, "density": 0.2}]
    assert loss_at(line, "density", 0.25) == pytest.approx(2.5)


def test_masks_from_the_prompt_are_timed_beside_their_quality(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moyu_train.reproduce.decode_time.Runner", partial(Runner, compile=False))
    bench = ["--bench", "{contexts: [128], new_tokens: 2, rounds: 5}"]
    rows = {row["method"]: row for row in run("tda", tiny, *bench)["rows"]}
    assert len(rows) == 6
    assert all(row["ms a token"] > 0 for row in rows.values())
    assert rows["dense"]["times faster"] == "1.00 (1.00 to 1.00)"
    assert all(" to " in row["times faster"] for row in rows.values())


def test_decode_times_are_paired_and_leave_out_what_has_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moyu_train.reproduce.decode_time.Runner", partial(Runner, compile=False))
    ids, settings = torch.arange(24), Bench(contexts=(16,), new_tokens=4, rounds=5)
    rules = {"prompt": [Rule(torch.zeros(96), keep="prompt_topk", share=0.2, prompt=16)] * 2}
    model, steps = tiny_model(), []
    monkeypatch.setattr(PromptFFN, "_count", lambda self, *counts: steps.append(counts))
    found = decode_times(
        model, rules | {"gate": [Rule(torch.zeros(96), gate="relu", keep="nonzero")] * 2}, ids, settings
    )
    assert set(found) == {DENSE, "prompt", "gate"}
    assert [int(selected) for _, selected, _ in steps[-8:]] == [19] * 8, "the steps that are timed skip"
    ratios = [a / b for a, b in zip(*(found[name]["seconds_per_token"] for name in (DENSE, "prompt")), strict=True)]
    assert [found["prompt"][key] for key in ("least", "speedup", "most")] == [sorted(ratios)[i] for i in (0, 2, 4)]
    assert cell({"speedup": 1.234, "least": 1.1, "most": 1.3}) == "1.23 (1.10 to 1.30)"
    assert milliseconds({"seconds_per_token": [0.001, 0.003, 0.002]}) == 2
    assert set(decode_times(tiny_model("opt"), rules, ids, settings)) == {DENSE}, "its blocks do not see sequences"
    plain = [Rule(torch.zeros(128), keep="prompt_topk", share=0.2, prompt=16)] * 2
    assert set(decode_times(tiny_model("gpt2"), {"prompt": plain}, ids, settings)) == {DENSE, "prompt"}
    with pytest.raises(MoyuError, match=r"first 16 tokens .* bench.contexts has 8"):
        decode_times(model, rules, ids, Bench(contexts=(8,), new_tokens=4))
    with pytest.raises(MoyuError, match="has 24 tokens, and 48 are decoded"):
        decode_times(model, rules, ids, Bench(contexts=(16,)))


def test_late_scores_leave_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moyu_train.reproduce.prompt_masks.PROMPT", 10)
    model, ids = tiny_model(), torch.arange(64)
    found = late_scores(model, Documents([ids[:40], ids[40:50]]), 32, "late")
    assert found.tokens == [21, 0]  # of 32, 8 and 10 tokens only the first window is longer than the prompt
    logits = model(ids[None, :32]).logits[0, 10:-1]
    assert found.nll[0] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[11:32]).item() * 21, rel=1e-5)


def test_regression_of_gradients_is_that_of_autograd() -> None:
    model, ids = tiny_model(), torch.arange(64)
    rows = regress(model, Documents([ids[:32], ids[32:]]), 32)
    down, seen = model.model.layers[1].mlp.down_proj, []
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    slopes = []
    for piece in (ids[:32], ids[32:]):
        logits = model(piece[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, seen[-1])
        x = seen[-1].detach() - seen[-1].detach().mean()
        slopes.append((x * gradient).sum() / x.square().sum())
    handle.remove()
    assert rows[1]["slope"] == pytest.approx(torch.stack(slopes).mean().item(), rel=1e-3)
