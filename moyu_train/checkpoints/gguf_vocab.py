"""A tokenizer as GGUF metadata. What llama.cpp would split otherwise than the tokenizer does is refused."""

import json
from pathlib import Path
from typing import Any

import gguf

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


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int, splits: tuple[str, ...]) -> None:
    """Put the tokenizer in `folder` into the metadata; size: rows of the embedding, some of them without a token.

    splits: those of llama.cpp's names that the engine knows.
    Raises: MoyuError for a tokenizer that is neither byte-level BPE of a known split nor sentencepiece.
    """
    file, sentencepiece = folder / "tokenizer.json", (folder / "tokenizer.model").is_file()
    settings = read_json(file) if file.is_file() or not sentencepiece else {"added_tokens": []}
    with reading(file):
        if sentencepiece:
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
    found = settings["pre_tokenizer"] or {}
    steps = tuple(_step(step) for step in found.get("pretokenizers", [found]))
    name = SPLITS.get(steps)
    if settings["model"]["type"] != "BPE" or name not in splits:
        raise MoyuError(
            f"the tokenizer in {str(folder)!r} is {settings['model']['type']} after {', '.join(steps)}, and what the "
            f"engine splits text by is {', '.join(splits)}, or sentencepiece (tokenizer.model); it would read other "
            "tokens"
        )
    return name


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
