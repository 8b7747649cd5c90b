"""Reads files as rows of values; a registry has the formats by suffix.

A format is one function and one line of `READERS`. The function gets the file's bytes, unpacked if
`.gz` follows the suffix, and returns the names of the columns and the records. Anything wrong with
a file raises a `DataError` that names the file, the line and the remedy.
"""

import contextlib
import gc
import glob
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from adapters_jax.files.hub import is_id
from adapters_jax.finetune.data.columnar import read_columnar
from adapters_jax.finetune.data.delimited import read_conll, read_csv, read_tsv, read_txt
from adapters_jax.finetune.data.files import (
    NAMED,
    Found,
    Reader,
    Rows,
    place,
    read_bytes,
    without_header,
)
from adapters_jax.finetune.data.files import DataError as DataError
from adapters_jax.finetune.data.files import FilePath as FilePath
from adapters_jax.finetune.data.hub_rows import PREFIX, read_hub
from adapters_jax.finetune.data.images import read_images
from adapters_jax.finetune.data.json_rows import read_json, read_jsonl, rows_of
from adapters_jax.finetune.data.streaming import index, streams

READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": partial(read_columnar, kind="parquet"),
    ".arrow": partial(read_columnar, kind="arrow"),
    ".conll": read_conll,
    ".txt": read_txt,
}


def read_file(path: FilePath | Rows) -> Rows:
    """Reads the rows of a file, in the format of its suffix.

    Args:
        path: the path of the file, where `.gz` may follow the suffix; a pattern such as
            `"part-*.jsonl"`, whose files are read as one; `"rows.tsv#text,labels"` for a CSV or TSV
            file without a header; a directory of images; or a data set of the Hugging Face Hub, as
            `"hub:user/name#config:split@revision"`. Rows that are read already stay as they are.

    Returns:
        The names of the columns, and each record with the line that it starts on.

    Raises:
        DataError: the file does not exist, `READERS` lacks its suffix, it does not parse, or a row
            has more or fewer fields than there are columns.
        MissingPackageError: a Parquet or Arrow file without pyarrow, or a data set of the Hub
            without huggingface_hub.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.tsv")
        >>> _ = path.write_text("text\\tstars\\nGood\\t5\\n")
        >>> read_file(path)
        Rows(header=['text', 'stars'], records=[(2, ['Good', '5'])], path='.../rows.tsv')
    """
    return path if isinstance(path, Rows) else Rows.of(path, *_read(path))


def _read(path: FilePath) -> Found:
    if str(path).startswith(PREFIX):
        return read_hub(str(path), _read_files)
    path = Path(path)
    if NAMED in path.name and not path.exists():
        return _read_named(path)
    if path.is_dir():
        return read_images(path, read_file)
    if glob.has_magic(str(path)) and not path.exists():
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise DataError(f"{path.as_posix()}: no file has a name of this pattern")
        return _read_files(files)
    return _by_suffix(path)


def _by_suffix(path: Path) -> Found:
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix not in READERS:
        *others, last = READERS
        if not path.suffix and not path.exists():
            name = path.as_posix()
            of_hub = f"; for a data set of the Hugging Face Hub write {PREFIX}{name}"
            raise DataError(f"{name}: this path does not exist{of_hub if is_id(name) else ''}")
        raise DataError(
            f"{path.as_posix()}: unknown suffix {suffix!r}; use {', '.join(others)} or {last}, or "
            "one of them with .gz"
        )
    if streams(path):
        return index(path)
    with _without_collecting():
        return READERS[suffix](path, read_bytes(path))


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Rows have no cycles; looking for some, again and again, takes most of the time of reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_named(path: Path) -> Found:
    """Reads a file whose first line is a row; its columns are named behind `NAMED`."""
    place, _, names = str(path).partition(NAMED)
    file, header = Path(place), [name.strip() for name in names.split(",")]
    if without_header(file) == "" or not all(header) or len({*header}) < len(header):
        raise DataError(
            f"{path.as_posix()}: expected the names of the columns behind {NAMED}, each once, of a "
            f"CSV or TSV file without a header, as in rows.tsv{NAMED}text,labels"
        )
    first, records = _by_suffix(file)
    return header, [(1, [*first]), *records]


def _read_files(files: Sequence[Path]) -> Found:
    """Reads several files as one; a column that a file lacks is None there."""
    if len(files) == 1:
        return _read(files[0])
    found = (
        (f"{place(line)} of {file.name}", dict(zip(rows.header, values, strict=True)))
        for file in files
        for rows in (read_file(file),)
        for line, values in rows.records
    )
    return rows_of(f"{files[0].as_posix()} and others", found)


def title_of(path: FilePath, *others: FilePath) -> str:
    """A short name of files of rows, for the names of runs.

    Example:
        >>> title_of("data/train.jsonl.gz"), title_of("data/part-*.csv"), title_of("a.csv", "b.csv")
        ('train', 'part', 'a-and-1-more')
    """
    name = re.sub(r"[^\w.-]+", "-", Path(path).name.partition(".")[0]).strip("-") or "rows"
    return f"{name}-and-{len(others)}-more" if others else name
