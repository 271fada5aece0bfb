"""The references: every setting and public name says what it is, and the page of the settings is that of the code."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import moyu_kernels
import pytest
from settings_page import meaning_of, methods, page, sections, table

import moyu_train

ROOT = Path(__file__).parent.parent
API = re.search(r"^API := ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def modules() -> list[ModuleType]:
    """Those that `make docs` takes, with the modules in them."""
    assert API
    named = [importlib.import_module(name) for name in API[1].replace("\\", "").split()]
    inside = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for package in named
        for module in pkgutil.iter_modules(getattr(package, "__path__", []))
    ]
    return [*named, *inside]


def undocumented(owner: Any, home: str) -> Iterator[str]:
    """Public functions and classes without a docstring, their own or the base's that they fill in."""
    for name, thing in vars(owner).items():
        found = getattr(owner, name)
        bare = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
        if name.startswith("_") or getattr(bare, "__module__", None) != home:
            continue
        if not (inspect.isclass(bare) or inspect.isfunction(bare)):
            continue
        if not inspect.getdoc(found):
            yield f"{home}: {bare.__qualname__}"
        if inspect.isclass(bare):
            yield from undocumented(bare, home)


def test_the_page_of_the_settings_is_current() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == page() + "\n", "run `python tests/settings_page.py > docs/settings.md`"


def test_every_setting_says_what_it_is() -> None:
    for name, model in sections():
        assert inspect.getdoc(model), name
        for key, field in model.model_fields.items():
            assert meaning_of(field), f"{name}.{key}"


def test_every_method_and_option_says_what_it_is() -> None:
    for section, name, about, options in methods():
        assert about, f"{section} {name}"
        for key, field in options.model_fields.items():
            assert meaning_of(field), f"{section} {name}: {key}"


def test_the_page_tells_limits_and_defaults() -> None:
    rows = {name: table(model, f"{name}.") for name, model in sections()}
    assert "| `finetune.warmup` | number, from 0, below 1 | `0.1` | share of the steps |" in rows["finetune"]
    assert "| `evaluate.agreement.file` | text | required |" in rows["evaluate.agreement"]


@pytest.mark.parametrize("package", [moyu_train, moyu_kernels])
def test_what_the_packages_give_is_in_the_reference(package: ModuleType) -> None:
    homes = {module.__name__ for module in modules()}
    for name in package.__all__:
        assert getattr(package, name).__module__ in homes, name


def test_every_public_name_has_a_docstring() -> None:
    found = modules()
    assert len(found) > 30
    for module in found:
        assert module.__doc__, module.__name__
    assert not [name for module in found for name in undocumented(module, module.__name__)]
