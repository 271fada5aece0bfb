"""Every code block in the docs is taken by what it is for; every setting, verb and file that they name is there."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from moyu_kernels.rules import Rule
from tiny import tiny_model, tokenizer
from zoo import CASES, table

from moyu_train.checkpoints.export import export
from moyu_train.cli import build_parser
from moyu_train.models.blocks import PATTERNS
from moyu_train.recipe import Recipe, load_recipe, section_of
from moyu_train.settings import Method

ROOT = Path(__file__).parent.parent
# But not what a run wrote, such as a checkpoint's card.
DOCS = [path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]
BLOCKS = [
    (path.relative_to(ROOT).as_posix(), language, block)
    for path in DOCS
    for language, block in re.findall(
        r"^```(\S*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]
COMMANDS = sorted(
    {line.split("#")[0].strip() for _, kind, block in BLOCKS if kind == "bash" for line in block.splitlines()}
)
INLINE = sorted({code for path in DOCS for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8"))})


def blocks(language: str) -> list[Any]:
    """Parameters, `path` and `block`, of the code blocks in one language."""
    found = [(path, block) for path, kind, block in BLOCKS if kind == language]
    assert found
    return [pytest.param(path, block, id=f"{path}-{place}") for place, (path, block) in enumerate(found)]


def test_every_block_has_a_test_here() -> None:
    assert {kind for _, kind, _ in BLOCKS} == {"bash", "python", "yaml", "json", ""}, "a block in another language"
    for path, kind, block in BLOCKS:
        assert kind or "moyu " not in block, f"{path}: commands go into a block of bash"


def exported(folder: Path) -> Path:
    model = tiny_model()
    rules = [Rule(torch.full((96,), 0.01)) for _ in range(2)]
    export(model, tokenizer(), folder, "threshold", rules, None, None)
    return folder


@pytest.mark.parametrize(("path", "block"), blocks("python"))
def test_python_runs(path: str, block: str, tmp_path: Path) -> None:
    """In a folder where a run of `mine.yaml` has exported a tiny model."""
    if "vllm" in block:
        pytest.skip("tests/test_vllm.py runs it, where vLLM is installed")
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and importlib.util.find_spec(str(node.module).split(".")[0]) is None:
            pytest.skip(f"{node.module} is not installed")
    exported(tmp_path / "runs/mine/export/checkpoint")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("path", "block"), blocks("yaml"))
def test_yaml_is_part_of_a_recipe(path: str, block: str) -> None:
    Recipe.model_validate({"model": "someone/model", **yaml.safe_load(block)})


@pytest.mark.parametrize(("path", "block"), blocks("json"))
def test_json_has_the_keys_of_an_export(path: str, block: str, tmp_path: Path) -> None:
    written = json.loads("{" + block.replace("{…}", "{}") + "}")
    real = json.loads((exported(tmp_path / "checkpoint") / "config.json").read_text(encoding="utf-8"))
    assert written["moyu"].keys() == real["moyu"].keys()
    assert written["moyu"]["blocks"][0].keys() == real["moyu"]["blocks"][0].keys()


def test_verbs_in_the_prose_are_there() -> None:
    verbs = {code.split()[1] for code in INLINE if re.match(r"moyu [a-z]", code)}
    known = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    assert len(verbs) > 10
    assert verbs <= set(known)


def test_settings_in_the_prose_are_there() -> None:
    named = [code.removeprefix("--").split(":")[0].split() for code in INLINE]
    dotted = {words[0] for words in named if words and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", words[0])}
    sections = {key for key, field in Recipe.model_fields.items() if section_of(field.annotation)}
    settings = {name for name in dotted if name.split(".")[0] in sections}
    assert len(settings) > 30
    for name in settings:
        model: Any = Recipe
        for key in name.split("."):
            if model is Method:  # its options are the method's
                break
            assert key in model.model_fields, name
            model = section_of(model.model_fields[key].annotation)


@pytest.mark.parametrize("command", filter(None, COMMANDS))
def test_commands_are_valid(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:2] == ["accelerate", "launch"]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        words = ["moyu", *words[words.index("moyu_train") + 1 :]]
    assert words[0] == "moyu"
    known, rest = build_parser().parse_known_args(words[1:])
    if rest:
        load_recipe(str(ROOT / "recipes" / "smollm2-135m" / "quickstart.yaml"), rest)
    recipe = Path(getattr(known, "recipe", None) or "")
    if recipe.parent != Path() and recipe.suffix == ".yaml":
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_table_of_architectures_is_that_of_the_tests() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    written = re.search(r"<!-- python tests/zoo\.py -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert written
    assert written[1] == table(), "run `python tests/zoo.py` and put its table into docs/models.md"


def test_patterns_in_the_docs_are_those_of_the_search() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for names in PATTERNS:
        assert ", ".join(f"`{name}`" for name in names if name) in text, names


def test_the_description_in_the_docs_is_one_that_works() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert settings == {"blocks": list(CASES["GPT-J"].described)}


def test_quoted_messages_are_those_of_the_source() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        piece.strip()
        for line in re.findall(r"^\*\*(`.*?)\*\* ", text, re.MULTILINE)
        for piece in re.split("`, `|…|`", line)
    ]
    paths = [path for folder in ("moyu_train", "kernels") for path in (ROOT / folder).rglob("*.py")]
    joined = (re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in paths)
    source = re.sub(r"\{[^{}]*\}", "…", "\n".join(joined))
    pieces = [piece.strip(" ,*") for piece in quoted if len(piece.strip(" ,*")) > 3]
    assert len(pieces) > 20
    for piece in pieces:
        assert piece in source, piece


def test_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_do_not_import_the_trainer() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "moyu_train" not in path.read_text(encoding="utf-8"), path
    for path in (ROOT / "kernels" / "moyu_kernels" / "ops").rglob("*.py"):
        assert "transformers" not in path.read_text(encoding="utf-8"), path
