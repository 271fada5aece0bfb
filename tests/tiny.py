"""Tiny random models of every layout, and a byte-level tokenizer, made in a moment and saved as ordinary folders."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from moyu_train.training import finetune

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCAB = 259
COMMON = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}

CONFIGS = {
    "llama": LlamaConfig(**SIZES, **COMMON, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES, **COMMON, intermediate_size=96, num_key_value_heads=2),  # fused gate_up
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, **COMMON, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "opt": OPTConfig(**SIZES, **COMMON, ffn_dim=96, word_embed_proj_dim=32, dropout=0.0),  # plain, in the layer itself
    "mixtral": MixtralConfig(
        **SIZES, **COMMON, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),  # 3-D experts
}


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def bpe() -> PreTrainedTokenizerFast:
    """The same with a merge, in the place of a byte's symbol: GGUF engines load no tokenizer without."""
    raw = tokenizer().backend_tokenizer
    vocab = {symbol: i for symbol, i in raw.get_vocab().items() if i != 255} | {"th": 255}
    merged = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    merged.pre_tokenizer, merged.decoder = raw.pre_tokenizer, raw.decoder
    return PreTrainedTokenizerFast(tokenizer_object=merged, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_model(family: str = "llama") -> torch.nn.Module:
    return randomised(CONFIGS[family])


def randomised(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():  # the default init is so small that all layouts compute nearly the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def with_deltas(adapted: torch.nn.Module, size: float, seed: int) -> torch.nn.Module:
    """A LoRA model whose deltas do something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return adapted


def save_tiny(folder: Path, family: str = "llama") -> Path:
    tiny_model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_text(path: Path, documents: int = 8, words: int = 60) -> Path:
    """JSON lines of repetitive English, enough for a tiny model to learn something."""
    lines = []
    for i in range(documents):
        text = " ".join(f"the {('cat', 'dog', 'bird')[(i + j) % 3]} sat on mat {j % 7}." for j in range(words // 6))
        lines.append(f'{{"text": "{text}"}}\n')
    path.write_text("".join(lines))
    return path


def tiny_settings(folder: Path, model: Path) -> dict:
    """A recipe that runs every stage on a tiny model in seconds."""
    return {
        "model": str(model),
        "run": str(folder / "run"),
        "target_sparsity": 0.5,
        "data": {
            "train": str(save_text(folder / "train.jsonl", 12, 240)),
            "test": str(save_text(folder / "test.jsonl", 3, 120)),
            "validation_documents": 2,
        },
        "analyze": {"tokens": 256, "sparsities": [0.5, 0.9]},
        "calibrate": {"tokens": 256, "bytes_skipped": 0.2},
        "finetune": {"tokens": 1024, "window": 32, "batch": 4, "save_steps": 2, "learning_rate": 1e-3},
        "control": {"learning_rates": [1e-4, 1e-3]},
        "predictor": {"name": "lowbit"},
        "fit": {"tokens": 1024, "window": 64, "save_every": 4},
        "export": {"dtype": "float32"},
        "evaluate": {"window": 64, "kernel_tokens": 32},
        "bench": {"contexts": [8], "new_tokens": 4, "rounds": 5, "compiled": False},
    }


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Training within ends after an optimizer step, as by Ctrl-C."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    stock = finetune.SparsityTrainer.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.add_callback(Stop())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.SparsityTrainer, "__init__", begin)
        with pytest.raises(KeyboardInterrupt):
            yield
