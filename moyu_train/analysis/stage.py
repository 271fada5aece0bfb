"""The analyze stage of a recipe, and its verb on two models or a sparse checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moyu_train import data
from moyu_train.analysis.measures import measure
from moyu_train.analysis.page import write_page
from moyu_train.analysis.subject import Subject
from moyu_train.analysis.uplift import uplift_curve
from moyu_train.errors import MoyuError
from moyu_train.evaluation.perplexity import score
from moyu_train.files import check_writable
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source
from moyu_train.own_text import SELF
from moyu_train.progress import console
from moyu_train.recipe import Recipe

if TYPE_CHECKING:
    from moyu_train.pipeline import Run


def analyze(run: "Run", folder: Path) -> dict[str, Any]:
    """The MOYU notions of the dense model on the validation documents."""
    figures = _figures(Subject("dense", run.dense()), run.validation, run.recipe)
    write_page(folder, {"dense": figures})
    return figures


def _figures(subject: Subject, documents: data.Documents, recipe: Recipe) -> dict[str, Any]:
    """A dense model's uplift curve, or a sparse checkpoint's perplexity under its masks; and the notions of either."""
    settings = recipe.analyze
    if subject.rules is None:
        figures = uplift_curve(subject.model, documents, settings.tokens, settings.sparsities)
        figures["perplexity"] = figures["uplift"][0]["perplexity"]
    else:
        with subject.masked(lambda seen: None):
            scores = score(subject.model, documents, None, f"analyze {subject.name}: perplexity", settings.tokens)
        figures = {"tokens": sum(scores.tokens), "layers": [{"block": block.path} for block in subject.blocks]}
        figures["perplexity"] = scores.perplexity
    measured = measure(subject, documents, settings)
    for row, more in zip(figures["layers"], measured.pop("layers"), strict=True):
        row |= more
    return figures | measured


def analyze_models(recipe: Recipe, models: list[str]) -> dict[str, Any]:
    """Models or sparse checkpoints side by side, each on the recipe's validation documents, into `analysis` of its run.

    Returns: figures by the model's name.
    """
    if SELF in recipe.data.sources:
        raise MoyuError("data.train 'self' is the text of one model; give a text file or data set to compare models on")
    folder = Path(recipe.run) / "analysis"
    check_writable(folder, 0)
    found: dict[str, Any] = {}
    for model in models:
        sparse = (Path(model) / "moyu").is_dir()
        source = model if sparse else resolve_source(model)
        tokenizer, window = load_tokenizer(source), recipe.finetune.window
        _, documents = data.training_text(recipe.data, tokenizer, window, recipe.data.sources)
        name = model.rstrip("/").rsplit("/", 1)[-1]
        if name in found:
            name = model
        subject = (
            Subject.checkpoint(name, Path(model))
            if sparse
            else Subject(name, load_dense(source, described=recipe.described))
        )
        found[name] = _figures(subject, documents, recipe)
    console.print(f"{folder.resolve()}: {', '.join(write_page(folder, found))}")
    return found
