"""One backward (docs/architecture.md): a penalty gives the same gradients and the same run however a step is cut."""

from collections.abc import Callable

import contract
import pytest
import torch
from launched import ENGINES, distance, marked, norm, reference

PLAIN = [variant for variant in contract.VARIANTS if "_" not in variant]


def test_the_penalty_weighs_in() -> None:
    both, alone = reference()
    assert norm(alone) > 0.3 * norm(both)
    assert max(contract.LENGTHS) >= 5 * min(contract.LENGTHS)


@pytest.mark.parametrize("variant", marked(PLAIN))
def test_gradients_are_those_of_the_formulas(launch: Callable, variant: str) -> None:
    seen = launch(variant)
    expected, _ = reference()
    assert distance(seen.gradients, expected) < 1e-5
    assert seen.engine == ENGINES.get(variant.split("-")[0], "LlamaForCausalLM")


@pytest.mark.parametrize("variant", marked(PLAIN[1:]))
def test_runs_end_at_the_same_weights(launch: Callable, variant: str) -> None:
    first, second = launch("8x1"), launch(variant)
    start = dict(contract.tiny_model().named_parameters())
    assert min((weight - start[name]).norm().item() for name, weight in first.weights.items()) > 0
    assert distance(second.weights, first.weights) < 1e-4
    if len(second.losses):  # FSDP2 runs without the Trainer's loop and its log
        torch.testing.assert_close(second.losses, first.losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[pytest.mark.slow] * (name == "labels")) for name in contract.MUTANTS]
)
def test_mutants_fail(launch: Callable, mutant: str) -> None:
    expected, _ = reference()
    assert distance(launch("ddp-1x4", mutant).gradients, expected) > 1e-3
