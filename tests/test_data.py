"""Text and conversations to tokens, and which of them are scored."""

import csv
import hashlib
import itertools
import json
from pathlib import Path

import datasets
import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_settings, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moyu_train.data import Documents, hold_back, join, tokenise
from moyu_train.errors import MoyuError
from moyu_train.evaluation.perplexity import score
from moyu_train.pipeline import Run, run_stage
from moyu_train.recipe import Recipe
from moyu_train.texts import read_texts

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
UNSTABLE = "{% for m in messages %}{% if not loop.last %}old {% endif %}{{ m['content'] }}{% endfor %}"
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def chat(template: str = TEMPLATE) -> object:
    made = tokenizer()
    made.chat_template = template
    return made


def test_only_the_assistants_turns_are_scored() -> None:
    documents = tokenise([TALK], chat(), "talk", 2)
    assert documents.scored is not None
    said = documents.tokens[0][documents.scored[0]]
    assert chat().decode(said) == "hello</s>see you</s>"
    assert chat().decode(documents.tokens[0]) == chat().apply_chat_template(TALK, tokenize=False)
    labels = documents.packed_labels(8, seed=0)
    assert labels.shape == documents.packed(8, seed=0).shape
    assert ((labels == documents.packed(8, seed=0)) | (labels == -100)).all()
    assert 0 < (labels == -100).sum() < labels.numel()


def test_conversations_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(MoyuError, match="tokenizer no chat template"):
        tokenise([TALK], tokenizer(), "talk", 2)
    with pytest.raises(MoyuError, match="writes turn 1 of a conversation in data 'talk' in another way"):
        tokenise([TALK], chat(UNSTABLE), "talk", 2)
    with pytest.raises(MoyuError, match=r"with the turns user, assistant.* \(no system turn\); leave"):
        tokenise([TALK], chat("{{ raise_exception('no system turn') }}"), "talk", 2)
    with pytest.raises(MoyuError, match="each needs a role and a content"):
        tokenise([[{"role": "user"}]], chat(), "talk", 2)
    with pytest.raises(MoyuError, match="no turn of the role 'assistant'"):
        tokenise([TALK[:1]], chat(), "talk", 2)


def test_a_chat_recipe_trains_on_the_scored_tokens_alone(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model")) | {"predictor": None}
    chat().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"messages": [{"role": "user", "content": f"say {i} " * 9}, *TALK[1:]]}) for i in range(40)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    settings["data"] |= {"train": str(tmp_path / "talk.jsonl")}
    run = Run(Recipe.model_validate(settings))
    run_stage(run, "calibrate")
    assert run_stage(run, "finetune")["tokens"] == 1024
    assert run.validation.scored is not None
    assert len(run.validation.scored) == 2


def test_a_limit_takes_pieces_worth_taking() -> None:
    few, many = Documents([torch.arange(1000)] * 3), Documents([torch.arange(300) + i for i in range(100)])
    assert [len(t) for t in few.first(900).tokens] == [300] * 3
    taken = many.first(1000).tokens
    assert sorted(len(t) for t in taken) == [232, 256, 256, 256]
    starts = [int(t[0]) for t in taken]
    assert starts == sorted(starts)
    assert starts != list(range(4))
    assert many.first(None) is many
    short = Documents([torch.arange(20)] * 100)
    assert short.first(200).total == 200


def test_wikitext_is_split_into_articles_and_joined_as_in_papers(tmp_path: Path) -> None:
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = One = \n \n Some text . \n = = Part = = \n More . \n \n = Two = \n \n Other . \n")
    articles = read_texts(str(path), "text")
    assert articles == [
        " = One = \n\n\n\n\n Some text . \n\n\n = = Part = = \n\n\n More . \n\n\n\n\n",
        " = Two = \n\n\n\n\n Other . \n",
    ]


