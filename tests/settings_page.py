"""The page docs/settings.md, made from the classes that check a recipe; `python tests/settings_page.py` prints it."""

import importlib
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from moyu_train.penalties import PENALTIES
from moyu_train.predictors import PREDICTORS
from moyu_train.recipe import Recipe, section_of
from moyu_train.settings import Method
from moyu_train.sparsifiers import SPARSIFIERS

INTRO = """# Settings

Every setting of a recipe, made by `python tests/settings_page.py` from the classes that check it. A nested setting is
written as a mapping in YAML, and on the command line with points: `--finetune.learning_rate 3e-4`. A section or method
that may be `null` is left out by it; one with all its settings at their defaults needs no mention. How they go together
is told in [training](training.md), [predictors](predictors.md), [analysis](analysis.md) and [results](results.md)."""
METHODS: tuple[tuple[str, dict[str, str], bool], ...] = (  # the last: what tells of it is the class, else its module
    ("sparsifier", SPARSIFIERS, True),
    ("penalty", PENALTIES, False),
    ("predictor", PREDICTORS, False),
)
SIGNS = {Gt: ("above", "gt"), Ge: ("from", "ge"), Lt: ("below", "lt"), Le: ("to", "le")}


def sections(name: str = "", model: type[BaseModel] = Recipe) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every class of settings but plain methods, with the place of its settings in a recipe."""
    yield name, model
    for key, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner and inner is not Method:
            yield from sections(f"{name}.{key}".strip("."), inner)


def methods() -> Iterator[tuple[str, str, str, type[BaseModel]]]:
    """Section, name, first paragraph of what the source tells, and options of every registered method."""
    for section, registry, by_class in METHODS:
        for name, home in registry.items():
            module = importlib.import_module(home.split(":")[0])
            cls = getattr(module, home.split(":")[1])
            yield section, name, first_paragraph(cls if by_class else module), cls.Options


def first_paragraph(documented: Any) -> str:
    """Of its own docstring, in one line; empty where it has none."""
    return " ".join(inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0].split())


def type_of(field: FieldInfo) -> str:
    return ", ".join([_words(field.annotation), *_limits(field.metadata)])


def _limits(metadata: Sequence[Any]) -> list[str]:
    limits = [
        f"{word} {getattr(limit, name):g}"
        for limit in metadata
        for kind, (word, name) in SIGNS.items()
        if isinstance(limit, kind)
    ]
    return limits + ["not empty" for limit in metadata if isinstance(limit, MinLen)]


def _words(annotation: Any) -> str:
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not Ellipsis]
    if origin is Annotated:
        return ", ".join([_words(parts[0]), *_limits(parts[1:])])
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is tuple and len(parts) == 1:
        return f"list of {_words(parts[0])}"
    if origin is tuple:
        return f"({', '.join(map(_words, parts))})"
    if origin is dict:
        return f"mapping of {_words(parts[0])} to {_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "method" if annotation is Method else "section"
    return {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}[annotation]


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _value(field.default)


def _value(value: Any) -> str:
    if isinstance(value, Method):
        options = "".join(f", {key}: {option}" for key, option in value.options.items())
        return f"`{{name: {value.name}{options}}}`" if options else f"`{value.name}`"
    if isinstance(value, BaseModel):
        return "as below"
    if isinstance(value, tuple):
        return ", ".join(_value(part) for part in value) or "none"
    if isinstance(value, dict) or value == "":
        return "none"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def meaning_of(field: FieldInfo) -> str:
    """The field's description, or for a section what its class says."""
    inner = section_of(field.annotation)
    return field.description or (first_paragraph(inner) if inner else "")


def table(model: type[BaseModel], prefix: str = "") -> str:
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        cells = [f"`{prefix}{key}`", type_of(field), default_of(field), meaning_of(field)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def page() -> str:
    parts = [INTRO]
    for name, model in sections():
        title = f"`{name}`" if name else "Recipe"
        parts += [f"## {title}", first_paragraph(model), table(model, f"{name}." if name else "")]
    for section, registry, _ in METHODS:
        parts.append(f"## Methods for `{section}`\n\nOne of {', '.join(f'`{name}`' for name in registry)}.")
        for kind, name, about, options in methods():
            if kind == section:
                parts += [f"### `{name}`", about, table(options) if options.model_fields else "It has no options."]
    return re.sub(r"\(docs/([\w-]+)\.md\)", r"([\1](\1.md))", "\n\n".join(parts))


if __name__ == "__main__":
    print(page())
