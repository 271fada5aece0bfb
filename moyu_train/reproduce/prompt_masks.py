"""Masks from the prompt (TDA, GRIFFIN) and token by token (CATS, TEAL, WINA) at matched sparsity, without training.

TEAL and WINA as far as they concern an FFN's neurons: the input of down, by magnitude, and weighed by the norms of the
weights that read it. Scored after the prompt, where all masks act, in fp32; timed after it in the export's dtype, all
in one runner, where an op computes the rule.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from moyu_kernels.rules import Rule

from moyu_train.analysis.plots import axes_of
from moyu_train.analysis.tables import interval_said
from moyu_train.data import Documents
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.perplexity import Scores, ratio_interval
from moyu_train.models.blocks import device_of
from moyu_train.pipeline import Run
from moyu_train.progress import track
from moyu_train.recipe import Recipe
from moyu_train.registry import resolve
from moyu_train.reproduce.base import Outcome, Reproduction
from moyu_train.reproduce.decode_time import DENSE, cell, decode_times, milliseconds
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS
from moyu_train.training.losses import Weights, token_loss
from moyu_train.training.rule import calibrate_rule

PROMPT = 128
METHODS = {
    "WINA (contribution)": Method(name="threshold"),
    "TEAL (magnitude)": Method(name="threshold", statistic="magnitude"),
    "CATS (gate)": Method(name="gate_threshold"),
    "GRIFFIN": Method(name="griffin", prompt=PROMPT),
    "TDA": Method(name="tda", prompt=PROMPT),
}
MATCH = 1.02  # of GRIFFIN's perplexity


class PromptMasks(Reproduction):
    claim: ClassVar[str] = "A mask from the prompt by thresholds (TDA) keeps the quality of a fixed share (GRIFFIN)"
    criterion: ClassVar[str] = f"perplexity under TDA at most {MATCH} times that under GRIFFIN, at the same sparsity."

    def run(self, recipe: Recipe, seeds: Sequence[int]) -> Outcome:
        run = Run(recipe)
        model, text = run.dense(), run.test.first(recipe.evaluate.tokens)
        dense = late_scores(model, text, recipe.evaluate.window, "dense")
        found: dict[str, Scores] = {}
        rules: dict[str, list[Rule]] = {}
        rows: list[dict[str, Any]] = [{"method": "dense", "neurons off": 0.0, "perplexity": dense.perplexity}]
        for name, method in METHODS.items():
            cls, options = resolve("sparsifier", method, SPARSIFIERS)
            density, tokens = 1 - recipe.target_sparsity, recipe.calibrate.tokens
            rules[name] = calibrate_rule(model, cls, options, density, run.train, tokens, passes=2).rules
            with SparseMasks(model, rules[name], None) as masks:
                found[name] = late_scores(model, text, recipe.evaluate.window, name)
            rows.append({"method": name, "neurons off": masks.neurons_off(), "perplexity": found[name].perplexity})
        for row in rows:
            row["over dense"] = row["perplexity"] / dense.perplexity
        timed = ""
        if recipe.bench:
            dtype = getattr(torch, recipe.export.dtype)
            times = decode_times(model.to(dtype), rules, run.test.longest(), recipe.bench)
            for row in rows:
                row["ms a token"] = milliseconds(times[row["method"]]) if row["method"] in times else "simulated"
                row["times faster"] = cell(times[row["method"]]) if row["method"] in times else "simulated"
            fastest = max(
                (name for name in times if name != DENSE), key=lambda name: times[name]["speedup"], default=""
            )
            timed = f" {fastest} decodes fastest, {cell(times[fastest])} times dense." if fastest else ""
        interval = ratio_interval(found["TDA"], found["GRIFFIN"])
        ratio = found["TDA"].perplexity / found["GRIFFIN"].perplexity
        best = min(rows[1:], key=lambda row: row["perplexity"])
        conclusion = (
            f"TDA has {ratio:.3f} times GRIFFIN's perplexity ({interval_said(interval)}). Of all masks "
            f"{best['method']} is nearest to dense, {best['over dense']:.3f} times. Neurons off count the "
            f"prompt, which masks from it leave dense.{timed}"
        )
        figure, axes = axes_of("", f"perplexity over dense, {recipe.target_sparsity:.0%} off")
        axes.bar(range(len(rows) - 1), [row["over dense"] for row in rows[1:]])
        axes.set_xticks(range(len(rows) - 1), [row["method"].replace(" ", "\n") for row in rows[1:]])
        axes.set_yscale("log")
        return Outcome(rows, ratio <= MATCH, conclusion, figure, {"interval": interval})


@torch.no_grad()
def late_scores(model: Any, documents: Documents, window: int, what: str) -> Scores:
    """Scores of the tokens of each window after its first `PROMPT`.

    Raises: MoyuError where there are none.
    """
    nll, tokens = [0.0] * len(documents.tokens), [0] * len(documents.tokens)
    for document, ids in track(documents.windows(window), what):
        if len(ids) < PROMPT + 2:
            continue
        ids = ids[None].to(device_of(model))
        late = model(input_ids=ids, use_cache=False).logits[:, PROMPT:]
        nll[document] += token_loss(late, ids[:, PROMPT:], Weights(kl=0.0, lm=1.0))[0].item()
        tokens[document] += late.shape[1] - 1
    if not sum(tokens):
        raise MoyuError(f"no window of the test text is longer than the prompt of {PROMPT} tokens; give longer text")
    return Scores(nll, tokens)
