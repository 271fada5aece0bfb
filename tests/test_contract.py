"""One backward (docs/architecture.md): a penalty gives the same gradients and the same run however a step is cut."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import contract
import pytest
import torch
from moyu_kernels.seam import Seam
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Gradients = dict[str, Tensor]


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
        Seam(block, "down_proj", partial(mask, layer))
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


def norm(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()]).norm()


def distance(found: Gradients, expected: Gradients) -> float:
    """The largest relative difference of any parameter."""
    assert found.keys() == expected.keys()
    assert all(tensor.isfinite().all() for tensor in found.values())
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


class Seen(NamedTuple):
    gradients: Gradients  # of the first step
    weights: Gradients  # after the last, of what trains
    losses: Tensor
    thresholds: Gradients
    engine: str


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """Runs a variant in processes of its own."""
    folder = tmp_path_factory.mktemp("contract")

    def start(variant: str, mutant: str = "", penalty: str = "hoyer") -> Seen:
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

    return start


def mode_of(variant: str) -> str:
    return variant.rpartition("_")[0]


ENGINES = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP2"}
FAST = ("8x1", "1x8", "2x4", "checkpointing", "ddp", "ddp-1x4", "fsdp2")


def variants() -> list:
    deepspeed = pytest.mark.skipif(
        subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True).returncode != 0,
        reason="deepspeed is not installed",
    )
    return [
        pytest.param(name, marks=() if name.rpartition("_")[2] in FAST else deepspeed) for name in contract.VARIANTS
    ]


def test_the_penalty_weighs_in() -> None:
    both, alone = reference()
    assert norm(alone) > 0.3 * norm(both)
    assert max(contract.LENGTHS) >= 5 * min(contract.LENGTHS)


@pytest.mark.parametrize("variant", variants())
def test_gradients_are_those_of_the_formulas(launch: Callable, variant: str) -> None:
    seen = launch(variant)
    mode, _, plain = variant.rpartition("_")
    expected, _ = reference(mode)
    assert distance(seen.gradients, expected) < 1e-5
    model = "PeftModel" if mode == "lora" else "LlamaForCausalLM"
    assert seen.engine == ENGINES.get(plain.split("-")[0], model)


@pytest.mark.parametrize("variant", variants()[1:])
def test_runs_end_at_the_same_weights(launch: Callable, variant: str) -> None:
    mode = mode_of(variant)
    first, second = launch(f"{mode}_8x1" if mode and mode != "left" else "8x1"), launch(variant)
    one, other = first.weights, second.weights
    model = contract.tiny_model()
    start = dict((contract.adapted(model) if mode == "lora" else model).named_parameters())
    assert min((one[name] - start[name]).norm().item() for name in one) > 0
    assert distance(other, one) < 1e-4
    if len(second.losses):  # FSDP2 runs without the Trainer's loop and its log
        torch.testing.assert_close(second.losses, first.losses, rtol=1e-4, atol=0)


def test_thresholds_move_alike_on_all_processes(launch: Callable) -> None:
    one = launch("moving_8x1").thresholds
    for variant in contract.MODES["moving"]:
        for name, threshold in launch(f"moving_{variant}").thresholds.items():
            torch.testing.assert_close(threshold, one[name], rtol=1e-5, atol=0)
            assert (threshold / contract.THRESHOLD - 1).abs().min() > 0.05, "it did not move"


@pytest.mark.parametrize("mutant", contract.MUTANTS)
def test_mutants_fail(launch: Callable, mutant: str) -> None:
    expected, _ = reference()
    assert distance(launch("ddp-1x4", mutant).gradients, expected) > 1e-3


@pytest.mark.parametrize("penalty", contract.INERTIA_COEFFICIENT)
def test_penalties_with_statistics_hold_it_too(launch: Callable, penalty: str) -> None:
    """First gradients, and 20 steps in which the statistics move, are the same however a step is cut."""
    whole, without = launch("8x1", penalty=penalty), launch("8x1", "off", penalty).gradients
    gradients = whole.gradients
    rest = {name: gradients[name] - without[name] for name in gradients}
    assert norm(rest) > 0.3 * norm(gradients)
    for variant in ("checkpointing", "ddp-1x4"):
        found = launch(variant, penalty=penalty)
        assert distance(found.gradients, gradients) < 1e-5, variant
        assert distance(found.weights, whole.weights) < 1e-4, variant


def test_statistics_of_one_process_alone_would_be_noticed(launch: Callable) -> None:
    whole = launch("8x1", penalty="lag_decorrelation")
    own = launch("ddp-1x4", contract.OWN_STATISTICS, "lag_decorrelation")
    assert distance(own.weights, whole.weights) > 1e-4
