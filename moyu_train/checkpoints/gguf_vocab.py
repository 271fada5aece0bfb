"""A tokenizer as GGUF metadata. What llama.cpp would split otherwise than the tokenizer does is refused."""

import json
from pathlib import Path
from typing import Any

import gguf
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from moyu_train.errors import MoyuError
from moyu_train.files import read_json, reading

BEFORE = r"Split (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
AFTER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps in front of byte-level BPE, as tokenizer.json has them, and llama.cpp's name for the lot.
SPLITS = {
    ("ByteLevel words",): "gpt-2",
    ("Digits one by one", "ByteLevel words"): "smollm",
    (BEFORE + r"\p{N}{1,3}" + AFTER, "ByteLevel"): "llama-bpe",
    (BEFORE + r"\p{N}" + AFTER, "ByteLevel"): "qwen2",
}

SAMPLES = (
    "Hello world",
    " The quick  brown fox's 1234 jumps\n\n\tover it. ",
    "naïve Ünïcode: 日本語, привет 🙂",
    "def f(x):\n    return x + 1  # <b>",
)


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int, splits: tuple[str, ...]) -> None:
    """Put the tokenizer in `folder` into the metadata; size: rows of the embedding, some of them without a token.

    splits: those of llama.cpp's names that the engine knows.
    Raises: MoyuError for a tokenizer that is neither byte-level BPE of a known split nor BPE of sentencepiece.
    """
    file, sentencepiece = folder / "tokenizer.json", (folder / "tokenizer.model").is_file()
    settings = read_json(file) if file.is_file() or not sentencepiece else {"added_tokens": []}
    with reading(file):
        if sentencepiece:
            writer.add_add_space_prefix(_checked_space_prefix(folder))
            pieces = [*gguf.SentencePieceVocab(folder).all_tokens()]
            known = {i: (text.decode("utf-8"), int(kind)) for i, (text, _, kind) in enumerate(pieces)}
            writer.add_token_scores([score for _, score, _ in pieces] + [-1000.0] * (size - len(pieces)))
        else:
            known = {i: (text, int(gguf.TokenType.NORMAL)) for text, i in settings["model"]["vocab"].items()}
            if not settings["model"]["merges"]:
                raise MoyuError(f"the tokenizer in {str(folder)!r} has no merges, and GGUF engines load none without")
        writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
        writer.add_tokenizer_pre("default" if sentencepiece else _split(settings, folder, splits))
        for token in settings["added_tokens"]:
            kind = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
            if not sentencepiece or token["id"] not in known:
                known[token["id"]] = (token["content"], int(kind))
    if max(known) >= size:
        raise MoyuError(f"the tokenizer in {str(folder)!r} has token {max(known)}, and the model {size} embeddings")
    rows = [known.get(i, (f"[PAD{i}]", int(gguf.TokenType.UNUSED))) for i in range(size)]
    writer.add_token_list([text for text, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=size).add_to_gguf(writer, quiet=True)


def _split(settings: dict[str, Any], folder: Path, splits: tuple[str, ...]) -> str:
    found, model = settings["pre_tokenizer"] or {}, settings["model"]
    steps = tuple(_step(step) for step in found.get("pretokenizers", [found]))
    name = SPLITS.get(steps)
    if model["type"] != "BPE" or name not in splits:
        raise MoyuError(
            f"the tokenizer in {str(folder)!r} is {model['type']} after {', '.join(steps)}, and what the "
            f"engine splits text by is {', '.join(splits)}, or sentencepiece (tokenizer.model); it would read other "
            "tokens"
        )
    normalizer = settings.get("normalizer")
    others = {name: model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")}
    others |= {"normalizer": None if normalizer == {"type": "NFC"} else normalizer}
    others |= {"ignore_merges": model.get("ignore_merges") if name != "llama-bpe" else None}
    if odd := [f"{name} {json.dumps(value)}" for name, value in others.items() if value]:
        raise MoyuError(
            f"the tokenizer in {str(folder)!r} has {', '.join(odd)}, and the engine splits text as {name} without; it "
            "would read other tokens"
        )
    return name


def _checked_space_prefix(folder: Path) -> bool:
    """Whether tokenizer.model puts a space in front of a text.

    Raises: MoyuError where it is none of BPE on the text as it is, or is not what tokenizer.json computes.
    """
    processor = SentencePieceProcessor(str(folder / "tokenizer.model"))
    parts = _fields(processor.serialized_model_proto())
    trainer, normalizer = _fields(parts.get(2, b"")), _fields(parts.get(3, b""))
    if trainer.get(3, 1) != 2 or normalizer.get(2) or normalizer.get(4, 1):
        raise MoyuError(
            f"{folder / 'tokenizer.model'} has to have the model_type BPE, the normalisation rule identity and "
            "remove_extra_whitespaces false, as Llama's has: the engine computes nothing else, and would read other "
            "tokens"
        )
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in SAMPLES:
            ours, theirs = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
            if ours != theirs:
                raise MoyuError(
                    f"in {str(folder)!r} tokenizer.model reads {text!r} as {ours} and tokenizer.json as {theirs}; the "
                    "engine would get the first, and the model learned the second"
                )
    return bool(normalizer.get(3, 1))


def _fields(message: bytes) -> dict[int, Any]:
    """Last value of each field of a serialized protobuf message: an int, or bytes.

    sentencepiece's own classes for it need protobuf, which nothing else here does. Of its ModelProto 2 is trainer_spec
    (3: model_type, 1 is unigram, 2 BPE), 3 normalizer_spec (2: precompiled_charsmap, 3: add_dummy_prefix, 4:
    remove_extra_whitespaces).
    """
    found: dict[int, Any] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            found[key >> 3] = varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        found[key >> 3], at = message[at : at + size], at + size
    return found


def _step(step: dict[str, Any]) -> str:
    """A step of a pre-tokenizer in words, as `SPLITS` has it; others as they are."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel words" if step["use_regex"] else "ByteLevel"
    if kind == "Digits" and step["individual_digits"]:
        return "Digits one by one"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return f"Split {step['pattern'].get('Regex')}"
    return json.dumps(step)
