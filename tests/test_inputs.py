"""Sparse inputs of linear layers: which layers, the masks by hand, training, deltas, and the way into a checkpoint."""

import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from moyu_kernels.checkpoint import MANIFEST
from moyu_kernels.inputs import SparseLinear
from moyu_kernels.modules import set_mode
from moyu_kernels.rules import Rule
from tiny import interrupted_at, save_tiny, tiny_model, tiny_settings

from moyu_train.checkpoints.export import read_inputs
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.files import sha256
from moyu_train.models.blocks import find_inputs
from moyu_train.models.loading import load_dense
from moyu_train.models.masking import InputMasks
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe
from moyu_train.training.inputs import channel_medians, input_rules

ATTENTION = {"llama": r"self_attn\.[qkvo]_proj", "gpt2": r"attn\.c_(attn|proj)", "opt": "self_attn"}


def settings_in(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    settings = tiny_settings(folder, save_tiny(folder / "model"))
    return settings | {"predictor": None, "control": None, "bench": None, "inputs": inputs}


@pytest.mark.parametrize("family", list(ATTENTION))
def test_layers_are_found_by_pattern(family: str) -> None:
    model = tiny_model(family)
    layers = find_inputs(model, ATTENTION[family])
    assert len(layers) == {"llama": 8, "gpt2": 4, "opt": 8}[family]
    for layer in layers:
        weight = model.get_submodule(layer.path).weight
        expected = weight.norm(dim=1) if family == "gpt2" else weight.norm(dim=0)
        torch.testing.assert_close(layer.down_norms(), expected)


def test_patterns_that_match_nothing_or_an_ffn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MoyuError, match=r"matches no linear layer; there are model.layers.0.self_attn.q_proj"):
        find_inputs(tiny_model(), "query")
    with pytest.raises(MoyuError, match=r"matches model.layers.0.mlp.gate_proj, a part of an FFN block"):
        find_inputs(tiny_model(), "proj")
    for inputs, message in (
        ({"sparsity": 0.5, "modules": "("}, "is no regular expression"),
        ({"sparsity": 0.5, "name": "tresh"}, "did you mean"),
        ({"name": "threshold"}, "inputs.sparsity"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.model_validate(settings_in(tmp_path, inputs))
    with pytest.raises(MoyuError, match="sparsifier 'relu' acts on gated, fused, plain blocks"):
        Run(Recipe.model_validate(settings_in(tmp_path, {"sparsity": 0.5, "name": "relu"})))
    with pytest.raises(MoyuError, match=r"unknown key 'inputs\.statistics'"):
        Run(Recipe.model_validate(settings_in(tmp_path, {"sparsity": 0.5, "statistics": "magnitude"})))


@pytest.mark.parametrize(
    "inputs",
    [
        {"sparsity": 0.4},  # WINA
        {"sparsity": 0.4, "statistic": "magnitude"},  # TEAL
        {"sparsity": 0.4, "centre": "median"},  # SCAP, with a centre for each input
        {"sparsity": 0.4, "name": "topk", "statistic": "magnitude", "modules": r"[qk]_proj"},  # Q-Sparse
    ],
)
def test_inputs_are_sparse_from_calibration_to_the_checkpoint(tmp_path: Path, inputs: dict[str, Any]) -> None:
    settings = settings_in(tmp_path, inputs)
    through_kernels = "name" in inputs or "statistic" not in inputs  # once simulated and once by the op: it compiles
    settings["evaluate"] |= {"kernel_tokens": 32 if through_kernels else 0}
    run = Run(Recipe.model_validate(settings))
    run_stage(run, "calibrate")
    model, ids = run.dense(), run.validation.tokens[0][None, :64]
    rules = input_rules(run, "calibrate")
    layer = model.model.layers[1].self_attn.q_proj
    weight, seen = layer.weight, []
    layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with InputMasks(model, rules) as masks, torch.no_grad():
        model(input_ids=ids)
    (x, y), path = seen[0], "model.layers.1.self_attn.q_proj"
    torch.testing.assert_close(y, x @ weight.T)
    assert masks.off() == pytest.approx(0.4, abs=0.08)
    with torch.no_grad():
        model(input_ids=ids)
    dense = seen[1][0]  # masks are off again
    assert (dense != 0).all()
    strength = rules[path].distance(dense).abs() * (
        weight.norm(dim=0) if inputs.get("statistic") != "magnitude" else 1.0
    )
    keep = rules[path].mask(dense)
    if inputs.get("centre") == "median":
        assert rules[path].centre.abs().min() > 0
        assert (x == rules[path].centre).float().mean().item() == pytest.approx(0.4, abs=0.1)
    kept, dropped = strength.where(keep, torch.inf).amin(-1), strength.where(~keep, 0.0).amax(-1)
    assert (kept >= dropped * (1 - 1e-5)).all()

    figures = run_stage(run, "finetune")
    assert figures["inputs_sparsity"] == pytest.approx(0.4, abs=0.1)
    run_stage(run, "export")
    run_stage(run, "verify")
    found = run_stage(run, "evaluate")
    assert found["inputs_off"] == pytest.approx(0.4, abs=0.1)
    assert (found["kernels"] is not None) == through_kernels

    folder = run.stage_folder("export") / "checkpoint"
    assert sorted(read_inputs(folder)) == sorted(b.path for b in find_inputs(model, run.recipe.inputs.modules))
    with torch.no_grad():
        sparse = moyu_kernels.from_pretrained(folder, mode="dense")(input_ids=ids).logits
        stock = load_dense(run.stage_folder("finetune") / "model")(input_ids=ids).logits
        loaded = moyu_kernels.from_pretrained(folder)
        ruled = loaded(input_ids=ids).logits
    torch.testing.assert_close(sparse, stock, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ruled, stock, rtol=1e-2, atol=1e-2)
    if inputs.get("centre") != "median":  # format 5 did not say `centred`
        config, manifest = (json.loads((folder / name).read_text()) for name in ("config.json", MANIFEST))
        assert config["moyu"]["inputs"].pop("centred") is False
        config["moyu"]["format_version"] = manifest["format_version"] = 5
        (folder / "config.json").write_text(json.dumps(config))
        manifest["files"]["config.json"] = sha256(folder / "config.json")
        (folder / MANIFEST).write_text(json.dumps(manifest))
        torch.testing.assert_close(moyu_kernels.from_pretrained(folder)(input_ids=ids).logits, ruled)
    layer = loaded.model.layers[1].self_attn.q_proj
    assert isinstance(layer, SparseLinear) == ("name" not in inputs)
    if isinstance(layer, SparseLinear):
        set_mode(loaded, "dense")
        torch.testing.assert_close(loaded(input_ids=ids).logits, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centre", ["zero", "median"])
def test_a_delta_keeps_the_rules_of_inputs(tmp_path: Path, centre: str) -> None:
    settings = settings_in(tmp_path, {"sparsity": 0.4, "centre": centre})
    settings["finetune"] |= {"lora": {"rank": 2, "alpha": 4}}
    run = Run(Recipe.model_validate(settings))
    run_stage(run, "calibrate")
    run_stage(run, "finetune")
    delta = str(run.stage_folder("finetune") / "delta")
    again = Run(Recipe.model_validate(settings | {"delta": delta, "run": str(tmp_path / "again")}))
    run_stage(again, "calibrate")
    assert run_stage(again, "finetune")["ffn_sha256"] == run.figures("finetune")["ffn_sha256"]
    trained, rebuilt, before = (
        input_rules(r, s) for r, s in ((run, "finetune"), (again, "finetune"), (run, "calibrate"))
    )
    for path, rule in trained.items():
        torch.testing.assert_close(rebuilt[path].threshold, rule.threshold, rtol=0, atol=0)
        torch.testing.assert_close(rebuilt[path].centre, rule.centre, rtol=0, atol=0)
        assert (rule.centre is None) == (centre == "zero")
    assert any(not torch.equal(before[path].threshold, rule.threshold) for path, rule in trained.items())
    other = Run(
        Recipe.model_validate(settings | {"delta": delta, "inputs": {"sparsity": 0.5}, "run": str(tmp_path / "b")})
    )
    run_stage(other, "calibrate")
    with pytest.raises(MoyuError, match="was trained under"):
        run_stage(other, "finetune")


def test_training_resumes_with_the_thresholds_of_inputs(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, {"sparsity": 0.4})
    whole = Run(Recipe.model_validate(settings | {"run": str(tmp_path / "whole")}))
    run_stage(whole, "calibrate")
    run_stage(whole, "finetune")

    broken = Run(Recipe.model_validate(settings))
    run_stage(broken, "calibrate")
    with interrupted_at(5):
        run_stage(broken, "finetune")
    run_stage(broken, "finetune")
    one, two = (input_rules(r, "finetune") for r in (whole, broken))
    for path, rule in one.items():
        torch.testing.assert_close(two[path].threshold, rule.threshold)


def test_medians_are_those_of_the_text() -> None:
    model, ids = tiny_model(), torch.arange(40) % 100
    layers = find_inputs(model, "o_proj")
    seen: list[torch.Tensor] = []
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    found = channel_medians(model, layers, Documents([ids]))
    torch.testing.assert_close(found[1], seen[0].median(0).values)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centred_layer(backend: str, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    centre, threshold = torch.randn(24), torch.full((24,), 0.8)
    x = torch.randn(11, 24).to(dtype)
    rule = Rule(threshold, centre=centre)
    expected = linear(torch.where(rule.mask(x), x, centre.to(dtype)))
    dense = linear(x)
    layer = SparseLinear(linear, threshold, backend=backend, centre=centre)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(x), expected, **close)  # a prompt
    torch.testing.assert_close(layer(x[:2]), expected[:2], **close)  # a step
    assert layer.counts.tolist() == [13, rule.mask(x).sum() + rule.mask(x[:2]).sum()]
    torch.testing.assert_close(layer.set_mode("dense")(x[:2]), dense[:2], **close)
    with pytest.raises(ValueError, match=r"centre is torch.float32 \[23\], the layer needs torch.float32 \[24\]"):
        SparseLinear(linear, threshold, centre=centre[:23])
