"""Recipe: the only source of truth for settings. Strict YAML, overridden by `--section.key value`. Imports no torch."""

import contextlib
import difflib
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moyu_train.errors import MoyuError
from moyu_train.penalties import PENALTIES
from moyu_train.predictors import PREDICTORS
from moyu_train.sparsifiers import SPARSIFIERS

CONTROL = "control"  # as finetune.parent


class RecipeError(MoyuError):
    """A setting that cannot work; the message names the setting and what to change."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Method(BaseModel):
    """A method by its registry name; all other keys are options that the method's own file declares and checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Adaptive(BaseModel):
    """The closed loop that finds a penalty's coefficient for `target_sparsity` (moyu_train/penalties/adaptive.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    gain: float = Field(0.1, gt=0, description="of the logarithm per step and relative error of the density")
    ramp: float = Field(0.5, gt=0, le=1, description="share of the steps until the density should be reached")


class Penalty(Method):
    """A penalty on activations with its coefficient: one number, or points of (share of the steps, value)."""

    model_config = ConfigDict(extra="allow", frozen=True, validate_default=True)
    coefficient: tuple[tuple[float, float], ...]
    interpolation: Literal["linear", "sine"] = "sine"
    adaptive: Adaptive | None = None

    @field_validator("coefficient", mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        if isinstance(value, str):  # YAML takes 1e-4, without a point, for a string
            with contextlib.suppress(ValueError):
                value = float(value)
        return [(0.0, value)] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _points(self) -> "Penalty":
        shares = [share for share, _ in self.coefficient]
        if not shares or shares != sorted(set(shares)) or not all(0 <= share <= 1 for share in shares):
            raise ValueError(
                f"penalty.coefficient {list(self.coefficient)} must be a number or points of (share of the steps from "
                "0 to 1, value) with rising shares"
            )
        if not all(0 <= value < math.inf for _, value in self.coefficient):
            raise ValueError(
                "penalty.coefficient holds values that are not finite or below 0, which would reward dense "
                "activations; use finite values from 0"
            )
        if self.adaptive and (len(self.coefficient) > 1 or self.coefficient[0][1] == 0):
            raise ValueError(
                "penalty.adaptive moves one coefficient above 0 that it starts from; give a number above 0"
            )
        return self


class Block(Section):
    """FFN blocks of an architecture whose names moyu does not know; their layout is told by their shapes."""

    path: str = Field(pattern=r"^[\w*]+(\.[\w*]+)*$", description="of the modules, * for any one name in it")
    gate: str | None = Field(None, description="projection under the activation, where `up` is another one")
    up: str = Field(description="projection to the neurons; of twice their number it holds gate and up")
    down: str = Field(description="projection back")
    act: str = Field(description="attribute of the module that holds the activation module")

    @model_validator(mode="after")
    def _distinct(self) -> "Block":
        names = [name for name in (self.gate, self.up, self.down, self.act) if name]
        if len(set(names)) < len(names):
            raise ValueError(f"gate, up, down and act have to be different attributes, got {', '.join(names)}")
        return self


class Data(Section):
    train: str = Field(
        "builtin:state-union-train", description="JSON lines, text file, id[:subset[:split]], builtin:<name>, or self"
    )
    test: str = Field("builtin:state-union-test", description="held-out documents, used by `evaluate` alone")
    text_field: str = "text"
    validation_documents: int = Field(3, ge=1, description="training documents held back for choosing settings")
    max_tokens: int = Field(2_000_000, ge=1, description="read no more than this of the training text")


class Inputs(Method):
    """Sparse inputs of linear layers anywhere in the model, by a sparsifier for layout `linear`: threshold or topk.

    With `statistic: magnitude` a threshold is TEAL (arXiv 2408.14690), with `contribution` WINA (arXiv 2505.19427);
    topk with `straight_through` is Q-Sparse (arXiv 2407.10969).
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "threshold"
    modules: str = Field(r"self_attn\.[qkvo]_proj", description="regular expression, found anywhere in the path")
    sparsity: float = Field(gt=0, lt=1, description="share of the inputs that are off")

    @field_validator("modules")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"inputs.modules {value!r} is no regular expression: {error}") from error
        return value


