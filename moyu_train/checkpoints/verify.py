"""Proves a sparse checkpoint: it reloads, computes what it should, and stock transformers refuses it loudly."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from moyu_kernels.checkpoint import CheckpointError
from torch import Tensor

from moyu_train.checkpoints.export import read_heads, read_inputs, read_state, read_weights
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.evaluation.replay import parts_of, record, replay
from moyu_train.files import read_json, reading
from moyu_train.models.loading import load_dense, load_sparse

TOLERANCE = 1e-4  # largest relative difference of logits in fp32
STEPS = 8  # tokens that are decoded one by one

# Runs where neither of our packages can be imported: what a stranger with stock transformers would see.
STOCK_LOAD = """
import sys
for name in ("moyu_train", "moyu_kernels"):
    sys.modules[name] = None
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
except KeyError as error:
    print("refused:", error)
else:
    import torch
    tensors = torch.load(sys.argv[2], weights_only=True)
    logits = model(input_ids=tensors["ids"], use_cache=False).logits
    print("loaded, gap", ((logits - tensors["logits"]).norm() / tensors["logits"].norm()).item())
"""


@torch.no_grad()
def verify(folder: Path, tokens: int = 64) -> dict[str, Any]:
    """Check a sparse checkpoint and return the figures.

    Logits of the kernels' rule mode are compared with stock code under the same rule mask, in fp32, over `tokens`
    random token ids after those that a mask is taken from, the last `STEPS` of them decoded one by one; both on the
    int8 weights where the checkpoint decodes with these. FFN blocks, and linear layers with sparse inputs, are compared
    on the same inputs; where neurons that are on their threshold to the last bit make logits differ, these must agree
    without masks instead. A subprocess without our packages must fail to load the folder, with the marker's KeyError;
    or, where stock code computes the very function, load it and compute the same logits.

    Raises: MoyuError where any of it does not hold.
    """
    try:
        sparse = load_sparse(folder, dtype=torch.float32, mode="rule")
    except CheckpointError as error:
        raise MoyuError(str(error)) from error
    vocabulary = sparse.config.get_text_config().vocab_size
    rules, predictors = read_state(folder)
    ids = torch.randint(vocabulary, (1, rules[0].prompt + tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(sparse.device)
    found = decode_logits(sparse, ids)
    marker = marker_of(folder)
    stock = load_dense(folder, device=sparse.device)
    inputs = read_inputs(folder)
    with SparseMasks(stock, rules, None, inputs=inputs) as masks:
        expected = stock(input_ids=ids, use_cache=False).logits
        # A mask from the prompt is not one of a block's inputs.
        parts = [] if rules[0].prompt else parts_of(masks.blocks, inputs)
        if parts:
            record(stock, parts, ids)
    figures: dict[str, Any] = {
        "logits_relative_error": relative(found, expected),
        "predictors": bool(predictors),
        "heads": bool(read_heads(folder)),
    }
    if parts:
        figures["parts"] = replay(sparse, parts, "verify")
    del sparse
    differ = not figures["logits_relative_error"] < TOLERANCE
    if differ and parts:
        found = decode_logits(load_sparse(folder, dtype=torch.float32, mode="dense"), ids)
        with SparseMasks(stock, [rule.unmasked for rule in rules], None):
            figures["dense_relative_error"] = relative(found, stock(input_ids=ids, use_cache=False).logits)
        differ = not figures["dense_relative_error"] < TOLERANCE
    if differ:
        raise MoyuError(f"{str(folder)!r}: the reloaded model's logits are not the rule's: {figures}")
    stock_error, said = stock_gap(folder, ids, expected)
    if rules[0].stock_activation and not inputs and read_weights(folder) == "stored":
        if stock_error is None or not stock_error < TOLERANCE:
            raise MoyuError(f"{str(folder)!r}: stock transformers does not compute the same logits; it said: {said}")
        return figures | {"stock_refuses": False, "stock_relative_error": stock_error}
    if "refused:" not in said or marker not in said:
        raise MoyuError(
            f"{str(folder)!r}: stock transformers did not refuse the folder with its marker; it said: {said}"
        )
    return figures | {"stock_refuses": True}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def decode_logits(model: Any, ids: Tensor) -> Tensor:
    """Logits `[B, T, V]` of ids `[B, T]`, all but the last `STEPS` in one call and these in one each."""
    first = model(input_ids=ids[:, :-STEPS], use_cache=True)
    steps = (model(input_ids=token, past_key_values=first.past_key_values) for token in ids[:, -STEPS:].split(1, 1))
    return torch.cat([first.logits, *(step.logits for step in steps)], dim=1)


def stock_gap(folder: Path, ids: Tensor, logits: Tensor) -> tuple[float | None, str]:
    """What a stranger without our packages sees: the relative difference of fp32 logits, None where the load failed.

    Args: ids `[B, T]`; logits: expected, `[B, T, V]`. Returns: it, and the end of what was printed.
    """
    with tempfile.TemporaryDirectory() as place:
        torch.save({"ids": ids.cpu(), "logits": logits.cpu()}, f"{place}/expected.pt")
        command = [sys.executable, "-c", STOCK_LOAD, str(folder), f"{place}/expected.pt"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    words = result.stdout.split()
    gap = float(words[2]) if words[:2] == ["loaded,", "gap"] else None
    return gap, (result.stdout + result.stderr)[-1000:]


def marker_of(folder: Path) -> str:
    config = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        text = config if config["moyu"]["activation_field"] in config else config["text_config"]
        return text[config["moyu"]["activation_field"]]
