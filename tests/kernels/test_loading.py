import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moyu_kernels import SparseFFN, SparseGatedFFN, density_drift, from_pretrained
from moyu_kernels.checkpoint import FORMAT_VERSION, CheckpointError
from moyu_kernels.modules import set_mode
from moyu_kernels.seam import Seam
from predictors import FAMILIES
from safetensors.torch import load_file, save_file
from sparse_checkpoints import NEURONS, tiny_llama, write_manifest
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

Factory = Callable[..., Path]


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def reseal(folder: Path) -> None:
    manifest = json.loads((folder / "moyu/manifest.json").read_text())
    write_manifest(folder, manifest["ffn_sha256"])


def test_import_needs_no_transformers() -> None:
    code = "import sys, moyu_kernels, moyu_kernels.modules; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rule_equals_stock_model_under_the_mask(checkpoint: Factory, backend: str) -> None:
    stock = tiny_llama(torch.float32)
    model = from_pretrained(checkpoint(stock, threshold=0.3), mode="rule", backend=backend)
    for layer in stock.model.layers:
        Seam(layer.mlp, "down_proj", lambda a: torch.where(a.abs() >= 0.3, a, 0.0))
    for length in (5, 20):
        ids = torch.randint(128, (1, length))
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)
    counts = model.model.layers[0].mlp.counts
    assert counts[0] == 25
    assert 0 < counts[2] < counts[1] == 25 * NEURONS


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_skips_and_modes_switch(checkpoint: Factory, family: str) -> None:
    model = from_pretrained(checkpoint(threshold=0.0, family=family))
    ids = torch.randint(128, (1, 4))
    model(ids)
    ffn = model.model.layers[0].mlp
    assert 0.2 < ffn.counts[1] / (4 * NEURONS) < 0.8
    predicted = model(ids).logits
    set_mode(model, "predicted", "reference")
    torch.testing.assert_close(model(ids).logits, predicted, rtol=0.1, atol=0.1)
    set_mode(model, "dense", "cpu")
    dense = model(ids).logits
    torch.testing.assert_close(dense, tiny_llama()(ids).logits, rtol=0.1, atol=0.1)
    assert not torch.allclose(dense, predicted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_to_dtype_keeps_the_state(checkpoint: Factory, family: str) -> None:
    model = from_pretrained(checkpoint(family=family)).to(torch.float32)
    ffn = model.model.layers[0].mlp
    assert ffn.threshold.dtype == torch.float32
    assert {t.dtype for t in ffn.predictor} == {torch.float32, torch.int8 if family == "lowrank" else torch.uint8}
    assert ffn.counts.dtype == torch.int64
    before = [t.clone() for t in (ffn.threshold, *ffn.predictor)]
    model.to(torch.bfloat16).to(torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(before, (ffn.threshold, *ffn.predictor), strict=True))
    assert all(weight.stride(1) == 1 and weight.dtype == torch.float16 for weight in ffn.weights)
    model(torch.randint(128, (1, 4)))


def test_round_trip_is_bitwise_and_stays_loud(checkpoint: Factory, tmp_path: Path) -> None:
    folder = checkpoint()
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(KeyError, match=r"load with moyu_kernels\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with pytest.raises(CheckpointError, match=r"has no moyu/manifest\.json"):
        from_pretrained(tmp_path / "again")


def test_no_predictor_is_announced(checkpoint: Factory, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(checkpoint(family=None))
    assert "no predictor" in caplog.text
    assert model.model.layers[0].mlp.mode == "rule"


def test_half_written(checkpoint: Factory) -> None:
    with pytest.raises(CheckpointError, match="not written to its end"):
        from_pretrained(checkpoint(seal=False))


def test_damaged_or_missing_file(checkpoint: Factory) -> None:
    folder = checkpoint()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed or damaged"):
        from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        from_pretrained(folder)


def test_stale_predictor(checkpoint: Factory) -> None:
    folder = checkpoint()
    write_manifest(folder, "0" * 64)
    with pytest.raises(CheckpointError, match="predictor is stale"):
        from_pretrained(folder)


@pytest.mark.parametrize(("calibrated", "said"), [(0.9, "less accurate"), (0.1, "slower"), (None, None)])
def test_density_guard_tells_of_text_that_drifts(checkpoint: Factory, calibrated: float | None, said: str) -> None:
    model = from_pretrained(checkpoint(family="lowbit", selected=calibrated))
    ids = torch.randint(128, (1, 8))
    model(ids[:, :4])
    assert density_drift(model) is None  # too few tokens to say
    model(ids)
    drift = density_drift(model)
    assert (said in drift) if said else (drift is None)
    counts = model.model.layers[0].mlp.counts
    share = (counts[1] / (counts[0] * NEURONS)).item()
    model.config.moyu["predictor"]["selected"] = share
    assert density_drift(model) is None


def test_unknown_predictor_family(checkpoint: Factory) -> None:
    folder = checkpoint()
    rewrite(folder / "config.json", lambda data: data["moyu"]["predictor"].update(family="psychic"))
    reseal(folder)
    with pytest.raises(CheckpointError, match="predictor family 'psychic' is unknown"):
        from_pretrained(folder)


def test_other_format_version(checkpoint: Factory) -> None:
    folder = checkpoint()
    rewrite(folder / "moyu/manifest.json", lambda data: data.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}"):
        from_pretrained(folder)
    reseal(folder)
    rewrite(folder / "config.json", lambda data: data["moyu"].update(format_version=FORMAT_VERSION + 2))
    reseal(folder)
    with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 2}"):
        from_pretrained(folder)


def test_copies_of_before_version_8_are_taken_as_exact(checkpoint: Factory) -> None:
    folder, ids = checkpoint(family="lowbit"), torch.randint(128, (1, 4))
    told = from_pretrained(folder)(ids).logits
    file = folder / "moyu/state.safetensors"
    state = load_file(file)
    scales = [name for name in state if name.endswith("_scales")]
    assert len(scales) == 2 * 2
    for name in scales:
        state[name][1] = 0
    save_file(state, file)
    reseal(folder)
    exact = from_pretrained(folder)(ids).logits
    assert not torch.equal(exact, told)
    old = {name.removesuffix("s"): state.pop(name)[0].clone() for name in scales}
    save_file(state | old, file)
    reseal(folder)
    assert torch.equal(from_pretrained(folder)(ids).logits, exact)


def test_missing_state_and_block(checkpoint: Factory) -> None:
    folder = checkpoint()

    def more_blocks(data: dict) -> None:
        data["moyu"]["blocks"].append(data["moyu"]["blocks"][0])

    rewrite(folder / "config.json", more_blocks)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'blocks\.2\.threshold'"):
        from_pretrained(folder)
    rewrite(folder / "config.json", lambda data: data["moyu"]["blocks"].pop())
    rewrite(folder / "config.json", lambda data: data["moyu"]["blocks"][0].update(path="model.layers.9.mlp"))
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.mlp, which the model lacks"):
        from_pretrained(folder)


def block(path: str, layout: str, up: str, down: str, **more: int) -> dict:
    return {
        "path": path,
        "layout": layout,
        "gate": None,
        "up": up,
        "down": down,
        "neurons": 96,
        "hidden": 32,
        "act": "act",
        **more,
    }


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.3,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("layout", ["fused", "plain", "experts"])
def test_other_layouts_are_decoded_or_masked_and_announced(
    checkpoint: Factory, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    if layout == "fused":
        stock = Phi3ForCausalLM(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))
        blocks = [block("model.layers.0.mlp", layout, "gate_up_proj", "down_proj")]
    elif layout == "plain":
        stock = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL))
        blocks = [block("gpt_neox.layers.0.mlp", layout, "dense_h_to_4h", "dense_4h_to_h")]
    else:
        stock = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4))
        blocks = [block("model.layers.0.mlp.experts", layout, "gate_up_proj", "down_proj", experts=4)]
    stock.eval()
    folder = checkpoint(stock, blocks=blocks, threshold=1e9, family=None)
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(folder)
    assert ("is simulated: mask after a dense matmul" in caplog.text) == (layout == "experts")
    assert any(isinstance(module, SparseFFN) for module in model.modules()) == (layout != "experts")
    ids = torch.randint(64, (1, 6))
    assert not torch.allclose(model(ids).logits, stock(ids).logits, atol=1e-3)
    shutil.rmtree(folder)
    model = from_pretrained(checkpoint(stock, blocks=blocks, threshold=0.0, family=None))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_biases_are_simulated_not_dropped(checkpoint: Factory, caplog: pytest.LogCaptureFixture) -> None:
    stock = tiny_llama(torch.float32, mlp_bias=True)
    for layer in stock.model.layers:
        torch.nn.init.normal_(layer.mlp.down_proj.bias)
    model = from_pretrained(checkpoint(stock, threshold=0.0))
    assert "its projections have biases" in caplog.text
    assert not any(isinstance(module, SparseGatedFFN) for module in model.modules())
    ids = torch.randint(128, (1, 4))
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"mode": "fast"}, "mode 'fast' is unknown; use one of predicted"),
        ({"backend": "gpu"}, "backend 'gpu' is unknown; use auto"),
        ({"weights": "int4"}, "weights 'int4' are unknown; use one of stored, int8"),
        ({"dtype": "bf16"}, "dtype 'bf16' is none of floating point"),
        ({"dtype": torch.int8}, r"dtype torch\.int8 is none of floating point"),
        ({"device_map": "gpu"}, "device_map 'gpu' names 'gpu', which is no device here"),
        ({"device_map": {"": "cuda:99"}}, "names 'cuda:99', which is no device here"),
    ],
)
def test_an_argument_is_not_taken_for_damage(checkpoint: Factory, argument: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_pretrained(checkpoint(tiny_llama()), **argument)
    assert not isinstance(caught.value, CheckpointError)


def test_a_dtype_by_its_name(checkpoint: Factory) -> None:
    assert from_pretrained(checkpoint(tiny_llama()), dtype="float32", device_map="cpu").dtype == torch.float32
