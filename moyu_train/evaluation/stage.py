"""The evaluate stage of a recipe: perplexity of every variant on the same held-out documents."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moyu_kernels.ffn import simulated_because
from moyu_kernels.ops.ffn.naive import SIMULATED, predictor_family

from moyu_train.checkpoints.export import (
    MANIFEST,
    read_heads,
    read_inputs,
    read_state,
    read_weights,
    stored_dtype,
)
from moyu_train.checkpoints.stage import CHECKPOINT
from moyu_train.data import Documents, overlap
from moyu_train.evaluation.extras import Extra, extras
from moyu_train.evaluation.head_masks import HeadMasks
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import Scores, ratio_interval, score
from moyu_train.evaluation.through_kernels import through_kernels
from moyu_train.models.blocks import find_blocks
from moyu_train.models.int8 import round_ffn
from moyu_train.models.loading import load_dense
from moyu_train.models.marker import base_activation
from moyu_train.training.heads import head_routers
from moyu_train.training.inputs import input_rules
from moyu_train.training.stages import read, sparsifier_of

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def evaluate_checkpoint(
    folder: Path,
    documents: Documents,
    window: int,
    kernel_tokens: int,
    beside: Sequence[Extra] = (),
    context: int = 2048,
) -> dict[str, Any]:
    """A sparse checkpoint as it decodes: predicted masks at every scored position, and the same through the kernels.

    The masked multi-token path computes in fp32 on the stored weights. `kernel_tokens` of the text are decoded one by
    one through the kernels, and have to agree with it. `beside` measures what else is asked for, under the same masks.

    With routers of heads, the masks of heads are on too, except under the rule; `all_heads` is the sparse model without
    them, and `heads` tells what they skip at `context` tokens.
    """
    rules, predictors = read_state(folder)
    inputs, heads = read_inputs(folder), read_heads(folder)
    itemsize = weight_itemsize(folder)
    model = load_dense(folder)
    act = rules[0].stock_activation or base_activation(model.config)
    blocks = zip(find_blocks(model), rules, strict=True)
    simulated = any(simulated_because(block.module, block.describe(), act, rule) for block, rule in blocks)
    with SparseMasks(model, rules, predictors, inputs=inputs) as masks, HeadMasks.of(model, heads) as of_heads:
        sparse = score(model, documents, window, "evaluate: sparse")
    if predictors and predictor_family(list(predictors[0].values())) in SIMULATED:
        simulated = True
    figures: dict[str, Any] = {
        "scores": sparse,
        "simulated": simulated,  # without an op nothing is skipped
        "bytes_skipped": None if simulated else masks.bytes_skipped(itemsize),
        "neurons_off": masks.neurons_off(),
        "inputs_off": masks.inputs.off() if inputs else None,
        "layers": masks.per_layer(),
        "heads": of_heads.figures(model, stored_dtype(folder).itemsize, context) if heads else None,
    }
    for extra in beside:
        with SparseMasks(model, rules, predictors, inputs=inputs) as counted, HeadMasks.of(model, heads):
            extra.add("sparse", model, counted)
    with SparseMasks(model, rules, predictors, oracle=True, inputs=inputs), HeadMasks.of(model, heads, oracle=True):
        figures["oracle"] = score(model, documents, window, "evaluate: oracle at the same density")
    figures |= {"rule": sparse, "rule_neurons_off": masks.neurons_off()}
    if heads:
        with SparseMasks(model, rules, predictors, inputs=inputs):
            figures["all_heads"] = score(model, documents, window, "evaluate: sparse, all heads")
    if predictors or heads:
        with SparseMasks(model, rules, None, inputs=inputs) as rule:
            figures["rule"] = score(model, documents, window, "evaluate: rule mask")
        figures["rule_neurons_off"] = rule.neurons_off()
    if kernel_tokens and (heads or not simulated):  # a simulated FFN decodes under its exact rule
        few = documents.windows(min(kernel_tokens, window))[0][1]
        figures["kernels"] = through_kernels(folder, model, few, predicted=not simulated)
    return figures


def evaluate(run: "Run", folder: Path) -> dict[str, Any]:
    """All perplexities of the result table, each on all tokens of the held-out documents."""
    window, documents = run.recipe.evaluate.window, run.test.first(run.recipe.evaluate.tokens)
    checkpoint = run.stage_folder("export") / CHECKPOINT
    beside = extras(run.recipe.evaluate, run.tokenizer)
    tokens, context = run.recipe.evaluate.kernel_tokens, run.recipe.heads.context
    found = evaluate_checkpoint(checkpoint, documents, window, tokens, beside, context)
    model = run.dense()
    dense = score(model, documents, window, "evaluate: dense")
    for extra in beside:
        extra.add("dense", model)
    rounded = {}
    if run.recipe.export.weights == "int8":
        rounded["dense_int8"] = score(round_ffn(model), documents, window, "evaluate: dense, int8 FFN weights")
    thresholds, predictors = read(run.before("finetune"))
    rules = sparsifier_of(run.recipe, thresholds).rules
    start = HeadMasks.of(model, head_routers(run, "fit-heads"))
    with start, SparseMasks(model, rules, predictors, inputs=input_rules(run, "calibrate")) as masks:
        untouched = score(model, documents, window, "evaluate: untouched model, same pipeline")
    itemsize = weight_itemsize(checkpoint)
    variants: dict[str, Scores] = {"dense": dense}
    if run.recipe.control:
        model = run.trained("control")
        variants["control"] = score(model, documents, window, "evaluate: dense control")
        for extra in beside:
            extra.add("control", model)
    best = min(variants.values(), key=lambda scores: scores.perplexity)
    variants |= rounded | {
        **({"all_heads": found["all_heads"]} if found["heads"] else {}),
        "rule": found["rule"],
        "oracle": found["oracle"],
        "sparse": found["scores"],
        "untouched": untouched,
    }
    return {
        "tokens": documents.total,
        "documents": len(documents.tokens),
        "ppl": {name: scores.perplexity for name, scores in variants.items()},
        "ratio": found["scores"].perplexity / best.perplexity,
        "ratio_interval": ratio_interval(found["scores"], best),
        "simulated": found["simulated"],
        "bytes_skipped": found["bytes_skipped"],
        "untouched_bytes_skipped": None if found["simulated"] else masks.bytes_skipped(itemsize),
        "neurons_off": found["neurons_off"],
        "rule_neurons_off": found["rule_neurons_off"],
        "inputs_off": found["inputs_off"],
        "heads": found["heads"],
        "kernels": found.get("kernels"),
        "overlap_13gram": overlap(run.train, documents),
        "layers": found["layers"],
        "manifest_sha256": hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
        **{name: value for extra in beside for name, value in extra.figures().items()},
    }


def weight_itemsize(checkpoint: Path) -> int:
    """Bytes of an FFN weight as a sparse checkpoint decodes; 1 is int8."""
    return 1 if read_weights(checkpoint) == "int8" else stored_dtype(checkpoint).itemsize
