"""The whole path on a GPU: every stage and verb of a tiny model, where all of them run on it."""

import json
from pathlib import Path
from typing import Any

import moyu_kernels
import pytest
import torch
import yaml
from tiny import save_tiny, tiny_settings

from moyu_train.cli import main
from moyu_train.models.loading import compute_device, load_dense, load_sparse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and MOYU_TEST_GPU=1")

RECIPES: dict[str, dict[str, Any]] = {
    "predicted": {},
    "int8": {"export": {"dtype": "bfloat16", "weights": "int8"}, "predictor": {"name": "lowrank", "rank": 8}},
    "heads": {"heads": {"keep": 0.5, "dense_layers": [0], "train": True}},
    "rule": {"predictor": None},
    "prompt": {"predictor": None, "sparsifier": {"name": "griffin", "prompt": 8}},
    "inputs": {"inputs": {"modules": r"q_proj|o_proj", "sparsity": 0.4}},
}


def run(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """The folder of a finished run."""
    settings = tiny_settings(folder, save_tiny(folder / "model", family)) | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    assert main(["run", str(folder / "tiny.yaml")]) == 0
    return folder / "run"


def test_models_are_on_the_gpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    assert compute_device().type == load_dense(folder).device.type == "cuda"
    assert load_dense(folder, device="cpu").device.type == "cpu"


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, **RECIPES[name])
    result = json.loads((folder / "result.json").read_text())
    assert all(value > 1 for value in result["ppl"].values())
    if result["kernels"]:
        exact, masked = (result["kernels"][key] for key in ("fp32_perplexity", "masked_perplexity"))
        assert exact == pytest.approx(masked, rel=1e-3)
    checkpoint = folder / "export" / "checkpoint"
    blocks = [m for m in load_sparse(checkpoint).modules() if isinstance(m, moyu_kernels.SparseFFN)]
    assert blocks
    assert all(block.backend == "triton" and block.threshold.is_cuda for block in blocks)
    assert main(["analyze", str(checkpoint)]) == 0
    assert main(["generate", str(checkpoint), "--prompt", "the cat", "--max-new-tokens", "8"]) == 0


def test_other_verbs(tmp_path: Path) -> None:
    folder = run(tmp_path, bench=None)
    recipe, checkpoint = str(tmp_path / "tiny.yaml"), str(folder / "export" / "checkpoint")
    assert main(["heads", recipe]) == 0
    assert main(["fit-predictors", "--from", checkpoint]) == 0
    assert main(["export-dense", checkpoint, str(tmp_path / "dense")]) == 0
    assert main(["step-cost", recipe]) == 0


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral"])
def test_other_layouts(family: str, tmp_path: Path) -> None:
    run(tmp_path, family, predictor=None, bench=None)
