"""Every supported architecture as a tiny random model, and what has to be found in it: for the matrix and the docs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers as hf
from tiny import COMMON, CONFIGS, SIZES, randomised
from transformers import PreTrainedConfig

LAYERS, D, F = 2, 32, 96


class Expected(NamedTuple):
    """One FFN block of a layer. `down`: path of its down projection, or of the module that holds 3-D experts."""

    layout: str
    down: str
    neurons: int = F
    experts: int = 1


@dataclass(frozen=True)
class Case:
    """An architecture: `blocks` are those of one layer in order, `first` those of layer 0 where they are others."""

    config: PreTrainedConfig
    blocks: tuple[Expected, ...]
    field: str = "hidden_act"
    first: tuple[Expected, ...] = ()
    described: tuple[dict[str, str], ...] = ()  # what a recipe has to say in `blocks`, where structure is not enough

    @property
    def expected(self) -> list[Expected]:
        layers = [self.first or self.blocks, *[self.blocks] * (LAYERS - 1)]
        return [b._replace(down=b.down.format(i)) for i, blocks in enumerate(layers) for b in blocks]

    @property
    def layout(self) -> str:
        return "+".join(dict.fromkeys(block.layout for block in (*self.first, *self.blocks)))

    def model(self) -> Any:
        return randomised(self.config)


DENSE: dict[str, Any] = {**SIZES, **COMMON, "intermediate_size": F}
GROUPED: dict[str, Any] = {**DENSE, "num_key_value_heads": 2}
HEADS: dict[str, Any] = {**GROUPED, "head_dim": 8}
MOE: dict[str, Any] = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

MLP = "model.layers.{}.mlp"
GATED = (Expected("gated", f"{MLP}.down_proj"),)
FUSED = (Expected("fused", f"{MLP}.down_proj"),)
ROUTED = Expected("experts", f"{MLP}.experts", 48, 4)

CASES = {
    "Llama": Case(CONFIGS["llama"], GATED),
    "Mistral": Case(hf.MistralConfig(**GROUPED), GATED),
    "Qwen2": Case(hf.Qwen2Config(**GROUPED), GATED),
    "Qwen3": Case(hf.Qwen3Config(**HEADS), GATED),
    "Gemma": Case(hf.GemmaConfig(**HEADS, hidden_activation="gelu_pytorch_tanh"), GATED),  # read by old code only
    "Gemma 2": Case(hf.Gemma2Config(**HEADS), GATED, "hidden_activation"),
    "Gemma 3 (text)": Case(hf.Gemma3TextConfig(**HEADS), GATED, "hidden_activation"),
    "Gemma 3": Case(
        hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**HEADS), vision_config=VISION, **COMMON),
        (Expected("gated", "model.language_model.layers.{}.mlp.down_proj"),),
        "text_config.hidden_activation",
    ),
    "OLMo 2": Case(hf.Olmo2Config(**GROUPED), GATED),
    "SmolLM3": Case(hf.SmolLM3Config(**GROUPED), GATED),
    "Granite": Case(hf.GraniteConfig(**GROUPED), GATED),
    "StableLM": Case(hf.StableLmConfig(**GROUPED), GATED),
    "Cohere": Case(hf.CohereConfig(**GROUPED), GATED),
    "Phi-3": Case(CONFIGS["phi3"], FUSED),
    "GLM-4": Case(hf.Glm4Config(**HEADS), FUSED),
    "OPT": Case(CONFIGS["opt"], (Expected("plain", "model.decoder.layers.{}.fc2"),), "activation_function"),
    "GPT-2": Case(CONFIGS["gpt2"], (Expected("plain", "transformer.h.{}.mlp.c_proj", 4 * D),), "activation_function"),
    "GPT-NeoX": Case(hf.GPTNeoXConfig(**DENSE), (Expected("plain", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),)),
    "Falcon": Case(
        hf.FalconConfig(**SIZES, **COMMON, ffn_hidden_size=F),
        (Expected("plain", "transformer.h.{}.mlp.dense_4h_to_h"),),
        "activation",
    ),
    "Phi": Case(hf.PhiConfig(**DENSE), (Expected("plain", f"{MLP}.fc2"),)),
    "StarCoder2": Case(
        hf.Starcoder2Config(**GROUPED, residual_dropout=0.0, embedding_dropout=0.0),
        (Expected("plain", f"{MLP}.c_proj"),),
    ),
    "Nemotron": Case(hf.NemotronConfig(**HEADS), (Expected("plain", f"{MLP}.down_proj"),)),
    "Mixtral": Case(CONFIGS["mixtral"], (ROUTED,)),
    "Qwen2-MoE": Case(
        hf.Qwen2MoeConfig(**MOE, moe_intermediate_size=48, shared_expert_intermediate_size=64),
        (ROUTED, Expected("gated", f"{MLP}.shared_expert.down_proj", 64)),
    ),
    "Qwen3-MoE": Case(hf.Qwen3MoeConfig(**MOE, head_dim=8, moe_intermediate_size=48), (ROUTED,)),
    "OLMoE": Case(hf.OlmoeConfig(**MOE | {"intermediate_size": 48}), (ROUTED,)),
    "DeepSeek-V3": Case(
        hf.DeepseekV3Config(
            **DENSE,
            moe_intermediate_size=48,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        (ROUTED, Expected("gated", f"{MLP}.shared_experts.down_proj", 48)),
        first=GATED,
    ),
    "GPT-J": Case(
        hf.GPTJConfig(n_embd=D, n_layer=LAYERS, n_head=4, n_inner=F, rotary_dim=4, **COMMON),
        (Expected("plain", "transformer.h.{}.mlp.fc_out"),),
        "activation_function",
        described=({"path": "transformer.h.*.mlp", "up": "fc_in", "down": "fc_out", "act": "act"},),
    ),
}


def table() -> str:
    """The table of docs/models.md; `python tests/zoo.py` prints it."""
    lines = ["| architecture | FFN blocks of a layer | config field with the marker | kernels |", "|---|---|---|---|"]
    for name, case in CASES.items():
        layers = {" and ".join(f"`{block.layout}`" for block in layer): None for layer in (case.first, case.blocks)}
        found = ", then ".join(filter(None, layers)) + (", described" if case.described else "")
        layouts = {block.layout for block in (*case.first, *case.blocks)}
        kernels = "of the `gated` ones" if "gated" in layouts else "simulated"
        kernels = "yes" if "experts" not in layouts else kernels
        lines.append(f"| {name} | {found} | `{case.field}` | {kernels} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
