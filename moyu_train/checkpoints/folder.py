"""The verbs that take a sparse checkpoint's folder in place of a recipe."""

from pathlib import Path
from typing import Any

from moyu_train import data
from moyu_train.checkpoints.export import check_whole, read_weights
from moyu_train.checkpoints.verify import verify
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import bench_checkpoint
from moyu_train.evaluation.extras import extras
from moyu_train.evaluation.perplexity import score
from moyu_train.evaluation.stage import evaluate_checkpoint
from moyu_train.models.int8 import round_ffn
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source
from moyu_train.recipe import Recipe
from moyu_train.settings_export import Bench
from moyu_train.texts import read_texts


def _test_documents(folder: Path, recipe: Recipe) -> data.Documents:
    check_whole(folder)
    texts = read_texts(recipe.data.test, recipe.data.text_field)
    return data.tokenise(texts, load_tokenizer(folder), recipe.data.test, 2)


def verify_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return verify(folder)


def evaluate_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Raises: MoyuError where agreement is asked for and `recipe.model` still is the folder, not its dense parent."""
    settings, parent = recipe.evaluate, recipe.model != str(folder)
    if settings.agreement and not parent:
        raise MoyuError(
            "evaluate.agreement compares with the dense parent, which a sparse checkpoint does not hold; name it with "
            "--model"
        )
    documents = _test_documents(folder, recipe).first(settings.tokens)
    beside = extras(settings, load_tokenizer(folder))
    tokens, context = settings.kernel_tokens, recipe.heads.context
    found = evaluate_checkpoint(folder, documents, settings.window, tokens, beside, context)
    ppl = {"sparse": found["scores"], "oracle": found["oracle"], "rule": found["rule"]}
    if found["heads"]:
        ppl["all_heads"] = found["all_heads"]
    if parent:
        model = load_dense(resolve_source(recipe.model))
        ppl["dense"] = score(model, documents, settings.window, "evaluate: dense")
        for extra in beside:
            extra.add("dense", model)
        if read_weights(folder) == "int8":
            ppl["dense_int8"] = score(round_ffn(model), documents, settings.window, "evaluate: dense, int8 FFN weights")
    return {
        "tokens": documents.total,
        "ppl": {name: scores.perplexity for name, scores in ppl.items()},
        **{name: found.get(name) for name in ("bytes_skipped", "neurons_off", "heads", "kernels", "layers")},
        **{name: value for extra in beside for name, value in extra.figures().items()},
    }


def bench_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return bench_checkpoint(folder, _test_documents(folder, recipe).tokens[0], recipe.bench or Bench())
