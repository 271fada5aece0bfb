"""Documents (texts.py) to tokens, tokens to windows. Splits are by document."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from moyu_train.errors import MoyuError
from moyu_train.settings import Data
from moyu_train.texts import read_texts

PIECE = 256  # tokens, the least that is worth taking of a long document


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, each int64 `[T]` of its own length.

    scored: for conversations, bool like `tokens`: the assistant's turns, which training scores. None: all tokens.
    start: the token that the tokenizer puts before any text, and so every window begins with; in no document itself.
    """

    tokens: list[Tensor]
    scored: list[Tensor] | None = None
    start: int | None = None

    @property
    def total(self) -> int:
        return sum(len(t) for t in self.tokens)

    def digest(self) -> str:
        digest = hashlib.sha256(torch.cat(self.tokens).numpy().tobytes())
        if self.start is not None:
            digest.update(f"start {self.start}".encode())
        if self.scored is not None:
            digest.update(torch.cat(self.scored).numpy().tobytes())
        return digest.hexdigest()

    def windows(self, length: int) -> list[tuple[int, Tensor]]:
        """Consecutive windows inside each document, none overlapping, each with its document's index.

        A last one shorter than 2 tokens is dropped.
        """
        start = self._start()
        pieces = [
            (index, torch.cat([start, piece]))
            for index, document in enumerate(self.tokens)
            for piece in document.split(length - len(start))
        ]
        return [(index, piece) for index, piece in pieces if len(piece) > 1]

    def longest(self) -> Tensor:
        """The longest document as one window `[T]`."""
        return torch.cat([self._start(), max(self.tokens, key=len)])

    def _start(self) -> Tensor:
        return torch.tensor([] if self.start is None else [self.start], dtype=torch.int64)

    def first(self, tokens: int | None) -> "Documents":
        """About so many tokens, all where `tokens` is None: evenly from the start of every document.

        Where that would be less than `PIECE` tokens of each, so much is taken of some of them, in fixed random order.
        """
        if tokens is None:
            return self
        share = max(tokens // len(self.tokens), PIECE)
        pieces: dict[int, Tensor] = {}
        for index in torch.randperm(len(self.tokens), generator=torch.Generator().manual_seed(0)).tolist():
            if tokens < 2:
                break
            pieces[index] = self.tokens[index][: min(share, tokens)]
            tokens -= len(pieces[index])
        return replace(self, tokens=[pieces[index] for index in sorted(pieces)], scored=None)

    def packed(self, length: int, seed: int) -> Tensor:
        """All documents end to end, cut into full windows `[N, length]` in random order; the rest is dropped."""
        return self._packed(torch.cat(self.tokens), length, seed)

    def packed_labels(self, length: int, seed: int) -> Tensor:
        """Labels of `packed`: the tokens themselves, -100 where training does not score them."""
        stream = torch.cat(self.tokens)
        if self.scored is not None:
            stream = torch.where(torch.cat(self.scored), stream, -100)
        return self._packed(stream, length, seed)

    def _packed(self, stream: Tensor, length: int, seed: int) -> Tensor:
        start = self._start()
        own = length - len(start)
        count = len(stream) // own
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return torch.cat([start.expand(count, -1), stream[: count * own].view(count, own)], dim=1)[order]


def tokenise(
    texts: Iterable[Any], tokenizer: Any, source: str, window: int, max_tokens: int | None = None
) -> Documents:
    """Tokens of the documents (texts, or conversations by the tokenizer's chat template), in order, until `max_tokens`.

    What the tokenizer puts before any text becomes the start of all windows: models that are trained with it know no
    text without.

    Raises: MoyuError where there is less text than one window.
    """
    tokens: list[Tensor] = []
    scored: list[Tensor] = []
    total, chat, start = 0, False, start_of(tokenizer)
    for text in texts:
        chat = not isinstance(text, str)
        if chat:
            ids, turns = conversation(text, tokenizer, source)
        else:
            ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
            turns = torch.ones(0)
        if start is not None and len(ids) and ids[0] == start:
            ids, turns = ids[1:], turns[1:]
        if len(ids):
            tokens.append(ids)
            scored.append(turns)
            total += len(ids)
        if max_tokens is not None and total >= max_tokens:
            break
    if total < window:
        raise MoyuError(
            f"data {source!r} has {total} tokens, less than one window of {window}; give more text or lower the window"
        )
    if chat and not any(turns.any() for turns in scored):
        raise MoyuError(f"data {source!r} has conversations and no turn of the role 'assistant', so nothing is scored")
    return Documents(tokens, scored if chat else None, start)


def start_of(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before any text; None where it puts none."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[0] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else None


def conversation(messages: list[dict[str, str]], tokenizer: Any, source: str) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[T]` of a conversation, and which of them the assistant wrote, bool `[T]`.

    Raises: MoyuError where the tokenizer has no chat template, or one that writes earlier turns in another way later.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise MoyuError(
            f"data {source!r} has conversations and the model's tokenizer no chat template; give plain text, or a "
            "model with one"
        )

    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise MoyuError(
                f"data {source!r} has a conversation with the turn {message!r}; each needs a role and a content"
            )

    def tokens(count: int, prompt: bool) -> list[int]:
        try:
            ids = tokenizer.apply_chat_template(messages[:count], add_generation_prompt=prompt, return_dict=False)
        except (TemplateError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages[:count]) or "none"
            raise MoyuError(
                f"the chat template of the tokenizer refuses a conversation in data {source!r}, with the turns {roles} "
                f"({error}); leave such conversations out, or give plain text"
            ) from error
        return list(ids)

    ids = tokens(len(messages), prompt=False)
    scored = torch.zeros(len(ids), dtype=torch.bool)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = tokens(index, prompt=True) if index else [], tokens(index + 1, prompt=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise MoyuError(
                f"the chat template of this tokenizer writes turn {index} of a conversation in data {source!r} in "
                "another way once more turns follow, so it cannot be told which tokens are the assistant's; split such "
                "conversations, or give plain text"
            )
        scored[len(before) : len(after)] = True
    return torch.tensor(ids, dtype=torch.int64), scored


def join(parts: Sequence[Documents]) -> Documents:
    """The documents of several sources, one after the other."""
    tokens = [document for part in parts for document in part.tokens]
    start = parts[0].start
    if all(part.scored is None for part in parts):
        return Documents(tokens, start=start)
    all_scored = [
        part.scored or [torch.ones_like(document, dtype=torch.bool) for document in part.tokens] for part in parts
    ]
    return Documents(tokens, [scored for part in all_scored for scored in part], start)


def hold_back(documents: Documents, count: int, source: str) -> tuple[Documents, Documents]:
    """Split off the last `count` documents for validation: (training, validation)."""
    if len(documents.tokens) <= count:
        raise MoyuError(
            f"data {source!r} has {len(documents.tokens)} document(s), and data.validation_documents asks to hold back "
            f"{count}; give more documents (JSON lines, one document a line) or lower it"
        )
    scored, tokens = documents.scored, documents.tokens
    first = replace(documents, tokens=tokens[:-count], scored=scored and scored[:-count])
    return first, replace(documents, tokens=tokens[-count:], scored=scored and scored[-count:])


def training_text(settings: Data, tokenizer: Any, window: int, sources: Sequence[str]) -> tuple[Documents, Documents]:
    """The documents of all `sources` as (training, validation)."""
    parts = [
        tokenise(read_texts(source, settings.text_field), tokenizer, source, window, settings.max_tokens)
        for source in sources
    ]
    return hold_back(join(parts), settings.validation_documents, ", ".join(settings.sources))


def overlap(train: Documents, test: Documents, n: int = 13) -> float:
    """Share of the test text's n-grams of tokens that occur in the training text (contamination check)."""

    def grams(documents: Documents) -> set[bytes]:
        return {row.numpy().tobytes() for doc in documents.tokens if len(doc) >= n for row in doc.unfold(0, n, 1)}

    seen, wanted = grams(train), grams(test)
    return len(seen & wanted) / max(len(wanted), 1)
