"""What a recipe cannot do with a model is refused here, before any weights are loaded."""

from collections.abc import Callable
from typing import Any

import torch
from moyu_kernels.ffn import sees_sequences, simulated_because
from moyu_kernels.ops.ffn.naive import SIMULATED, WHOLE_ROW
from moyu_kernels.rules import Rule

from moyu_train.checkpoints.export import check_heads
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import short_context
from moyu_train.evaluation.extras import check_extras
from moyu_train.models.blocks import FFNBlock, ffn_bytes, find_blocks, find_inputs
from moyu_train.models.context import check_window
from moyu_train.models.heads import find_attention
from moyu_train.models.marker import base_activation, check_marker
from moyu_train.penalties import PENALTIES
from moyu_train.predictors import PREDICTORS
from moyu_train.progress import console
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.allocation import check_allocation
from moyu_train.training.heads import check_shares, sparse_attentions
from moyu_train.training.lora import check_quantise
from moyu_train.training.shared_parent import check_shared


def check_methods(recipe: Recipe) -> None:
    """The options of all methods, and whether they go together."""
    sparsifier, _ = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    if recipe.predictor:
        resolve("predictor", recipe.predictor, PREDICTORS)
    if recipe.penalty:
        penalty, _ = resolve("penalty", recipe.penalty, PENALTIES)
        if penalty.needs_threshold and sparsifier.calibrates != "activation":
            raise MoyuError(
                f"penalty.name {penalty.name!r} needs a rule with a threshold on the activation, and sparsifier "
                f"{sparsifier.name!r} has none; use the sparsifier 'threshold', or the penalty 'l1' or 'hoyer'"
            )
    check_allocation(sparsifier, recipe)
    check_quantise(recipe.finetune.lora)
    check_shared(recipe.finetune.parent)
    check_extras(recipe.evaluate)


def check_model(recipe: Recipe, model: Any) -> None:
    """model: without weights."""
    blocks = find_blocks(model)
    check_marker(model.config)
    cls, options = resolve("sparsifier", recipe.sparsifier, SPARSIFIERS)
    cls.check(blocks)
    if recipe.inputs:
        method, _ = resolve("inputs", recipe.inputs, SPARSIFIERS)
        method.check(find_inputs(model, recipe.inputs.modules))
    for name in ("finetune", "fit", "evaluate"):
        check_window(model, getattr(recipe, name).window, f"{name}.window")
    rule = cls(options, [torch.ones(1)], 1 - recipe.target_sparsity).rules[0]
    for name in ("finetune", "evaluate"):
        window = getattr(recipe, name).window
        if rule.prompt >= window:
            raise MoyuError(
                f"sparsifier {cls.name!r} takes its mask from {rule.prompt} tokens and then uses it, and "
                f"{name}.window is {window}: lower sparsifier.prompt, or raise {name}.window"
            )
    flat = (b.path for b in blocks if b.layout == "plain" and not sees_sequences(b.module, b.describe()))
    if rule.prompt and (path := next(flat, None)):
        raise MoyuError(
            f"sparsifier {cls.name!r} takes masks from the first tokens of a sequence, and {path} sees the tokens of "
            "all sequences in one row; use another sparsifier, such as 'threshold'"
        )
    if recipe.bench and rule.prompt > min(recipe.bench.contexts):
        raise MoyuError(short_context(rule.prompt, recipe.bench.contexts))
    if recipe.heads.keep is not None:
        _check_heads(recipe, model)
    if recipe.finetune.compensation:
        _check_compensation(recipe.finetune.compensation.rank, cls.name, rule, blocks)
    act = rule.stock_activation or base_activation(model.config)
    if recipe.export.weights == "int8":
        _check_int8(rule, act, blocks)
    if recipe.bench or recipe.predictor:
        _check_kernels(cls.name, rule, act, blocks)
    if recipe.predictor:
        _check_predictor(recipe, cls.name, rule, blocks)


