"""Directories of images: a folder for each class, or a table of file names; paths alone."""

import logging
import os
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from adapters_jax.errors import first_few
from adapters_jax.finetune.data.files import DataError, Found, Rows, place, refuse

_log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
IMAGE, LABEL, FILE_NAME = "image", "label", "file_name"


def read_images(directory: Path, read_file: Callable[[Path], Rows]) -> Found:
    """Reads the paths of a directory's images.

    Args:
        directory: it has a folder for each class; or `metadata.csv` (or `.jsonl`, `.parquet`) with
            a column `file_name` and others; or images alone, to predict. What begins with a dot is
            left out, and other files that are not read are logged.
        read_file: reads that table.

    Returns:
        The columns "image" and "label", "image" and those of the table, or "image" alone; the paths
        are from the directory on, so that what is drawn by them is the same wherever it lies.

    Raises:
        DataError: there are no images, or the table names a file that is not in the directory.
    """
    table = next((directory / name for name in TABLES if (directory / name).is_file()), None)
    if table is not None:
        return _of_table(directory, read_file(table))
    classes = _inside(directory, "*/*")
    files = classes or _inside(directory, "*")
    if not files:
        raise DataError(
            f"{directory.as_posix()}: a directory without images; expected a folder of images for "
            f"each class, or {TABLES[0]} with a column {FILE_NAME}; for several files of rows "
            f"write a pattern, as '{directory.as_posix()}/*.jsonl'"
        )
    _log_others(directory, {directory / path for path in files})
    if not classes:
        return [IMAGE], [(path.name, [path.name]) for path in files]
    return [IMAGE, LABEL], [
        (path.as_posix(), [path.as_posix(), path.parent.name]) for path in files
    ]


def _inside(directory: Path, pattern: str) -> list[Path]:
    """The images of a pattern, from the directory on."""
    images = (p for p in directory.glob(pattern) if p.suffix.lower() in SUFFIXES)
    return sorted(p for each in images if not _is_hidden(p := each.relative_to(directory)))


def home_of(table: Path) -> Path:
    """The directory from which a table of images, or a directory of them, names its paths."""
    return table if table.is_dir() else table.parent


def _is_hidden(inside: Path) -> bool:
    """Whether a path is of a hidden file or folder, as those that macOS and Jupyter write."""
    return any(part.startswith(".") for part in inside.parts)


def _log_others(directory: Path, images: Collection[Path]) -> None:
    """Logs the files of a directory that are not read."""
    others = sorted(
        inside.as_posix()
        for path in directory.rglob("*")
        if path not in images
        and not _is_hidden(inside := path.relative_to(directory))
        and path.is_file()
    )
    if others:
        _warn_of(directory.resolve(), first_few(others))


@lru_cache(64)  # rows are read for their layout first, and then again
def _warn_of(directory: Path, others: str) -> None:
    _log.warning(
        "%s: not read: %s; an image lies in the folder of its class, and its name ends in %s",
        directory.as_posix(),
        others,
        ", ".join(SUFFIXES),
    )


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
