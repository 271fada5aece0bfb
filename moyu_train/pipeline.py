"""Runs the stages of a recipe in order, each from its predecessors' folders into its own, and resumes.

A stage is finished when its `stage.json`, written last, is there with the key of this recipe: a hash over the recipe's
sections, the weights, the text and the keys of the stages before. Any other key means an earlier run, and the stage
runs again from nothing, so that no number of an earlier run can be reported.
"""

import hashlib
import importlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from moyu_train import __version__, data, own_text
from moyu_train.checks import check_methods, check_model, check_parent
from moyu_train.errors import MoyuError
from moyu_train.files import check_writable, read_json, sha256, write_json, write_text
from moyu_train.models.loading import load_dense, load_tokenizer, resolve_source, skeleton
from moyu_train.predictors import PREDICTORS
from moyu_train.progress import console
from moyu_train.recipe import CONTROL, SHARED, Recipe
from moyu_train.registry import resolve
from moyu_train.stages import STAGES
from moyu_train.texts import read_texts
from moyu_train.training.delta import MANIFEST
from moyu_train.training.launch import start_processes

INSIDE = ("", CONTROL, SHARED)  # parents that are no other model
KEEP = ("model", "seed", "data")  # sections that every stage depends on


class Run:
    """A recipe, its run folder, and what all stages share: the source model, the tokenizer and the documents."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.folder = Path(recipe.run)
        start_processes()
        check_methods(recipe)
        check_writable(self.folder, 0)
        check_model(recipe, self.skeleton)
        if recipe.finetune.parent not in INSIDE:
            check_parent(recipe.finetune.parent, self.skeleton, lambda: skeleton(self._parent))

    @cached_property
    def source(self) -> str:
        with PartialState().main_process_first():
            return resolve_source(self.recipe.model)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.source)

    @cached_property
    def skeleton(self) -> Any:
        return skeleton(self.source, self.recipe.described)

    @cached_property
    def _parent(self) -> str:
        with PartialState().main_process_first():
            return resolve_source(self.recipe.finetune.parent)

    @cached_property
    def _training(self) -> tuple[data.Documents, data.Documents]:
        settings = self.recipe.data
        sources = [self._own_text() if source == own_text.SELF else source for source in settings.sources]
        train, validation = data.training_text(settings, self.tokenizer, self.recipe.finetune.window, sources)
        self._check_ids(train)
        self._check_ids(validation)
        return train, validation

    def _own_text(self) -> str:
        """File of the model's own text, written once."""
        recipe, settings = self.recipe, self.recipe.finetune
        held_back = recipe.data.validation_documents * own_text.LENGTH
        tokens = max(settings.tokens // settings.epochs + settings.window, recipe.fit.tokens) + held_back
        path = self.folder / f"own-text-{recipe.digest('model', 'seed')[:8]}-{tokens}.jsonl"
        with PartialState().main_process_first():
            if not path.is_file():
                own_text.write_own_text(self.dense(), self.tokenizer, path, tokens, recipe.seed)
        return str(path)

    @property
    def train(self) -> data.Documents:
        return self._training[0]

    @property
    def validation(self) -> data.Documents:
        return self._training[1]

    @cached_property
    def test(self) -> data.Documents:
        source = self.recipe.data.test
        test = data.tokenise(read_texts(source, self.recipe.data.text_field), self.tokenizer, source, 2)
        self._check_ids(test)
        return test

    def _check_ids(self, documents: data.Documents) -> None:
        """Raises: MoyuError for tokens that the model does not know."""
        size = len(self.skeleton.get_input_embeddings().weight)
        largest = max(int(ids.max()) for ids in documents.tokens)
        if largest >= size:
            raise MoyuError(
                f"the tokenizer of {self.recipe.model!r} makes token {largest} of the text, and the model has {size}: "
                "they do not belong together; put the model's own tokenizer into its folder"
            )

    def dense(self, dtype: torch.dtype = torch.float32, device: str | None = None) -> Any:
        return load_dense(self.source, dtype, self.recipe.described, device)

    def to_train(self) -> Any:
        """The dense model on the CPU: whoever trains it places or shards it."""
        return self.dense(device="cpu")

    def trained(self, stage: str, dtype: torch.dtype = torch.float32, device: str | None = None) -> Any:
        """The model that finetune or control left."""
        folder = self.stage_folder(stage) / ("model" if stage == "finetune" else self.figures(stage)["model"])
        try:
            return load_dense(folder, dtype, device=device)
        except MoyuError as error:
            raise MoyuError(f"{error}. Delete {str(folder.parent)!r}, and the stage runs again") from error

    def parent(self) -> Any:
        """The dense model that fine-tuning distils from, on the CPU too."""
        if self.recipe.finetune.parent == CONTROL:
            return self.trained("control", device="cpu")
        return load_dense(self._parent, device="cpu") if self.recipe.finetune.parent else self.to_train()

    @cached_property
    def inputs_digest(self) -> str:
        """Hash of the weights and the text that every stage starts from."""
        parts = [*_weights(self.source), self.train.digest(), self.validation.digest(), self.test.digest()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def stages(self) -> list[str]:
        """The stages of this recipe, in order."""
        return [s.name for s in STAGES.values() if not s.only_with or attrgetter(s.only_with)(self.recipe)]

    def needs(self, name: str) -> list[str]:
        """The stages that one reads from; where one of them is left out, those before it."""
        found, needs = [], STAGES[name].needs
        if name == "finetune" and CONTROL in (self.recipe.finetune.parent, self.recipe.finetune.learning_rate):
            needs = (*needs, "control")
        for need in needs:
            found += [need] if need in self.stages else self.needs(need)
        return list(dict.fromkeys(found))

    def before(self, name: str) -> Path:
        """Folder of the stage whose state a stage starts from."""
        return self.stage_folder(self.needs(name)[0])

    def key(self, name: str) -> str:
        return self.key_of(name, self.recipe)

    def key_of(self, name: str, recipe: Recipe) -> str:
        """The key that a stage would have with another recipe on the same model and text."""
        parts = [__version__, name, self.inputs_digest, recipe.digest(*KEEP, *STAGES[name].sections)]
        if recipe.blocks:
            parts.append(recipe.digest("blocks"))
        if recipe.delta and "delta" in STAGES[name].sections and (Path(recipe.delta) / MANIFEST).is_file():
            parts.append(sha256(Path(recipe.delta) / MANIFEST))  # another delta in the same folder is another run
        if recipe.finetune.parent not in INSIDE and "finetune" in STAGES[name].sections:
            parts += _weights(self._parent)
        if "evaluate" in STAGES[name].sections:
            parts += [sha256(path) for _, path in recipe.evaluate.files]
        if recipe.predictor and "predictor" in STAGES[name].sections:
            cls, options = resolve("predictor", recipe.predictor, PREDICTORS)
            parts += [sha256(path) for path in cls.files(options)]
        parts += [self.key_of(need, recipe) for need in self.needs(name)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def stage_folder(self, name: str) -> Path:
        return self.folder / name

    def finished(self, name: str) -> dict[str, Any] | None:
        """A finished stage's record, or None where it is missing, damaged or of another recipe, text or model."""
        path = self.stage_folder(name) / "stage.json"
        if not path.is_file():
            return None
        try:
            record = read_json(path)
        except MoyuError:
            return None  # so that the stage runs again
        return record if record.get("key") == self.key(name) and "figures" in record else None

    def figures(self, name: str) -> dict[str, Any]:
        """Figures of a stage that has to be finished.

        Raises: MoyuError naming the command that runs it.
        """
        record = self.finished(name)
        if record is None:
            raise MoyuError(
                f"stage {name!r} is not finished in {str(self.folder)!r} for this recipe; run `moyu {name}` with the "
                "same recipe first, or `moyu run` for all stages"
            )
        return record["figures"]


def _weights(source: str) -> list[str]:
    """What tells a model's weights from others: hashes of its files, or a hub id."""
    path = Path(source)
    if not path.is_dir():
        return [source]
    files = [*path.glob("*.safetensors"), *path.glob("*.bin"), path / "config.json"]
    return [sha256(file) for file in sorted(files)]


def run_stage(run: Run, name: str) -> dict[str, Any]:
    """Run one stage, or reuse it where it is finished; returns its figures."""
    if name not in run.stages:
        raise MoyuError(f"stage {name!r} is not part of this recipe without {STAGES[name].only_with}")
    for need in run.needs(name):
        run.figures(need)
    record = run.finished(name)
    if record is not None:
        console.print(f"[dim]{name}: finished before, reused[/dim]")
        return record["figures"]
    with _alone(run.folder):
        return _run_stage(run, name)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Raises: MoyuError where another command is at work in a run folder. The lock goes with its process."""
    if not PartialState().is_main_process:
        yield
        return
    lock = FileLock(folder / ".lock", timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise MoyuError(
            f"another command is at work in {str(folder)!r}; wait for it, or give another folder as run"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _run_stage(run: Run, name: str) -> dict[str, Any]:
    folder, key = run.stage_folder(name), run.key(name)
    process = PartialState()
    if process.is_main_process:
        _clear_others(folder, key)
    process.wait_for_everyone()
    module, function = STAGES[name].function.split(":")
    console.print(f"[bold]{name}[/bold]")
    started = time.monotonic()
    figures = getattr(importlib.import_module(module), function)(run, folder)
    if process.is_main_process:
        write_json(
            folder / "stage.json", {"key": key, "figures": figures, "seconds": round(time.monotonic() - started, 1)}
        )
    process.wait_for_everyone()
    return figures


def _clear_others(folder: Path, key: str) -> None:
    """Keep what an interrupted run of this very stage left, for it to resume from; delete anything else."""
    owner = folder / "key"
    if folder.exists() and not owner.is_file() and any(folder.iterdir()):
        raise MoyuError(
            f"{str(folder)!r} holds files that no stage wrote, and the stage {folder.name!r} would take their place; "
            "give another folder as run, or move them away"
        )
    if folder.exists() and not (owner.is_file() and owner.read_text() == key):
        shutil.rmtree(folder)
    (folder / "stage.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(owner, key)


def run_up_to(run: Run, name: str) -> None:
    """A stage and those that it needs."""
    for need in run.needs(name):
        run_up_to(run, need)
    run_stage(run, name)


def run_all(run: Run) -> dict[str, Any]:
    """All stages; returns the report stage's figures (the content of result.json)."""
    write_json(run.folder / "recipe.json", run.recipe.model_dump(mode="json"))
    for name in run.stages:
        figures = run_stage(run, name)
    return figures
