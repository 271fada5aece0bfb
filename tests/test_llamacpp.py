"""llama.cpp itself on files that we wrote: the same logits and tokens as transformers. Needs llama-cpp-python."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_gguf import FAMILIES, IDS, random_model, save_stock, write
from transformers import AutoTokenizer

llama_cpp = pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("name", FAMILIES)
def test_llamacpp_decodes_the_same(name: str, tmp_path: Path) -> None:
    out = write(save_stock(tmp_path / "model", name))
    model = llama_cpp.Llama(str(out), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    model.eval(IDS[0].tolist())
    logits, expected = torch.tensor(np.array(model.scores[: IDS.shape[1]])), random_model(name)(IDS).logits[0]
    assert (logits - expected).norm() < 2e-3 * expected.norm()  # keys and values in float16
    ids, own = IDS, []
    for _ in range(16):
        ids = torch.cat([ids, random_model(name)(ids).logits[:, -1:].argmax(-1)], 1)
        own.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(own[-1:])
    assert own == ids[0, IDS.shape[1] :].tolist()
    text = "the 1234 birds' thing\n  sat"
    assert (
        model.tokenize(text.encode(), add_bos=False)
        == AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids
    )
    model.close()
