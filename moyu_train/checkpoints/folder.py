"""The verbs that take a sparse checkpoint's folder in place of a recipe."""

from pathlib import Path
from typing import Any

from moyu_kernels.loading import CheckpointError, read_manifest

from moyu_train import data
from moyu_train.checkpoints.verify import verify
from moyu_train.errors import MoyuError
from moyu_train.evaluation.bench import bench_checkpoint
from moyu_train.evaluation.stage import evaluate_checkpoint
from moyu_train.models.loading import load_tokenizer
from moyu_train.recipe import Bench, Recipe


def _test_documents(folder: Path, recipe: Recipe) -> data.Documents:
    try:
        read_manifest(folder)
    except CheckpointError as error:
        raise MoyuError(str(error)) from error
    texts = data.read_texts(recipe.data.test, recipe.data.text_field)
    return data.tokenise(texts, load_tokenizer(folder), recipe.data.test, 2)


def verify_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return verify(folder)


def evaluate_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    documents = _test_documents(folder, recipe)
    found = evaluate_checkpoint(folder, documents, recipe.evaluate.window, recipe.evaluate.kernel_tokens)
    ppl = {"sparse": found["scores"], "oracle": found["oracle"], "rule": found["rule"]}
    return {
        "tokens": documents.total,
        "ppl": {name: scores.perplexity for name, scores in ppl.items()},
        **{name: found.get(name) for name in ("bytes_skipped", "neurons_off", "kernels", "layers")},
    }


def bench_folder(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return bench_checkpoint(folder, _test_documents(folder, recipe).tokens[0], recipe.bench or Bench())
