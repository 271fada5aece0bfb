"""What `evaluate` measures beside perplexity, on each variant in turn: tasks, and agreement with the dense parent."""

from pathlib import Path
from typing import Any, Protocol

from moyu_train.errors import MoyuError
from moyu_train.evaluation.agreement import GreedyAgreement
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.tasks import Tasks, find_tasks
from moyu_train.settings_export import Evaluate


class Extra(Protocol):
    def add(self, variant: str, model: Any, masks: SparseMasks | None = None) -> None:
        """Measure a variant, with whatever masks are on the model; `masks` counts the neurons that it needs."""

    def figures(self) -> dict[str, Any]:
        """Of all variants so far, by their names in `result.json`."""


def check_extras(settings: Evaluate) -> None:
    """Refuse files and tasks that are not there, before anything long runs."""
    if settings.task_folder and not Path(settings.task_folder).is_dir():
        raise MoyuError(f"evaluate.task_folder {settings.task_folder!r} is not a folder; give one with task YAML files")
    for setting, path in settings.files:
        if not path.is_file():
            raise MoyuError(f"{setting} {str(path)!r} does not exist; give a file on this machine")
    if settings.tasks or settings.task_folder:
        find_tasks(settings)


def extras(settings: Evaluate, tokenizer: Any) -> list[Extra]:
    """Those that the settings ask for, their data read.

    Raises: MoyuError as `check_extras`, and where a task or file cannot be read.
    """
    check_extras(settings)
    found: list[Extra] = []
    if settings.tasks or settings.task_folder:
        found.append(Tasks(settings, tokenizer))
    if settings.agreement:
        found.append(GreedyAgreement(settings.agreement, tokenizer))
    return found
