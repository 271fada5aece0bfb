"""`heads.keep` in a recipe: fitted on the tuned model, exported, verified, evaluated in the loop, and refused early."""

import json
import shutil
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from moyu_kernels.checkpoint import CheckpointError
from moyu_kernels.heads import HeadQuery
from moyu_kernels.vllm_plugin import read_blocks
from test_heads import logits_of
from tiny import save_tiny, tiny_settings
from transformers import AutoConfig, AutoModelForCausalLM

from moyu_train.analysis.subject import Subject
from moyu_train.checkpoints.export import STATE, read_heads, read_state
from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench_bytes import heads_skipped, inputs_skipped
from moyu_train.evaluation.head_masks import HeadMasks, dense_bytes
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import score
from moyu_train.files import read_tensors
from moyu_train.models.heads import find_attention
from moyu_train.models.loading import load_dense
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe, load_recipe
from moyu_train.training import stages
from moyu_train.training.heads import RouterTrainer, head_routers

IDS = torch.arange(20).view(1, 20) * 7 % 259


def settings_in(folder: Path, family: str = "llama", heads: dict[str, Any] | None = None) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    settings |= {"control": None, "bench": None, "heads": {"keep": 0.5, "dense_layers": [0], **(heads or {})}}
    return settings


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    (folder / "r.yaml").write_text(yaml.safe_dump(settings_in(folder)))
    assert main(["run", str(folder / "r.yaml")]) == 0
    return folder


def checkpoint(finished: Path) -> Path:
    return finished / "run" / "export" / "checkpoint"


def test_a_run_evaluates_its_heads_in_the_loop(finished: Path, capsys: pytest.CaptureFixture) -> None:
    result = json.loads((finished / "run" / "result.json").read_text())
    heads, ppl = result["heads"], result["ppl"]
    assert (heads["unit"], heads["keep"], heads["units"]) == ("head", 2, 4)
    assert (heads["layers"], heads["dense_layers"], heads["context"]) == (1, 1, 2048)
    assert 0.5 < heads["recall"] <= 1
    assert heads["weights_skipped"] < 0.3
    folder = checkpoint(finished)
    run = Run(load_recipe(str(finished / "r.yaml")))
    model, documents = load_dense(folder), run.test
    rules, predictors = read_state(folder)
    routers = read_heads(folder)
    with SparseMasks(model, rules, predictors), HeadMasks.of(model, routers) as masks:
        assert score(model, documents, 64, "sparse").perplexity == pytest.approx(ppl["sparse"], rel=1e-6)
    skipped = masks.skipped(find_attention(model)[:1], 4, 2048)
    assert skipped == {name: heads[name] for name in skipped}
    with SparseMasks(model, rules, predictors):
        assert score(model, documents, 64, "sparse").perplexity == pytest.approx(ppl["all_heads"], rel=1e-6)
    with SparseMasks(model, rules, None):
        assert score(model, documents, 64, "sparse").perplexity == pytest.approx(ppl["rule"], rel=1e-6)
    calibrated = run.figures("recalibrate")  # with heads off in the loop
    few = run.validation.first(run.recipe.calibrate.tokens)
    with SparseMasks(model, rules, predictors), HeadMasks.of(model, routers):
        assert score(model, few, 1024, "calibrated").perplexity == pytest.approx(calibrated["perplexity"], rel=1e-6)
    assert len({ppl[name] for name in ("sparse", "all_heads", "rule")}) == 3
    assert result["kernels"]["fp32_perplexity"] == pytest.approx(result["kernels"]["masked_perplexity"], rel=1e-3)
    card = ModelCard.load(folder / "README.md").text
    assert f"2 of 4 heads run per token in 1 of 2 layers; {heads['weights_skipped']:.1%} of the weights' bytes" in card
    assert f"| sparse, with all attention heads | {ppl['all_heads']:.3f} |" in card
    page = (finished / "run" / "report.html").read_text()
    assert f"{heads['bytes_skipped']:.0%} of the attention" in page
    assert main(["evaluate", str(folder), "--data.test", run.recipe.data.test, "--evaluate.window", "64"]) == 0
    assert "all_heads" in capsys.readouterr().out
    documented = (Path(__file__).parent.parent / "docs" / "results.md").read_text()
    for name in ("heads", "ppl.all_heads", *heads):
        assert f"`{name}`" in documented or f"`heads.{name}`" in documented, name


