"""Directories of images: a folder for each class, or a table of file names; paths alone."""

import os
from collections.abc import Callable
from pathlib import Path

from adapters_jax.finetune.data.files import DataError, Found, Rows, place, refuse

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE, LABEL, FILE_NAME = "image", "label", "file_name"


def read_images(directory: Path, read_file: Callable[[Path], Rows]) -> Found:
    """Reads the paths of a directory's images.

    Args:
        directory: it has a folder for each class; or `metadata.csv` (or `.jsonl`, `.parquet`) with
            a column `file_name` and others.
        read_file: reads that table.

    Returns:
        The columns "image" and "label", or "image" and those of the table; the paths are from the
        directory on, so that what is drawn by them is the same wherever it lies.

    Raises:
        DataError: there are no images, or the table names a file that is not in the directory.
    """
    table = next((directory / name for name in TABLES if (directory / name).is_file()), None)
    if table is not None:
        return _of_table(directory, read_file(table))
    files = sorted(p for p in directory.glob("*/*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{directory.as_posix()}: a directory without images; expected a folder of images for "
            f"each class, or {TABLES[0]} with a column {FILE_NAME}; for several files of rows "
            f"write a pattern, as '{directory.as_posix()}/*.jsonl'"
        )
    return [IMAGE, LABEL], [
        (inside, [inside, path.parent.name])
        for path in files
        for inside in (path.relative_to(directory).as_posix(),)
    ]


def _of_table(directory: Path, rows: Rows) -> Found:
    header, records, table = rows
    if FILE_NAME not in header:
        raise DataError(
            f"{table}: no column {FILE_NAME!r} for the images; the columns are {', '.join(header)}"
        )
    at = header.index(FILE_NAME)
    inside = os.path.realpath(directory)
    paths = [directory / str(values[at]) for _, values in records]
    wrong = [
        f"{values[at]!r} ({place(line)})"
        for (line, values), path in zip(records, paths, strict=True)
        if not os.path.isfile(path) or not Path(os.path.realpath(path)).is_relative_to(inside)
    ]
    refuse(table, wrong, "not an image in this directory: ", "")
    named = [IMAGE if i == at else name for i, name in enumerate(header)]
    return named, [
        (line, [str(x) if i == at else x for i, x in enumerate(values)]) for line, values in records
    ]
