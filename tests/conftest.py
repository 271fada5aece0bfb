import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: more threads only wait for each other
if os.environ.get("MOYU_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # every machine runs the same; see `make test-gpu`

from collections.abc import Callable
from functools import partial

import pytest
from launched import Seen, run_variant


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """Starts variants of the contract, each once a module."""
    return partial(run_variant, tmp_path_factory.mktemp("contract"))


@pytest.fixture
def without_llamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
