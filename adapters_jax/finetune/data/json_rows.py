"""JSON lines, JSON arrays, and SQuAD's JSON; each key of a row is a column.

The rules of `texts.parse_json` hold: bounded depth, no duplicate keys, finite numbers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.finetune.data.files import (
    DataError,
    Found,
    Line,
    Record,
    check_columns,
    lines_of,
    place,
    text_of,
)
from adapters_jax.texts import parse_json

MOST_ARRAY = 2**28  # bytes of a file that is parsed at once
SPARSEST = 64  # columns for each value that a row has
_INK = re.compile(rb"\S")
# An escaped backslash before "u0000" is text, so backslashes count in pairs.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def read_jsonl(path: Path, raw: bytes) -> Found:
    """Reads the rows of a file with one JSON object a line."""
    rows = ((n, parse_object(path, n, line)) for n, line in lines_of(path, raw))
    return rows_of(path.as_posix(), rows)


def parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """The object of a line, which has no keys if it is blank; raises DataError if it is none."""
    row = _parse(path, number, line) if line.strip() else {}
    if not isinstance(row, dict):
        raise DataError(
            f"{path.as_posix()}, line {number}: a JSON {type(row).__name__}; each line must be "
            'an object like {"text": "...", "label": "..."}'
        )
    return row


def read_json(path: Path, raw: bytes) -> Found:
    """Reads a JSON array of objects, or SQuAD's layout; or JSON lines, whatever the suffix."""
    end = raw.find(b"\n") + 1
    first = raw[:end].removeprefix(b"\xef\xbb\xbf").rstrip()
    if first.startswith(b"{") and first.endswith(b"}") and _INK.search(raw, end):
        return read_jsonl(path, raw)
    if len(raw) > MOST_ARRAY:
        raise DataError(
            f"{path.as_posix()}: {len(raw)} bytes of JSON, expected at most {MOST_ARRAY}; write a "
            "file of many rows as JSON lines"
        )
    values = _parse(path, None, text_of(path, raw))
    items = values.get("data") if isinstance(values, dict) else values
    if not isinstance(items, list) or not items or not all(isinstance(x, dict) for x in items):
        raise DataError(
            f"{path.as_posix()}: expected an array of objects, "
            'as [{"text": "...", "label": "..."}], or the layout of SQuAD'
        )
    if any("paragraphs" in item for item in items):
        items = list(_questions(path, items))
    if not items:
        raise DataError(f"{path.as_posix()}: its paragraphs have no question")
    return rows_of(path.as_posix(), ((f"row {n}", row) for n, row in enumerate(items, 1)))


def rows_of(place: str, rows: Iterable[tuple[Line, Mapping[str, Any]]]) -> Found:
    """Found of mappings as rows of values; a key that a row lacks is None there.

    Raises:
        DataError: rows share few keys, so that most values would be None; or there are too many.
    """
    header: dict[str, None] = {}
    records: list[Record] = []
    given = 0
    for line, row in rows:
        if not row.keys() <= header.keys():
            header |= dict.fromkeys(row)
            check_columns(place, len(header))
        records.append((line, [row.get(key) for key in header]))
        given += len(row)
        if len(header) * len(records) > 2**20 + SPARSEST * given:
            raise DataError(
                f"{place}: {len(header)} different keys in {len(records)} rows, and most rows lack "
                "most keys; give all rows the same keys"
            )
    for _, values in records:  # of rows before those that have further keys
        values.extend([None] * (len(header) - len(values)))
    return [*header], records


def _parse(path: Path, line: int | None, text: str) -> Any:
    """Parses a JSON text by the strict rules; `line` is for messages."""
    where = path.as_posix() if line is None else f"{path.as_posix()}, {place(line)}"
    if "\\u0000" in text and _NUL.search(text):
        raise DataError(f"{where}: a text has the character 0, which no text has; remove it")
    try:
        return parse_json(text)
    except UserError as error:
        raise DataError(f"{where}: {error}") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None


def _questions(path: Path, articles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The questions of SQuAD's articles, with the columns that the Hub's copies have."""
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = qa.get("answers") or []
                    yield {
                        "id": qa.get("id"),
                        "title": article.get("title"),
                        "context": paragraph["context"],
                        "question": qa["question"],
                        "answers": {
                            key: [answer[key] for answer in answers]
                            for key in ("text", "answer_start")
                        },
                    }
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path.as_posix()}: it has paragraphs, but not in the layout of SQuAD: {error!r}; "
            "expected data, paragraphs, context, qas, question and answers"
        ) from None
