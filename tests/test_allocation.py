"""The density is shared out among the layers by block errors, and held there or as a mean."""

from types import SimpleNamespace

import pytest
import torch
from moyu_kernels.seam import Seam
from tiny import tiny_model

from moyu_train.api import sparsify
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.recipe import Recipe, RecipeError, load_recipe
from moyu_train.sparsifiers.gate_threshold import GateThreshold
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.allocation import block_errors, densities, share_out
from moyu_train.training.rule import calibrate_rule

DOCUMENTS = Documents([torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(i)) for i in range(2)])
GREEDY = {"method": "greedy", "step": 0.05, "most": 0.95}


def test_shares_equalise_the_marginal_error_and_meet_the_target_exactly() -> None:
    sparsities = [i / 100 for i in range(1, 100)]
    s = torch.tensor(sparsities, dtype=torch.float64)
    errors = torch.stack([s**2, 3 * s**2])
    first, second = share_out(errors, [100, 100], sparsities, 0.4)
    assert 1 - (first + second) / 2 == pytest.approx(0.4)
    assert 1 - first == pytest.approx(0.6, abs=0.011)  # 2 s1 = 6 s2 with s1 + s2 = 0.8
    # With four times the neurons a layer's error is spread over more of them: 2 s1 / 400 = 6 s2 / 100.
    large, small = share_out(errors, [400, 100], sparsities, 0.4)
    assert (1 - large) * 400 + (1 - small) * 100 == pytest.approx(0.4 * 500)
    assert (1 - large) / (1 - small) == pytest.approx(12, rel=0.25)
    assert share_out(errors, [100, 100], sparsities, 0.99) == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("cls", [Threshold, GateThreshold])
def test_block_errors_are_those_of_the_masked_block(family: str, cls: type) -> None:
    model = tiny_model(family)
    options = cls.Options()
    found = block_errors(model, cls, options, DOCUMENTS, 600, [0.3, 0.7])
    assert (found[:, 1] > found[:, 0]).all()
    rule = calibrate_rule(model, cls, options, 0.3, DOCUMENTS, 600, passes=1)
    block = find_blocks(model)[0]
    size = error = 0.0

    def compare(a: torch.Tensor) -> torch.Tensor:
        nonlocal size, error
        value = a if cls is Threshold else gates[-1]
        kept = value.abs() >= rule.rules[0].threshold
        down = getattr(block.module, block.down)
        whole, left = (down.forward(part) - down.forward(torch.zeros_like(part)) for part in (a, a * kept))
        size, error = size + whole.square().sum().item(), error + (whole - left).square().sum().item()
        return a

    gates: list[torch.Tensor] = []
    Seam(block.module, block.act, output=lambda args, value: (gates.append(value), value)[1])
    Seam(block.module, block.down, compare)
    with torch.no_grad():
        for document in DOCUMENTS.tokens:
            model(input_ids=document[None])
    assert found[0, 1].item() == pytest.approx(error / size, rel=0.02)


def recipe(**settings: object) -> Recipe:
    return Recipe.model_validate({"model": "x", "target_sparsity": 0.7, **settings})


def uneven() -> torch.nn.Module:
    """A model whose first layer has few neurons that matter, so that it is cheap to make sparse."""
    model = tiny_model()
    with torch.no_grad():
        find_blocks(model)[0].module.up_proj.weight[8:] *= 0.01
    return model


def test_greedy_loses_less_than_uniform_and_keeps_as_many() -> None:
    model = uneven()
    found = densities(model, recipe(allocation=GREEDY), DOCUMENTS)
    assert sum(found) / len(found) == pytest.approx(0.3)
    assert found[0] < 0.15 < 0.4 < found[1]
    sparsities = [1 - d for d in found]
    errors = block_errors(model, Threshold, Threshold.Options(), DOCUMENTS, 600, sorted({*sparsities, 0.7}))
    order = sorted({*sparsities, 0.7})
    greedy = sum(errors[i, order.index(s)].item() for i, s in enumerate(sparsities))
    assert greedy < 0.8 * errors[:, order.index(0.7)].sum().item()


@pytest.mark.parametrize("method", ["uniform", "greedy", "learned"])
def test_layers_are_held_where_they_were_put(method: str) -> None:
    model = uneven()
    control = sparsify(model, recipe(allocation={**GREEDY, "method": method}), DOCUMENTS)
    control.counting = True
    before = [t.clone() for t in control.sparsifier.thresholds]
    with torch.no_grad():
        model(input_ids=DOCUMENTS.tokens[0][None])
    state = SimpleNamespace(global_step=0, max_steps=10)
    control._counts[0, 0] *= 1.5  # the first layer keeps too many
    control.on_optimizer_step(None, state, None)
    moved = [(after / b).mean().item() for after, b in zip(control.sparsifier.thresholds, before, strict=True)]
    if method == "learned":
        assert moved[0] == pytest.approx(moved[1])
        assert moved[0] > 1.02
    else:
        assert control.density[0, 0].item() == pytest.approx(1.5 * control.targets[0], rel=0.1)
        assert moved[0] == pytest.approx(1.1, abs=0.02)
        assert moved[1] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("name", ["topk", "tda"])
def test_methods_without_a_level_and_targets_out_of_reach_are_refused(name: str) -> None:
    for method in ("greedy", "learned"):
        with pytest.raises(MoyuError, match=rf"'{method}' needs a sparsifier .* '{name}' is none"):
            sparsify(tiny_model(), recipe(allocation={"method": method}, sparsifier={"name": name}), DOCUMENTS)
    with pytest.raises(RecipeError, match=r"above allocation\.most"):
        load_recipe("x", ["--target_sparsity", "0.99", "--allocation.method", "greedy"])
