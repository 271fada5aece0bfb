"""Kernels against the masked path: blocks on the same inputs to rounding, losses of a text to rounding or chance."""

from pathlib import Path

import moyu_kernels
import pytest
import torch
from test_export import DOCUMENTS
from tiny import tiny_model, tokenizer

from moyu_train.checkpoints.export import export, read_state
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.replay import parts_of, record
from moyu_train.evaluation.through_kernels import (
    REPLAYED,
    check_agreement,
    decoded_losses,
    masked_losses,
    through_kernels,
)
from moyu_train.models.loading import load_dense
from moyu_train.predictors.lowbit import LowBit
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.rule import calibrate_rule

IDS = DOCUMENTS.tokens[0][:100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint with 1-bit predictors."""
    place, model = tmp_path_factory.mktemp("kernels"), tiny_model()
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.4, DOCUMENTS, 200, passes=1)
    trainer = PredictorTrainer(model, rule.rules, LowBit, LowBit.Options(bits=1), place / "fit")
    predictors = trainer.fit(DOCUMENTS.packed(50, 0), 100)
    export(model, tokenizer(), place / "sparse", "threshold", rule.rules, predictors, "lowbit")
    return place / "sparse"


def found(folder: Path) -> dict:
    return through_kernels(folder, load_dense(folder), IDS)


def test_kernels_agree_with_the_masked_path(folder: Path) -> None:
    figures = found(folder)
    assert figures["tokens"] == 100
    assert figures["blocks"]["outputs"] == 2 * REPLAYED
    assert figures["blocks"]["other_masks"] == 0
    assert 0 < figures["blocks"]["worst"] < 1e-5
    assert figures["fp32_perplexity"] == pytest.approx(figures["masked_perplexity"], rel=1e-3)


def test_losses_are_those_of_the_logits(folder: Path) -> None:
    model = load_dense(folder)
    logits = model(IDS[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], IDS[1:], reduction="none").double()
    torch.testing.assert_close(masked_losses(model, IDS), expected, rtol=1e-5, atol=1e-5)
    dense = moyu_kernels.from_pretrained(folder, mode="dense")
    torch.testing.assert_close(decoded_losses(dense, IDS), expected, rtol=1e-4, atol=1e-4)


def test_what_is_recorded_is_the_masked_output(folder: Path) -> None:
    model = load_dense(folder)
    with SparseMasks(model, *read_state(folder)) as masks:
        parts = parts_of(masks.blocks)
        record(model, parts, IDS[None])
        x, y = parts[0].x, parts[0].y
        assert x.shape == y.shape == (1, 100, 32)
        torch.testing.assert_close(model.model.layers[0].mlp(x), y)
        assert torch.equal(parts[0].output, y)
    assert (model.model.layers[0].mlp(x) - y).norm() > 0.01 * y.norm(), "the mask does nothing"
    assert not any(module._forward_hooks for module in model.model.layers[0].mlp.modules())


def test_a_block_that_selects_other_neurons_is_caught(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = moyu_kernels.from_pretrained

    def shifted(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        model.model.layers[1].mlp.predictor_bias[:3] -= 100  # three neurons that are never selected
        return model

    monkeypatch.setattr(moyu_kernels, "from_pretrained", shifted)
    with pytest.raises(MoyuError, match=r"on the same inputs.*in model.layers.1.mlp"):
        found(folder)


def test_outputs_that_are_no_numbers_are_caught_where_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = moyu_kernels.from_pretrained

    def broken(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr(moyu_kernels, "from_pretrained", broken)
    with pytest.raises(MoyuError, match=r"on the same inputs.*in model.layers.1.mlp"):
        found(folder)


def test_means_may_differ_by_chance_and_by_no_more() -> None:
    chance = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = torch.full((400,), 3.0, dtype=torch.float64)
    chance -= chance.mean()
    check_agreement(losses + 0.009, losses)
    check_agreement(losses + chance + 0.12, losses)  # a standard error is 0.05
    for wrong in (losses + 0.011, losses + chance + 0.2, losses - chance - 0.2, losses + float("nan")):
        with pytest.raises(MoyuError, match="differ by more than 1%"):
            check_agreement(wrong, losses)
