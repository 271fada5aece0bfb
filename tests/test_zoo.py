"""The matrix: every architecture of zoo.py against stock transformers and a reference of its own, step by step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
from moyu_kernels.rules import Rule
from tiny import tokenizer
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM
from zoo import CASES, Case, D

from moyu_train.checkpoints.export import export
from moyu_train.checkpoints.verify import verify
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.blocks import describe_blocks, find_blocks
from moyu_train.models.marker import activation_field, check_marker, set_marker
from moyu_train.models.masking import Masking
from moyu_train.models.state import family_of
from moyu_train.penalties.hoyer import Hoyer
from moyu_train.penalties.scale import measure_scales
from moyu_train.predictors.lowbit import LowBit
from moyu_train.settings import Lora
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.anchor import BlockAnchor
from moyu_train.training.control import SparsityControl
from moyu_train.training.fit import PredictorTrainer
from moyu_train.training.lora import adapt, merge
from moyu_train.training.rule import calibrate_rule

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
DOCUMENTS = Documents([torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(1))])
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
See = Callable[[int, torch.Tensor, int], torch.Tensor]  # (block, a [..., F], expert) -> the activation to go on with


def built(case: Case) -> Any:
    model = case.model()
    describe_blocks(model.config, case.described)
    return model


def look(case: Case, model: Any, see: See) -> torch.Tensor:
    """Logits of a model whose activations go through `see`: by hooks and a loop over tokens, nothing of moyu's."""

    def hook(index: int) -> Callable[..., Any]:
        return lambda module, args: (see(index, args[0], 0), *args[1:])

    def routed(index: int, experts: Any) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            rows = []
            for token, row in enumerate(x):
                y = torch.zeros(D)
                for e, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                    gate, up = linear(row, experts.gate_up_proj[e]).split(experts.down_proj.shape[2])
                    y = y + weight * linear(see(index, silu(gate) * up, e), experts.down_proj[e])
                rows.append(y)
            return torch.stack(rows)

        return forward

    undo: list[Callable[[], None]] = []
    for index, expected in enumerate(case.expected):
        module = model.get_submodule(expected.down)
        if expected.layout == "experts":
            module.forward = routed(index, module)
            undo.append(lambda module=module: delattr(module, "forward"))
        else:
            undo.append(module.register_forward_pre_hook(hook(index)).remove)
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    for step in undo:
        step()
    return logits


def thresholds_of(case: Case, model: Any) -> list[torch.Tensor]:
    """Another threshold for each neuron, around the median of its block: about half are kept."""
    seen: list[list[torch.Tensor]] = [[] for _ in case.expected]

    def see(index: int, a: torch.Tensor, expert: int) -> torch.Tensor:
        seen[index].append(a[a != 0].abs())
        return a

    look(case, model, see)
    generator = torch.Generator().manual_seed(2)
    sizes = [(e.experts, e.neurons) if e.layout == "experts" else (e.neurons,) for e in case.expected]
    spread = [0.5 + torch.rand(size, generator=generator) for size in sizes]
    return [torch.cat(values).median() * s for values, s in zip(seen, spread, strict=True)]


@every
def test_blocks_are_found(case: Case) -> None:
    blocks = find_blocks(built(case))
    paths = [block.path if block.layout == "experts" else f"{block.path}.{block.down}" for block in blocks]
    found = [(b.layout, path, b.neurons, b.experts) for b, path in zip(blocks, paths, strict=True)]
    assert found == case.expected
    assert all(block.hidden == D for block in blocks)
    for block, expected in zip(blocks, case.expected, strict=True):
        size = (expected.experts, expected.neurons) if expected.layout == "experts" else (expected.neurons,)
        assert block.down_norms().shape == size
        assert sum(weight.numel() for weight in block.weights()) == (
            expected.experts * expected.neurons * D * (2 if expected.layout == "plain" else 3)
        )


@every
def test_stock_code_trips_over_the_marker(case: Case) -> None:
    model = built(case)
    assert activation_field(model.config) == case.field.split(".")[-1]
    check_marker(model.config)
    set_marker(model.config, "threshold")
    data = model.config.to_dict()
    for name in case.field.split("."):
        data = data[name]
    assert str(data).startswith("moyu:threshold:")
    with pytest.raises(KeyError, match="moyu:threshold:"), torch.device("meta"):
        AutoModelForCausalLM.from_config(model.config)