def test_routers_are_fitted_under_the_masks_of_the_tuned_model(finished: Path, tmp_path: Path) -> None:
    run = Run(load_recipe(str(finished / "r.yaml")))
    routers = head_routers(run, "refit-heads")
    assert routers is not None
    assert list(routers.routers) == ["model.layers.1.self_attn"]
    model = load_dense(run.stage_folder("finetune") / "model")
    windows = stages.fit_windows(run.recipe, run.train)
    rules = stages.sparsifier_of(run.recipe, stages.read(run.stage_folder("finetune"))[0]).rules
    last = find_attention(model)[1:]
    (tmp_path / "plain").mkdir()
    plain = RouterTrainer(model, last, "head", tmp_path / "plain").fit(windows, 100)
    with SparseMasks(model, rules, None):
        under = RouterTrainer(model, last, "head", tmp_path).fit(windows, 100)
    found = routers.routers["model.layers.1.self_attn"]
    torch.testing.assert_close(found["bias"], under[0]["bias"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found["bias"], plain[0]["bias"], rtol=1e-3, atol=1e-4)


def test_switches_and_analysis_of_what_was_exported(finished: Path) -> None:
    folder = checkpoint(finished)
    model = moyu_kernels.from_pretrained(folder)
    assert {
        module.mode for module in model.modules() if isinstance(module, HeadQuery | moyu_kernels.SparseGatedFFN)
    } == {"predicted"}
    rules, predictors = read_state(folder)
    stock = load_dense(folder)
    with SparseMasks(stock, rules, predictors), HeadMasks.of(stock, read_heads(folder)):
        expected = logits_of(stock, IDS)
    torch.testing.assert_close(logits_of(model, IDS[:, :8]), expected[:, :8], rtol=1e-3, atol=1e-3)
    seen: list[torch.Tensor] = []
    Subject.checkpoint("sparse", folder).run(IDS, lambda seen_: seen.append(seen_.a))
    kept: list[torch.Tensor] = []
    with SparseMasks(stock, rules, predictors), HeadMasks.of(stock, read_heads(folder)):
        down = stock.model.layers[1].mlp.down_proj
        down.register_forward_hook(lambda _, args, __: kept.append(args[0]))
        logits_of(stock, IDS)
    torch.testing.assert_close(seen[1].view_as(kept[-1]), kept[-1], rtol=1e-4, atol=1e-5)


def test_bytes_of_a_benchmark_are_those_of_the_masks(finished: Path) -> None:
    folder, context = checkpoint(finished), 64
    model, stock = moyu_kernels.from_pretrained(folder), load_dense(folder)
    last = find_attention(stock)[1:]
    with SparseMasks(stock, *read_state(folder)), HeadMasks.of(stock, read_heads(folder)) as masks:
        logits_of(stock, IDS[:, :8])
    runner = moyu_kernels.Runner(model, 8, compile=False)
    runner.reset()
    for module in model.modules():
        if hasattr(module, "counts"):
            module.counts.zero_()
    for token in IDS[:, :8].split(1, 1):
        runner.step(token)
    thresholds = 4 * 32  # zeros, which the op reads beside o
    dense, read = dense_bytes(last, 4, context, 1), masks.bytes_read(4, context)
    found = inputs_skipped(model, 4) + heads_skipped(model, 4, context)
    assert found == pytest.approx(sum(dense) - sum(read) - thresholds)
    moyu_kernels.modules.set_mode(model, "rule")
    assert heads_skipped(model, 4, context) == 0
    runner.close()


def test_stages_are_reused_and_keep_only_counts_where_it_matters(finished: Path) -> None:
    recipe = load_recipe(str(finished / "r.yaml"))
    run = Run(recipe)
    assert all(run.finished(name) for name in run.stages)
    assert "refit-heads" in run.stages
    other = Run(load_recipe(str(finished / "r.yaml"), ["--heads.keep", "0.75"]))
    stale = [name for name in other.stages if not other.finished(name)]
    assert stale == ["recalibrate", "export", "verify", "evaluate", "report"]
    other = Run(load_recipe(str(finished / "r.yaml"), ["--heads.unit", "group"]))
    assert next(name for name in other.stages if not other.finished(name)) == "refit-heads"
    without = Run(load_recipe(str(finished / "r.yaml"), ["--heads.keep", "null"]))
    assert "refit-heads" not in without.stages
    assert without.needs("export") == ["recalibrate", "finetune"]
    with pytest.raises(MoyuError, match=r"not part of this recipe without heads\.keep"):
        run_stage(without, "refit-heads")


def test_fine_tuning_runs_with_heads_off_and_its_parent_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path, heads={"train": True}) | {"predictor": None}
    for parent in ("", "shared"):
        lora = {"lora": {"rank": 2}, "parent": parent} if parent else {}
        more = {"run": str(tmp_path / f"run{parent}"), "finetune": settings["finetune"] | lora}
        run = Run(Recipe.model_validate(settings | more))
        assert run.needs("finetune") == ["calibrate", "fit-heads"]
        for name in ("calibrate", "fit-heads"):
            run_stage(run, name)
        model = run.dense()
        dense = logits_of(model, IDS)
        rules = stages.sparsifier_of(run.recipe, stages.read(run.stage_folder("calibrate"))[0]).rules
        with SparseMasks(model, rules, None), HeadMasks.of(model, head_routers(run, "fit-heads")):
            masked = logits_of(model, IDS)

        class Seen(Exception):
            """Enough was seen."""

        def look(self: Any, *_: Any, dense: Any = dense, masked: Any = masked, **__: Any) -> None:
            with torch.no_grad():
                torch.testing.assert_close(self.parent(input_ids=IDS, use_cache=False).logits, dense)
                torch.testing.assert_close(logits_of(self.model, IDS), masked, rtol=1e-4, atol=1e-4)
            raise Seen

        with monkeypatch.context() as patch:
            patch.setattr("moyu_train.training.finetune.SparsityTrainer.train", look)
            with pytest.raises(Seen):
                run_stage(run, "finetune")
    assert not torch.allclose(masked, dense, rtol=1e-2, atol=1e-2)


