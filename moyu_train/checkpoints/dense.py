"""A stock folder of a sparse checkpoint's weights, without masks, for engines that know nothing of them.

It computes another function than was trained (usually a slightly better one, as fast as any dense model), so it is a
folder of its own that says so, never a mode of the sparse one.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from moyu_train.checkpoints.export import check_whole, read_inputs, read_state, read_weights
from moyu_train.checkpoints.verify import TOLERANCE, stock_gap
from moyu_train.errors import MoyuError
from moyu_train.files import check_writable
from moyu_train.models.loading import load_dense, load_tokenizer
from moyu_train.models.marker import clear_marker


@torch.no_grad()
def export_dense(folder: Path, out: Path) -> dict[str, Any]:
    """Write the checkpoint's model, in its stored dtype, to `out`, and check that stock code loads it as it is.

    Raises: MoyuError where gate or up is another function than the family's, which stock code would put its own for;
        where `out` exists; where stock logits differ.
    """
    check_whole(folder)
    rules, _ = read_state(folder)
    if rules[0].stock_activation and not read_inputs(folder) and read_weights(folder) == "stored":
        raise MoyuError(
            f"{str(folder)!r} already loads in stock transformers and computes the same there; use it as it is"
        )
    if rules[0].substitutes:
        raise MoyuError(
            f"{str(folder)!r} has another activation than its family ({rules[0].describe()}), which a stock engine "
            "would put back; only rules that drop neurons and change nothing else have a dense model to export"
        )
    if out.exists():
        raise MoyuError(f"{str(out)!r} exists; give another folder")
    model = load_dense(folder, "auto", device="cpu", compensated=False)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    check_writable(out.parent, 2 * stored)
    clear_marker(model.config)
    del model.config.moyu
    model.config.architectures = [type(model).__name__]
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        load_tokenizer(folder).save_pretrained(temporary)
        ids = torch.randint(
            model.config.get_text_config().vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)
        )
        expected = model.float()(input_ids=ids, use_cache=False).logits
        gap, said = stock_gap(temporary, ids, expected)
        if gap is None or not gap < TOLERANCE:
            raise MoyuError(f"stock transformers does not compute the same logits from {str(out)!r}; it said: {said}")
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"folder": str(out), "stock_relative_error": gap, "computes": "the same weights without the masks"}
