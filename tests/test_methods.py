"""The rule, the predictor and the counts, against brute force."""

from pathlib import Path

import pytest
import torch
from moyu_kernels.ops.ffn.naive import gated_ffn, lowrank_scores, pack_codes, predictor_scores, unpack_codes
from moyu_kernels.rules import Rule
from tiny import CONFIGS, tiny_model

from moyu_train.analysis.histogram import Histogram
from moyu_train.analysis.tables import interval_said
from moyu_train.analysis.uplift import largest, uplift_curve
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks, bytes_skipped, row_bytes
from moyu_train.evaluation.perplexity import Scores, ratio_interval, score
from moyu_train.models.blocks import FFNBlock, find_blocks
from moyu_train.models.state import stored_bytes
from moyu_train.predictors import lowbit
from moyu_train.predictors.lowbit import LowBit, round_weight
from moyu_train.predictors.lowrank import LowRank, quantise_rows
from moyu_train.settings import Calibrate
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.loop import calibrate_in_loop
from moyu_train.training.rule import calibrate_rule

DOCUMENTS = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(i)) for i in range(3)])


def test_histogram_levels_are_quantiles() -> None:
    values = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram(2, -8.0, 8.0)
    for layer in range(2):
        for part in values[layer].split(7_000):
            histogram.add(layer, part)
    for density in (0.1, 0.5, 0.9):
        expected = values.quantile(1 - density, dim=1)
        torch.testing.assert_close(torch.tensor(histogram.levels(density)), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("statistic", ["contribution", "magnitude"])
def test_rule_reaches_its_density_in_every_layer(family: str, statistic: str) -> None:
    model = tiny_model(family)
    options = Threshold.Options(statistic=statistic)
    rule = calibrate_rule(model, Threshold, options, 0.3, DOCUMENTS, 600, passes=2)
    blocks = find_blocks(model)
    with SparseMasks(model, rule.rules, None) as masks:
        score(model, DOCUMENTS, 1024, "test")
    places = masks.counts.tokens * torch.tensor([block.neurons for block in blocks])
    assert (masks.counts.kept / places - 0.3).abs().max() < 0.02
    if statistic == "magnitude":
        assert all(threshold.unique().numel() == 1 for threshold in rule.thresholds)
    else:
        levels = rule.thresholds[0] * blocks[0].down_norms()
        torch.testing.assert_close(levels, torch.full_like(levels, levels.flatten()[0].item()))


def test_a_layer_that_is_all_zero_is_refused_by_name() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(MoyuError, match=r"every activation of model\.layers\.1\.mlp is zero"):
        calibrate_rule(model, Threshold, Threshold.Options(), 0.3, DOCUMENTS, 600, passes=1)


def test_controller_moves_thresholds_towards_the_target() -> None:
    rule = Threshold(Threshold.Options(), [torch.ones(4), torch.ones(4)], density=0.4)
    rule.control(0, density=0.5, target=0.4)
    rule.control(1, density=0.3, target=0.4)
    assert (rule.thresholds[0] > 1).all()
    assert (rule.thresholds[1] < 1).all()


def test_largest_is_the_oracle() -> None:
    n = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    count = torch.tensor([0, 1, 7, 39, 40])
    mask = largest(n, count)
    assert mask.sum(-1).tolist() == count.tolist()
    for row, keep, k in zip(n, mask, count.tolist(), strict=True):
        if 0 < k < 40:
            assert row[keep].min() > row[~keep].max()


PLANTED = FFNBlock("", torch.nn.Identity(), "gated", "gate", "up", "down", hidden=16, neurons=24)


def planted(tokens: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a contribution whose root is a rank-3 linear map of x plus a constant."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 16, generator=g) + 0.5
    root = 4 + 0.3 * x @ torch.randn(16, 3, generator=g) @ torch.randn(3, 24, generator=g)
    return x, root.clamp_min(0).square()


def test_lowrank_finds_a_planted_map_and_the_best_rank() -> None:
    x, contribution = planted()
    root = contribution.sqrt() / contribution.sqrt().mean()
    errors = {}
    for rank in (1, 3):
        predictor = LowRank(LowRank.Options(rank=rank, ridge=1e-6), PLANTED, torch.device("cpu"))
        for part, target in zip(x.split(900), contribution.split(900), strict=True):
            predictor.observe(part, target)
        stored = predictor.solve()
        errors[rank] = (lowrank_scores(x, **stored) - root).pow(2).mean().item()
    spread = root.var(0).mean().item()
    assert errors[3] < 0.02 * spread < 0.1 * spread < errors[1]
    assert stored["w1"].dtype == stored["w2"].dtype == torch.int8
    assert stored_bytes(stored) == 3 * 16 + 4 * 3 + 24 * 3 + 4 * 24 + 4 * 24


def test_lowrank_beats_a_constant_of_the_same_share() -> None:
    x, contribution = planted()
    predictor = LowRank(LowRank.Options(rank=3), PLANTED, torch.device("cpu"))
    predictor.observe(x, contribution)
    scores = lowrank_scores(x, **predictor.solve())
    half = torch.full((len(x),), 12)
    kept = (contribution * largest(scores - scores.min(), half)).sum()
    static = (contribution * largest(contribution.mean(0).expand_as(contribution), half)).sum()
    assert kept > 1.05 * static


def test_rows_are_quantised_to_half_a_step() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    q, scale = quantise_rows(weight)
    assert ((q * scale[:, None] - weight).abs() <= scale[:, None] / 2 + 1e-6).all()


@pytest.mark.parametrize("columns", [1, 4, 7, 64])
def test_codes_are_packed_and_unpacked(columns: int) -> None:
    levels = torch.randint(0, 4, (5, columns), generator=torch.Generator().manual_seed(0)) * 2.0 - 3
    codes = pack_codes(levels)
    assert codes.shape == (5, -(-columns // 4))
    assert torch.equal(unpack_codes(codes, columns), levels)


def correlated(tokens: int, size: int) -> torch.Tensor:
    """Inputs `[tokens, size]` that mostly vary in a quarter of the directions."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(tokens, size // 4, generator=g) @ torch.randn(size // 4, size, generator=g)
    return few + 0.3 * torch.randn(tokens, size, generator=g)


def test_rounding_makes_up_for_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain rounding at the same scales: a much smaller error of the product, a larger one of the weights. The
    scales tell that error, and sweeps after GPTQ make it smaller still."""
    x = correlated(2000, 96)
    moment = (x.T @ x / len(x)).double()
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    levels, (scale, off) = round_weight(weight, moment)
    assert levels.unique().tolist() == [-3, -1, 1, 3]
    plain = ((weight / scale[:, None] / 2 - 0.5).round().clamp(-2, 1) * 2 + 1) * scale[:, None]
    ours = levels * scale[:, None]

    def error(rounded: torch.Tensor) -> float:
        return ((x @ (rounded - weight).T).norm() / (x @ weight.T).norm()).item()

    assert error(ours) < 0.6 * error(plain)
    assert (ours - weight).norm() > (plain - weight).norm()
    for factor in (0.99, 1.01):  # the scale is the best one for these levels
        assert error(ours) < error(factor * ours)
    missed = (x @ (ours - weight).T).square().mean(0).sqrt() / x.norm(dim=1).square().mean().sqrt()
    assert torch.allclose(off, missed, rtol=1e-3)
    swept = lowbit.SWEEPS
    monkeypatch.setattr(lowbit, "SWEEPS", 0)
    once, (scale, _) = round_weight(weight, moment)
    assert swept
    assert error(ours) < 0.95 * error(once * scale[:, None])


def test_without_correlation_rounding_is_to_the_nearest() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    levels, (scale, _) = round_weight(weight, torch.eye(32, dtype=torch.float64))
    assert torch.equal(levels, (weight / scale[:, None] / 2 - 0.5).round().clamp(-2, 1) * 2 + 1)


def test_lowbit_predicts_contributions_in_units_of_their_mean() -> None:
    block = find_blocks(tiny_model())[0]
    gate, up, _ = block.weights()
    x = correlated(3000, 32) / 10
    contribution = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs() * block.down_norms()
    predictor = LowBit(LowBit.Options(), block, torch.device("cpu"))
    for part, target in zip(x.split(700), contribution.split(700), strict=True):
        predictor.observe(part, target)
    stored = predictor.solve()
    assert stored_bytes(stored) == LowBit.planned_bytes(LowBit.Options(), 32, 96) == 2 * 96 * 8 + 4 * 6 * 96
    scores = predictor_scores(x, list(stored.values()), block.activation())
    root = contribution.sqrt() / contribution.sqrt().mean()
    assert scores.mean().item() == pytest.approx(1, abs=0.15)
    assert torch.corrcoef(torch.stack([scores.flatten(), root.flatten()]))[0, 1] > 0.8
    half = torch.full((len(x),), 48)
    kept = (contribution * largest(scores, half)).sum() / (contribution * largest(contribution, half)).sum()
    static = contribution.mean(0).expand_as(contribution)
    fixed = (contribution * largest(static, half)).sum() / (contribution * largest(contribution, half)).sum()
    assert kept > 0.93 > 0.85 > fixed


def test_a_neuron_of_zeros_is_copied_as_such() -> None:
    x = correlated(300, 16) / 1e6
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    levels, scales = round_weight(weight, (x.T @ x / len(x)).double())
    assert levels.abs().unique().tolist() == [1, 3]
    assert (scales[:, 1] == 0).all()
    assert (scales[:, [0, 2]] > 0).all()


def test_scores_allow_for_what_copies_miss() -> None:
    """1-bit copies of few of the directions that x takes: neurons are better chosen with their errors than without."""
    block = find_blocks(tiny_model())[0]
    gate, up, _ = block.weights()
    x = correlated(3000, 32)
    contribution = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs() * block.down_norms()
    predictor = LowBit(LowBit.Options(bits=1), block, torch.device("cpu"))
    predictor.observe(x, contribution)
    stored = predictor.solve()
    half = torch.full((len(x),), 48)

    def kept() -> float:
        scores = predictor_scores(x, list(stored.values()), block.activation())
        return ((contribution * largest(scores, half)).sum() / contribution.sum()).item()

    allowed = kept()
    for name in ("gate_scales", "up_scales"):
        stored[name][1] = 0
    assert allowed > kept() + 0.002


FAMILIES = {"lowrank": (LowRank, LowRank.Options(rank=4)), "lowbit": (LowBit, LowBit.Options())}


def fitted(
    model: torch.nn.Module, folder: Path, family: str = "lowbit"
) -> tuple[list[Rule], list[dict[str, torch.Tensor]]]:
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.5, DOCUMENTS, 600, passes=1)
    trainer = PredictorTrainer(model, rule.rules, *FAMILIES[family], folder)
    return rule.rules, trainer.fit(DOCUMENTS.packed(50, 0), save_every=5)


def test_inputs_without_a_second_moment_are_refused_by_name() -> None:
    block = find_blocks(tiny_model())[0]
    predictor = LowBit(LowBit.Options(), block, torch.device("cpu"))
    x = torch.randn(100, 32)
    x[3, 3] = float("nan")
    predictor.observe(x, torch.rand(100, 96))
    with pytest.raises(MoyuError, match=r"inputs of model\.layers\.0\.mlp have no usable second moment"):
        predictor.solve()


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_that_are_all_off_have_no_predictor(family: str, tmp_path: Path) -> None:
    model = tiny_model()
    rules = [Rule(torch.full((96,), level)) for level in (0.05, 1e9)]
    trainer = PredictorTrainer(model, rules, *FAMILIES[family], tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    with pytest.raises(MoyuError, match=r"no predictor can be fitted to model\.layers\.1\.mlp: .* all off"):
        trainer.fit(DOCUMENTS.packed(50, 0), save_every=5)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(MoyuError, match=r"activations of model\.layers\.1\.mlp are not finite"):
        PredictorTrainer(model, rules, *FAMILIES[family], tmp_path / "other").fit(DOCUMENTS.packed(50, 0), save_every=5)


def test_a_target_below_what_relu_skips_anyway_says_so(tmp_path: Path) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    rules, predictors = fitted(model, tmp_path)
    with pytest.raises(MoyuError, match=r"bytes_skipped 0\.25 was not met .* raise it to about 0\.32"):
        calibrate_in_loop(model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.25), itemsize=4)
    calibrate_in_loop(model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.32), itemsize=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_interrupted_fit_goes_on_to_the_same_predictors(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, whole = fitted(model, tmp_path / "a", family)
    save, calls = PredictorTrainer._save, []

    def interrupted(self: PredictorTrainer, path: Path, done: int) -> None:
        save(self, path, done)
        calls.append(done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictorTrainer, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fitted(model, tmp_path / "b", family)
    assert calls == [5]
    _, resumed = fitted(model, tmp_path / "b", family)
    for one, other in zip(whole, resumed, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_in_loop_calibration_meets_its_target_and_counts_bytes_right(family: str, tmp_path: Path) -> None:
    model = tiny_model()
    blocks = find_blocks(model)
    rules, predictors = fitted(model, tmp_path, family)
    calibrated, figures = calibrate_in_loop(
        model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.25), itemsize=4
    )
    assert abs(figures["bytes_skipped"] - 0.25) <= 0.002
    with SparseMasks(model, rules, calibrated) as masks:
        score(model, DOCUMENTS, 1024, "test")
    assert abs(bytes_skipped(masks.blocks, masks.counts, calibrated, 4) - figures["bytes_skipped"]) < 0.003
    # brute force: rows of 32 fp32 values are two whole lines
    assert row_bytes(blocks[0], 4) == 128
    tokens = masks.counts.tokens[0].item()
    read = sum(
        128 * (2 * masks.counts.selected[i] + masks.counts.kept[i]).item() / tokens + 4 * 96 + stored_bytes(p)
        for i, p in enumerate(calibrated)
    )
    assert bytes_skipped(masks.blocks, masks.counts, calibrated, 4) == pytest.approx(1 - read / (2 * 3 * 96 * 128))


def test_rows_that_are_not_whole_lines_cost_one_more() -> None:
    block = find_blocks(tiny_model())[0]
    assert row_bytes(block, 1) == 128  # 32 bytes may lie across two lines
    assert row_bytes(block, 2) == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_compute_what_the_kernel_defines(family: str, tmp_path: Path) -> None:
    """The multi-token path and the op agree on every row, counts included."""
    model = tiny_model()
    rules, predictors = fitted(model, tmp_path, family)
    calibrated, _ = calibrate_in_loop(
        model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.25), itemsize=4
    )
    block = find_blocks(model)[0]
    x = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    with SparseMasks(model, rules, calibrated) as masks:
        found = block.module(x)
    gate, up, down = block.weights()
    expected, counts = gated_ffn(x[0], gate, up, down.T, rules[0].threshold, "silu", list(calibrated[0].values()))
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert masks.counts.selected[0] == counts[:, 0].sum()
    assert masks.counts.kept[0] == counts[:, 1].sum()
    assert 0 < masks.counts.kept[0] < masks.counts.selected[0] < 20 * 96


def test_oracle_keeps_as_many_neurons_and_more_contribution(tmp_path: Path) -> None:
    model = tiny_model()
    rules, predictors = fitted(model, tmp_path)
    calibrated, _ = calibrate_in_loop(
        model, rules, predictors, DOCUMENTS, Calibrate(tokens=600, bytes_skipped=0.25), itemsize=4
    )
    mass = {}
    for oracle in (False, True):
        with SparseMasks(model, rules, calibrated, oracle=oracle) as masks:
            find_blocks(model)[0].module(torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0)))
        mass[oracle] = masks.counts
    assert mass[True].kept[0] == mass[False].kept[0]
    assert mass[True].mass_kept[0] > mass[False].mass_kept[0]


def test_perplexity_is_the_models_own_loss() -> None:
    model = tiny_model()
    ids = DOCUMENTS.tokens[0]
    loss = model(ids[None], labels=ids[None]).loss.item()
    assert score(model, Documents([ids]), 1024, "test").perplexity == pytest.approx(
        torch.tensor(loss).exp().item(), 1e-4
    )
    windows = score(model, Documents([ids]), 64, "test")
    assert windows.tokens == [200 - 4]  # four windows, the first token of each unscored


def test_bootstrap_interval_covers_the_ratio() -> None:
    a, b = Scores([110.0, 230.0, 300.0], [100, 200, 300]), Scores([100.0, 210.0, 290.0], [100, 200, 300])
    low, high = ratio_interval(a, b)
    assert low < a.perplexity / b.perplexity < high
    assert ratio_interval(a, a) == (1.0, 1.0)
    assert ratio_interval(Scores([110.0, 0.0], [100, 0]), Scores([100.0, 0.0], [100, 0])) is None
    unscored = Scores([*a.nll, 0.0], [*a.tokens, 0]), Scores([*b.nll, 0.0], [*b.tokens, 0])
    assert ratio_interval(*unscored) == (low, high)
    assert interval_said((low, high)) == f"{low:.3f} to {high:.3f}"
    assert interval_said(None) == "unknown with one document"


def test_more_sequences_side_by_side_than_there_are() -> None:
    with pytest.raises(MoyuError, match="9 sequences side by side need as many windows of text, and there are 2"):
        score(tiny_model(), Documents(DOCUMENTS.tokens[:2]), 1024, "test", batch=9)


def test_uplift_curve_counts_zeros_and_rises() -> None:
    figures = uplift_curve(tiny_model("opt"), DOCUMENTS, 600, (0.5, 0.98))
    assert figures["tokens"] == 600
    assert 0.2 < figures["layers"][0]["zero_share"] < 0.8  # ReLU
    assert 0 < figures["layers"][0]["participation"] < 1
    dense, half, few = (point["perplexity"] for point in figures["uplift"])
    assert abs(half / dense - 1) < abs(few / dense - 1)
