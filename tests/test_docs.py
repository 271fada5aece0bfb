"""Every command in the docs is one that the command line takes; every file they link to is there."""

import re
import shlex
from pathlib import Path

import pytest

from moyu_train.cli import build_parser
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
    recipe = Path(getattr(known, "recipe", ""))
    if recipe.parent != Path() and recipe.suffix == ".yaml":
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_kernels_folder_does_not_shadow_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_do_not_import_the_trainer() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert "moyu_train" not in path.read_text(encoding="utf-8"), path
    for path in (ROOT / "kernels" / "moyu_kernels" / "ops").rglob("*.py"):
        assert "transformers" not in path.read_text(encoding="utf-8"), path
