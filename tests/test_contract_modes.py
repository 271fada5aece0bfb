"""The contract with more at work: adapters, moving thresholds, predictors, padding on the left, statistics."""

from collections.abc import Callable

import contract
import pytest
import torch
from launched import ENGINES, apart, distance, marked, norm, reference

VARIANTS = [f"{mode}_{variant}" for mode, variants in contract.MODES.items() for variant in variants]
WHOLE = ("lora_8x1", "moving_8x1", "predicted_8x1")  # what the others of their mode are compared with


@pytest.mark.parametrize("variant", marked(VARIANTS))
def test_gradients_are_those_of_the_formulas(launch: Callable, variant: str) -> None:
    mode, plain = variant.split("_")
    seen = launch(variant)
    expected, _ = reference(mode)
    assert distance(seen.gradients, expected) < 1e-5
    model = "PeftModel" if mode == "lora" else "LlamaForCausalLM"
    assert seen.engine == ENGINES.get(plain.split("-")[0], model)


@pytest.mark.parametrize(
    "variant", marked([variant for variant in VARIANTS if variant == "left_8x1" or "8x1" not in variant])
)
def test_runs_end_at_the_same_weights(launch: Callable, variant: str) -> None:
    mode, _ = variant.split("_")
    first, second = launch("8x1" if mode == "left" else f"{mode}_8x1"), launch(variant)
    model = contract.tiny_model()
    if mode == "compensated":
        contract.attach(contract.find_blocks(model), contract.compensations())
    start = dict((contract.adapted(model) if mode == "lora" else model).named_parameters())
    assert min((weight - start[name]).norm().item() for name, weight in first.weights.items()) > 0
    assert distance(second.weights, first.weights) < 1e-4
    torch.testing.assert_close(second.losses, first.losses, rtol=1e-4, atol=0)


def test_heads_that_are_off_weigh_in() -> None:
    assert distance(reference("heads")[0], reference()[0]) > 0.1


def test_thresholds_move_alike_on_all_processes(launch: Callable) -> None:
    one = launch("moving_8x1").thresholds
    for variant in contract.MODES["moving"]:
        for name, threshold in launch(f"moving_{variant}").thresholds.items():
            torch.testing.assert_close(threshold, one[name], rtol=1e-5, atol=0)
            assert (threshold / contract.THRESHOLD - 1).abs().min() > 0.05, "it did not move"


ROUNDED = [f"bf16_{variant}" for variant in contract.ROUNDED]


@pytest.mark.parametrize(
    "variant", ROUNDED[:2] + [pytest.param(*v.values, marks=[*v.marks, pytest.mark.slow]) for v in marked(ROUNDED[2:])]
)
def test_bf16_is_the_same_but_for_rounding(launch: Callable, variant: str) -> None:
    """Under autocast. DeepSpeed also keeps the weights of the forward pass in bf16, which is coarser."""
    whole, seen = launch("bf16_8x1"), launch(variant)
    expected, _ = reference()
    zero = "zero" in variant
    assert seen.engine == ENGINES.get(variant.removeprefix("bf16_").split("-")[0], "LlamaForCausalLM")
    assert 0.01 < apart(seen.gradients, expected) < 0.12
    assert apart(seen.gradients, whole.gradients) < (0.12 if zero else 0.01)
    assert distance(seen.weights, whole.weights) < (5e-3 if zero else 1e-3)
    torch.testing.assert_close(seen.losses, whole.losses, rtol=2e-3 if zero else 1e-3, atol=0)


@pytest.mark.parametrize("mutant", [pytest.param(name, marks=pytest.mark.slow) for name in contract.MUTANTS])
def test_mutants_fail_in_bf16(launch: Callable, mutant: str) -> None:
    whole, seen = launch("bf16_8x1"), launch("bf16_ddp-1x4", mutant)
    assert apart(seen.gradients, whole.gradients) > 0.15
    assert distance(seen.weights, whole.weights) > 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("penalty", contract.STATISTICS_COEFFICIENT)
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


@pytest.mark.slow
@pytest.mark.parametrize(  # the loop of fsdp2 is written by hand, and takes no statistics
    ("engine", "penalty"),
    [("zero3", "history_consistency"), ("zero3", "predictability"), ("fsdp2", "history_consistency")],
)
def test_engines_that_share_weights_out_look_at_other_text_too(launch: Callable, engine: str, penalty: str) -> None:
    whole, found = launch("8x1", penalty=penalty), launch(engine, penalty=penalty)
    assert distance(found.gradients, whole.gradients) < 1e-5
    assert distance(found.weights, whole.weights) < 1e-4
    assert found.engine == ENGINES[engine]


def test_statistics_of_one_process_alone_would_be_noticed(launch: Callable) -> None:
    whole = launch("8x1", penalty="lag_decorrelation")
    own = launch("ddp-1x4", contract.OWN_STATISTICS, "lag_decorrelation")
    assert distance(own.weights, whole.weights) > 1e-4
