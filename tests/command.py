"""The real command line, and a tiny recipe for it."""

import subprocess
import sys
from pathlib import Path

import yaml
from tiny import save_tiny, tiny_settings

ROOT = Path(__file__).parent.parent


def moyu(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "moyu_train", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def prepare(folder: Path, family: str = "llama") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, save_tiny(folder / "model", family))
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    return recipe
