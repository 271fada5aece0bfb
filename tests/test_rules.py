"""Every sparsifier against its formula, and through find → mask → export → verify on every layout that it takes."""

from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import moyu_kernels
import pytest
import torch
from moyu_kernels.ops import cpu
from moyu_kernels.rules import Rule
from tiny import CONFIGS, tiny_model, tokenizer
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM

from moyu_train.checkpoints.export import export
from moyu_train.checkpoints.verify import verify
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import ffn_read
from moyu_train.evaluation.inloop import SparseMasks, bytes_skipped
from moyu_train.evaluation.perplexity import score
from moyu_train.evaluation.stage import evaluate_checkpoint
from moyu_train.models.blocks import find_blocks
from moyu_train.penalties.adaptive import AdaptiveCoefficient
from moyu_train.predictors.lowbit import LowBit
from moyu_train.registry import resolve
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.control import SparsityControl
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.rule import calibrate_rule

DOCUMENTS = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(i)) for i in range(3)])
IDS = DOCUMENTS.tokens[0][None, :16]
METHODS: dict[str, dict[str, Any]] = {
    "threshold": {"name": "threshold"},
    "gate_threshold": {"name": "gate_threshold"},
    "relu": {"name": "relu"},
    "shifted": {"name": "relu", "shift": 0.05},
    "fatrelu": {"name": "fatrelu"},
    "relu2": {"name": "relu2"},
    "drelu": {"name": "drelu"},
    "topk": {"name": "topk"},
    "topk-magnitude": {"name": "topk", "statistic": "magnitude"},
    "statistical_topk": {"name": "statistical_topk"},
    "statistical_topk-soft": {"name": "statistical_topk", "soft": True},
    "griffin": {"name": "griffin", "prompt": 5},
    "tda": {"name": "tda", "prompt": 5},
}
PROMPT = ("griffin", "tda")  # see whole sequences: tests/test_prompt.py
HOLD = ("threshold", "gate_threshold", "fatrelu", "topk", "topk-magnitude")  # reach any density without training
DENSITY = 0.3


def test_every_registered_sparsifier_is_in_the_matrix() -> None:
    assert {settings["name"] for settings in METHODS.values()} == set(SPARSIFIERS)


def calibrated(name: str, model: torch.nn.Module) -> Any:
    cls, options = resolve("sparsifier", Method(**METHODS[name]), SPARSIFIERS)
    return calibrate_rule(model, cls, options, DENSITY, DOCUMENTS, 600, passes=2)


