"""Penalties and their schedules, by their formulas."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels.rules import Rule
from tiny import save_tiny, tiny_model, tiny_settings

from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.models.masking import Masking
from moyu_train.penalties import PENALTIES
from moyu_train.penalties.adaptive import AdaptiveCoefficient
from moyu_train.penalties.hoyer import Hoyer
from moyu_train.penalties.l1 import L1
from moyu_train.penalties.ratio import RatioCoefficient
from moyu_train.penalties.scale import ScaleOptions, measure_scales
from moyu_train.penalties.schedule import coefficient
from moyu_train.pipeline import Run
from moyu_train.recipe import Recipe, RecipeError, load_recipe
from moyu_train.registry import resolve
from moyu_train.settings import Penalty
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.control import SparsityControl

WINDOWS = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))
A = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])


def test_hoyer_is_the_share_of_neurons_that_carry_a_token() -> None:
    penalty = Hoyer(ScaleOptions(), [torch.ones(4)], [], 0.5)
    torch.testing.assert_close(penalty(0, A), torch.tensor([1.0, 0.25, 0.0]))
    torch.testing.assert_close(penalty(0, 10 * A), penalty(0, A))


def test_l1_weighs_neurons_by_their_scale() -> None:
    scales = [torch.ones(4), torch.tensor([0.0, 0.5, 9.0, 9.0])]
    penalty = L1(ScaleOptions(), scales, [], 0.5)
    assert penalty(0, A).tolist() == [1.0, 1.0, 0.0]
    assert penalty(1, A)[1] == 0.5
    assert penalty(0, A.bfloat16()).dtype == torch.float32


def built(name: str, rules: list[Rule], density: float = 0.25, **options: float) -> Any:
    cls, checked = resolve("penalty", Penalty(name=name, coefficient=1, **options), PENALTIES)
    return cls(checked, [torch.ones_like(rule.threshold) for rule in rules], rules, density)


def soft(ratio: float, kappa: float = 4.0) -> float:
    return 1 / (1 + ratio**-kappa) if ratio else 0.0


def test_soft_penalties_compute_their_formulas() -> None:
    rule = Rule(torch.tensor([1.0, 1.0, 2.0, 2.0]))
    a = torch.tensor([[2.0, 0.5, 2.2, 0.1]])
    ratios = [2.0, 0.5, 1.1, 0.05]
    z = [soft(r) for r in ratios]
    expected = {
        "budget": max(sum(z) / 4 - 0.25, 0) ** 2,
        "margin": sum(max(0.2 - abs(math.log(r)), 0) ** 2 for r in ratios) / 4,
        "lte": sum(v**2 for v in z) / 4 + 5e-3 * sum(1 / max(abs(v - 0.5), 0.05) ** 2 for v in z) / 4,
    }
    for name, value in expected.items():
        assert built(name, [rule])(0, a).item() == pytest.approx(value, rel=1e-5), name
        assert built(name, [rule])(0, -a).item() == pytest.approx(value, rel=1e-5), name
    assert built("budget", [rule], density=0.9)(0, a).item() == 0
    rule.threshold = rule.threshold * 2  # the controller has moved it
    assert built("budget", [rule], density=0.0)(0, a).item() == pytest.approx(
        (sum(soft(r / 2) for r in ratios) / 4) ** 2
    )


def test_sequence_penalties_compute_their_formulas() -> None:
    rule = Rule(torch.ones(3))
    a = torch.rand(1, 5, 3, generator=torch.Generator().manual_seed(0)) * 2
    z = [[soft(v) for v in token] for token in a[0].tolist()]

    def union(tokens: list[list[float]]) -> float:
        return sum(1 - math.prod(1 - token[i] for token in tokens) for i in range(3)) / 3

    def entropy(now: list[float], before: list[float]) -> float:
        return -sum(b * math.log(n) + (1 - b) * math.log(1 - n) for n, b in zip(now, before, strict=True)) / 3

    chunks = [union(z[:2])] * 2 + [union(z[2:4])] * 2 + [union(z[4:])]
    assert built("chunk", [rule], window=2)(0, a)[0].tolist() == pytest.approx(chunks, rel=1e-4)
    expected = [0.0] + [entropy(z[t], z[t - 1]) for t in range(1, 5)]
    assert built("locality", [rule])(0, a)[0].tolist() == pytest.approx(expected, rel=1e-4)


PAIRED = ("overlap_residual", "lag_decorrelation")  # tokens of one sequence
STREAMED = (*PAIRED, "prefix_contrast", "predictability")  # with statistics that follow training


def activations() -> tuple[Any, torch.Tensor]:
    """A model, and the activations of its first block on WINDOWS."""
    model, seen = tiny_model(), []
    with Masking(find_blocks(model), lambda layer, a, expert: seen.append(a)), torch.no_grad():
        model(WINDOWS)
    return model, seen[0].detach()


def test_overlap_residual_computes_its_formula() -> None:
    rule = Rule(torch.ones(3))
    a = torch.rand(1, 5, 3, generator=torch.Generator().manual_seed(0)) * 3
    z = [[soft(v) for v in token] for token in a[0].tolist()]

    def phi(t: int, s: int) -> float:
        return sum((z[t][i] - 0.25) * (z[s][i] - 0.25) for i in range(3)) / (3 * 0.25 * 0.75)

    expected = [sum(max(phi(t, t - k) - 0.1, 0) ** 2 for k in (1, 2, 4) if k <= t) / 7 for t in range(5)]
    penalty = built("overlap_residual", [rule], margin=0.1)
    assert penalty(0, a)[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 0


@pytest.mark.parametrize("left", [False, True])
def test_padding_has_no_meaning(left: bool) -> None:
    model, a = activations()
    penalty = built("overlap_residual", [Rule(torch.full((96,), 0.05)) for _ in range(2)], 0.25, margin=0.0)
    penalty.begin(model, WINDOWS)
    penalty.prepare(WINDOWS, None, None)
    alone = penalty(0, a)
    sides = (6, 0) if left else (0, 6)
    ids = torch.nn.functional.pad(WINDOWS, sides, value=7)
    real = torch.nn.functional.pad(torch.ones_like(WINDOWS), sides).bool()
    penalty.prepare(ids, real, None)
    padded = penalty(0, torch.nn.functional.pad(a, (0, 0, *sides), value=3.0), real)
    torch.testing.assert_close(padded[real].view_as(alone), alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(MoyuError, match="pass `ids` to `armed`"):
        penalty.prepare(None, None, None)


def test_a_start_token_stays_in_front_of_other_halves() -> None:
    from moyu_train.penalties.prefixes import Prefixes

    windows = torch.cat([torch.full((3, 1), 256), WINDOWS], dim=1)
    swapped, first, _ = Prefixes(windows).swap(windows, None)
    assert (swapped[:, 0] == 256).all()
    assert (swapped == 256).sum() == 3
    assert (swapped != windows)[:, 1:10].any(1).all()
    assert first.sum(1).tolist() == [10] * 3
    assert (swapped[:, 10:] == windows[:, 10:]).all()


def test_meaning_excuses_overlap() -> None:
    """q is the mean overlap of pairs of other sequences, by similarity: it takes away what those have too."""
    model, a = activations()
    rules = [Rule(torch.full((96,), 0.05)) for _ in range(2)]
    penalty = built("overlap_residual", rules, 0.25, margin=0.0)
    penalty.begin(model, WINDOWS)
    assert penalty.rate(0).mean() == pytest.approx(penalty.mask(0, a).mean().item(), rel=1e-4)
    without = penalty(0, a).mean()
    penalty.prepare(WINDOWS, None, None)
    q = penalty._features[0] @ penalty.weights[0]
    x = penalty.centred(0, a, None)
    p = penalty.rate(0)
    across = torch.einsum("atf,bsf->abts", x, x) / (p * (1 - p)).sum()
    others = torch.stack([across[1, 0], across[2, 1]])
    assert q.mean() == pytest.approx(others.mean().item(), abs=0.1)
    assert penalty(0, a).mean() != without
    again = built("overlap_residual", rules, 0.25, margin=0.0)
    again.load(penalty.state())
    torch.testing.assert_close(again.rate(1), penalty.rate(1))


def test_lag_decorrelation_is_its_statistic_with_its_gradient() -> None:
    model, a = activations()
    rules = [Rule(torch.full((96,), 0.05)) for _ in range(2)]
    penalty = built("lag_decorrelation", rules, 0.25)
    penalty.begin(model, WINDOWS)

    def statistic(a: torch.Tensor) -> torch.Tensor:
        x, p = penalty.mask(0, a) - penalty.rate(0), penalty.rate(0)
        tokens, v = a.shape[0] * a.shape[1], (p * (1 - p)).clamp_min(1e-3)
        lags = [k for k in (1, 2, 4, 8, 16) if k < a.shape[1]]
        parts = [((x[:, k:] * x[:, :-k]).sum((0, 1)) / tokens).square() / v for k in lags]
        return torch.stack(parts).sum(0).mean() / 7

    one, two = a.clone().requires_grad_(), a.clone().requires_grad_()
    value = penalty(0, one).mean()
    assert value.item() == pytest.approx(statistic(two).item(), rel=1e-4)
    value.backward()
    statistic(two).backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-7)


def halves(ids: torch.Tensor) -> torch.Tensor:
    """Sequences with their first halves replaced as `Prefixes` says: from the place that their own sum names."""
    text, swapped = WINDOWS.flatten().tolist(), ids.clone()
    for row in swapped:
        start = int(row.sum())
        for t in range(len(row) // 2):
            row[t] = text[(start + t) % len(text)]
    return swapped


def soft_masks(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first block at a threshold of 0.05, and log-probabilities, token by token without moyu's penalties."""
    seen: list[torch.Tensor] = []
    keep = lambda layer, a, expert: seen.append(a) or a.abs() >= 0.05  # noqa: E731
    with Masking(find_blocks(model), keep), torch.no_grad():
        logits = model(ids).logits
    return 1 / (1 + (seen[0].abs() / 0.05).clamp_min(1e-8) ** -4), logits.log_softmax(-1)