class Analyze(Section):
    tokens: int = Field(4096, ge=1, description="validation tokens for the statistics and each point of the curve")
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9)

    @model_validator(mode="after")
    def _range(self) -> "Analyze":
        if any(not 0 < s < 1 for s in self.sparsities):
            raise ValueError("sparsities are shares of neurons off, each between 0 and 1")
        return self


class Lora(Section):
    """Low-rank adaptation (arXiv 2106.09685) by peft: only A and B of these projections train, and are merged."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field("all-linear", description="module names, or one regular expression")


class Optimise(Section):
    tokens: int = Field(24_576, ge=1)
    epochs: int = Field(1, ge=1, description="how often the training text may be gone through to give `tokens`")
    window: int = Field(256, ge=8, description="tokens per training sequence")
    batch: int = Field(4, ge=1, description="sequences per device and micro-batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step")
    learning_rate: float = Field(1e-4, gt=0)
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: float = Field(0.0, ge=0)
    save_steps: int = Field(10, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    parent: str = Field(
        "",
        description="dense model to distil from, of the same vocabulary: default `model`; `control`: the dense control",
    )
    kl_weight: float = Field(1.0, ge=0, description="KL to the dense parent")
    kl_top_k: int | None = Field(None, ge=1, description="of its distribution only the likeliest tokens; default all")
    block_weight: float = Field(0.0, ge=0, description="relative error of each FFN block's output to the parent's")
    lm_weight: float = Field(0.0, ge=0, description="next-token loss")
    lora: Lora | None = Field(None, description="train low-rank deltas in place of all weights")

    @model_validator(mode="after")
    def _loss(self) -> "Optimise":
        if self.kl_weight == 0 and self.lm_weight == 0 and self.block_weight == 0:
            raise ValueError("kl_weight, lm_weight and block_weight are all 0: nothing to train; set one above 0")
        if self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens ({self.tokens}) is less than one step, window x batch x accumulation = "
                f"{self.tokens_per_step}; raise tokens or lower one of the three"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.window * self.batch * self.accumulation


class Control(Section):
    learning_rates: tuple[float, ...] = Field((1e-5, 3e-5, 1e-4), min_length=1, description="best on validation wins")
    reuse: str = Field("", description="folder of a run with the same text and training settings, to take its control")

    @model_validator(mode="after")
    def _distinct(self) -> "Control":
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(self.learning_rates):
            raise ValueError(f"learning_rates {self.learning_rates} holds one twice; each is a run of its own")
        return self


class Fit(Section):
    tokens: int = Field(49_152, ge=1)
    window: int = Field(1024, ge=8)
    save_every: int = Field(16, ge=1, description="windows between checkpoints")


class Calibrate(Section):
    tokens: int = Field(4096, ge=1)
    bytes_skipped: float = Field(0.45, gt=0, lt=1, description="share of FFN bytes, predictor bytes counted as read")


class Export(Section):
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


class Agreement(Section):
    """Greedy continuations of questions, compared with the dense parent's (moyu_train/evaluation/agreement.py)."""

    file: str = Field(description="JSON lines, one question a line")
    field: str = Field("question", description="where the question is")
    prompts: int = Field(20, ge=1, description="the first so many")
    new_tokens: int = Field(64, ge=1)


class Evaluate(Section):
    window: int = Field(1024, ge=2)
    tokens: int | None = Field(None, ge=2, description="score about so many of the test text; default all of it")
    kernel_tokens: int = Field(1024, ge=0, description="tokens decoded one by one through the kernels for the check")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks: its own, local_*, those of task_folder, YAML files")
    task_folder: str = Field("", description="folder of task YAML files; all of them where `tasks` is empty")
    task_data: dict[str, str] = Field({}, description="task: local JSON lines file that it reads in place of the hub")
    task_limit: int | None = Field(None, ge=1, description="the first so many examples of each task; default all")
    agreement: Agreement | None = None

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
    contexts: tuple[int, ...] = (128,)
    new_tokens: int = Field(32, ge=2)
    rounds: int = Field(5, ge=5, description="interleaved rounds; at least 5")
    threads: tuple[int, ...] = (1, 2)
    compiled: bool = Field(True, description="also time dense transformers under torch.compile")


