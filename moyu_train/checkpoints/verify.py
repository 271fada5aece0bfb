"""Proves a sparse checkpoint: it reloads, computes what it should, and stock transformers refuses it loudly."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import moyu_kernels
import torch
from moyu_kernels.loading import CheckpointError

from moyu_train.checkpoints.export import read_state
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.loading import load_dense

# Runs where neither of our packages can be imported: what a stranger with stock transformers would see.
STOCK_LOAD = """
import sys
for name in ("moyu_train", "moyu_kernels"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except KeyError as error:
    print("refused:", error)
else:
    print("loaded")
"""


@torch.no_grad()
def verify(folder: Path, tokens: int = 64) -> dict[str, Any]:
    """Check a sparse checkpoint and return the figures.

    Logits of the kernels' rule mode are compared with stock code under the same rule mask, in fp32, over `tokens`
    random token ids; and a subprocess without our packages must fail to load the folder, with the marker's KeyError.

    Raises: MoyuError where any of it does not hold.
    """
    try:
        sparse = moyu_kernels.from_pretrained(folder, dtype=torch.float32, mode="rule")
    except CheckpointError as error:
        raise MoyuError(str(error)) from error
    vocabulary = sparse.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    found = sparse(input_ids=ids, use_cache=False).logits
    marker = marker_of(folder)
    del sparse
    stock = load_dense(folder)
    thresholds, predictors = read_state(folder)
    with SparseMasks(stock, thresholds, None):
        expected = stock(input_ids=ids, use_cache=False).logits
    gap = ((found - expected).norm() / expected.norm()).item()
    if not gap < 1e-4:
        raise MoyuError(f"{str(folder)!r}: the reloaded model's logits differ from the rule's by {gap:.2e} (relative)")
    result = subprocess.run(
        [sys.executable, "-c", STOCK_LOAD, str(folder)], capture_output=True, text=True, check=False
    )
    if "refused:" not in result.stdout or marker not in result.stdout:
        raise MoyuError(
            f"{str(folder)!r}: stock transformers did not refuse the folder with its marker; it said: "
            f"{(result.stdout + result.stderr)[-500:]}"
        )
    return {"logits_relative_error": gap, "stock_refuses": True, "predictors": bool(predictors)}


def marker_of(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config if config["moyu"]["activation_field"] in config else config["text_config"]
    return text[config["moyu"]["activation_field"]]
