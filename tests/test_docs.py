"""Every command in the docs is one that the command line takes; every file they link to is there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from zoo import CASES, table

from moyu_train.cli import build_parser
from moyu_train.models.blocks import PATTERNS
from moyu_train.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DOCS = [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for path in DOCS
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    }
)


def test_there_are_commands() -> None:
    assert any(command.startswith("moyu run") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
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
