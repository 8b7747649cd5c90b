"""CSV, TSV and CoNLL: fields between separators; and lines of text."""

import contextlib
import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from adapters_jax.finetune.data.files import (
    MOST_ROW,
    DataError,
    Found,
    Record,
    check_columns,
    lines_of,
    text_stream,
)

_log = logging.getLogger(__name__)
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
TOKENS, TAGS, TEXT = "tokens", "ner_tags", "text"


def read_csv(path: Path, raw: bytes) -> Found:
    """Reads the rows of a CSV file, where quotes enclose fields.

    Where the header has no comma, semicolons or tabs may separate the fields, which is logged.
    """
    separator = separator_of(path, raw[: raw.find(b"\n") % (len(raw) + 1)])
    return _headed(path, _parse_csv(path, raw, separator))


def separator_of(path: Path, header: bytes) -> str:
    """What separates the fields of a CSV file, by its header; logged if it is no comma."""
    separator = next((s for s in _SEPARATORS if s.encode() in header), ",")
    if separator != ",":
        _log.info("%s: %s separate its fields", path.as_posix(), _SEPARATORS[separator])
    return separator


def _parse_csv(path: Path, raw: bytes, separator: str) -> Iterator[Record]:
    """The fields of each record but blank lines at the end."""
    line, blank = 1, list[int]()
    with reading_csv(path, lambda: line), text_stream(path, raw, "") as stream:
        reader = csv.reader(stream, strict=True, delimiter=separator)
        for fields in reader:
            if fields:
                yield from ((n, []) for n in blank)
                blank.clear()
                yield line, fields
            else:
                blank.append(line)
            line = reader.line_num + 1


@contextlib.contextmanager
def reading_csv(path: Path, line: Callable[[], int]) -> Iterator[None]:
    """Within, fields may be long, and an error of the module names the line where its row begins.

    The module's limit of a field's length is for the whole process.
    """
    # 131,072 characters by default, which a document exceeds.
    limit = csv.field_size_limit(MOST_ROW)
    try:
        yield
    except csv.Error as error:
        raise DataError(
            f"{path.as_posix()}, line {line()}: {error}; check the quotes of this row"
        ) from None
    finally:
        csv.field_size_limit(limit)


def read_tsv(path: Path, raw: bytes, header: Sequence[str] | None = None) -> Found:
    """Reads the rows of a TSV file; quotes are plain text. `header` is for files without one."""
    lines = lines_of(path, raw)
    return _headed(path, ((n, line.removesuffix("\r").split("\t")) for n, line in lines), header)


def _headed(path: Path, records: Iterator[Record], header: Sequence[str] | None = None) -> Found:
    """Splits the header from the records; a blank line becomes a record of blank fields."""
    header = next(records)[1] if header is None else header
    check_columns(path, len(header))
    blank = [""] * len(header)
    rows = [(n, fields if any(fields) else blank) for n, fields in records]
    if not rows:
        raise DataError(f"{path.as_posix()}: no rows below the header")
    return list(header), rows


def read_conll(path: Path, raw: bytes) -> Found:
    """Reads sentences in CoNLL columns: a token a line, its tag last, a blank line between them.

    A row is a sentence: its tokens, each further column, and the tags, as lists. Documents begin
    with `-DOCSTART-`, which is no token.
    """
    separator = "\t" if b"\t" in raw else None
    sentences: list[tuple[int, list[list[str]]]] = []
    fresh = True
    for number, line in lines_of(path, raw):
        fields = line.split(separator) if line.strip() else []
        if not fields or fields[0] == "-DOCSTART-":
            fresh = True
            continue
        if fresh:
            sentences.append((number, []))
        fresh = False
        sentences[-1][1].append([field.strip() for field in fields])
    if not sentences:
        raise DataError(f"{path.as_posix()}: it has no tokens, only lines between documents")
    return _columns_of(path, sentences)


def _columns_of(path: Path, sentences: list[tuple[int, list[list[str]]]]) -> Found:
    """Turns sentences of tokens into rows of columns; every token must have the same columns."""
    width = len(sentences[0][1][0])
    uneven = [
        f"line {first + i} has {len(fields)}"
        for first, tokens in sentences
        for i, fields in enumerate(tokens)
        if len(fields) != width
    ]
    if width < 2 or uneven:
        raise DataError(
            f"{path.as_posix()}: expected a token and its tag on each line, in {max(width, 2)} "
            f"columns; {uneven[0] if uneven else f'line {sentences[0][0]} has 1'}"
        )
    between = [f"column {i}" for i in range(2, width)]
    rows: list[Record] = [
        (n, [list(column) for column in zip(*tokens, strict=True)]) for n, tokens in sentences
    ]
    return [TOKENS, *between, TAGS], rows


def read_txt(path: Path, raw: bytes) -> Found:
    """Reads the lines of a text file that are not blank, each a row with the column "text"."""
    lines = lines_of(path, raw)
    return [TEXT], [(n, [line.strip()]) for n, line in lines if line.strip()]
