"""The contract's variants as tests start them, and how what they saw is compared."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import contract
import pytest
import torch
from moyu_kernels.seam import Seam
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Gradients = dict[str, Tensor]
ENGINES = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP2"}


def norm(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


def distance(found: Gradients, expected: Gradients) -> float:
    """The largest relative difference of any parameter."""
    assert found.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in found.values())
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


def apart(found: Gradients, expected: Gradients) -> float:
    """The relative difference of all parameters together."""
    return (norm({name: found[name] - expected[name] for name in expected}) / norm(expected)).item()


class Seen(NamedTuple):
    gradients: Gradients  # of the first step
    weights: Gradients  # after the last, of what trains
    losses: Tensor
    thresholds: Gradients
    engine: str


def run_variant(folder: Path, variant: str, mutant: str = "", penalty: str = "hoyer") -> Seen:
    """Runs a variant in processes of its own, or takes what they wrote into `folder` before."""
    path = folder / f"{variant}{mutant}{penalty}.safetensors"
    if not path.is_file():
        processes = contract.VARIANTS[variant][0]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), contract.__file__, variant, str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if "zero" not in variant:  # with it accelerate would quietly run DDP in place of DeepSpeed
            environment["ACCELERATE_USE_CPU"] = "true"
        result = subprocess.run(
            [*command, mutant, penalty], env=environment, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
    tensors = load_file(path)
    parts = [
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("gradient.", "weight.", "threshold.")
    ]
    with safe_open(path, "pt") as file:
        engine = file.metadata()["engine"]
    return Seen(parts[0], parts[1], tensors["losses"], parts[2], engine)


def reference(mode: str = "") -> tuple[Gradients, Gradients]:
    """Gradients of the whole loss and of the penalty alone, text by text without padding, by the formulas."""
    model, parent, texts = contract.tiny_model(), contract.parent(), contract.Texts()
    blocks = [layer.mlp for layer in model.model.layers]
    if mode == "lora":
        model = contract.adapted(model)
    penalties: list[Tensor] = []
    inputs: dict[int, Tensor] = {}

    def mask(layer: int, a: Tensor) -> Tensor:
        n = a.abs() * contract.SCALE
        penalties.append((n.sum(-1) ** 2 / (96 * (n**2).sum(-1) + 96**2 * 1e-6)).sum())
        keep = a.abs() >= contract.THRESHOLD
        if mode == "predicted":
            p = contract.predictors()[layer]
            first = inputs[layer] @ (p["w1"] * p["s1"][:, None]).T
            keep &= first @ (p["w2"] * p["s2"][:, None]).T + p["bias"] > 0
        return torch.where(keep, a, 0.0)

    for layer, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update({layer: args[0].detach()}))
        if mode == "compensated":
            block.compensation = contract.compensations()[layer]
            block.register_forward_hook(compensate)
        Seam(block, "down_proj", partial(mask, layer))
    if mode == "heads":
        for layer, router in zip(model.model.layers, contract.routers().routers.values(), strict=True):
            mask_heads(layer.self_attn, router)
    tokens, scored, loss, penalty = 0, 0, torch.zeros(()), torch.zeros(())
    for index, ids in enumerate(texts.ids):
        labels = texts[index]["labels"][: len(ids)]
        penalties.clear()
        log_q = model(ids[None]).logits[0, :-1].log_softmax(-1)
        penalty = penalty + sum(penalties) / 2
        log_p = parent(ids[None]).logits[0, :-1].log_softmax(-1).detach()
        use = labels[1:] != -100
        nll = -log_q.gather(1, ids[1:, None])[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        loss = loss + (contract.LM * nll + contract.KL * kl)[use].sum()
        tokens, scored = tokens + len(ids), scored + int(use.sum())
    penalty = contract.COEFFICIENT * penalty / tokens
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names, parameters = zip(*trained, strict=True)
    alone = torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
    both = torch.autograd.grad(loss / scored + penalty, parameters)
    zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(alone, parameters, strict=True)]
    return dict(zip(names, both, strict=True)), dict(zip(names, zeros, strict=True))


def compensate(block: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
    c = block.compensation
    return output + args[0] @ c.a.T @ c.b.T + c.bias


def mask_heads(attention: Any, router: Mapping[str, Tensor]) -> None:
    """Two of four heads, those of the largest scores, hook by hook."""
    off: list[Tensor] = []

    def choose(_: Any, args: tuple[Tensor]) -> None:
        score = router["scale"] * (args[0].detach() @ router["weight"].float().T) + router["bias"]
        off[:] = [score < score.sort(-1).values[..., 2:3]]

    attention.q_proj.register_forward_pre_hook(choose)
    attention.o_proj.register_forward_pre_hook(
        lambda _, args: (args[0].masked_fill(off[0].repeat_interleave(8, -1), 0),)
    )


SLOW = (
    "heads_ddp-1x4",
    "heads_zero3",
    "predicted_ddp-1x4",
    "compensated_checkpointing",
)  # what they would show, others of their mode mostly show too


def marked(variants: list[str]) -> list:
    """As parameters, those of DeepSpeed skipped where it is not installed."""
    missing = importlib.util.find_spec("deepspeed") is None
    skip = pytest.mark.skipif(missing, reason="deepspeed is not installed")
    marks = {variant: [skip] * ("zero" in variant) + [pytest.mark.slow] * (variant in SLOW) for variant in variants}
    return [pytest.param(variant, marks=marks[variant]) for variant in variants]
