"""Text that the dense model writes itself, for those who have none: sampled at temperature 1 from the start token."""

import json
from pathlib import Path
from typing import Any

import torch

from moyu_train.errors import MoyuError
from moyu_train.files import write_text
from moyu_train.models.blocks import device_of
from moyu_train.models.context import longest_window
from moyu_train.progress import track

SELF = "self"  # as a source in `data.train`
LENGTH, BATCH = 512, 32  # tokens of a document, documents at a time


@torch.no_grad()
def write_own_text(model: Any, tokenizer: Any, path: Path, tokens: int, seed: int) -> None:
    """About `tokens` tokens as JSON lines, a document each, as long as the model makes it, `LENGTH` at most."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    length = longest_window(model, LENGTH + 1) - 1
    first = torch.full((BATCH, 1), start, device=device_of(model))
    lines: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while tokens > 0:
            before = tokens
            for _ in track(range(-(-tokens // (length * BATCH))), "the model writes its own text"):
                written = model.generate(first, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length)
                texts = [text for text in tokenizer.batch_decode(written, skip_special_tokens=True) if text.strip()]
                lines += [json.dumps({"text": text}) for text in texts]
                tokens -= sum(len(ids) for ids in tokenizer(texts)["input_ids"]) if texts else 0
            if tokens == before:
                raise MoyuError("the model ends every text that it starts at once; give text of your own to data.train")
    write_text(path, "\n".join(lines) + "\n")
