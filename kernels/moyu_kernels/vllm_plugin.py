"""Plugin of vLLM: sparse checkpoints run in its transformers backend, under the rule's exact mask at every position.

The mask comes after a dense matmul: what is computed is the checkpoint's function, and nothing is skipped. Predictors
are not used. vLLM itself is imported by `register` and by vllm_model.py only.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import STATE, read_config, read_manifest, tensor_of
from .loading import config_owner
from .ops.ffn.naive import ruled_gate
from .reading import CheckpointError, reading
from .rules import SUBSTITUTES, Rule

MODEL = "moyu_kernels.vllm_model:MoyuForCausalLM"  # as a string: importing it would start CUDA before vLLM forks


class RuledBlock(NamedTuple):
    """One FFN block of a checkpoint: attributes of the module at `path` that hold activation and down, and its rule."""

    path: str
    act: str
    down: str
    rule: Rule


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: gives vLLM a class for `Moyu<name>`, of every causal LM."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    for name in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        ModelRegistry.register_model(f"Moyu{name}", MODEL)


def read_blocks(folder: str | Path, config: Any) -> list[RuledBlock]:
    """A sparse checkpoint's FFN blocks with their rules; gives `config` the stock activation and architecture back.

    config: the checkpoint's, as transformers reads it.

    Raises: CheckpointError for a checkpoint that is damaged, or that vLLM cannot run under its exact rule.
    """
    with reading(folder):
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{str(folder)!r} is no folder; download the sparse checkpoint, and name its folder")
        read_manifest(folder)
        _, blocks, settings = read_config(folder)
        if reason := _unsupported(settings, config):
            raise CheckpointError(f"{folder} cannot run in vLLM: {reason}; use moyu_kernels.from_pretrained")
        state = load_file(folder / STATE)
        setattr(config, settings["activation_field"], settings["activation"])
        config.architectures = settings["architectures"]
        return [
            RuledBlock(
                block["path"],
                block.get("act", ""),
                block["down"],
                Rule(tensor_of(folder, state, f"blocks.{index}.threshold"), **settings.get("formula", {})),
            )
            for index, block in enumerate(blocks)
        ]


def _unsupported(settings: dict[str, Any], config: Any) -> str:
    """Why vLLM cannot compute the checkpoint's function; empty where it can."""
    formula = settings.get("formula", {})
    if settings.get("weights", "stored") != "stored":
        return f"its FFN weights are {settings['weights']!r}, for which vLLM has no FFN"
    if (settings.get("inputs") or {}).get("paths"):
        return "it has sparse inputs, and vLLM fuses the layers that take them"
    if settings.get("compensation"):
        return "it has a compensation for the neurons that are off, for which vLLM has no place"
    if formula.get("prompt"):
        return "its masks come from the prompt, and vLLM's blocks see tokens of many sequences at once"
    if any(block["layout"] == "experts" for block in settings["blocks"]):
        return "it is a mixture of experts, whose activations vLLM's kernels do not hand out"
    if config_owner(config, settings["activation_field"]) is not config:
        return "it is the text part of a multimodal model"
    if formula.get("up", "stock") != "stock" and formula["gate"] not in SUBSTITUTES:
        return f"its rule {formula} has a ReLU on up beside a gate that can be negative"
    return ""


class RuledActivation(nn.Module):
    """What a rule puts in place of `act`, in a class that vLLM does not know, so that it keeps gate and up apart."""

    threshold: Tensor

    def __init__(self, act: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.act, self.gate = act, rule.gate_name
        self.register_buffer("threshold", rule.op_threshold.to(rule.threshold.device), persistent=False)

    def forward(self, g: Tensor) -> Tensor:
        """g `[..., F]`, the gate's output (up's in a plain FFN); returns the same shape and dtype."""
        return ruled_gate(self.gate, g, self.act(g), self.act, self.threshold)


def put_activations(model: nn.Module, blocks: list[RuledBlock]) -> None:
    """Put the rules' gates on a model, on any device."""
    for block in blocks:
        if block.rule.gate != "stock":
            module = _at(model, _inner(model, block.path))
            setattr(module, block.act, RuledActivation(_at(module, block.act), block.rule))


def put_masks(model: nn.Module, blocks: list[RuledBlock]) -> None:
    """Mask the inputs of the modules that now stand at the down projections; one that replaces them loses the mask."""
    for block in blocks:
        down = _at(_at(model, _inner(model, block.path)), block.down)
        down.register_forward_pre_hook(lambda _, args, rule=block.rule: (masked(args[0], rule), *args[1:]))


def masked(a: Tensor, rule: Rule) -> Tensor:
    """a `[..., F]`, made with the rule's gate, set to zero where the rule drops a neuron.

    Up's ReLU is taken here: as the gates beside it are not negative, `gate * relu(u)` is `relu(gate * u)`.
    """
    a = torch.relu(a) if rule.up == "relu" else a
    return a if rule.keep == "nonzero" else torch.where(rule.mask(a), a, 0.0)


def _inner(model: Any, path: str) -> str:
    """The path of a causal LM's module within the base model, which is what vLLM builds."""
    return path.removeprefix(f"{model.base_model_prefix}.")


def _at(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(
            f"this vLLM builds the model without {path!r}, so the rule has no place ({error}); use "
            "moyu_kernels.from_pretrained"
        ) from error