def test_a_run_that_trains_with_heads_off(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, heads={"train": True}) | {"predictor": None}
    settings["finetune"] |= {"lora": {"rank": 2, "alpha": 4}}
    run = Run(Recipe.model_validate(settings))
    for name in ("calibrate", "fit-heads", "finetune", "refit-heads", "export", "verify"):
        run_stage(run, name)
    before, after = (head_routers(run, stage) for stage in ("fit-heads", "refit-heads"))
    path = "model.layers.1.self_attn"
    assert not torch.equal(before.routers[path]["bias"], after.routers[path]["bias"])
    found = run_stage(run, "evaluate")
    model, thresholds = run.dense(), stages.read(run.stage_folder("calibrate"))[0]
    with SparseMasks(model, stages.sparsifier_of(run.recipe, thresholds).rules, None), HeadMasks.of(model, before):
        untouched = score(model, run.test, 64, "untouched").perplexity
    assert found["ppl"]["untouched"] == pytest.approx(untouched, rel=1e-6)
    delta = {"delta": str(run.stage_folder("finetune") / "delta"), "run": str(tmp_path / "again")}
    other = Run(Recipe.model_validate(settings | delta | {"heads": settings["heads"] | {"keep": 0.75}}))
    for name in ("calibrate", "fit-heads"):
        run_stage(other, name)
    with pytest.raises(MoyuError, match="was trained under"):
        run_stage(other, "finetune")
    plain = Run(Recipe.model_validate(settings | {"heads": settings["heads"] | {"train": False}}))
    stale = [name for name in plain.stages if not plain.finished(name)]
    assert "calibrate" not in stale
    assert {"finetune", "refit-heads", "export", "evaluate"} <= set(stale)


def test_an_interrupted_fit_goes_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    recipe = load_recipe(str(finished / "r.yaml"), ["--run", str(tmp_path / "run"), "--fit.window", "32"])
    whole = Run(recipe.model_copy(update={"run": str(tmp_path / "whole")}))
    broken, seen = Run(recipe), []
    for run in (whole, broken):
        shutil.copytree(finished / "run" / "finetune", run.folder / "finetune", dirs_exist_ok=True)
        monkeypatch.setattr(run, "figures", lambda name: {})
    expected = run_stage(whole, "refit-heads")
    stock = stages.fit_under

    def breaks(model: Any, *arguments: Any) -> Any:
        def stop(*_: Any) -> None:
            seen.append(1)
            if len(seen) == 10:
                raise KeyboardInterrupt

        with model.register_forward_hook(stop):
            return stock(model, *arguments)

    monkeypatch.setattr(stages, "fit_under", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_stage(broken, "refit-heads")
    assert run_stage(broken, "refit-heads") == expected
    assert len(seen) == 10 + 32 - 8  # of 32 windows 8 were kept
    one, two = (head_routers(run, "refit-heads") for run in (whole, broken))
    for path, router in one.routers.items():
        torch.testing.assert_close(dict(two.routers[path]), dict(router), rtol=1e-4, atol=1e-5)


def test_weights_that_were_changed_get_routers_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(finished), folder)
    settings = yaml.safe_load((finished / "r.yaml").read_text())
    before = read_tensors(folder / STATE)
    model = load_dense(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(torch.randn(16, 32) / 4)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="where you changed weights, fit predictors"):
        moyu_kernels.from_pretrained(folder)
    text = ["--data.train", settings["data"]["train"], "--data.validation_documents", "2"]
    assert main(["fit-predictors", "--from", str(folder), *text]) == 0
    after = read_tensors(folder / STATE)
    assert after.keys() == before.keys()
    assert not torch.equal(after["heads.0.weight"], before["heads.0.weight"])
    moyu_kernels.from_pretrained(folder)


