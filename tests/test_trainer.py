"""One loss, one backward: the same numbers however the batch is cut, and nothing lost on resume."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import TrainingArguments

from moyu_train.errors import MoyuError
from moyu_train.models.blocks import find_blocks
from moyu_train.models.loading import load_dense
from moyu_train.sparsifiers.threshold import Threshold
from moyu_train.training.control import SparsityControl
from moyu_train.training.finetune import Windows
from moyu_train.training.losses import Weights, token_loss
from moyu_train.training.trainer import SparsityTrainer, last_complete_checkpoint

WINDOWS = torch.randint(0, 256, (16, 24), generator=torch.Generator().manual_seed(0))


def make(folder: Path, batch: int, accumulation: int, steps: int = 3, optimizer: str = "sgd", **options: Any) -> Any:
    model = tiny_model(family := options.pop("family", "llama"))
    start = [torch.full((block.neurons,), 0.05) for block in find_blocks(model)]
    rule = Threshold(Threshold.Options(gain=options.pop("gain", 0.2)), start, density=0.5)
    rule.thresholds = [t.clone() for t in rule.thresholds]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.05 if optimizer == "sgd" else 1e-3,
        optim=optimizer,
        use_cpu=True,
        logging_steps=1,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return SparsityTrainer(
        model=model,
        args=arguments,
        train_dataset=Windows(WINDOWS),
        eval_dataset=Windows(WINDOWS),
        sparsity=SparsityControl(model, rule, target=0.5),
        parent=tiny_model(family),
        kl_weight=1.0,
        lm_weight=0.5,
    )


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("top_k", [None, 3, 99])
def test_token_loss_and_its_gradient_are_those_of_the_formulas(top_k: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    logits, parent = torch.randn(2, 700, 11, generator=g).requires_grad_(), torch.randn(2, 700, 11, generator=g) * 2
    labels = torch.randint(0, 11, (2, 700), generator=g)
    labels[0, 300:] = -100
    keep = labels[:, 1:] != -100
    q, p = logits[:, :-1].softmax(-1)[keep], parent[:, :-1].softmax(-1)[keep]
    lm = -q.log().gather(-1, labels[:, 1:][keep][:, None]).sum()
    if top_k == 3:
        places = p.argsort(-1, descending=True)[:, :3]
        top_p, top_q = p.gather(-1, places), q.gather(-1, places)
        p, q = (torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1) for top in (top_p, top_q))
    kl = (p * (p / q).log()).sum()
    (expected,) = torch.autograd.grad((2.0 * kl + 0.5 * lm) * 3.0, logits)

    loss, parts = token_loss(logits, labels, Weights(2.0, 0.5, top_k), parent)
    torch.testing.assert_close(parts, torch.stack([kl, lm]).detach())
    torch.testing.assert_close(loss, 2.0 * kl + 0.5 * lm)
    torch.testing.assert_close(torch.autograd.grad(loss * 3.0, logits)[0], expected)


def test_logits_may_lie_in_any_order() -> None:
    logits = torch.randn(40, 2, 11).transpose(0, 1).requires_grad_()  # whose first dimensions cannot be one view
    labels = torch.randint(0, 11, (2, 40))
    loss, _ = token_loss(logits, labels, Weights(0.0, 1.0))
    expected, _ = token_loss(plain := logits.detach().contiguous().requires_grad_(), labels, Weights(0.0, 1.0))
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, plain)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_scored_tokens(tmp_path: Path, family: str) -> None:
    """Also of GPT-2, for which transformers counts the first token of each sequence too."""
    trainer = make(tmp_path, 2, 2, steps=1, family=family)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3))]
    batches[0]["labels"][0, 9:] = -100
    assert trainer._get_num_items_in_batch(batches, torch.device("cpu")) == 4 * 23 - (24 - 9)
    assert trainer._real_tokens == 4 * 24


def test_what_is_not_scored_may_be_no_number() -> None:
    logits, parent = torch.randn(1, 9, 11), torch.randn(1, 9, 11)
    labels = torch.randint(0, 11, (1, 9))
    labels[0, :4] = -100
    expected, _ = token_loss(logits, labels, Weights(1.0, 0.5), parent)
    logits[0, :3] = parent[0, :3] = torch.nan
    loss, _ = token_loss(logits.requires_grad_(), labels, Weights(1.0, 0.5), parent)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[0, :3] == 0).all()
    assert gradient.isfinite().all()


def test_token_loss_without_a_parent_is_the_cross_entropy() -> None:
    logits = torch.randn(2, 50, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(0, 11, (2, 50))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss, _ = token_loss(logits, labels, Weights(0.0, 1.0))
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "other", [{"batch": 1, "accumulation": 4}, {"batch": 4, "accumulation": 1, "activation_checkpointing": True}]
)
def test_accumulation_and_checkpointing_give_the_same_run(tmp_path: Path, other: dict[str, Any]) -> None:
    one, two = make(tmp_path / "a", 4, 1), make(tmp_path / "b", **other)
    one.train()
    two.train()
    for first, second in zip(one.state.log_history, two.state.log_history, strict=True):
        for name in ("loss", "kl", "lm", "sparsity", "grad_norm"):
            if name in first:
                assert first[name] == pytest.approx(second[name], rel=1e-4), name
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(one), torch.cat([p.flatten() for p in tiny_model().parameters()]))


def test_no_gradient_through_dropped_neurons(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1)
    trainer.sparsity.sparsifier.thresholds[0][:48] = float("inf")
    batch = {"input_ids": WINDOWS[:4], "labels": WINDOWS[:4]}
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    gradient = trainer.model.model.layers[0].mlp.down_proj.weight.grad
    assert gradient[:, :48].abs().max() == 0
    assert gradient[:, 48:].abs().max() > 0


def test_density_is_counted_for_the_student_in_training_only(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1)
    batch = {"input_ids": WINDOWS[:4], "labels": WINDOWS[:4]}
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.sparsity._counts.sum() == 0
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    assert trainer.sparsity._counts[:, 3].tolist() == [4 * 24 * 96.0] * 2


def test_a_recompute_counts_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    trainer.compute_loss(trainer.model, {"input_ids": WINDOWS[:4], "labels": WINDOWS[:4]}).backward()
    assert trainer.sparsity._counts[:, 3].tolist() == [4 * 24 * 96.0] * 2


def test_padding_is_not_counted_and_experts_take_a_mask() -> None:
    from moyu_train.penalties.hoyer import Hoyer
    from moyu_train.penalties.scale import ScaleOptions

    mask = torch.ones(4, 24, dtype=torch.long)
    mask[:, 18:] = 0
    for family, shape in (("llama", (96,)), ("mixtral", (4, 48))):
        model = tiny_model(family)
        rule = Threshold(Threshold.Options(), [torch.full(shape, 0.05)] * 2, density=0.5)
        control = SparsityControl(model, rule, target=0.5)
        with control.armed(True, mask):
            model(WINDOWS[:4], attention_mask=mask)
        if family == "llama":
            assert control._counts[:, 3].tolist() == [4 * 18 * 96.0] * 2
        control.remove()
    model = tiny_model()
    penalty = Hoyer(ScaleOptions(), [torch.ones(96)] * 2, [], 0.5)
    control = SparsityControl(
        model, Threshold(Threshold.Options(), [torch.zeros(96)] * 2, density=0.5), 0.5, penalty=penalty
    )
    for _ in range(2):  # a forward that is not armed keeps nothing
        model(WINDOWS[:4]).logits.sum().backward()
    with pytest.raises(MoyuError, match="no penalty was collected"):
        control.take_penalty()
    with control.armed(True, mask):
        model(WINDOWS[:4], attention_mask=mask)
    padded = control.take_penalty()
    with control.armed(True):
        model(WINDOWS[:4, :18])
    torch.testing.assert_close(control.take_penalty(), padded)


def test_evaluation_does_not_show_in_the_logged_parts(tmp_path: Path) -> None:
    plain = make(tmp_path / "a", 4, 1, save_strategy="no")
    evaluated = make(tmp_path / "b", 4, 1, save_strategy="no", eval_strategy="steps", eval_steps=1)
    lines = []
    for trainer in (plain, evaluated):
        trainer.train()
        lines.append([(line["lm"], line["kl"]) for line in trainer.state.log_history if "lm" in line])
    assert lines[0] == lines[1]


def test_a_penalty_and_its_coefficient_belong_together(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1)
    arguments = {"model": trainer.model, "args": trainer.args, "parent": None, "kl_weight": 0.0, "lm_weight": 1.0}
    with pytest.raises(ValueError, match="give both, or neither"):
        SparsityTrainer(**arguments, sparsity=trainer.sparsity, coefficient=lambda progress: 1.0)
    trainer.sparsity.penalty = lambda layer, a, real: a.sum(-1)
    with pytest.raises(ValueError, match="give both, or neither"):
        SparsityTrainer(**arguments, sparsity=trainer.sparsity)


def test_autocast_does_not_round_the_predicted_mask() -> None:
    from moyu_train.predictors.lowbit import LowBit

    model = tiny_model()
    predictors = []
    for block in find_blocks(model):
        fit = LowBit(LowBit.Options(), block, torch.device("cpu"))
        fit.observe(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)), torch.rand(500, 96))
        predictors.append(fit.solve())
    control = SparsityControl(
        model, Threshold(Threshold.Options(), [torch.zeros(96)] * 2, density=0.5), 0.5, predictors
    )
    control._masking._inputs[0] = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1))
    control.predictors[0]["bias"] -= control._masking.scores(0, control.predictors[0]).median()
    a = torch.ones(4000, 96)
    plain = control._keep(0, a, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(control._keep(0, a, None), plain)
    assert 0.4 < plain.float().mean() < 0.6


def test_sparsify_refuses_the_penalty_that_it_would_ignore() -> None:
    from moyu_train import load_recipe, sparsify
    from moyu_train.data import Documents

    recipe = load_recipe("tiny", ["--penalty", "{name: hoyer, coefficient: 0.1}"])
    with pytest.raises(MoyuError, match="sparsify holds a rule only"):
        sparsify(tiny_model(), recipe, Documents([WINDOWS.flatten()]))


def test_bfloat16_trains_the_same_curve_roughly(tmp_path: Path) -> None:
    losses = []
    for name, options in (("a", {}), ("b", {"bf16": True})):
        trainer = make(tmp_path / name, 4, 1, steps=6, save_strategy="no", **options)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_controller_brings_density_to_its_target(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1, steps=40, save_strategy="no", gain=0.5)
    trainer.train()
    assert abs(trainer.state.log_history[0]["sparsity"] - 0.5) > 0.05
    assert trainer.state.log_history[-2]["sparsity"] == pytest.approx(0.5, abs=0.03)


def test_resume_gives_the_same_numbers(tmp_path: Path) -> None:
    whole = make(tmp_path / "a", 4, 1, steps=4, optimizer="adamw_torch")
    whole.train()
    part = make(tmp_path / "b", 4, 1, steps=4, optimizer="adamw_torch")
    part.args.max_steps = 4

    class Stop(Exception):
        pass

    original = part.training_step

    def stop(*args: Any, **kwargs: Any) -> torch.Tensor:
        if part.state.global_step == 2:
            raise Stop
        return original(*args, **kwargs)

    part.training_step = stop
    with pytest.raises(Stop):
        part.train()
    half_written = tmp_path / "b" / "checkpoint-3"
    half_written.mkdir()
    checkpoint = last_complete_checkpoint(tmp_path / "b")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    assert not half_written.exists()
    again = make(tmp_path / "b", 4, 1, steps=4, optimizer="adamw_torch")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(weights(whole), weights(again))
    for one, two in zip(whole.sparsity.sparsifier.thresholds, again.sparsity.sparsifier.thresholds, strict=True):
        assert torch.equal(one, two)


def test_training_checkpoints_carry_the_marker(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1, steps=1)
    trainer.train()
    from transformers import AutoModelForCausalLM

    with pytest.raises(KeyError, match="moyu:threshold:silu"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert load_dense(tmp_path / "checkpoint-1").config.hidden_act.startswith("moyu:")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(MoyuError, match=r"the loss is nan at step 0 \(all FFN activations are finite"):
        trainer.train()
    trainer = make(tmp_path, 4, 1)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(MoyuError, match=r"the first activation that is not finite is in model\.layers\.1\.mlp"):
        trainer.train()


def test_a_layer_that_keeps_nothing_stops_the_run_by_name(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1, gain=0.0)
    trainer.sparsity.sparsifier.rules[1].threshold.fill_(1e9)
    with pytest.raises(MoyuError, match=r"model\.layers\.1\.mlp kept no neuron in step 0"):
        trainer.train()


def test_a_threshold_that_runs_away_stops_the_run_by_name(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4, 1, gain=0.0)
    trainer.sparsity.health._first[0] = 1e-6
    with pytest.raises(MoyuError, match=r"the threshold of model\.layers\.0\.mlp went from 1e-06 to 0\.05"):
        trainer.train()


def test_neurons_that_are_never_kept_are_counted_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moyu_train.training.health.DEAD_AFTER", 2 * 4 * 24)
    trainer = make(tmp_path, 4, 1, gain=0.0)
    trainer.sparsity.sparsifier.rules[0].threshold[:24] = float("inf")
    trainer.sparsity.health._first[0] = 0.0  # the infinite ones are meant
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["dead_highest_layer"] for line in lines] == [0.0, 0.25, 0.25]
    assert lines[-1]["dead_neurons"] == 0.125
    again = make(tmp_path / "again", 4, 1)
    again.sparsity.load(last_complete_checkpoint(tmp_path))
    assert again.sparsity.health.silent[0][:24].tolist() == [3 * 4 * 24] * 24
    assert again.sparsity.health.silent[0][24:].max() == 0


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_silence_is_counted_in_tokens(family: str) -> None:
    """Of which each goes to two of mixtral's experts."""
    model = tiny_model(family)
    shape = (4, 48) if family == "mixtral" else (96,)
    rule = Threshold(Threshold.Options(), [torch.full(shape, 0.05)] * 2, density=0.5)
    rule.thresholds[1].view(-1)[3] = 1e9
    control = SparsityControl(model, rule, target=0.5)
    for step in range(2):
        model(WINDOWS[:4])
        control.on_optimizer_step(None, SimpleNamespace(global_step=step, max_steps=4), None)  # type: ignore[arg-type]
    assert control.health.silent[1].view(-1)[3] == 2 * 4 * 24


