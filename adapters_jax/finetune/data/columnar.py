"""Parquet and Arrow files, by pyarrow.

The types of the columns, and all that the headers inside of a file claim, are checked before
pyarrow reads a row. It then reads some rows at a time.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from adapters_jax.errors import OF_DAMAGE, first_few, needed
from adapters_jax.finetune.data.files import MOST_ROW, DataError, Found, Record, check_columns
from adapters_jax.finetune.data.unfolding import (
    DELTA,
    DICTIONARY,
    Budget,
    Page,
    check_kinds,
    claims_of,
    pages_of,
)

_ROWS, _PIECE = 2**13, 2**24  # rows read at a time, fewer if they have more bytes than these
_REPEATED = 16  # bytes of repeated texts that may be read at a time, for each byte of the file
_FEW = 2**6  # rows; where no more may be read at a time, texts are read as their dictionary's
_MOST_PAGES = 2**20  # of a column in a group of rows
_OF_PAGE = 2**10  # bytes that count for a page itself, which takes time however short it is
_MOST_THRIFT = 2**15  # items of a list in the metadata of a Parquet file
# Types of pyarrow, by the ends of the names of their tests.
_VIEW = ("string_view", "binary_view")
_TEXT = (*_VIEW, "string", "large_string", "binary", "large_binary")
_PLAIN = (*_TEXT, "primitive", "null", "decimal", "fixed_size_binary")
_PADDED = 8  # bytes before the messages of an Arrow file


def read_columnar(path: Path, raw: bytes, kind: str) -> Found:
    """Reads a Parquet file, or an Arrow file or stream as the `datasets` library saves it."""
    header: list[str] = []
    records: list[Record] = []
    for header, rows in read_batches(path, raw, kind):  # noqa: B007
        records += [(f"row {n}", row) for n, row in enumerate(rows, len(records) + 1)]
    if not records:
        raise DataError(f"{path.as_posix()}: it has no rows")
    return header, records


def read_batches(path: Path, raw: Any, kind: str) -> Iterator[tuple[list[str], list[list[Any]]]]:
    """The names of the columns and the next rows, again and again.

    Args:
        path: the path of the file, for messages.
        raw: its bytes, or a map of them.
        kind: "parquet" or "arrow".
    """
    subject, instead = f"{path.as_posix()}: reading it", "save it as JSON lines"
    with needed(subject, "pyarrow", "parquet", instead):
        import pyarrow
    budget = Budget(path, min(len(raw), path.stat().st_size))  # of a .gz file, its own bytes
    try:
        for batch in (_of_parquet if kind == "parquet" else _of_arrow)(raw, budget):
            batch.validate(full=True)  # a damaged file may have offsets behind its end
            names = class_names(batch.schema)
            for column in batch.columns:
                _count(column, budget)
            columns = [
                _of_classes(column.to_pylist(), names.get(name))
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            ]
            yield batch.schema.names, [list(row) for row in zip(*columns, strict=True)]
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, MemoryError, struct.error, *OF_DAMAGE) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path.as_posix()}: cannot be read as {kind}: {why}") from None


def _of_parquet(raw: bytes, budget: Budget) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    def opened(**options: Any) -> Any:
        return parquet.ParquetFile(
            pyarrow.BufferReader(raw), thrift_container_size_limit=_MOST_THRIFT, **options
        )

    file = opened()
    metadata = file.metadata
    check_columns(budget.path, metadata.num_columns)
    check_types(budget.path, file.schema_arrow)
    check_kinds(memoryview(raw), _MOST_THRIFT)
    unpacked, groups = Budget(budget.path, budget.size), range(metadata.num_row_groups)
    plans = [_planned(raw, metadata, i, budget, unpacked) for i in groups]
    tables = sorted({name for _, names in plans for name in names})
    exact = opened(read_dictionary=tables, metadata=metadata) if tables else file
    for i, (rows, names) in enumerate(plans):
        # By groups: pyarrow does not join lists of dictionaries.
        yield from (exact if names else file).iter_batches(batch_size=rows, row_groups=[i])


def _planned(
    raw: bytes, metadata: Any, number: int, budget: Budget, unpacked: Budget
) -> tuple[int, set[str]]:
    """How many rows of a group are read at a time, and which columns by their dictionaries.

    What the group claims is in both budgets: `unpacked` is that of pages as pyarrow unpacks them.
    """
    group = metadata.row_group(number)
    budget.spend(rows=group.num_rows)
    piece = max(_PIECE, _REPEATED * budget.size)
    rows, size, names = _ROWS, 0, set[str]()
    for i in range(group.num_columns):
        column, about = group.column(i), metadata.schema.column(i)
        pages = _pages(raw, column)
        for page in pages:
            budget.spend(values=0 if page.table else page.values)
            unpacked.spend(size=page.size + _OF_PAGE)
            size += page.size
        if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
            unpacked.spend(size=about.length * column.num_values)
        if column.physical_type != "BYTE_ARRAY":
            continue
        if any(page.encoding == DELTA for page in pages):
            # Each text begins as the last one, so it may be as long as all pages.
            rows = min(rows, piece // (2 * sum(page.size for page in pages) + 1) + 1)
            if about.max_repetition_level:
                raise DataError(
                    f"{budget.path.as_posix()}: the lists of {column.path_in_schema} are encoded "
                    "as DELTA_BYTE_ARRAY; save them with the encoding PLAIN"
                )
        coded = sum(p.values for p in pages if p.encoding in DICTIONARY and not p.table)
        largest = max((page.size for page in pages if page.table), default=0)
        if coded * largest > piece:  # each may be the longest text of the dictionary
            few = piece // largest
            if about.max_repetition_level or few < _FEW:
                names.add(column.path_in_schema)
            else:
                rows = min(rows, few)
    return min(rows, _PIECE * group.num_rows // (size + 1) + 1), names


def _pages(raw: bytes, column: Any) -> list[Page]:
    """The pages of a column of a group of rows."""
    if not column.num_values:  # its offsets may be 0
        return []
    table, begin = column.dictionary_page_offset, column.data_page_offset
    begin = table if column.has_dictionary_page and 0 < table < begin else begin
    end = begin + column.total_compressed_size
    if not 0 <= begin <= end <= len(raw):
        raise ValueError(f"{column.path_in_schema} is behind the end of the file")
    found = list(islice(pages_of(memoryview(raw), begin, end), _MOST_PAGES))
    values = sum(page.values for page in found if not page.table)
    if values != column.num_values:
        raise ValueError(
            f"the pages of {column.path_in_schema} have {values} values, and its metadata say "
            f"{column.num_values}"
        )
    return found


def _of_arrow(raw: bytes, budget: Budget) -> Iterator[Any]:
    """The batches of rows of an Arrow file, whose messages are a stream, or of a stream."""
    import pyarrow

    source = pyarrow.py_buffer(raw)[_PADDED if raw[:6] == b"ARROW1" else 0 :]
    stream = pyarrow.ipc.open_stream(source)
    check_columns(budget.path, len(stream.schema))
    check_types(budget.path, stream.schema)
    unpacked = Budget(budget.path, budget.size)
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        body = memoryview(message.body if message.body is not None else b"")
        rows, values, size = claims_of(memoryview(message.metadata), body)
        budget.spend(rows, values)
        unpacked.spend(size=size)
    for batch in stream:
        for at in range(0, batch.num_rows, _ROWS):
            yield batch.slice(at, _ROWS)


def check_types(path: Path, schema: Any) -> None:
    """Raises DataError for columns whose values have other types than texts, numbers, times, bytes,
    and lists and structures of these: others can repeat values without end.
    """
    wrong = [f"{field.name} has {field.type}" for field in schema if not _is_known(field.type)]
    if wrong:
        raise DataError(
            f"{path.as_posix()}: columns of types that are not read: {first_few(wrong)}; save them "
            "as texts, numbers, times, bytes, lists or structures of these"
        )


def _is_known(kind: Any) -> bool:
    from pyarrow import BaseExtensionType, types

    if isinstance(kind, BaseExtensionType):
        return _is_known(kind.storage_type)
    if types.is_dictionary(kind):
        return _is(kind.value_type, _PLAIN)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_known(kind.value_type)
    if types.is_fixed_size_list(kind):  # pyarrow divides by the size
        return kind.list_size > 0 and _is_known(kind.value_type)
    if types.is_map(kind):
        return _is_known(kind.key_type) and _is_known(kind.item_type)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        return 0 < len({*names}) == len(names) and all(_is_known(field.type) for field in kind)
    return _is(kind, _PLAIN)


def _is(kind: Any, tests: Sequence[str]) -> bool:
    from pyarrow import types

    return any(getattr(types, f"is_{test}")(kind) for test in tests)


def _count(array: Any, budget: Budget) -> None:
    """Counts the bytes of a column's texts, however often one of them is repeated."""
    import pyarrow
    from pyarrow import types

    kind = array.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        _count(array.storage, budget)
    elif types.is_map(kind):
        pair = pyarrow.struct([("key", kind.key_type), ("value", kind.item_type)])
        _count(array.cast(pyarrow.list_(pair)), budget)
    elif types.is_struct(kind):
        for part in array.flatten():
            _count(part, budget)
    elif types.is_nested(kind):
        _count(array.flatten(), budget)
    elif types.is_dictionary(kind) and _is(kind.value_type, _TEXT):
        ids = array.indices.drop_null().to_numpy()
        _count_texts(_lengths(array.dictionary)[ids], kind.value_type, budget)
    elif _is(kind, _TEXT):
        _count_texts(_lengths(array), kind, budget)