def brute_force(name: str, rule: Rule, g: torch.Tensor, u: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The masked activation of one token, g and u `[F]`, neuron by neuron."""
    level = g.mean() + NormalDist().inv_cdf(1 - DENSITY) * g.std()
    stock = silu(g) * u
    ranked = stock.abs() * (norms if name == "topk" else 1)
    last = ranked.sort(descending=True).values[round(DENSITY * len(g)) - 1]
    values = []
    for i, (gate, up, t) in enumerate(zip(g.tolist(), u.tolist(), rule.threshold.tolist(), strict=True)):
        act = silu(torch.tensor(gate)).item()
        values.append(
            {
                "threshold": act * up if abs(act * up) >= t else 0.0,
                "gate_threshold": act * up if abs(act) >= t else 0.0,
                "relu": max(gate, 0.0) * up,
                "shifted": max(gate - 0.05, 0.0) * up,
                "fatrelu": gate * up if gate >= t > 0 else 0.0,
                "relu2": max(gate, 0.0) ** 2 * up,
                "drelu": max(gate, 0.0) * max(up, 0.0),
                "topk": act * up if ranked[i] >= last else 0.0,
                "topk-magnitude": act * up if ranked[i] >= last else 0.0,
                "statistical_topk": act * up if gate > level else 0.0,
                "statistical_topk-soft": silu(torch.relu(torch.tensor(gate) - level)).item() * up,
            }[name]
        )
    return torch.tensor(values)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PROMPT])
def test_rules_compute_their_formulas(name: str) -> None:
    model = tiny_model()
    sparsifier = calibrated(name, model)
    block = find_blocks(model)[0]
    gate, up, down = block.weights()
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    stock = block.module(x)
    with SparseMasks(model, sparsifier.rules, None) as masks:
        found = block.module(x)[0]
    for row, y in zip(x[0], found, strict=True):
        a = brute_force(name, sparsifier.rules[0], gate @ row, up @ row, block.down_norms())
        torch.testing.assert_close(y, down @ a, rtol=1e-4, atol=1e-5)
    kept = sum((brute_force(name, sparsifier.rules[0], gate @ r, up @ r, block.down_norms()) != 0).sum() for r in x[0])
    assert masks.counts.kept[0] == kept
    assert torch.equal(block.module(x), stock), "the block is not as it was"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", METHODS)
def test_every_rule_goes_all_the_way_on_every_layout(tmp_path: Path, name: str, family: str) -> None:
    """Refused by name, or: the density where the rule holds one, and an export that computes the rule or is refused."""
    model = tiny_model(family)
    cls, _ = resolve("sparsifier", Method(**METHODS[name]), SPARSIFIERS)
    if find_blocks(model)[0].layout not in cls.layouts:
        with pytest.raises(MoyuError, match=rf"sparsifier '{cls.name}' acts on .* blocks, .* is"):
            calibrated(name, model)
        return
    if name in PROMPT and family == "opt":
        SparsityControl(model, cls.start(cls.Options(), find_blocks(model), DENSITY), DENSITY)
        with pytest.raises(MoyuError, match="sees the tokens of all sequences in one row"):
            model(IDS)
        return
    sparsifier = calibrated(name, model)
    with SparseMasks(model, sparsifier.rules, None) as masks:
        score(model, DOCUMENTS, 1024, "test")
        expected = model(IDS).logits
    if name in HOLD:
        places = masks.counts.tokens * torch.tensor([block.neurons for block in masks.blocks])
        assert (masks.counts.kept / places - DENSITY).abs().max() < 0.025
    export(model, tokenizer(), tmp_path / "sparse", cls.name, sparsifier.rules, None, None)
    if family == "llama":  # takes a subprocess
        assert verify(tmp_path / "sparse")["stock_refuses"] == (name not in ("relu", "relu2"))
    found = moyu_kernels.from_pretrained(tmp_path / "sparse", mode="rule", backend="reference")
    torch.testing.assert_close(found(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in PROMPT])
def test_kernels_decode_what_the_masks_compute(tmp_path: Path, name: str) -> None:
    """Token by token, with the masks' own logits, counts and bytes."""
    model = tiny_model()
    sparsifier = calibrated(name, model)
    with SparseMasks(model, sparsifier.rules, None) as masks:
        expected = model(IDS).logits
    export(model, tokenizer(), tmp_path / "sparse", METHODS[name]["name"], sparsifier.rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse", mode="rule", backend="cpu")
    runner = moyu_kernels.Runner(found, max_length=IDS.shape[1], compile=False)
    runner.reset()
    logits = torch.stack([runner.step(token) for token in IDS[0]], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    counts = torch.stack([layer.mlp.counts for layer in found.model.layers]).double()
    assert counts[:, 1].tolist() == masks.counts.selected.tolist()
    assert counts[:, 2].tolist() == masks.counts.kept.tolist()
    gates = 96 * IDS.shape[1] * len(masks.blocks)
    rows = (gates + counts[:, 1:].sum().item()) / IDS.shape[1]
    skipped = 1 - (128 * rows + len(masks.blocks) * 96 * 4) / (len(masks.blocks) * 3 * 96 * 128)
    assert bytes_skipped(masks.blocks, masks.counts, None, 4) == pytest.approx(skipped)
    assert skipped > (0.15 if name.startswith(("threshold", "topk")) else 0.25)
    read, dense = ffn_read(found, masks.blocks)
    assert 1 - read / dense == pytest.approx(skipped)


@pytest.mark.parametrize("name", ["gate_threshold", "shifted", "fatrelu", "relu2", "drelu"])
def test_predictors_under_every_rule_that_takes_them(tmp_path: Path, name: str) -> None:
    """The op's scores see the rule's own gate, as those of the masks do."""
    model = tiny_model()
    sparsifier = calibrated(name, model)
    options = LowBit.Options()
    windows = torch.cat(DOCUMENTS.tokens)[:512].view(16, 32)
    predictors = PredictorTrainer(model, sparsifier.rules, LowBit, options, tmp_path).fit(windows, 100)
    block, x = find_blocks(model)[0], torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(0))
    for predictor in predictors:
        predictor["bias"] -= 0.5
    with SparseMasks(model, sparsifier.rules, predictors) as masks:
        expected = block.module(x)[0]
    assert 0 < masks.counts.kept[0] < masks.counts.selected[0] < 20 * 96
    gate, up, down = block.weights()
    rule, stored = sparsifier.rules[0], list(predictors[0].values())
    for rows in x[0].split(5):
        y, counts = cpu.gated_ffn(rows, gate, up, down.T.contiguous(), rule.op_threshold, "silu", stored, rule.op)
        torch.testing.assert_close(y, expected[: len(rows)], rtol=1e-4, atol=1e-4)
        expected = expected[len(rows) :]
        masks.counts.selected[0] -= counts[:, 0].sum()
        masks.counts.kept[0] -= counts[:, 1].sum()
    assert masks.counts.selected[0] == masks.counts.kept[0] == 0
    assert not expected.numel()


@pytest.mark.parametrize(("name", "simulated"), [("relu", False), ("shifted", True), ("gate_threshold", True)])
def test_on_a_gpu_most_rules_on_the_gate_are_simulated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, simulated: bool
) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", METHODS[name]["name"], calibrated(name, model).rules, None, None)
    found = moyu_kernels.from_pretrained(tmp_path / "sparse", mode="rule", backend="triton")
    assert ("has no op for the backend 'triton'" in caplog.text) == simulated
    if not simulated:
        assert found.model.layers[0].mlp.rule == "threshold"  # with relu for activation, which is the same


def test_evaluate_counts_what_a_rule_on_the_gate_skips(tmp_path: Path) -> None:
    model = tiny_model()
    export(model, tokenizer(), tmp_path / "sparse", "drelu", calibrated("drelu", model).rules, None, None)
    figures = evaluate_checkpoint(tmp_path / "sparse", DOCUMENTS, 64, kernel_tokens=40)
    assert not figures["simulated"]
    passed, kept = (sum(layer[kind] for layer in figures["layers"]) / 2 for kind in ("selected", "kept"))
    assert 0.1 < kept < passed - 0.1 < 0.6
    assert figures["bytes_skipped"] == pytest.approx((2 - passed - kept) / 3 - 4 / (3 * 128))
    assert figures["kernels"]["perplexity"] == pytest.approx(figures["kernels"]["masked_perplexity"], rel=1e-4)


def test_relu_loads_in_stock_code_under_its_own_name(tmp_path: Path) -> None:
    model = tiny_model()
    rules = calibrated("relu", model).rules
    with SparseMasks(model, rules, None):
        expected = model(IDS).logits
    export(model, tokenizer(), tmp_path / "sparse", "relu", rules, None, None)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert stock.config.hidden_act == "relu"
    torch.testing.assert_close(stock(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_transition_starts_dense_and_ends_at_the_rule() -> None:
    model = tiny_model()
    dense = model(IDS).logits
    cls, options = resolve("sparsifier", Method(name="drelu", transition=0.5), SPARSIFIERS)
    sparsifier = calibrate_rule(model, cls, options, DENSITY, DOCUMENTS, 600, passes=1)
    with SparseMasks(model, sparsifier.rules, None):
        end = model(IDS).logits
    control = SparsityControl(model, sparsifier, DENSITY)
    torch.testing.assert_close(model(IDS).logits, dense)
    sparsifier.advance(0.25)
    halfway = model(IDS).logits
    assert (halfway - dense).norm() > 0.05 * dense.norm()
    assert (halfway - end).norm() > 0.05 * end.norm()
    sparsifier.advance(0.5)
    torch.testing.assert_close(model(IDS).logits, end)
    control.remove()
    torch.testing.assert_close(model(IDS).logits, dense)


@pytest.mark.parametrize("straight_through", [True, False])
def test_straight_through_gradients_reach_dropped_neurons(straight_through: bool) -> None:
    model = tiny_model()
    block = find_blocks(model)[1]
    cls, options = resolve("sparsifier", Method(name="topk", straight_through=straight_through), SPARSIFIERS)
    control = SparsityControl(model, calibrate_rule(model, cls, options, 0.1, DOCUMENTS, 600, passes=1), 0.1)
    block.module(torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))).sum().backward()
    touched = (block.module.up_proj.weight.grad.abs().sum(1) > 0).sum().item()
    assert touched == (96 if straight_through else 10)
    control.remove()


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="rule 'selu' is unknown; known: stock, threshold"):
        Rule(torch.zeros(4), gate="selu")


