"""llama.cpp as rows of the benchmark, where llama-cpp-python is installed: the same dense model in f16, q8_0, q4_1."""

import importlib.util
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.models.marker import base_activation
from moyu_train.progress import console

# Settings, and `llama_ftype` of llama.cpp's own quantizer.
KINDS = {"llamacpp_f16": 1, "llamacpp_q8_0": 7, "llamacpp_q4_1": 3}


class LlamaCpp:
    """A GGUF file in llama.cpp, decoding with `threads`; several of them may share what `load` gave."""

    def __init__(self, llama: Any, threads: int, weights: int, ffn: int) -> None:
        """weights, ffn: bytes that a step reads of all weights, and of the FFN's among them."""
        self.llama, self.threads, self.weights, self.ffn = llama, threads, weights, ffn

    def prefill(self, ids: Tensor) -> None:
        self.seek(0)
        self._eval(ids[0].tolist())

    def seek(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        import llama_cpp

        llama_cpp.llama_set_n_threads(self.llama.ctx, self.threads, self.threads)
        self.llama.n_tokens = position

    def step(self, token: Tensor) -> None:
        self._eval([int(token)])

    def _eval(self, tokens: list[int]) -> None:
        import llama_cpp

        self.llama.eval(tokens)
        llama_cpp.llama_synchronize(self.llama.ctx)


@contextmanager
def llamacpp_files(dense: Any) -> Iterator[dict[str, Path]]:
    """Files of a dense model by setting, in a temporary folder; none where llama.cpp is missing or does not compute it.

    The first one is written from the model, without a tokenizer, in its dtype; the others are quantised from it.
    """
    if not all(map(importlib.util.find_spec, ("llama_cpp", "gguf"))):
        yield {}
        return
    import llama_cpp

    from moyu_train.checkpoints.gguf_model import DENSE, check_family, entries, write_gguf

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as place:
        files, source = {name: Path(place) / f"{name}.gguf" for name in KINDS}, Path(place) / "source.gguf"
        try:
            check_family(dense.config, "llama.cpp")
            if base_activation(dense.config) not in DENSE:
                raise MoyuError(f"it computes SiLU, and this model has {base_activation(dense.config)}")
            write_gguf(source, dense, entries(dense, dense.dtype), lambda writer: writer.add_tokenizer_model("none"))
        except MoyuError as error:
            console.print(f"bench: no rows of llama.cpp, since {error}")
            yield {}
            return
        for name, file in files.items():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.nthread = KINDS[name], torch.get_num_threads()
            if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), settings):
                raise MoyuError(f"llama.cpp could not write {name}; is there room for it in {place}?")
        source.unlink()
        yield files


def load(file: Path, length: int, threads: tuple[int, ...]) -> dict[int, LlamaCpp]:
    """Decoders of a file for `length` tokens, one for each number of threads."""
    import gguf
    import llama_cpp

    llama = llama_cpp.Llama(str(file), n_ctx=length, verbose=False)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    ffn = sum(size for name, size in sizes.items() if ".ffn_" in name and "norm" not in name)
    return {count: LlamaCpp(llama, count, sum(sizes.values()), ffn) for count in threads}
