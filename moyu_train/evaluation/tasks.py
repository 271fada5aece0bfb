"""Downstream tasks, scored by the lm-eval harness on the live model with whatever masks are on it."""

import copy
import functools
import logging
import statistics
from pathlib import Path
from typing import Any

from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks, generating
from moyu_train.progress import console
from moyu_train.recipe import nearest
from moyu_train.settings_export import Evaluate

TASK_FILES = Path(__file__).parent / "task_files"
SHIPPED = sorted(path.stem for path in TASK_FILES.glob("*.yaml"))
BOOTSTRAP = 10_000  # resamples for the standard error of what has none in closed form
LOCAL_JSON = {
    "dataset_path": "json",
    "dataset_name": None,
    "training_split": None,
    "validation_split": None,
    "test_split": "test",
    "fewshot_split": None,
}


def find_tasks(settings: Evaluate) -> tuple[Any, list[Any]]:
    """lm-eval's task manager and what it should load: names, and tasks that read a local file in place of the hub.

    Raises: MoyuError where lm_eval is not installed, or a task is unknown or lacks its file.
    """
    manager, names = _manager(settings)
    for name in names:
        if name in SHIPPED and name not in settings.task_data:
            raise MoyuError(f"task {name!r} reads a file of yours: give it as evaluate.task_data: {{{name}: FILE}}")
    for name in settings.task_data:
        if name not in names or name not in manager.all_subtasks:
            raise MoyuError(f"evaluate.task_data names {name!r}, which is not the name of one of the tasks to run")
    local = [
        {"task": name, **LOCAL_JSON, "dataset_kwargs": {"data_files": {"test": file}}}
        for name, file in settings.task_data.items()
    ]
    group = [{"group": "task_data", "task": local}] if local else []  # settings are overridden for a group's members
    return manager, [*(name for name in names if name not in settings.task_data), *group]


def _manager(settings: Evaluate) -> tuple[Any, tuple[str, ...]]:
    """A manager that knows all tasks asked for, and their names."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MoyuError(
            "evaluate.tasks needs the lm-eval harness, which is not installed; install the extra: "
            "pip install 'moyu[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that it is given on purpose
    folder = settings.task_folder
    for setting, path in settings.files:
        if path.suffix in (".yaml", ".yml") and path.is_file() and b"!function" in path.read_bytes():
            raise MoyuError(f"{setting}: {str(path)!r} calls Python code (!function); write the task without it")
    names = settings.tasks or tuple(TaskManager(include_path=folder, include_defaults=False).all_subtasks)
    if not names:
        raise MoyuError(f"evaluate.task_folder {folder!r} holds no task; give a folder of task YAML files")
    for defaults in (False, True):  # reading all of lm-eval's own takes seconds
        manager = _task_manager(folder, defaults)
        unknown = [name for name in names if name not in manager.all_tasks and not name.endswith((".yaml", ".yml"))]
        if not unknown:
            return manager, names
    raise MoyuError(
        f"evaluate.tasks: {unknown[0]!r} is no task of lm-eval, none that moyu ships ({', '.join(SHIPPED)}), and none "
        f"of evaluate.task_folder{nearest(unknown[0], manager.all_tasks)}"
    )


@functools.cache
def _task_manager(folder: str, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[TASK_FILES, *([folder] if folder else [])], include_defaults=defaults)


class Tasks:
    """Scores the same examples of the same tasks with each variant, one at a time, so that nothing is padded."""

    def __init__(self, settings: Evaluate, tokenizer: Any) -> None:
        """Raises: MoyuError where a task's data cannot be read, or its rows lack a field."""
        self.limit = settings.task_limit
        self.tokenizer = copy.deepcopy(tokenizer)  # the harness may give it a pad token
        self.manager, self.tasks = find_tasks(settings)
        try:
            self.manager.load(self.tasks)
        except Exception as error:  # datasets and jinja raise many types here; the cause stays attached
            raise MoyuError(
                f"evaluate.tasks: a task could not be loaded ({type(error).__name__}: {error}); lm-eval's own tasks "
                "need a hub, or by evaluate.task_data a local JSON lines file with the fields that the task asks for"
            ) from error
        self.results: dict[str, Any] = {}
        self.neurons_off: float | None = None

    def add(self, variant: str, model: Any, masks: SparseMasks | None = None) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        console.print(f"evaluate: tasks, {variant}")
        with generating(model, masks):
            self.results[variant] = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=1),
                tasks=self.tasks,
                task_manager=self.manager,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAP,
            )
        if masks:
            self.neurons_off = masks.neurons_off()

    def figures(self) -> dict[str, Any]:
        """Per task: number of examples, and per variant each metric with its standard error by lm-eval (in closed form
        for means, else by bootstrap over the examples). Beside a mean, its difference to the dense parent's on the same
        examples, with the standard error of the paired differences.
        """
        tasks: dict[str, Any] = {}
        for variant, found in self.results.items():
            for name, row in found["results"].items():
                metrics = _metrics(row)
                if not metrics:  # a group without a mean of its own
                    continue
                if "dense" in self.results and variant != "dense" and name in found["samples"]:
                    metrics |= _differences(self.results["dense"], found, name)
                tasks.setdefault(name, {"examples": row["sample_len"]})[variant] = metrics
        return {"tasks": tasks, "task_neurons_off": self.neurons_off}


def _named(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric}/{filter_name}"


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """`metric` and `metric_stderr` from lm-eval's `metric,filter` and `metric_stderr,filter`."""
    found: dict[str, float] = {}
    for key, value in row.items():
        metric, _, filter_name = key.partition(",")
        if filter_name and isinstance(value, int | float):
            name = _named(metric.removesuffix("_stderr"), filter_name)
            found[name + ("_stderr" if metric.endswith("_stderr") else "")] = float(value)
    return found


def _differences(dense: dict[str, Any], found: dict[str, Any], name: str) -> dict[str, float]:
    """`metric_minus_dense` and its standard error, of the metrics that are means over examples."""
    metrics = found["configs"][name].get("metric_list") or []
    means = [metric["metric"] for metric in metrics if metric.get("aggregation") == "mean"]
    pairs: dict[str, list[float]] = {}
    for before, after in zip(dense["samples"][name], found["samples"][name], strict=True):
        for metric in means:
            pairs.setdefault(_named(metric, after["filter"]), []).append(after[metric] - before[metric])
    differences: dict[str, float] = {}
    for metric, values in pairs.items():
        differences[f"{metric}_minus_dense"] = statistics.fmean(values)
        if len(values) > 1:
            differences[f"{metric}_minus_dense_stderr"] = statistics.stdev(values) / len(values) ** 0.5
    return differences
