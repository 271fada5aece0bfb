"""One backward (docs/architecture.md): a penalty gives the same gradients and the same run however a step is cut."""

import os
import subprocess
import sys
from collections.abc import Callable

import contract
import pytest
import torch
from moyu_kernels.seam import Seam
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

Gradients = dict[str, Tensor]


def reference() -> tuple[Gradients, Gradients]:
    """Gradients of the whole loss and of the penalty alone, text by text without padding, by the formulas."""
    model, parent, texts = contract.tiny_model(), contract.parent(), contract.Texts()
    penalties: list[Tensor] = []

    def mask(a: Tensor) -> Tensor:
        n = a.abs() * contract.SCALE
        penalties.append((n.sum(-1) ** 2 / (96 * (n**2).sum(-1) + 96**2 * 1e-6)).sum())
        return torch.where(a.abs() >= contract.THRESHOLD, a, 0.0)

    for layer in model.model.layers:
        Seam(layer.mlp, "down_proj", mask)
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
    names, parameters = zip(*model.named_parameters(), strict=True)
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


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Gradients, Gradients, Tensor, str]]:
    """Runs a variant in processes of its own: gradients of the first step, weights after the last, losses, engine."""
    folder = tmp_path_factory.mktemp("contract")

    def start(variant: str, mutant: str = "", penalty: str = "hoyer") -> tuple[Gradients, Gradients, Tensor, str]:
        path = folder / f"{variant}{mutant}{penalty}.safetensors"
        if not path.is_file():
            processes = contract.VARIANTS[variant][0]
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            command = [sys.executable, *(launcher if processes > 1 else []), contract.__file__, variant, str(folder)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            if not variant.startswith("zero"):  # with it accelerate would quietly run DDP in place of DeepSpeed
                environment["ACCELERATE_USE_CPU"] = "true"
            result = subprocess.run(
                [*command, mutant, penalty], env=environment, capture_output=True, text=True, timeout=120
            )
            assert result.returncode == 0, result.stderr[-3000:]
        tensors = load_file(path)
        parts = [
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("gradient.", "weight.")
        ]
        with safe_open(path, "pt") as file:
            engine = file.metadata()["engine"]
        return parts[0], parts[1], tensors["losses"], engine

    return start


ENGINES = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine", "fsdp2": "FSDP2"}
FAST = ("8x1", "1x8", "2x4", "checkpointing", "ddp", "ddp-1x4", "fsdp2")


def variants() -> list:
    deepspeed = pytest.mark.skipif(
        subprocess.run([sys.executable, "-c", "import deepspeed"], capture_output=True).returncode != 0,
        reason="deepspeed is not installed",
    )
    return [pytest.param(name, marks=() if name in FAST else deepspeed) for name in contract.VARIANTS]


def test_the_penalty_weighs_in() -> None:
    both, alone = reference()
    assert norm(alone) > 0.3 * norm(both)
    assert max(contract.LENGTHS) >= 5 * min(contract.LENGTHS)


@pytest.mark.parametrize("variant", variants())
def test_gradients_are_those_of_the_formulas(launch: Callable, variant: str) -> None:
    found, _, _, engine = launch(variant)
    expected, _ = reference()
    assert distance(found, expected) < 1e-5
    assert engine == ENGINES.get(variant.split("-")[0], "LlamaForCausalLM")


@pytest.mark.parametrize("variant", variants()[1:])
def test_runs_end_at_the_same_weights(launch: Callable, variant: str) -> None:
    _, one, losses, _ = launch("8x1")
    _, other, other_losses, _ = launch(variant)
    start = dict(contract.tiny_model().named_parameters())
    assert min((one[name] - start[name]).norm().item() for name in one) > 0
    assert distance(other, one) < 1e-4
    if len(other_losses):  # FSDP2 runs without the Trainer's loop and its log
        torch.testing.assert_close(other_losses, losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mutant", contract.MUTANTS)
def test_mutants_fail(launch: Callable, mutant: str) -> None:
    found, _, _, _ = launch("ddp-1x4", mutant)
    expected, _ = reference()
    assert distance(found, expected) > 1e-3


@pytest.mark.parametrize("penalty", contract.INERTIA_COEFFICIENT)
def test_penalties_with_statistics_hold_it_too(launch: Callable, penalty: str) -> None:
    """First gradients, and 20 steps in which the statistics move, are the same however a step is cut."""
    gradients, weights, _, _ = launch("8x1", penalty=penalty)
    without, _, _, _ = launch("8x1", "off", penalty)
    rest = {name: gradients[name] - without[name] for name in gradients}
    assert norm(rest) > 0.3 * norm(gradients)
    for variant in ("1x8", "checkpointing", "ddp-1x4"):
        found, ended, _, _ = launch(variant, penalty=penalty)
        assert distance(found, gradients) < 1e-5, variant
        assert distance(ended, weights) < 1e-4, variant


def test_statistics_of_one_process_alone_would_be_noticed(launch: Callable) -> None:
    _, weights, _, _ = launch("8x1", penalty="lag_decorrelation")
    _, ended, _, _ = launch("ddp-1x4", contract.OWN_STATISTICS, "lag_decorrelation")
    assert distance(ended, weights) > 1e-4
