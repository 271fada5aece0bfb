"""Sizes of real models, for benchmarks with random weights where no such checkpoint is at hand. Imports no torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like decoder.

    Args:
        hidden, neurons, layers: D, F and L; heads, groups: of queries, and of keys and values; vocabulary: V.
        tied: whether the head is the input embedding; family: "llama" or "qwen2" (biases in q, k and v).
        built: layers that a random model of this shape gets; fewer than `layers` where all would fill the memory.
    """

    hidden: int
    neurons: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool
    family: str = "llama"
    built: int | None = None

    def config(self) -> dict[str, Any]:
        """Settings of the transformers config."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.neurons,
            "num_hidden_layers": self.built or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
        }


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49_152, True),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128_256, True),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, True, "qwen2"),
    "llama-2-7b": Shape(4096, 11_008, 32, 32, 32, 32_000, False, built=1),
}
