"""QLoRA: the model that is merged is the one that trained on 4-bit weights."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, randomised, save_tiny, tiny_model, tiny_settings, tokenizer, with_deltas
from torch import nn

from moyu_train.checkpoints.export import read_state
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe
from moyu_train.settings import Lora
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.control import SparsityControl
from moyu_train.training.lora import adapt, dequantise, merge, quantise

bitsandbytes = pytest.importorskip("bitsandbytes")
quantize_4bit, dequantize_4bit = bitsandbytes.functional.quantize_4bit, bitsandbytes.functional.dequantize_4bit

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))
SETTINGS = Lora(rank=4, alpha=8, quantise="nf4")


def roomy(family: str = "llama") -> nn.Module:
    """A tiny model whose rows can be cut into blocks of 64."""
    config = copy.deepcopy(CONFIGS[family])
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    return randomised(config)


trained = partial(with_deltas, size=0.05, seed=3)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_merged_computes_what_trained(family: str) -> None:
    model = roomy(family)
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    control = SparsityControl(model, Threshold.start(Threshold.Options(), find_blocks(model), 0.5), 0.5)
    control.sparsifier.thresholds = [torch.full_like(t, 0.02) for t in control.sparsifier.thresholds]
    adapted = trained(adapt(model, SETTINGS))
    packed = [m for m in adapted.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 2 * (7 if family == "llama" else 4)
    assert all(layer.weight.dtype == torch.uint8 for layer in packed)
    with torch.no_grad():
        before = adapted(input_ids=IDS, use_cache=False).logits
    merged, figures = merge(adapted, control, IDS[0])
    with torch.no_grad():
        after = merged(input_ids=IDS, use_cache=False).logits
    assert ((after - before).norm(dim=-1) / before.norm(dim=-1)).median() < 1e-4
    assert figures["density_after_merge"] == pytest.approx(figures["density_before_merge"], abs=0.01)
    assert set(merged.state_dict()) == set(stock)
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in merged.modules())
    # The deltas are on the rounded weights, not on those of the source.
    weight = "model.layers.0.mlp.down_proj.weight"
    plain, _ = merge(trained(adapt(roomy(family), Lora(rank=4, alpha=8))), None, IDS[0])
    difference = merged.state_dict()[weight] - plain.state_dict()[weight]
    rounding = (
        dequantize_4bit(*quantize_4bit(stock[weight], quant_type="nf4", compress_statistics=True)) - stock[weight]
    )
    torch.testing.assert_close(difference, rounding, rtol=0, atol=1e-6)
    assert 0.07 < difference.norm() / stock[weight].norm() < 0.11


def test_gradients_are_those_of_the_rounded_weights() -> None:
    found = []
    for rounded in (False, True):
        adapted = trained(adapt(roomy(), SETTINGS))
        if rounded:
            dequantise(adapted)
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


def test_a_recipe_trains_on_four_bits_and_its_delta_rebuilds_the_model(tmp_path: Path) -> None:
    roomy().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    settings = tiny_settings(tmp_path, tmp_path / "model") | {"predictor": None, "control": None}
    settings["finetune"] |= {"lora": {"rank": 4, "alpha": 8, "quantise": "nf4"}, "tokens": 256}
    runs = {}
    for name, delta in (("first", ""), ("again", str(tmp_path / "first" / "finetune" / "delta"))):
        run = Run(Recipe.model_validate(settings | {"run": str(tmp_path / name), "delta": delta}))
        runs[name] = [run_stage(run, stage) for stage in ("calibrate", "finetune", "export")]
    assert runs["first"][1]["merge_gap"] < 1e-4
    assert runs["first"][1]["ffn_sha256"] == runs["again"][1]["ffn_sha256"]
    rules, _ = read_state(tmp_path / "again" / "export" / "checkpoint")
    assert len(rules) == 2
    manifest = json.loads((tmp_path / "first" / "finetune" / "delta" / "delta.json").read_text())
    assert manifest["trained"]["quantise"] == "nf4"
    settings["finetune"]["lora"] |= {"quantise": None}
    run = Run(Recipe.model_validate(settings | {"run": str(tmp_path / "other"), "delta": delta}))
    run_stage(run, "calibrate")
    with pytest.raises(MoyuError, match=r"finetune\.lora\.quantise"):
        run_stage(run, "finetune")


@pytest.mark.parametrize("missing", ["bitsandbytes", "engine"])
def test_what_cannot_run_is_refused_before_a_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings["finetune"] |= {"lora": {"quantise": "nf4"}}
    if missing == "engine":
        monkeypatch.setattr("moyu_train.training.lora.asked_engine", lambda: "DEEPSPEED")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MoyuError, match="which DEEPSPEED" if missing == "engine" else r"pip install 'moyu\[qlora\]'"):
        Run(Recipe.model_validate(settings))


def test_layers_that_cannot_be_cut_into_blocks_are_refused() -> None:
    with pytest.raises(MoyuError, match=r"multiple of 64; finetune\.lora\.targets names layers of 32 inputs"):
        adapt(tiny_model(), SETTINGS)
    with pytest.raises(MoyuError, match="no plain linear layers"):
        adapt(tiny_model("gpt2"), SETTINGS)


def test_quantise_leaves_what_is_frozen_elsewhere() -> None:
    adapted = adapt(roomy(), Lora(rank=2, alpha=4, targets=("down_proj",)))
    quantise(adapted)
    kinds = {name.rpartition(".")[2] for name, m in adapted.named_modules() if type(m) is nn.Linear}
    assert {"gate_proj", "up_proj", "q_proj", "lm_head"} <= kinds
    assert sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in adapted.modules()) == 2