def prefixed(name: str, ids: torch.Tensor, **options: float) -> tuple[Any, torch.Tensor, Any]:
    """The penalty of each token of `ids` in the first block, collected in a training forward; the model."""
    model = tiny_model()
    sparsifier = Threshold(Threshold.Options(), [torch.full((96,), 0.05)] * 2, 0.1)
    penalty = built(name, sparsifier.rules, 0.1, **options)
    penalty.begin(model, WINDOWS)
    values = []

    class Watched(type(penalty)):
        def __call__(self, *args: Any) -> torch.Tensor:
            values.append(super().__call__(*args))
            return values[-1]

    penalty.__class__ = Watched
    control = SparsityControl(model, sparsifier, 0.1, penalty=penalty)
    with control.armed(True, ids=ids, model=model):
        model(ids)
    assert len(values) == 2, "the forward on other text is no part of it"
    control.remove()
    return penalty, values[0].detach(), model


def test_history_consistency_computes_its_formula() -> None:
    ids, tolerance = WINDOWS.flip(1), 1e9
    for _ in range(2):
        _, values, model = prefixed("history_consistency", ids, tolerance=tolerance)
        (z, own), (other, changed) = soft_masks(model, ids), soft_masks(model, halves(ids))
        kl, z = (own.exp() * (own - changed)).sum(-1), z.clamp(1e-6, 1 - 1e-6)
        expected = -(other * z.log() + (1 - other) * (1 - z).log()).mean(-1) * (kl < tolerance)
        expected[:, :10] = 0
        torch.testing.assert_close(values, expected, rtol=2e-2, atol=1e-4)  # the other masks are held in bf16
        assert (values > 0).sum() == (30 if tolerance == 1e9 else 15)
        tolerance = kl[:, 10:].flatten().sort().values[14:16].mean().item()