class Recipe(Section):
    model: str
    run: str = Field("", description="run folder; default runs/<recipe name>")
    seed: int = 0
    target_sparsity: float = Field(0.6, gt=0, lt=1, description="share of neurons off per token under the rule")
    blocks: tuple[Block, ...] = Field((), description="FFN blocks, where they are not found by structure")
    data: Data = Data()
    analyze: Analyze = Analyze()
    sparsifier: Method = Method(name="threshold")
    inputs: Inputs | None = Field(None, description="also sparse inputs of other linear layers")
    calibrate: Calibrate = Calibrate()
    finetune: Optimise = Optimise()
    delta: str = Field("", description="folder of a trained delta to take in place of fine-tuning")
    penalty: Penalty | None = None
    control: Control | None = Control()
    predictor: Method | None = Method(name="lowbit")
    fit: Fit = Fit()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    bench: Bench | None = Bench()

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Options may be given without the name: they are then the default method's."""
        named = dict(settings)
        for kind in ("sparsifier", "predictor"):
            if isinstance(named.get(kind), dict):
                named[kind] = {"name": cls.model_fields[kind].default.name, **named[kind]}
        return named

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        _known("sparsifier", self.sparsifier.name, SPARSIFIERS)
        if self.predictor:
            _known("predictor", self.predictor.name, PREDICTORS)
        if self.inputs:
            _known("inputs", self.inputs.name, SPARSIFIERS)
        if self.finetune.parent == CONTROL and not self.control:
            raise ValueError("finetune.parent 'control' distils from the dense control, and control is null; give one")
        if self.penalty:
            _known("penalty", self.penalty.name, PENALTIES)
        return self

    @property
    def described(self) -> list[dict[str, str | None]]:
        """The descriptions in `blocks`, as data."""
        return [block.model_dump() for block in self.blocks]

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections, to tell whether a finished stage still belongs to this recipe."""
        dump = self.model_dump(mode="json")
        text = json.dumps({key: dump[key] for key in sections}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _known(kind: str, name: str, registry: dict[str, str]) -> None:
    if name not in registry:
        raise ValueError(f"{kind}.name {name!r} is unknown{nearest(name, registry)}; known: {', '.join(registry)}")


def nearest(word: str, words: Any) -> str:
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _fields_at(location: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    for part in location:
        if part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section(part))), None)


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line per problem: the key, what is wrong, and for an unknown key the nearest valid one."""
    lines = []
    for problem in error.errors():
        key = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            fields = _fields_at(problem["loc"][:-1], model)
            lines.append(f"unknown key {key!r}{nearest(str(problem['loc'][-1]), fields)} (keys: {', '.join(fields)})")
        else:
            lines.append(f"{key + ': ' if key else ''}{problem['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _override(settings: dict[str, Any], overrides: list[str]) -> None:
    """Apply `--a.b value` or `--a.b=value` pairs to nested settings."""
    words = list(overrides)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        if not flag.startswith("--"):
            raise RecipeError(f"unexpected argument {flag!r}; settings are overridden as --section.key value")
        if not equals:
            if not words:
                raise RecipeError(f"{flag} has no value; write {flag} VALUE")
            value = words.pop(0)
        *sections, key = flag.removeprefix("--").split(".")
        target = settings
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise RecipeError(f"{flag}: {section!r} is a value, not a section")
        target[key] = yaml.safe_load(value)


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, or take `source` as a model and every other setting at its default.

    Raises: RecipeError naming each wrong key with the nearest valid one.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise RecipeError(f"recipe {source!r} does not exist; `moyu recipes` lists the shipped ones")
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {source!r} is not valid YAML: {error}") from error
        if not isinstance(settings, dict):
            raise RecipeError(f"recipe {source!r} must be a mapping of settings, got {type(settings).__name__}")
        name = f"{path.parent.name}-{path.stem}" if path.parent.name else path.stem
    else:
        settings, name = {"model": source}, Path(source.replace(":", "-")).name
    _override(settings, overrides or [])
    settings.setdefault("run", f"runs/{name}")
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe)) from error