def test_blocks_that_share_an_activation_are_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn
    with pytest.raises(MoyuError, match="share one activation module"):
        calibrated("gate_threshold", model)
    calibrated("threshold", model)


def test_nothing_is_moved_by_the_density_of_a_mixture() -> None:
    """Half stock and half FATReLU is nowhere zero: its density is no reason to raise a threshold."""
    model = tiny_model()
    cls, options = resolve("sparsifier", Method(name="fatrelu", transition=0.5), SPARSIFIERS)
    sparsifier = calibrate_rule(model, cls, options, DENSITY, DOCUMENTS, 600, passes=1)
    before = [threshold.clone() for threshold in sparsifier.thresholds]
    adaptive = AdaptiveCoefficient(0.01, 0.1, 0.5)
    control = SparsityControl(model, sparsifier, DENSITY / 2, adaptive=adaptive)
    for step, moves in enumerate((False, False, True, True)):
        model(IDS)
        control.on_optimizer_step(None, SimpleNamespace(global_step=step, max_steps=4), None)  # type: ignore[arg-type]
        assert (control.density[:, 0] == 1).all() != moves
        assert all(map(torch.equal, sparsifier.thresholds, before)) != moves
        assert (adaptive.first is None) != moves


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_zeros_are_not_counted_as_kept(share: float) -> None:
    """Of a ReLU model top-k has zeros to take where fewer neurons are on than it may keep."""
    model = tiny_model("opt")
    cls, options = resolve("sparsifier", Method(name="topk"), SPARSIFIERS)
    control = SparsityControl(model, calibrate_rule(model, cls, options, share, DOCUMENTS, 600, passes=1), share)
    seen: list[int] = []
    for block in find_blocks(model):
        block.module.fc2.register_forward_pre_hook(lambda _, args: seen.append(int((args[0] != 0).sum())))
    model(IDS)
    assert control.take_density() == pytest.approx(sum(seen) / (2 * 96 * IDS.numel()))


def test_what_is_not_a_number_takes_no_place() -> None:
    rule = Rule(torch.ones(5), keep="topk", share=0.4)
    a = torch.tensor([[float("nan"), 1.0, 2.0, 3.0, float("nan")], [float("nan")] * 4 + [1.0]])
    assert rule.mask(a).tolist() == [[False, False, True, True, False], [False] * 4 + [True]]
