"""The sections of a recipe about what is exported and how it is measured. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from moyu_train.settings import Section


class Export(Section):
    """What the sparse checkpoint holds (docs/checkpoint-format.md)."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="of the weight files")
    weights: Literal["stored", "int8"] = Field(
        "stored", description="of the FFN as they decode: as stored, in `dtype`, or int8 with a scale a neuron's row"
    )
    license: str = Field("", description="of the model card, as the hub names it; default what the parent's card says")
    base_model: str = Field("", description="of the model card: the parent's hub id; default `model` where it is one")

    @property
    def itemsize(self) -> int:
        """Bytes of an FFN weight as it decodes; 1 is int8, whose rows have scales beside them."""
        if self.weights == "int8":
            return 1
        return 4 if self.dtype == "float32" else 2


class Agreement(Section):
    """Greedy continuations of questions, compared with the dense parent's (moyu_train/evaluation/agreement.py)."""

    file: str = Field(description="JSON lines, one question a line")
    field: str = Field("question", description="where the question is")
    prompts: int = Field(20, ge=1, description="the first so many")
    new_tokens: int = Field(64, ge=1, description="length of a continuation")


class Evaluate(Section):
    """Quality of the exported checkpoint on held-out text, and by tasks (docs/results.md)."""

    window: int = Field(1024, ge=2, description="tokens per window, and how far it moves")
    tokens: int | None = Field(None, ge=2, description="score about so many of the test text; default all of it")
    kernel_tokens: int = Field(1024, ge=0, description="tokens decoded one by one through the kernels for the check")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks: its own, local_*, those of task_folder, YAML files")
    task_folder: str = Field("", description="folder of task YAML files; all of them where `tasks` is empty")
    task_data: dict[str, str] = Field({}, description="task: local JSON lines file that it reads in place of the hub")
    task_limit: int | None = Field(None, ge=1, description="the first so many examples of each task; default all")
    agreement: Agreement | None = Field(None, description="compare greedy continuations with the dense parent's")

    @model_validator(mode="after")
    def _scored(self) -> "Evaluate":
        if self.kernel_tokens == 1:
            raise ValueError("kernel_tokens is 1, and the first token has no prediction; give 2 or more, or 0 for none")
        return self

    @model_validator(mode="after")
    def _data_of_tasks(self) -> "Evaluate":
        strangers = set(self.task_data) - set(self.tasks)
        if strangers and not self.task_folder:
            raise ValueError(
                f"task_data names {', '.join(sorted(strangers))}, which evaluate.tasks does not ask for; name the "
                "same tasks in both"
            )
        return self

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Files that the figures depend on, each after the setting that names it."""
        found = [(f"evaluate.task_data.{task}", Path(file)) for task, file in self.task_data.items()]
        found += [("evaluate.tasks", Path(task)) for task in self.tasks if task.endswith((".yaml", ".yml"))]
        if self.task_folder:
            inside = sorted(path for path in Path(self.task_folder).rglob("*") if path.is_file())
            found += [("evaluate.task_folder", path) for path in inside]
        if self.agreement:
            found.append(("evaluate.agreement.file", Path(self.agreement.file)))
        return found


class Bench(Section):
    """Decoding speed (docs/results.md); null for none."""

    contexts: tuple[int, ...] = Field((128,), description="tokens before the ones that are timed")
    new_tokens: int = Field(32, ge=2, description="tokens that are timed")
    rounds: int = Field(5, ge=5, description="interleaved rounds; at least 5")
    threads: tuple[int, ...] = Field((1, 2), description="of the CPU, each timed")
    compiled: bool = Field(True, description="also time dense transformers under torch.compile")


class Heads(Section):
    """Attention heads named by routers: in the checkpoint, and for `moyu heads` (docs/heads.md)."""

    keep: float | None = Field(
        None, gt=0, lt=1, description="share of the units that run for each token of the checkpoint; null for all"
    )
    train: bool = Field(False, description="fine-tune with heads off, by routers of the dense model")
    densities: tuple[float, ...] = Field(
        (0.75, 0.5), min_length=1, description="shares of the units kept of each token, of `moyu heads`"
    )
    unit: Literal["head", "group"] = Field("head", description="group: of the heads that share keys and values")
    dense_layers: tuple[NonNegativeInt, ...] = Field((0,), description="that keep all heads")
    batch: int = Field(
        1, ge=1, le=8, description="sequences that `moyu heads` decodes together: q and o rows of the union"
    )
    context: int = Field(2048, ge=1, description="tokens in the cache, for its bytes")

    @model_validator(mode="after")
    def _trains_what_it_keeps(self) -> "Heads":
        if self.train and self.keep is None:
            raise ValueError("heads.train runs fine-tuning with heads off, and heads.keep is null; give a share")
        return self
