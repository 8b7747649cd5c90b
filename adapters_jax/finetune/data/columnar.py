"""Parquet and Arrow files, by pyarrow."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import needed
from adapters_jax.finetune.data.files import DataError, Found, Record

MOST_MEMORY = 2**32  # bytes of the values; a file of 1 MB may hold a text a billion times
_ROWS = 256  # read at a time


def read_columnar(path: Path, raw: bytes, kind: str) -> Found:
    """Reads a Parquet file, or an Arrow file or stream as the `datasets` library saves it."""
    subject, instead = f"{path.as_posix()}: reading it", "save it as JSON lines"
    with needed(subject, "pyarrow", "parquet", instead):
        import pyarrow
    header: list[str] = []
    records: list[Record] = []
    size = 0
    try:
        for batch in _batches(raw, kind):
            batch.validate(full=True)  # a damaged file may have offsets behind its end
            header = batch.schema.names
            size += batch.nbytes
            if size > MOST_MEMORY:
                raise DataError(
                    f"{path.as_posix()}: its {len(raw)} bytes hold more than the limit of "
                    f"{MOST_MEMORY} bytes of values; split it into several files"
                )
            names = class_names(batch.schema)
            columns = [
                _named(column.to_pylist(), names.get(name))
                for name, column in zip(header, batch.columns, strict=True)
            ]
            first = len(records) + 1
            rows = zip(*columns, strict=True)
            records += [(f"row {n}", list(row)) for n, row in enumerate(rows, first)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path.as_posix()}: cannot be read as {kind}: {why}") from None
    if not records:
        raise DataError(f"{path.as_posix()}: it has no rows")
    return header, records


def _batches(raw: bytes, kind: str) -> Iterator[Any]:
    """The batches of rows of a file."""
    import pyarrow

    source = pyarrow.BufferReader(raw)
    if kind == "parquet":
        from pyarrow import parquet

        yield from parquet.ParquetFile(source).iter_batches(batch_size=_ROWS)
    elif raw[:6] == b"ARROW1":
        file = pyarrow.ipc.open_file(source)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(source)


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


def _named(values: Any, names: list[str] | None) -> Any:
    """Class ids, or lists of them, by their names; other values as they are."""
    if names is None:
        return values
    if isinstance(values, list):
        return [_named(value, names) for value in values]
    known = isinstance(values, int) and 0 <= values < len(names)
    return names[values] if known else values
