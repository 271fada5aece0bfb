"""Documents of files, data sets and what is shipped: texts, or conversations."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from moyu_train.errors import MoyuError

BUILTIN = {
    "state-union-train": "state_union_train.jsonl.gz",
    "state-union-test": "state_union_test.jsonl.gz",
    "wikipedia-passages": "wikipedia_passages.jsonl.gz",
    "wikipedia-articles": "wikipedia_articles.jsonl.gz",
}

MESSAGES = "messages"
TABLES = {".csv": {"path": "csv"}, ".tsv": {"path": "csv", "sep": "\t"}, ".parquet": {"path": "parquet"}}  # of datasets
TEXT_SUFFIXES = (".txt", ".md", ".raw", ".json", ".jsonl", ".gz", *TABLES)


def read_texts(source: str, text_field: str, setting: str = "data.text_field") -> Iterable[Any]:
    """Documents of a file of JSON lines or a table, a plain text file (one document), a data set, or `builtin:<name>`.

    A data set is a folder or a hub id, with its subset and split after colons where they are not the first and `train`
    (`Salesforce/wikitext:wikitext-2-raw-v1:test`), and is streamed: no more is read than is taken. A file named `*.raw`
    is WikiText as published: one document an article, rows joined as in the literature. Where the rows have `messages`
    and no text field, the documents are conversations: lists of `{"role": …, "content": …}`.

    Args: setting: the one that chose `text_field`, for the message where there is no such field.
    """
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in BUILTIN:
            raise MoyuError(f"data {source!r} is unknown; shipped texts: {', '.join('builtin:' + n for n in BUILTIN)}")
        source = str(resources.files("moyu_train") / "data" / BUILTIN[name])
    path = Path(source)
    suffixes = "".join(path.suffixes[-2:]).lower()
    local = suffixes.endswith(TEXT_SUFFIXES) or source.startswith((".", "/"))
    if local and not path.exists() and not Path(source.partition(":")[0]).is_dir():
        raise MoyuError(f"text file {source!r} does not exist; give a JSON lines file, a text file or a hub id")
    if path.is_file() and path.stat().st_size == 0:
        raise MoyuError(f"text file {source!r} is empty; give a file with at least one document")
    if path.is_file() and "json" not in suffixes and path.suffix.lower() not in TABLES:
        try:
            text = path.read_text(encoding="utf-8")
            return _articles(text) if path.suffix == ".raw" else [text]
        except UnicodeDecodeError as error:
            raise MoyuError(
                f"text file {source!r} is not UTF-8 text ({error.reason}); JSON lines may be "
                "gzipped, plain text may not"
            ) from error
    rows = _rows(source, path.is_file())
    first = next(rows, {})
    field = MESSAGES if text_field not in first and MESSAGES in first else text_field
    if field not in first:
        raise MoyuError(
            f"data {source!r} has no field {text_field!r} (it has {', '.join(first) or 'no rows'}); set {setting}"
        )
    return _documents(_values(chain([first], rows), field, source), field, source)


def _values(rows: Iterable[dict[str, Any]], field: str, source: str) -> Iterator[Any]:
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise MoyuError(
                f"data {source!r} has no field {field!r} in row {number} (it has {', '.join(row) or 'none'}), and has "
                "it in the first; give all rows the same fields, with null where a row has no text"
            )
        yield row[field]


def _documents(values: Iterable[Any], field: str, source: str) -> Iterator[Any]:
    """Texts, or conversations, that hold something."""
    kind = list if field == MESSAGES else str
    for value in values:
        if value is not None and not isinstance(value, kind):
            raise MoyuError(
                f"data {source!r} has a {type(value).__name__} in the field {field!r}, where a {kind.__name__} is "
                "expected; set data.text_field to the field with the text"
            )
        if value and (not isinstance(value, str) or value.strip()):
            yield value


def _rows(source: str, file: bool) -> Iterator[dict[str, Any]]:
    try:
        table = TABLES.get(Path(source).suffix.lower())
        if file and not table:
            yield from _json_rows(Path(source))
            return
        import datasets

        if file and table:
            yield from datasets.load_dataset(**table, data_files=source, split="train", streaming=True)
            return
        name, subset, split, *_ = [*source.split(":"), "", ""]
        yield from datasets.load_dataset(name, subset or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises many types here; the cause stays attached
        raise MoyuError(f"data {source!r} could not be read: {error}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, or of one array, gzipped or not. Not by `datasets`: pyarrow, which reads JSON
    there, crashes on deep nesting."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        first = file.readline()
        if first.lstrip().startswith("["):
            rows = json.loads(first + file.read())
        else:
            rows = (_parsed(line, number) for number, line in enumerate(chain([first], file), start=1) if line.strip())
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"row {number} is a {type(row).__name__}, not an object")
            yield row


def _parsed(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _articles(text: str) -> list[str]:
    """WikiText split before each title (` = Title = `); end to end the text that papers measure on."""
    rows = "\n\n".join(f"{line}\n" if line.strip() else "" for line in text.splitlines())
    return [article for article in re.split(r"(?m)^(?= = [^=]+ = $)", rows) if article.strip()]