def test_a_data_set_is_streamed_by_name_subset_and_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"b-{split}.jsonl").write_text("".join(f'{{"text": "{split} {i}"}}\n' for i in range(5)))
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: broken.jsonl\n- config_name: b\n  data_files:\n"
        "  - {split: train, path: b-train.jsonl}\n  - {split: test, path: b-test.jsonl}\n---\n"
    )
    assert list(read_texts(f"{tmp_path}:b:test", "text")) == [f"test {i}" for i in range(5)]
    assert next(iter(read_texts(f"{tmp_path}:b", "text"))) == "train 0"
    with pytest.raises(MoyuError, match=r"could not be read"):
        list(read_texts(f"{tmp_path}:c", "text"))
    taken = []
    endless = (taken.append(i) or "some words" for i in itertools.count())
    assert tokenise(endless, tokenizer(), "endless", 8, max_tokens=35).total == 40
    assert len(taken) == 4


def test_tables_are_read_by_their_field(tmp_path: Path) -> None:
    rows = [("first, with a comma", 1), ("second\nof two lines", 2)]
    csv_file, parquet = tmp_path / "a.csv", tmp_path / "a.parquet"
    with csv_file.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "number"), *rows])
    datasets.Dataset.from_list([{"text": text, "number": number} for text, number in rows]).to_parquet(parquet)
    (tmp_path / "a.tsv").write_text("number\ttext\n1\tfirst, with a comma\n")
    for path in (csv_file, parquet):
        assert list(read_texts(str(path), "text")) == [text for text, _ in rows]
    assert list(read_texts(str(tmp_path / "a.tsv"), "text")) == ["first, with a comma"]
    with pytest.raises(MoyuError, match=r"has no field 'body' \(it has text, number\)"):
        read_texts(str(csv_file), "body")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"\n')
    with pytest.raises(MoyuError, match=r"a\.jsonl' could not be read: line 3, column"):
        list(read_texts(str(tmp_path / "a.jsonl"), "text"))


def test_shipped_passages_are_documents() -> None:
    texts = list(read_texts("builtin:wikipedia-passages", "text"))
    assert len(texts) == len(set(texts)) == 2938
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest().startswith("c8a41bb7939968f3")


def test_shipped_articles_are_whole_and_others_than_the_passages() -> None:
    articles = list(read_texts("builtin:wikipedia-articles", "text"))
    assert len(articles) == 98
    assert min(map(len, articles)) > 2000
    titles = list(read_texts("builtin:wikipedia-articles", "title"))
    assert {"Anarchism", "Algorithm", "Alaska"} < set(titles)
    assert titles[-1] == "American Revolutionary War"  # the last are held back for validation
    assert not any("{{" in article or "[[" in article for article in articles)


