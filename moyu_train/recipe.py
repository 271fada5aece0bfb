"""Recipe: the only source of truth for settings. Strict YAML, overridden by `--section.key value`. Imports no torch."""

import difflib
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from moyu_train.errors import MoyuError
from moyu_train.penalties import PENALTIES
from moyu_train.predictors import PREDICTORS
from moyu_train.settings import (
    CONTROL,
    SHARED,
    Allocation,
    Analyze,
    Block,
    Calibrate,
    Compare,
    Control,
    Data,
    Fit,
    Inputs,
    Method,
    Optimise,
    Penalty,
    Section,
)
from moyu_train.settings_export import Bench, Evaluate, Export, Heads
from moyu_train.sparsifiers import SPARSIFIERS

METHODS = ("sparsifier", "inputs", "penalty", "predictor")  # settings that may be a name alone
DEPTH = 30  # of nested lists and mappings in a recipe
INERTIA_RAMP = (0.3, 0.5)  # shares of the steps between which the coefficient of `inertia` rises from 0


class RecipeError(MoyuError):
    """A setting that cannot work; the message names the setting and what to change."""


class Recipe(Section):
    """All settings of a run; only `model` has to be given."""

    model: str = Field(min_length=1, description="hub id, folder or GGUF file of the dense model")
    run: str = Field("", description="run folder; default runs/<recipe name>")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything that is random")
    target_sparsity: float = Field(0.6, gt=0, lt=1, description="share of neurons off per token under the rule")
    blocks: tuple[Block, ...] = Field((), description="FFN blocks, where they are not found by structure")
    data: Data = Data()
    analyze: Analyze = Analyze()
    sparsifier: Method = Field(Method(name="threshold"), description="the rule: which neurons are kept")
    allocation: Allocation = Allocation()
    inputs: Inputs | None = Field(None, description="also sparse inputs of other linear layers")
    calibrate: Calibrate = Calibrate()
    finetune: Optimise = Optimise()
    delta: str = Field("", description="folder of a trained delta to take in place of fine-tuning")
    penalty: Penalty | None = Field(None, description="a term on activations that joins the loss")
    control: Control | None = Control()
    predictor: Method | None = Field(Method(name="lowbit"), description="what names neurons beforehand; null for none")
    fit: Fit = Fit()
    compare: Compare = Compare()
    heads: Heads = Heads()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    bench: Bench | None = Bench()

    @model_validator(mode="before")
    @classmethod
    def _default_methods(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Options may be given without the name: they are then the default method's. `inertia: w` is a penalty."""
        named = dict(settings)
        if "inertia" in named:
            named["penalty"] = _inertia(named.pop("inertia"), named.get("penalty"))
        for kind in ("sparsifier", "predictor"):
            if isinstance(named.get(kind), dict):
                named[kind] = {"name": cls.model_fields[kind].default.name, **named[kind]}
        return named

    @field_validator("run")
    @classmethod
    def _stays(cls, value: str) -> str:
        if ".." in Path(value).parts or "\0" in value:
            raise ValueError(
                f"run {value!r} leads out of where it starts; stages delete what they find in it, so name it plainly"
            )
        return value

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        _known("sparsifier", self.sparsifier.name, SPARSIFIERS)
        if self.predictor:
            _known("predictor", self.predictor.name, PREDICTORS)
        for method in self.compare.predictors:
            _known("compare.predictors", method.name, PREDICTORS)
        if self.inputs:
            _known("inputs", self.inputs.name, SPARSIFIERS)
        if self.allocation.method == "greedy" and self.target_sparsity > self.allocation.most:
            raise ValueError(
                f"target_sparsity {self.target_sparsity} is above allocation.most {self.allocation.most}, which no "
                "layer goes beyond; raise allocation.most"
            )
        if self.finetune.parent == CONTROL and not self.control:
            raise ValueError("finetune.parent 'control' distils from the dense control, and control is null; give one")
        if self.finetune.learning_rate == CONTROL and not self.control and not self.delta:
            raise ValueError("finetune.learning_rate 'control' is the dense control's, and control is null; give one")
        if self.finetune.parent == SHARED and not (self.finetune.lora and self.finetune.block_weight == 0):
            raise ValueError(
                "finetune.parent 'shared' is the student without its deltas, for finetune.lora with block_weight 0; "
                "give lora, or leave parent empty for a copy of the model"
            )
        if self.finetune.parent_offload and not self.finetune.holds_parent:
            raise ValueError(
                "finetune.parent_offload keeps the parent's copy in the CPU's memory, and there is none with parent "
                "'shared', or with kl_weight and block_weight 0; leave it out"
            )
        if self.penalty:
            _known("penalty", self.penalty.name, PENALTIES)
        return self

    @property
    def described(self) -> list[dict[str, str | None]]:
        """The descriptions in `blocks`, as data."""
        return [block.model_dump() for block in self.blocks]

    def digest(self, *sections: str) -> str:
        """SHA-256 of the named sections, to tell whether a finished stage still belongs to this recipe.

        sections: names of sections, or `section.key`.
        """
        dump = self.model_dump(mode="json")
        parts = {name: functools.reduce(lambda part, key: part[key], name.split("."), dump) for name in sections}
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _inertia(weight: Any, penalty: Any) -> dict[str, Any] | None:
    """The penalty of the signed knob: above 0 against inertia, below 0 for it."""
    if penalty is not None:
        raise ValueError("inertia stands for a penalty, and penalty is given too; remove one of them")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(
            f"inertia {weight!r} must be a number: above 0 against it (overlap_residual), below 0 locality"
        )
    points = list(zip(INERTIA_RAMP, (0.0, abs(float(weight))), strict=True))
    return {"name": "overlap_residual" if weight > 0 else "locality", "coefficient": points} if weight else None


def _known(kind: str, name: str, registry: dict[str, str]) -> None:
    if name not in registry:
        raise ValueError(f"{kind}.name {name!r} is unknown{nearest(name, registry)}; known: {', '.join(registry)}")


def nearest(word: str, words: Any) -> str:
    """A question about the most similar of `words`, to end a message with; empty where none is similar."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _fields_at(location: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    for part in location:
        if part in model.model_fields:
            model = section_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


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
            if section in METHODS and isinstance(target.get(section), str):
                target[section] = {"name": target[section]}
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise RecipeError(f"{flag}: {section!r} is a value, not a section")
        target[key] = _parse(value, flag)


def _parse(text: str, what: str) -> Any:
    """Plain data of a YAML text: no objects, and no aliases, of which a few lines can stand for gigabytes."""
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > DEPTH:
                wrong = "YAML aliases (*name)" if depth <= DEPTH else f"more than {DEPTH} levels"
                raise RecipeError(f"{what} has {wrong}; write the values out plainly")
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise RecipeError(f"{what} is not valid YAML: {error}") from error


def load_recipe(source: str, overrides: list[str] | None = None, known: dict[str, Any] | None = None) -> Recipe:
    """Read a YAML recipe, or take `source` as a model and every other setting from `known`, or at its default.

    Raises: RecipeError naming each wrong key with the nearest valid one.
    """
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
        if not path.is_file():
            raise RecipeError(f"recipe {source!r} does not exist; `moyu recipes` lists the shipped ones")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {source!r} could not be read: {error}; give a text file in UTF-8") from error
        settings = _parse(text, f"recipe {source!r}") or {}
        if not isinstance(settings, dict):
            raise RecipeError(f"recipe {source!r} must be a mapping of settings, got {type(settings).__name__}")
        name = f"{path.parent.name}-{path.stem}" if path.parent.name else path.stem
    else:
        settings, name = {"model": source, **(known or {})}, Path(source.replace(":", "-")).name
    _override(settings, overrides or [])
    settings.setdefault("run", f"runs/{name}")
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe)) from error


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with moyu, by name."""
    folder = Path(__file__).parent.parent / "recipes"
    if not folder.is_dir():
        folder = Path(__file__).parent / "recipes"  # an installed wheel carries them inside
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