def test_prefix_contrast_computes_its_formula() -> None:
    ids = WINDOWS.flip(1)
    penalty, values, model = prefixed("prefix_contrast", ids)
    p = penalty.rate(0)
    x, other = soft_masks(model, ids)[0] - p, soft_masks(model, halves(ids))[0] - p
    near = torch.einsum("btf,bf->bt", x, x[:, :10].mean(1) - other[:, :10].mean(1)) / (p * (1 - p)).sum()
    expected = near.clamp_min(0) ** 2
    expected[:, :10] = 0
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-6)
    assert values.max() > 0


def test_predictability_is_what_least_squares_leave() -> None:
    """On the text that its map was measured on: the residual of a regression on as many principal directions."""
    penalty, values, model = prefixed("predictability", WINDOWS, rank=32)
    z, _ = soft_masks(model, WINDOWS)
    seen: list[torch.Tensor] = []
    watch = lambda layer, a, expert: seen.append(masking.input(layer))  # noqa: E731
    with Masking(find_blocks(model), watch, inputs=True) as masking, torch.no_grad():
        model(WINDOWS)
    v = torch.nn.functional.rms_norm(seen[0], (32,)).flatten(0, 1)
    x = z.flatten(0, 1) - z.mean((0, 1))
    f = torch.cat([v, torch.ones(60, 1)], dim=1)
    left = (x - f @ torch.linalg.lstsq(f, x, driver="gelsd").solution).square().sum(-1)
    expected = left / (penalty.rate(0) * (1 - penalty.rate(0))).sum()
    torch.testing.assert_close(values.flatten(), expected, rtol=0.05, atol=1e-3)
    *_, few = prefixed("predictability", WINDOWS, rank=2)[:2]
    assert values.mean() < 0.8 * few.mean(), "a wider map foresees more"


