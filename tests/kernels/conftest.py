from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparse_checkpoints import tiny_llama, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A factory: `checkpoint(model, **options)` exports the model to a new folder."""
    made = []

    def make(model: Any = None, **options: Any) -> Path:
        made.append(tmp_path / f"checkpoint{len(made)}")
        return write_checkpoint(made[-1], model if model is not None else tiny_llama(), **options)

    return make