def _check_compensation(rank: int, sparsifier: str, rule: Rule, blocks: list[FFNBlock]) -> None:
    if rule.keep not in ("threshold", "topk"):
        raise MoyuError(
            "finetune.compensation stands for neurons that a threshold or top-k on the activation drops, and "
            f"sparsifier {sparsifier!r} has none; use 'threshold' or 'topk', or finetune.compensation: null"
        )
    for block in blocks:
        if block.layout == "experts":
            raise MoyuError(
                f"finetune.compensation: {block.path} holds experts, which have no place for it; set it to null"
            )
        if rank > block.hidden:
            raise MoyuError(
                f"finetune.compensation.rank {rank} is above the {block.hidden} inputs of {block.path}; lower it"
            )


def _check_heads(recipe: Recipe, model: Any) -> None:
    attentions, settings = find_attention(model), recipe.heads
    assert settings.keep is not None
    check_shares(attentions, settings, "keep", [settings.keep])
    paths = [attention.block.path for attention in sparse_attentions(attentions, settings)]
    inputs = find_inputs(model, recipe.inputs.modules) if recipe.inputs else []
    check_heads(model, paths, attentions[0].block.down, [layer.path for layer in inputs])


def _without_op(rule: Rule, act: str, blocks: list[FFNBlock]) -> tuple[str, str] | None:
    """Path of the first block that no op computes, and why."""
    reasons = ((b.path, simulated_because(b.module, b.describe(), act, rule)) for b in blocks)
    return next((found for found in reasons if found[1]), None)


def _check_int8(rule: Rule, act: str, blocks: list[FFNBlock]) -> None:
    if found := _without_op(rule, act, blocks):
        raise MoyuError(
            f"export.weights 'int8': {found[0]} cannot have int8 weights, since {found[1]}; use export.weights: "
            "stored (--export.weights stored)"
        )


def _check_kernels(sparsifier: str, rule: Rule, act: str, blocks: list[FFNBlock]) -> None:
    if rule.op is None:
        raise MoyuError(
            f"sparsifier {sparsifier!r} has no kernel yet, so there is nothing that a predictor could skip and no "
            "speed to measure: use predictor: null and bench: null (--predictor null --bench null), or another "
            "sparsifier, such as 'threshold'"
        )
    if found := _without_op(rule, act, blocks):
        raise MoyuError(
            f"the kernels cannot skip anything in {found[0]}, since {found[1]}: there is no speed to measure; "
            "use predictor: null and bench: null (--predictor null --bench null)"
        )


def _check_predictor(recipe: Recipe, sparsifier: str, rule: Rule, blocks: list[FFNBlock]) -> None:
    if rule.prompt:
        raise MoyuError(
            f"sparsifier {sparsifier!r} names the neurons of a whole sequence, so a predictor has none to name: use "
            "predictor: null (--predictor null)"
        )
    if rule.op in WHOLE_ROW:
        raise MoyuError(
            f"sparsifier {sparsifier!r} compares all neurons of a token, so a predictor has none to "
            "skip: use predictor: null (--predictor null), or another sparsifier, such as 'gate_threshold'"
        )
    assert recipe.predictor
    cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
    if cls.form in SIMULATED:
        if recipe.bench:
            raise MoyuError(
                f"predictor {cls.name!r} has no kernel yet, so there is no speed to measure: use bench: null "
                "(--bench null), or another predictor, such as 'lowbit'"
            )
        console.print(f"predictor {cls.name!r} is simulated: masks on a dense model, nothing is skipped")
    dense = sum(ffn_bytes(block, recipe.export.itemsize) for block in blocks)
    share = sum(cls.planned_bytes(options, b.hidden, b.neurons, b.layout != "plain") for b in blocks) / dense
    target = recipe.calibrate.bytes_skipped
    if target is not None and share + target >= 1:
        raise MoyuError(
            f"calibrate.bytes_skipped {target} cannot be reached: the predictors alone are {share:.0%} of the "
            "FFN's bytes; lower it, or make the predictor smaller"
        )


def check_parent(name: str, model: Any, load: Callable[[], Any]) -> None:
    """Args: name: as `finetune.parent` gives it; model, and what `load` returns: without weights."""
    try:
        parent = load()
    except MoyuError as error:
        raise MoyuError(f"finetune.parent: {error}; train it first, or give a dense model that is there") from error
    own, other = (m.config.get_text_config().vocab_size for m in (model, parent))
    if own != other:
        raise MoyuError(
            f"finetune.parent {name!r} has a vocabulary of {other} tokens and the model one of {own}, so their "
            "distributions cannot be compared; give a parent of the same family"
        )