def test_without_a_predictor_heads_are_predicted_all_the_same(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, heads={"unit": "group"}) | {"predictor": None}
    run = Run(Recipe.model_validate(settings))
    for name in ("calibrate", "finetune", "refit-heads", "export", "verify"):
        run_stage(run, name)
    found = run_stage(run, "evaluate")
    assert found["ppl"]["all_heads"] == found["ppl"]["rule"] != found["ppl"]["sparse"]
    assert found["heads"]["cache_skipped"] == pytest.approx(0.25)
    assert found["kernels"]["fp32_perplexity"] == pytest.approx(found["kernels"]["masked_perplexity"], rel=1e-3)


@pytest.mark.parametrize(("family", "simulated"), [("mixtral", True), ("opt", False)])
def test_heads_are_decoded_beside_ffns_of_other_layouts(tmp_path: Path, family: str, simulated: bool) -> None:
    run = Run(Recipe.model_validate(settings_in(tmp_path, family) | {"predictor": None}))
    for name in ("calibrate", "finetune", "refit-heads", "export", "verify"):
        run_stage(run, name)
    found = run_stage(run, "evaluate")
    assert found["simulated"] == simulated
    assert found["heads"]["weights_skipped"] > 0
    assert found["kernels"]["fp32_perplexity"] == pytest.approx(found["kernels"]["masked_perplexity"], rel=1e-3)
    model = moyu_kernels.from_pretrained(run.stage_folder("export") / "checkpoint")
    (query,) = [module for module in model.modules() if isinstance(module, HeadQuery)]
    assert (query.bias is not None) == (family == "opt")


def test_routers_of_other_weights_are_not_exported(tmp_path: Path) -> None:
    run = Run(Recipe.model_validate(settings_in(tmp_path) | {"predictor": None}))
    for name in ("calibrate", "finetune", "refit-heads"):
        run_stage(run, name)
    folder = run.stage_folder("finetune") / "model"
    model = load_dense(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.add_(1)
    model.save_pretrained(folder)
    with pytest.raises(MoyuError, match="were fitted for other weights; delete that folder"):
        run_stage(run, "export")


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("llama", {"heads": {"keep": 0.95}}, "heads.keep 0.95 keeps 4 of the 4 heads of a layer"),
        ("llama", {"heads": {"train": True}}, "heads.train runs fine-tuning with heads off, and heads.keep is null"),
        ("llama", {"heads": {"keep": 1.5}}, "heads.keep: Input should be less than 1"),
        ("llama", {"heads": {"keep": 0.5, "dense_layers": [0, 1]}}, "at least one has to be sparse"),
        ("gpt2", {}, "heads: no op can skip the heads of transformer.h.1.attn"),
        ("phi3", {}, "heads: no op can skip the heads of model.layers.1.self_attn"),
        ("llama", {"inputs": {"sparsity": 0.4}}, "layers.1.self_attn.q_proj would have sparse inputs beside heads"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, family: str, more: Any, message: str
) -> None:
    settings = settings_in(tmp_path, family) | {"predictor": None} | more
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr("moyu_train.pipeline.load_dense", None)
    assert main(["run", str(tmp_path / "r.yaml")]) == 1
    assert message in capsys.readouterr().err


def test_sparse_inputs_of_other_layers_go_together(tmp_path: Path) -> None:
    settings = settings_in(tmp_path) | {"inputs": {"sparsity": 0.4, "modules": r"layers\.0\.self_attn\.[qkvo]_proj"}}
    Run(Recipe.model_validate(settings))


def test_engines_without_routers_compute_all_heads(finished: Path, tmp_path: Path) -> None:
    folder = checkpoint(finished)
    assert main(["export-dense", str(folder), str(tmp_path / "dense")]) == 0
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(dense, IDS), logits_of(load_dense(folder), IDS), rtol=1e-4, atol=1e-4)
    assert not hasattr(dense.config, "moyu")
    assert len(read_blocks(folder, AutoConfig.from_pretrained(folder))) == 2
