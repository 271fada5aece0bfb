"""GGUF files: what transformers reads back, what PowerInfer would compute, and what is refused by name."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from moyu_kernels.rules import Rule
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_heads import named, routers_of
from tiny import COMMON, CONFIGS, SIZES, bpe, randomised
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from moyu_train.checkpoints.export import export, read_state
from moyu_train.checkpoints.gguf_vocab import SPLITS, _split
from moyu_train.cli import main
from moyu_train.errors import MoyuError
from moyu_train.evaluation.inloop import SparseMasks
from moyu_train.models.blocks import find_blocks
from moyu_train.models.heads import find_attention
from moyu_train.models.loading import load_dense
from moyu_train.predictors.mlp import MLP

MORE = {"intermediate_size": 96, "num_key_value_heads": 2}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": CONFIGS["llama"],
    "llama3": LlamaConfig(**SIZES, **COMMON, **MORE, rope_parameters=ROPE3, attention_bias=True),
    "mistral": MistralConfig(**SIZES, **COMMON, **MORE, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, **COMMON, **MORE),
    "qwen3": Qwen3Config(**SIZES, **COMMON, **MORE, head_dim=16, tie_word_embeddings=True),
}
IDS = torch.randint(0, 255, (1, 48), generator=torch.Generator().manual_seed(0))


def random_model(name: str, **changes: Any) -> Any:
    """With vectors (norms and biases) that are not all alike."""
    config = copy.deepcopy(FAMILIES[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = randomised(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def save_stock(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    random_model(name, **changes).to(dtype).save_pretrained(folder)
    bpe().save_pretrained(folder)
    return folder


def write(folder: Path, engine: str = "llama.cpp") -> Path:
    out = folder.with_suffix(".gguf")
    assert main(["export-gguf", str(folder), str(out), "--for", engine]) == 0
    return out


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])  # of qwen3 it does not read the heads' size
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    out = write(save_stock(tmp_path / "model", name))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    torch.testing.assert_close(again(IDS).logits, random_model(name)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_weights_are_stored_as_they_are_and_vectors_in_fp32(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(save_stock(tmp_path / "model", dtype=torch.bfloat16)))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.1.ffn_down.weight"] == "BF16"
    assert kinds["blk.1.ffn_norm.weight"] == "F32"
    assert "output.weight" not in kinds  # tied
    up = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    stored = load_dense(tmp_path / "model", "auto").model.layers[0].mlp.up_proj.weight
    assert np.array_equal(up.data.view(np.int16), stored.detach().view(torch.int16).numpy())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert (tokens[255], len(tokens)) == ("th", 259)
    assert reader.get_field("tokenizer.ggml.merges").contents() == ["t h"]
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 257


def save_sentencepiece(folder: Path, **changes: Any) -> Path:
    random_model("llama", vocab_size=320).save_pretrained(folder)
    text = ["the cat sat on the mat", "that thing there", "another bird", "dogs and cats"] * 20
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    options |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} | changes
    with (folder / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=file, **options)
    return folder


def test_sentencepiece(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(save_sentencepiece(tmp_path / "model")))
    pieces = SentencePieceProcessor(str(tmp_path / "model" / "tokenizer.model"))
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens[:300] == [pieces.id_to_piece(i) for i in range(300)]
    assert tokens[300:] == [f"[PAD{i}]" for i in range(300, 320)]
    assert reader.get_field("tokenizer.ggml.model").contents() == "llama"
    scores = reader.get_field("tokenizer.ggml.scores").contents()
    assert scores[299] == pieces.get_score(299)
    assert len(scores) == 320
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() is True


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(save_sentencepiece(tmp_path / "model", add_dummy_prefix=False)))
    assert reader.get_field("tokenizer.ggml.add_space_prefix").contents() is False


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram", "vocab_size": 280},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
    ],
)
def test_sentencepiece_of_another_kind_is_refused(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_sentencepiece(tmp_path / "model", **changes)
    assert "has to have the model_type BPE" in refused(folder, "llama.cpp", capsys)


def test_two_tokenizers_that_differ_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_sentencepiece(tmp_path / "model")
    processor = SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = {processor.id_to_piece(i): i for i in range(300)}
    merges = [(p[:i], p[i:]) for p in list(pieces)[259:] for i in range(1, len(p)) if {p[:i], p[i:]} <= set(pieces)]
    same = Tokenizer(models.BPE(vocab=pieces, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    same.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    same.save(str(folder / "tokenizer.json"))
    assert write(folder).is_file()
    bpe().save_pretrained(folder)
    assert "tokenizer.model reads 'Hello world' as [" in refused(folder, "llama.cpp", capsys)


def test_a_file_that_reads_back_otherwise_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = gguf.GGUFWriter.write_tensor_data

    def flipped(self: gguf.GGUFWriter, tensor: np.ndarray, *more: Any) -> None:
        tensor = tensor.copy()
        tensor[7] ^= 1
        stored(self, tensor, *more)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", flipped)
    folder, out = save_stock(tmp_path / "model"), tmp_path / "model.gguf"
    assert main(["export-gguf", str(folder), str(out), "--for", "llama.cpp"]) == 1
    assert "does not read back the tensor token_embd.weight" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def sparse(
    folder: Path,
    gate: str = "relu",
    up: str = "stock",
    family: str = "mlp",
    cut: float = 0.0,
    name: str = "llama",
    heads: bool = False,
) -> Path:
    """A checkpoint whose predictors have learned something of the gate, with their cut at `cut`."""
    model = random_model(name, hidden_act="silu" if gate == "stock" else "relu")
    keep = "threshold" if gate == "stock" else "nonzero"
    rules = [Rule(torch.zeros(96), gate=gate, up=up, keep=keep) for _ in range(2)]
    predictors = []
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(2))
    for block in find_blocks(model):
        predictor = MLP(MLP.Options(rank=24, biases=family != "mlp", learning_rate=0.01), block, torch.device("cpu"))
        kept = x @ block.module.gate_proj.weight.T > 0
        predictor.observe(x, x, kept)
        found = predictor.solve()
        predictors.append(found | {"bias": found["bias"] - cut})
    routers = named(find_attention(model), routers_of(find_attention(model)), 2) if heads else None
    export(model, bpe(), folder, gate, rules, predictors, "mlp", heads=routers)
    return folder


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbours, x `[T, heads, size]`."""
    size = x.shape[-1]
    angles = torch.arange(len(x))[:, None] * 1e4 ** -(torch.arange(0, size, 2) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def powerinfer(path: Path, ids: torch.Tensor, layers: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What PowerInfer's graph computes from a file: logits, and each layer's neurons. Written after its source."""
    data = path.read_bytes()
    assert data[:4] == b"PWRI"
    stock = path.with_suffix(".stock")
    stock.write_bytes(b"GGUF" + data[4:])
    reader = gguf.GGUFReader(stock)
    w = {t.name: torch.tensor(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    arch = reader.get_field("general.architecture").contents()
    heads = reader.get_field(f"{arch}.attention.head_count").contents()
    threshold = reader.get_field("powerinfer.sparse_threshold").contents()
    x, chosen = w["token_embd.weight"][ids], []
    mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for i in range(layers):
        part = {name.removeprefix(f"blk.{i}."): tensor for name, tensor in w.items() if name.startswith(f"blk.{i}.")}
        h = normed(x, part["attn_norm.weight"])
        q, k, v = ((h @ part[f"attn_{n}.weight"].T).unflatten(-1, (-1, x.shape[-1] // heads)) for n in "qkv")
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (turned(k), v))
        scores = torch.einsum("qhd,khd->hqk", turned(q), k) / math.sqrt(q.shape[-1]) + mask
        x = x + torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ part["attn_output.weight"].T
        selected = torch.relu(x @ part["fc1.weight"].T) @ part["fc2.weight"].T >= threshold
        h = normed(x, part["ffn_norm.weight"])
        gate, up = torch.relu(h @ part["ffn_gate.weight"].T), h @ part["ffn_up.weight"].T
        a = gate * (torch.relu(up) if arch == "bamboo" else up)
        x = x + torch.where(selected, a, 0) @ part["ffn_down_t.weight"]
        chosen.append(selected)
    return normed(x, w["output_norm.weight"]) @ w["output.weight"].T, chosen


@pytest.mark.parametrize(("up", "name"), [("stock", "llama"), ("relu", "mistral")])
def test_powerinfer_computes_the_predicted_model(up: str, name: str, tmp_path: Path) -> None:
    folder = sparse(tmp_path / "sparse", up=up, name=name)
    logits, chosen = powerinfer(write(folder, "powerinfer"), IDS[0])
    model = load_dense(folder)
    rules = [Rule(torch.zeros(96), gate="relu", up=up, keep="nonzero") for _ in range(2)]
    seen: list[torch.Tensor] = []
    _, predictors = read_state(folder)
    with SparseMasks(model, rules, predictors, observe=lambda _, scores: seen.append(scores[0] > 0)):
        expected = model(IDS).logits[0]
    for own, other in zip(chosen, seen, strict=True):
        assert (own == other).float().mean() > 0.995  # matrices in float16
        assert 0.2 < own.float().mean() < 0.95
    assert (logits - expected).norm() < 0.02 * expected.norm()
    with SparseMasks(model, rules, None):
        assert (model(IDS).logits[0] - expected).norm() > 0.05 * expected.norm(), "the predictors change nothing"


def test_powerinfer_runs_all_heads(tmp_path: Path) -> None:
    plain, routed = (sparse(tmp_path / name, heads=name == "routed") for name in ("plain", "routed"))
    one, two = (powerinfer(write(folder, "powerinfer"), IDS[0])[0] for folder in (plain, routed))
    assert torch.equal(one, two)


def refused(folder: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["export-gguf", str(folder), str(folder.parent / "no.gguf"), "--for", engine]) == 1
    assert not (folder.parent / "no.gguf").exists()
    return capsys.readouterr().err


def test_what_llamacpp_would_compute_otherwise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relu = save_stock(tmp_path / "relu", hidden_act="relu")
    said = refused(relu, "llama.cpp", capsys)
    assert "computes relu in its FFN, and llama.cpp computes SiLU for every llama model" in said
    said = refused(sparse(tmp_path / "sparse_relu"), "llama.cpp", capsys)
    assert "another activation than its family" in said
    assert "llama.cpp computes SiLU" in said
    folder = sparse(tmp_path / "threshold", gate="stock")
    assert f"moyu export-dense {folder} OUT" in refused(folder, "llama.cpp", capsys)
    assert main(["export-dense", str(folder), str(tmp_path / "dense")]) == 0
    assert write(tmp_path / "dense").is_file()
    random_model("llama").save_pretrained(tmp_path / "bare")
    assert "tokenizer.json" in refused(tmp_path / "bare", "llama.cpp", capsys)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mistral", {"sliding_window": 16}, "attends to the last 16 tokens, and llama.cpp to all"),
        ("qwen3", {"attention_bias": True}, "attention has biases, which llama.cpp knows no place for in Qwen3"),
        ("qwen2", {"rope_parameters": ROPE3}, "'llama3', which is written for llama and mistral alone"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type 'dynamic'"),
    ],
)
def test_graphs_that_are_not_known_are_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(save_stock(tmp_path / "model", name, **changes), "llama.cpp", capsys)


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    randomised(CONFIGS["gpt2"]).save_pretrained(tmp_path / "gpt2")
    assert "the architecture 'gpt2' is written for llama.cpp" in refused(tmp_path / "gpt2", "llama.cpp", capsys)
    folder = save_stock(tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"use_regex": true', '"use_regex": false'))
    assert "BPE after ByteLevel, and what the engine splits text by" in refused(folder, "llama.cpp", capsys)


def test_what_powerinfer_cannot_compute_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = save_stock(tmp_path / "stock", hidden_act="relu")
    assert "is no sparse checkpoint" in refused(stock, "powerinfer", capsys)
    folder = sparse(tmp_path / "threshold", gate="stock")
    assert "PowerInfer computes relu(gate) * up" in refused(folder, "powerinfer", capsys)
    folder = sparse(tmp_path / "cut", cut=0.3)
    assert "cut of layer 0 is 0.3" in refused(folder, "powerinfer", capsys)
    folder = sparse(tmp_path / "biases", family="with biases")
    said = refused(folder, "powerinfer", capsys)
    assert "has biases, which PowerInfer's have not; fit predictor: {name: mlp, biases: false}" in said
    (folder / "model.safetensors").write_bytes(b"")
    assert "changed or damaged" in refused(folder, "powerinfer", capsys)
    folder = sparse(tmp_path / "qwen", name="qwen2")
    assert "known for llama, mistral" in refused(folder, "powerinfer", capsys)
    folder = sparse(tmp_path / "llama3", name="llama3")
    assert "PowerInfer's graph has no blk.0.attn_q.bias" in refused(folder, "powerinfer", capsys)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_splits_are_named_after_the_steps_of_the_tokenizer(name: str) -> None:
    """The patterns in the table are regular expressions of the tokenizers library, not just strings."""
    steps = next(steps for steps, split in SPLITS.items() if split == name)
    parts = []
    for step in steps:
        if step.startswith("Split "):
            parts.append(pre_tokenizers.Split(Regex(step.removeprefix("Split ")), "isolated"))
        elif step.startswith("Digits"):
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step.endswith("words")))
    raw = bpe().backend_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence(parts)
    settings = json.loads(raw.to_str())
    assert _split(settings, Path(), (name,)) == name
    assert _split(settings | {"normalizer": {"type": "NFC"}}, Path(), (name,)) == name
    with pytest.raises(MoyuError, match=r'has normalizer {"type": "Lowercase"}, and the engine splits'):
        _split(settings | {"normalizer": {"type": "Lowercase"}}, Path(), (name,))
    for key, value in (("end_of_word_suffix", "</w>"), ("continuing_subword_prefix", "##"), ("ignore_merges", True)):
        changed = settings | {"model": settings["model"] | {key: value}}
        if (name, key) == ("llama-bpe", "ignore_merges"):
            assert _split(changed, Path(), (name,)) == name
            continue
        with pytest.raises(MoyuError, match=f"has {key} "):
            _split(changed, Path(), (name,))
