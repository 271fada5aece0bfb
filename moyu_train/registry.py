"""Turns a method's name and options from the recipe into its class and checked options."""

import importlib
from typing import Any

from pydantic import ValidationError

from moyu_train.recipe import RecipeError, explain
from moyu_train.settings import Method


def resolve(kind: str, method: Method, registry: dict[str, str]) -> tuple[Any, Any]:
    """Class and validated options of a method.

    Raises: RecipeError for an option that the method does not have, naming the nearest one it has.
    """
    module, name = registry[method.name].split(":")
    cls = getattr(importlib.import_module(module), name)
    try:
        return cls, cls.Options.model_validate(method.options)
    except ValidationError as error:
        raise RecipeError(explain(error, cls.Options, prefix=f"{kind}.")) from error