def test_other_text_is_seen_without_dropout() -> None:
    """Else the same text twice would seem to differ in meaning."""
    model = tiny_model("gpt2")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.3
    model.train()
    sparsifier = Threshold(Threshold.Options(), [torch.full((128,), 0.05)] * 2, 0.1)
    control = SparsityControl(model, sparsifier, 0.1, penalty=built("l1", sparsifier.rules, 0.1))
    one, other = (control._peek(model, WINDOWS, None, lambda layer, a: None) for _ in range(2))
    torch.testing.assert_close(one, other)
    assert all(part.training for part in model.modules() if isinstance(part, torch.nn.Dropout))


def test_predictability_reads_the_principal_directions_and_white() -> None:
    """Two rounds of subspace iteration hold most of what the best four directions hold, a random basis a quarter."""
    model, seen = tiny_model(), []
    with Masking(
        find_blocks(model), lambda layer, a, expert: seen.append(masking.input(layer)), inputs=True
    ) as masking:
        model(WINDOWS)
    penalty = built("predictability", [Rule(torch.full((96,), 0.05)) for _ in range(2)], 0.1, rank=4)
    penalty.begin(model, WINDOWS)
    v = torch.nn.functional.rms_norm(seen[0].detach(), (32,)).flatten(0, 1)
    basis = penalty._basis[0]
    directions = torch.linalg.qr(basis[1:])[0]
    best = torch.linalg.eigvalsh(v.T @ v)[-4:].sum()
    assert (v @ directions).square().sum() > 0.8 * best
    features = v @ basis[1:] + basis[0]
    torch.testing.assert_close(features.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.T @ features / len(features), torch.eye(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["history_consistency", "prefix_contrast"])
def test_other_text_needs_the_tokens_and_the_model(name: str) -> None:
    model = tiny_model()
    sparsifier = Threshold(Threshold.Options(), [torch.full((96,), 0.05)] * 2, 0.1)
    penalty = built(name, sparsifier.rules, 0.1)
    penalty.begin(model, WINDOWS)
    control = SparsityControl(model, sparsifier, 0.1, penalty=penalty)
    with pytest.raises(MoyuError, match="pass the model to `armed`"), control.armed(True, ids=WINDOWS):
        pass
    with pytest.raises(MoyuError, match="pass `ids` to `armed`"), control.armed(True, model=model):
        model(WINDOWS)


@pytest.mark.parametrize("left", [False, True])
def test_other_halves_are_the_same_under_padding(left: bool) -> None:
    from moyu_train.penalties.prefixes import Prefixes

    ids, real = torch.nn.functional.pad(WINDOWS, (7, 0) if left else (0, 7)), torch.ones(3, 20, dtype=torch.bool)
    real = torch.nn.functional.pad(real, (7, 0) if left else (0, 7))
    prefixes = Prefixes(WINDOWS)
    swapped, first, second = prefixes.swap(ids, real)
    plain = prefixes.swap(WINDOWS, None)
    for padded, bare in zip((swapped, first, second), plain, strict=True):
        assert padded[real].tolist() == bare.flatten().tolist()
    assert not (first | second)[~real].any()
    assert (first | second)[real].all()
    assert first.sum() == 30
    assert prefixes.swap(WINDOWS[1:2], None)[0].tolist() == plain[0][1:2].tolist()


@pytest.mark.parametrize("name", STREAMED)
def test_statistics_follow_the_training_forwards_and_nothing_else(name: str) -> None:
    """Sums of micro-batches, padding left out, taken at a step's end; a recompute or an evaluation adds nothing."""
    model = tiny_model()
    sparsifier = Threshold(Threshold.Options(), [torch.full((96,), 0.05)] * 2, 0.1)
    penalties = [built(name, sparsifier.rules, 0.1, memory=0.0) for _ in range(2)]
    padded = torch.cat([WINDOWS, WINDOWS.flip(0)], dim=1)
    real = torch.arange(40).expand(3, 40) < 20
    for penalty, whole in zip(penalties, (True, False), strict=True):
        penalty.begin(model, WINDOWS.flip(1))
        control = SparsityControl(model, sparsifier, 0.1, penalty=penalty)
        for part in (padded,) if whole else padded.split(1):
            ids = part if whole else part[:, :20]
            with control.armed(True, real[: len(part)] if whole else None, ids, model):
                model(ids)
            model(ids)  # not armed
        control.remove()
        before = penalty.measured[0].clone()
        penalty.step()
        assert (penalty.measured[0] != before).any()
    for one, other in zip(*(penalty.measured for penalty in penalties), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["chunk", "locality", *PAIRED])
def test_padding_changes_no_sequence_penalty(name: str) -> None:
    penalty = built(name, [Rule(torch.ones(3))])
    if name == "lag_decorrelation":
        penalty.measured[0][1:] = 0.1
    g = torch.Generator().manual_seed(0)
    a, padding = torch.rand(2, 11, 3, generator=g) * 2, torch.rand(2, 6, 3, generator=g) * 9
    real = torch.arange(17).expand(2, 17) < 11
    padded = penalty(0, torch.cat([a, padding], dim=1), real)
    torch.testing.assert_close((padded * real).sum(), penalty(0, a).sum())
    if name != "chunk":  # windows of chunk start where a sequence does, so padding in front moves them
        left = penalty(0, torch.cat([padding, a], dim=1), real.flip(1))
        torch.testing.assert_close((left * real.flip(1)).sum(), penalty(0, a).sum())
    with pytest.raises(MoyuError, match="compares neighbouring tokens"):
        penalty(0, a[0])


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_trains(name: str) -> None:
    """Steps on the penalty alone lower it, with finite gradients that reach gate and up of every layer."""
    model = tiny_model()
    rules = [Rule(torch.full((96,), 0.05)) for _ in range(2)]
    sparsifier = Threshold(Threshold.Options(), [rule.threshold for rule in rules], 0.1)
    penalty = built(name, sparsifier.rules, 0.1)
    penalty.begin(model, WINDOWS)
    control = SparsityControl(model, sparsifier, 0.1, penalty=penalty)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    values = []
    for _ in range(8):
        with control.armed(True, ids=WINDOWS, model=model):
            model(WINDOWS)
        value = control.take_penalty()
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                assert weight.grad.isfinite().all()
                assert weight.grad.any()
        optimizer.step()
    assert values[-1] < 0.97 * values[0], values


def test_a_soft_penalty_without_a_threshold_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings |= {"sparsifier": {"name": "relu"}, "penalty": {"name": "margin", "coefficient": 0.1}}
    with pytest.raises(MoyuError, match=r"'margin' needs a rule with a threshold .* 'relu' has none"):
        Run(Recipe.model_validate(settings))


def test_the_adaptive_coefficient_follows_its_goal_and_goes_on() -> None:
    loop = AdaptiveCoefficient(start=0.1, gain=0.5, ramp=0.5)
    loop.update(density=0.4, target=0.1, progress=0.0, penalty=1.0)
    assert loop.value == pytest.approx(0.1)  # on its goal, which starts where the model is
    loop.update(density=0.4, target=0.1, progress=0.25, penalty=1.0)
    assert loop.value == pytest.approx(0.1 * math.exp(0.5 * (0.4 - 0.25) / 0.25))
    again = AdaptiveCoefficient(start=9, gain=0.5, ramp=0.5)
    again.load(loop.state())
    for one in (loop, again):
        one.update(density=0.05, target=0.1, progress=0.9, penalty=1.0)
    assert again.value == loop.value < 0.1 * math.exp(0.5 * (0.4 - 0.25) / 0.25)
    fresh = AdaptiveCoefficient(start=9, gain=0.5, ramp=0.5)
    fresh.load(AdaptiveCoefficient(start=2, gain=0.5, ramp=0.5).state())
    assert (fresh.value, fresh.first) == (2, None)


def test_the_ratio_raises_the_coefficient_of_a_penalty_that_does_not_fall() -> None:
    loop = RatioCoefficient(start=0.1, window=2, rise=1.05, most=2.0)

    def window(*values: float) -> float:
        for value in values:
            loop.update(density=0.5, target=0.1, progress=0.5, penalty=value)
        return loop.value

    assert window(3.0, 5.0) == pytest.approx(0.1)  # nothing to compare with
    assert window(2.0, 4.0) == pytest.approx(0.1 * 3 / 4)
    assert window(3.0, 3.03) == pytest.approx(0.1 * 3 / 4 * 1.05)  # rose by half a percent
    assert window(9.0, 9.0) == pytest.approx(0.2)  # nearly three times as much, and no further than twice the start
    loop.update(density=0.5, target=0.1, progress=0.5, penalty=4.0)
    again = RatioCoefficient(start=0.1, window=2, rise=1.05, most=2.0)
    again.load(loop.state())
    for one in (loop, again):
        one.update(density=0.5, target=0.1, progress=0.6, penalty=5.0)
    assert again.value == loop.value == pytest.approx(0.2 * 4.5 / 9)


@pytest.mark.parametrize("real", [None, torch.arange(16).expand(2, 16) < 9])
def test_the_coefficient_sees_the_penalty_of_the_whole_step_a_token(real: torch.Tensor | None) -> None:
    model = tiny_model()
    sparsifier = Threshold(Threshold.Options(), [torch.full((96,), 0.05)] * 2, 0.1)
    loop = RatioCoefficient(start=0.1, window=5, rise=1.05, most=2.0)
    control = SparsityControl(model, sparsifier, 0.1, penalty=built("l1", sparsifier.rules, 0.1), adaptive=loop)
    total, tokens = 0.0, 0
    for ids in WINDOWS[:2, :16], WINDOWS[1:3, :16]:
        with control.armed(True, real):
            model(ids)
        total += control.take_penalty().item()
        tokens += ids.numel() if real is None else int(real.sum())
    control.on_optimizer_step(None, SimpleNamespace(global_step=0, max_steps=10), None)
    assert (loop.sum, loop.steps) == (pytest.approx(total / tokens), 1)


@pytest.mark.parametrize("statistic", ["contribution", "magnitude"])
def test_scaled_activations_have_a_mean_square_of_one(statistic: str) -> None:
    model = tiny_model()
    scales = measure_scales(model, statistic, WINDOWS)
    squares: dict[int, list[float]] = {0: [], 1: []}

    def observe(layer: int, a: torch.Tensor, expert: int | None) -> None:
        squares[layer].append((a * scales[layer]).square().mean().item())

    with Masking(find_blocks(model), observe), torch.no_grad():
        model(WINDOWS)
    assert squares[0] == pytest.approx([1.0], rel=1e-4)
    assert squares[1] == pytest.approx([1.0], rel=1e-4)
    flat = (scales[0] - scales[0][0]).abs().max() == 0
    assert flat == (statistic == "magnitude")


def test_experts_are_refused() -> None:
    with pytest.raises(MoyuError, match="this model has experts"):
        measure_scales(tiny_model("mixtral"), "contribution", WINDOWS)


def test_schedules() -> None:
    assert coefficient(((0.0, 3.0),), "sine", 0.7) == 3.0
    ramp = ((0.2, 0.0), (0.6, 4.0))
    assert [coefficient(ramp, "linear", p) for p in (0.0, 0.2, 0.3, 0.6, 1.0)] == pytest.approx([0, 0, 1, 4, 4])
    stages = ((0.0, 1.0), (0.5, 2.0), (1.0, 6.0))
    for p, low, high, t in ((0.125, 1, 2, 0.25), (0.75, 2, 6, 0.5)):
        eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * t) + 1)
        assert coefficient(stages, "sine", p) == pytest.approx(low + eta * (high - low))