def test_several_texts_are_one_with_the_turns_of_each(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model"))
    plain = settings["data"]["train"]
    lines = [json.dumps({"messages": TALK})] * 3
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    parts = [tokenise(read_texts(plain, "text"), chat(), plain, 2), tokenise([TALK] * 3, chat(), "talk", 2)]
    both = join(parts)
    assert both.scored is not None
    assert [len(t) for t in both.tokens] == [len(t) for part in parts for t in part.tokens]
    assert all(turns.all() for turns in both.scored[:-3])
    assert not both.scored[-1].all()
    assert join(parts[:1]).scored is None
    settings["data"] |= {"train": [plain, plain]}
    twice, once = (
        Run(Recipe.model_validate(settings)),
        Run(Recipe.model_validate(tiny_settings(tmp_path, settings["model"]))),
    )
    assert len(twice.train.tokens) == 2 * len(once.train.tokens) + 2
    assert twice.validation.digest() == once.validation.digest()
    with pytest.raises(ValueError, match=r"data.train names no text"):
        Recipe.model_validate(settings | {"data": settings["data"] | {"train": []}})


def test_validation_keeps_whole_documents_and_their_turns() -> None:
    documents = tokenise([TALK] * 5, chat(), "talk", 2)
    first, last = hold_back(documents, 2, "talk")
    assert (len(first.tokens), len(last.tokens)) == (3, 2)
    assert first.scored is not None
    assert last.scored is not None
    assert (len(first.scored), len(last.scored)) == (3, 2)
    assert documents.digest() != Documents(documents.tokens).digest()


def test_a_user_without_text_trains_on_what_the_model_writes(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, save_tiny(tmp_path / "model")) | {"predictor": None}
    settings["data"] |= {"train": "self"}
    settings["finetune"] |= {"tokens": 4096, "epochs": 4}
    run = Run(Recipe.model_validate(settings))
    assert run.train.total >= 1024
    assert len(run.validation.tokens) == 2
    (path,) = (tmp_path / "run").glob("own-text-*.jsonl")
    written = path.read_bytes()
    run_stage(run, "calibrate")
    assert run_stage(run, "finetune")["tokens"] == 4096

    assert Run(Recipe.model_validate(settings)).train.digest() == run.train.digest()
    again = Run(Recipe.model_validate(settings | {"run": str(tmp_path / "again")}))
    assert again.train.digest() == run.train.digest()
    other = Run(Recipe.model_validate(settings | {"seed": 1}))
    assert other.train.digest() != run.train.digest()
    assert path.read_bytes() == written


def starting() -> PreTrainedTokenizerFast:
    """The tokenizer of `tiny`, as Gemma's and OPT's: it puts a token before any text."""
    found = tokenizer()
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", found.bos_token_id)])
    found.backend_tokenizer.post_processor = template
    return found


def test_every_window_begins_with_what_the_tokenizer_puts_before_text() -> None:
    plain = tokenise(["abcdefg", "hij"], tokenizer(), "x", 2)
    found = tokenise(["abcdefg", "hij"], starting(), "x", 2)
    start = starting().bos_token_id
    assert (found.start, plain.start) == (start, None)
    assert [ids.tolist() for ids in found.tokens] == [ids.tolist() for ids in plain.tokens], "it is in no document"
    a = plain.tokens[0][0].item()
    assert [(i, ids.tolist()) for i, ids in found.windows(4)] == [
        (0, [start, a, a + 1, a + 2]), (0, [start, a + 3, a + 4, a + 5]), (0, [start, a + 6]),
        (1, [start, a + 7, a + 8, a + 9]),
    ]  # fmt: skip
    packed = found.packed(4, 0)
    assert sorted(packed.tolist()) == [[start, a + i, a + i + 1, a + i + 2] for i in (0, 3, 6)]
    assert torch.equal(found.packed_labels(4, 0), packed)
    assert found.digest() != plain.digest()
    assert found.longest().tolist() == [start, *range(a, a + 7)]
    train, held = hold_back(join([found, found]), 1, "x")
    assert train.start == held.start == held.first(2).start == start


def test_text_of_a_tokenizer_with_a_start_is_all_scored() -> None:
    found = tokenise(["abcdefg" * 10], starting(), "x", 2)
    assert sum(score(tiny_model(), found, 16, "x").tokens) == 70
    found = tokenise(["abcdefg" * 10], tokenizer(), "x", 2)
    assert sum(score(tiny_model(), found, 16, "x").tokens) == 65, "the first of each of five windows is not"


def test_conversations_start_once() -> None:
    talker = starting()
    talker.chat_template = "<s>" + chat().chat_template
    found = tokenise([TALK], talker, "talk", 2)
    plain = tokenise([TALK], chat(), "talk", 2)
    assert torch.equal(found.tokens[0], plain.tokens[0])
    assert found.scored
    assert plain.scored
    assert torch.equal(found.scored[0], plain.scored[0])
    labels = found.packed_labels(len(plain.tokens[0]) + 1, 0)[0]
    assert torch.equal(labels[1:] != -100, plain.scored[0])