@every
@torch.no_grad()
def test_masks_are_those_of_the_reference(case: Case) -> None:
    model = built(case)
    dense = model(IDS, use_cache=False).logits
    with Masking(find_blocks(model), lambda layer, a, expert: torch.ones_like(a, dtype=torch.bool)):
        torch.testing.assert_close(model(IDS, use_cache=False).logits, dense, rtol=1e-5, atol=1e-5)
    thresholds, kept = thresholds_of(case, model), [0] * len(case.expected)

    def see(index: int, a: torch.Tensor, expert: int) -> torch.Tensor:
        threshold = thresholds[index][expert] if thresholds[index].ndim == 2 else thresholds[index]
        kept[index] += int(((a.abs() >= threshold) & (a != 0)).sum())
        return torch.where(a.abs() >= threshold, a, torch.zeros(()))

    expected = look(case, model, see)
    with SparseMasks(model, [Rule(threshold) for threshold in thresholds], None) as masks:
        found = model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert masks.counts.kept.tolist() == kept
    assert 0.2 < masks.neurons_off() < 0.8
    assert (found - dense).norm() > 0.01 * dense.norm(), "the mask does nothing"
    torch.testing.assert_close(model(IDS, use_cache=False).logits, dense, rtol=0, atol=0)


@every
def test_at_density_one_a_step_has_the_gradients_of_the_dense_model(case: Case) -> None:
    dense, sparse = built(case).train(), built(case).train()
    control = SparsityControl(sparse, Threshold.start(Threshold.Options(), find_blocks(sparse), 1.0), 1.0)
    counts = torch.zeros(len(find_blocks(dense)), 2)

    def look(layer: int, a: torch.Tensor, expert: int | None) -> None:
        counts[layer] += torch.tensor([a.count_nonzero(), a.numel()])

    with Masking(find_blocks(dense), look):
        dense(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    sparse(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    used = 0
    for (name, expected), found in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        if expected.grad is None:
            assert found.grad is None, name
            continue
        used += 1
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert used > 10
    density = (counts[:, 0] / counts[:, 1]).mean()
    assert control.take_density() == pytest.approx(density.item())  # of models with ReLU less than 1


@every
def test_statistics_of_a_step_are_finite(case: Case) -> None:
    model = built(case).train()
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.4, Documents(list(IDS)), 24, passes=2)
    if "experts" in case.layout:
        with pytest.raises(MoyuError, match="penalties act on dense FFN blocks so far"):
            measure_scales(model, "contribution", DOCUMENTS.packed(50, 0))
        penalty = None
    else:
        scales = measure_scales(model, "contribution", DOCUMENTS.packed(50, 0), rule.rules)
        penalty = Hoyer(Hoyer.Options(), scales, rule.rules, 0.4)
    control = SparsityControl(model, rule, 0.4, penalty=penalty)
    with control.armed(True, torch.ones_like(IDS)):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    if penalty:
        loss = loss + control.take_penalty()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert control.take_density() == pytest.approx(0.4, abs=0.02)
    assert torch.isfinite(control.density).all()
    assert all(torch.isfinite(torch.tensor(value)) for value in control.metrics().values())


@every
def test_the_block_anchor_of_twins_is_zero(case: Case) -> None:
    student, parent = built(case), built(case)
    anchor = BlockAnchor(student, parent)
    with torch.no_grad():
        parent(input_ids=IDS, use_cache=False)
    with anchor.armed(None):
        student(input_ids=IDS, use_cache=False)
    assert anchor.take() == 0


@every
def test_predictors_are_fitted_or_refused(case: Case, tmp_path: Path) -> None:
    model = built(case)
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.5, DOCUMENTS, 200, passes=1)
    if "experts" in case.layout:
        with pytest.raises(MoyuError, match="predictors are fitted for gated and plain FFN blocks so far, this model"):
            PredictorTrainer(model, rule.rules, LowBit, LowBit.Options(), tmp_path)
        return
    trainer = PredictorTrainer(model, rule.rules, LowBit, LowBit.Options(), tmp_path)
    predictors = trainer.fit(DOCUMENTS.packed(50, 0), save_every=100)
    with SparseMasks(model, rule.rules, predictors, cuts=[0.9] * len(predictors)) as masks, torch.no_grad():
        model(IDS, use_cache=False)
    for layer in masks.per_layer():
        assert 0.2 < layer["selected"] < 0.8
        assert layer["mass_kept"] > layer["selected"] + 0.15, "no better than chance"
    for predictor in predictors:
        predictor["bias"] -= 0.9
    export(model, tokenizer(), tmp_path / "sparse", "threshold", rule.rules, predictors, family_of(predictors))
    sparse = moyu_kernels.from_pretrained(tmp_path / "sparse")
    few = IDS[:1, :8]  # as many rows as the ops take: more would run densely
    with SparseMasks(model, rule.rules, predictors), torch.no_grad():
        expected = model(few, use_cache=False).logits
    torch.testing.assert_close(sparse(few, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    native = [m for m in sparse.modules() if isinstance(m, moyu_kernels.SparseFFN)]
    assert 0 < sum(int(m.counts[2]) for m in native) < sum(int(m.counts[1]) for m in native)


@every
@pytest.mark.parametrize("first", ["mask", "adapter"])
def test_lora_merges_without_a_change(case: Case, first: str) -> None:
    model = built(case)
    rule = calibrate_rule(model, Threshold, Threshold.Options(), 0.5, DOCUMENTS, 200, passes=1)
    control = SparsityControl(model, rule, 0.5) if first == "mask" else None
    adapted = adapt(model, Lora(rank=2, alpha=4))
    control = control or SparsityControl(adapted, rule, 0.5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = adapted(input_ids=IDS, use_cache=False).logits
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        changed = adapted(input_ids=IDS, use_cache=False).logits
    assert (changed - before).norm() > 0.01 * before.norm()
    merged, figures = merge(adapted, control, IDS[0])
    assert figures["merge_gap"] < 1e-4
    assert figures["density_after_merge"] == pytest.approx(figures["density_before_merge"], abs=0.01)
    with torch.no_grad():
        again = merged(input_ids=IDS, use_cache=False).logits
    assert ((again - changed).norm(dim=-1) / changed.norm(dim=-1)).median() < 1e-4


def exported(case: Case, folder: Path) -> torch.Tensor:
    """Write a sparse checkpoint; returns its logits by the reference."""
    model = built(case)
    thresholds = thresholds_of(case, model)

    def see(index: int, a: torch.Tensor, expert: int) -> torch.Tensor:
        threshold = thresholds[index][expert] if thresholds[index].ndim == 2 else thresholds[index]
        return torch.where(a.abs() >= threshold, a, torch.zeros(()))

    expected = look(case, model, see)
    export(model, tokenizer(), folder, "threshold", [Rule(threshold) for threshold in thresholds], None, None)
    return expected


@every
def test_an_export_comes_back_and_computes_the_same(case: Case, tmp_path: Path) -> None:
    expected = exported(case, tmp_path / "sparse")
    sparse = moyu_kernels.from_pretrained(tmp_path / "sparse", mode="rule")
    native = [module for module in sparse.modules() if isinstance(module, moyu_kernels.SparseFFN)]
    assert len(native) == sum(block.layout != "experts" for block in case.expected)
    stock, restored = built(case).state_dict(), sparse.state_dict()
    assert stock.keys() == restored.keys()
    assert all(torch.equal(value, restored[name]) for name, value in stock.items()), "weights come back to the bit"
    torch.testing.assert_close(sparse(IDS, use_cache=False).logits, expected, rtol=1e-3, atol=1e-3)
    few = sparse(IDS[:1, :8], use_cache=False).logits  # through the ops, which take up to 8 rows
    torch.testing.assert_close(few, expected[:1, :8], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@every
def test_exports_are_verified(case: Case, tmp_path: Path) -> None:
    """In a process without moyu; one of each layout does this by default too, in test_export.py."""
    exported(case, tmp_path / "sparse")
    figures = verify(tmp_path / "sparse")
    assert figures["logits_relative_error"] < 1e-4
    assert figures["stock_refuses"]