def test_a_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: m\npenalty: {name: hoyer, coefficient: 1e-4}\n")
    penalty = load_recipe(str(tmp_path / "r.yaml")).penalty
    assert penalty is not None
    assert penalty.coefficient == ((0.0, 1e-4),)


def test_a_recipe_trains_with_its_penalty_and_schedule(tmp_path: Path) -> None:
    """Through the stages: predicted mask, two-point coefficient; the loss is the sum of its parts at every step."""
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    settings["finetune"] |= {"kl_weight": 0.5, "lm_weight": 1.0, "activation_checkpointing": True}
    settings["penalty"] = {"name": "hoyer", "coefficient": [[0.0, 0.0], [0.5, 4.0]], "interpolation": "linear"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    for stage in ("calibrate", "fit-predictors", "calibrate-in-loop", "finetune"):
        assert main([stage, str(tmp_path / "r.yaml")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/finetune/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for step, line in enumerate(lines):
        weight = min(step, 4)  # 8 steps: the ramp ends after 4
        expected = 0.5 * line["kl"] + line["lm"] + weight * line["penalty"]
        assert line["loss"] == pytest.approx(expected, rel=1e-3), step
    assert lines[-1]["penalty"] < 0.9 * lines[0]["penalty"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{name: hoier, coefficient: 1}", "penalty.name 'hoier' is unknown; did you mean 'hoyer'"),
        ("{name: hoyer}", "penalty.coefficient: Field required"),
        ("{name: hoyer, coefficient: -1}", "below 0"),
        ("{name: hoyer, coefficient: .nan}", "not finite"),
        ("{name: hoyer, coefficient: true}", "penalty.coefficient"),
        ("{name: hoyer, coefficient: [[0.5, 1], [0.2, 2]]}", "rising shares"),
        ("{name: hoyer, coefficient: 1, interpolation: cubic}", "penalty.interpolation"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\npenalty: {settings}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