def _count_texts(lengths: Any, kind: Any, budget: Budget) -> None:
    budget.spend(size=int(lengths.sum()))
    longest = int(lengths.max(initial=0))
    if longest > MOST_ROW and "string" in str(kind):  # others may be images
        raise DataError(
            f"{budget.path.as_posix()}: a text of {longest} bytes, expected at most {MOST_ROW}; "
            "split it into rows"
        )


def _lengths(array: Any) -> Any:
    """The bytes of each text, 0 for one that is missing."""
    import numpy as np
    import pyarrow.compute

    if not _is(array.type, _VIEW):
        return pyarrow.compute.binary_length(array).fill_null(0).to_numpy()
    # The kernel does not know views; each is 16 bytes and begins with the length.
    end = array.offset + len(array)
    numbers = np.frombuffer(array.buffers()[1], "<i4", 4 * end)[4 * array.offset :: 4]
    return np.where(array.is_valid().to_numpy(zero_copy_only=False), numbers, 0)


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of class ids by column, where the `datasets` library stored them in a schema."""
    stored = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(stored)["info"]["features"] if stored else {}
    except (ValueError, KeyError, TypeError):  # another program's metadata
        features = {}
    found = {}
    for name, feature in features.items() if isinstance(features, Mapping) else ():
        while isinstance(feature, Mapping) and isinstance(feature.get("feature"), Mapping):
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, Mapping) else None
        if isinstance(names, list) and all(isinstance(each, str) for each in names):
            found[name] = names
    return found


def _of_classes(values: list[Any], names: list[str] | None) -> list[Any]:
    """A column with its classes by name, if it has such; -1 there says that a row has none."""
    if names is None:
        return values
    return [None if value == -1 else _named(value, names) for value in values]


def _named(values: Any, names: list[str]) -> Any:
    """A class id, or lists of them, by their names; other values as they are."""
    if isinstance(values, list):
        return [_named(value, names) for value in values]
    known = isinstance(values, int) and 0 <= values < len(names)
    return names[values] if known else values