def test_sparsify_works_with_a_plain_trainer(tmp_path: Path) -> None:
    from transformers import Trainer

    from moyu_train import load_recipe, sparsify
    from moyu_train.data import Documents

    model = tiny_model()
    recipe = load_recipe("tiny", ["--target_sparsity", "0.7"])
    control = sparsify(model, recipe, Documents([WINDOWS.flatten()]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    Trainer(model=model, args=arguments, train_dataset=Windows(WINDOWS), callbacks=[control]).train()
    assert control.metrics()["sparsity"] == pytest.approx(0.7, abs=0.05)
    masked = model(WINDOWS[:1]).logits
    control.remove()
    assert not torch.allclose(model(WINDOWS[:1]).logits, masked)


def anchored(folder: Path, batch: int, accumulation: int, **options: Any) -> Any:
    trainer = make(folder, batch, accumulation, save_strategy="no", **options)
    return SparsityTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        sparsity=trainer.sparsity,
        parent=tiny_model(),
        kl_weight=0.0,
        lm_weight=0.0,
        block_weight=1.0,
    )


def test_the_block_anchor_is_the_relative_error_of_each_block(tmp_path: Path) -> None:
    trainer = anchored(tmp_path, 4, 1, gain=0.0)
    outputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    dense = tiny_model()
    for model in (dense, trainer.model):
        for i, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda _, __, y, i=i: outputs[i].append(y.detach()))
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[:, 20:] = 0
    batch = {"input_ids": WINDOWS[:4], "labels": WINDOWS[:4], "attention_mask": mask}
    dense(WINDOWS[:4], attention_mask=mask)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch).item()
    errors = [(y - y0).square().sum(-1) / y0.square().sum(-1) for y0, y in outputs.values()]
    assert loss == pytest.approx(sum(e[:, :20].mean().item() for e in errors) / 2, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_the_block_anchor_trains_the_same_however_a_step_is_cut(tmp_path: Path, options: dict[str, Any]) -> None:
    one, other = anchored(tmp_path / "a", 4, 1), anchored(tmp_path / "b", 1, 4, **options)
    start = weights(one)
    one.train()
    other.train()
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-4, atol=1e-6)
    assert (weights(one) - start).norm() > 1e-3
