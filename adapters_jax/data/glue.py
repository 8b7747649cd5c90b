"""Tasks: train, dev and test of one's own files, of GLUE in its own layouts, and of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters_jax.data.datasets import (
    SPLIT_SEED,
    Dataset,
    TaskData,
    class_names,
    make_dataset,
    numbers_of,
    split,
)
from adapters_jax.data.tables import (
    DataError,
    FilePath,
    Table,
    complete_rows,
    make_table,
    read_rows,
    tsv_rows,
)


def load_task(
    train: FilePath,
    dev: FilePath | None = None,
    test: FilePath | None = None,
    *,
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    task: str = "classification",
    metrics: Sequence[str] | None = None,
    split_seed: int = SPLIT_SEED,
) -> TaskData:
    """A task from one to three files of the same columns.

    Args:
        train: the file to train on.
        dev: the file to select on; None holds out a tenth of `train`.
        test: the file to report on; None holds out a tenth of `train`.
        text: as for `read_rows`, like `text_pair` and `label`.
        text_pair: the second text column, for pairs.
        label: the label column.
        task: as for `make_dataset`.
        metrics: names, the one selected on first; None is accuracy and F1, or Pearson and Spearman.
        split_seed: of the rows held out.

    Returns:
        The task, named after the training file.

    Raises:
        DataError: as for `read_rows`, `make_dataset` and `split`.

    Example:
        >>> import json, tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.jsonl")
        >>> lines = [json.dumps({"text": f"row {i}", "label": i % 2}) for i in range(40)]
        >>> _ = path.write_text("\\n".join(lines))
        >>> data = load_task(path)
        >>> data.name, len(data.train), len(data.dev), len(data.test), data.metrics
        ('rows', 32, 4, 4, ('accuracy', 'f1'))
    """
    paths = {"train": train, "dev": dev, "test": test}
    tables = {
        part: read_rows(path, text, text_pair, label)
        for part, path in paths.items()
        if path is not None
    }
    if metrics is None:
        metrics = ("pearson", "spearman") if task == "regression" else ("accuracy", "f1")
    name = Path(train).name.partition(".")[0]
    return _task_data(name, _datasets(tables, task), metrics, split_seed)


def _datasets(tables: dict[str, Table], task: str) -> dict[str, Dataset]:
    """Each part as a dataset with the classes of "train"."""
    names = class_names(tables["train"]) if task == "classification" else None
    return {part: make_dataset(table, task, names) for part, table in tables.items()}


def _task_data(name: str, parts: dict[str, Dataset], metrics: Sequence[str], seed: int) -> TaskData:
    """Hold the part that is absent, "dev" or "test", out of "train"."""
    fractions = {part: 0.0 if part in parts else 0.1 for part in ("dev", "test")}
    train, dev, test = split(parts["train"], seed, **fractions)
    return TaskData(name, train, parts.get("dev", dev), parts.get("test", test), tuple(metrics))


@dataclass(frozen=True)
class Glue:
    """One GLUE task: the columns of its files, and its metrics, the one selected on first.

    Args:
        text: the text column.
        text_pair: the second text column, if any.
        label: the label column.
        metrics: names for `metrics.compute`.
        task: "classification" or "regression".
        header: the columns where the files have no header line.
        dev: the name of the dev file.
        skips_incomplete: whether the official files have broken rows, to be left out.
    """

    text: str
    text_pair: str | None
    label: str
    metrics: tuple[str, ...] = ("accuracy",)
    task: str = "classification"
    header: tuple[str, ...] | None = None
    dev: str = "dev.tsv"
    skips_incomplete: bool = False


GLUE = {
    "cola": Glue(
        "sentence", None, "label", ("matthews",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": Glue("sentence", None, "label"),
    "mrpc": Glue("#1 String", "#2 String", "Quality", ("accuracy", "f1")),
    "qqp": Glue(
        "question1", "question2", "is_duplicate", ("accuracy", "f1"), skips_incomplete=True
    ),
    "stsb": Glue("sentence1", "sentence2", "score", ("pearson", "spearman"), task="regression"),
    "mnli": Glue("sentence1", "sentence2", "gold_label", dev="dev_matched.tsv"),
    "qnli": Glue("question", "sentence", "label"),
    "rte": Glue("sentence1", "sentence2", "label"),
    "wnli": Glue("sentence1", "sentence2", "label"),
}


def read_glue(name: str, directory: FilePath) -> dict[str, Dataset]:
    """The labelled files of a GLUE task, in the official layout.

    Broken rows of QQP's official files are left out, with a warning that counts them.

    Args:
        name: a key of `GLUE`, in any case, with or without a hyphen.
        directory: with `train.tsv` and `dev.tsv` (MNLI: `dev_matched.tsv`).

    Returns:
        "train" and "dev".

    Raises:
        DataError: an unknown task, or as for `read_rows` and `make_dataset`.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> for name in ("train.tsv", "dev.tsv"):
        ...     _ = (directory / name).write_text("sentence\\tlabel\\nGood.\\t1\\nBad.\\t0\\n")
        >>> read_glue("SST-2", directory)["dev"].texts
        [('Good.', None), ('Bad.', None)]
    """
    spec = GLUE[glue_name(name)]
    tables = {}
    for part, file in (("train", "train.tsv"), ("dev", spec.dev)):
        path = Path(directory) / file
        rows = tsv_rows(path, spec.header)
        rows = complete_rows(path, rows) if spec.skips_incomplete else rows
        tables[part] = make_table(path, rows, spec.text, spec.text_pair, spec.label)
    return _datasets(tables, spec.task)


def load_glue(name: str, directory: FilePath, split_seed: int = SPLIT_SEED) -> TaskData:
    """A GLUE task: its official dev file to select on, and a tenth of train held out as test.

    GLUE's own test files have no labels. Published dev figures compare with `dev`.

    Args:
        name: as for `read_glue`.
        directory: as for `read_glue`.
        split_seed: of the rows held out.

    Returns:
        The task, with GLUE's metrics.

    Raises:
        DataError: as for `read_glue` and `split`.

    Example:
        >>> load_glue("boolq", "data")
        Traceback (most recent call last):
        adapters_jax.data.tables.DataError: no GLUE task 'boolq'; there are: \
cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli
    """
    name = glue_name(name)
    return _task_data(name, read_glue(name, directory), GLUE[name].metrics, split_seed)


def glue_name(name: str) -> str:
    """The key of `GLUE` that a name means; raises DataError for none."""
    key = name.lower().replace("-", "")
    if key not in GLUE:
        raise DataError(f"no GLUE task {name!r}; there are: {', '.join(GLUE)}")
    return key


def movie_reviews(directory: FilePath) -> Dataset:
    """The 10,605 movie review sentences of Hutto and Gilbert, positive if their valence is above 0.

    Args:
        directory: of the unpacked asset "movie-reviews".

    Returns:
        Sentences with the classes "negative" and "positive"; a valence of 0 counts as negative.

    Raises:
        DataError: the file is absent or is not the 10,605 rows it should be.

    Example:
        >>> movie_reviews(".")
        Traceback (most recent call last):
        adapters_jax.data.tables.DataError: movieReviewSnippets_GroundTruth.txt: no such file

    Reference:
        C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
        of Social Media Text", ICWSM 2014.
    """
    path = Path(directory) / "movieReviewSnippets_GroundTruth.txt"
    table = make_table(path, tsv_rows(path), "text", None, "sentiment")
    valence = numbers_of(table)
    if len(valence) != 10_605 or not all(-4 <= number <= 4 for number in valence):
        raise DataError(
            f"{path.as_posix()}: {len(valence)} rows with valences from {min(valence)} to "
            f"{max(valence)}, expected 10605 from -4 to 4; delete its directory and fetch it again"
        )
    return Dataset(
        table.texts,
        np.array([number > 0 for number in valence], np.int32),
        ("negative", "positive"),
    )


def load_movie_reviews(directory: FilePath, split_seed: int = SPLIT_SEED) -> TaskData:
    """The demo's task: movie review sentences, a tenth each for dev and test.

    Args:
        directory: as for `movie_reviews`.
        split_seed: of the rows held out.

    Returns:
        The task, selected on accuracy.

    Raises:
        DataError: as for `movie_reviews`.

    Example:
        >>> load_movie_reviews(".")
        Traceback (most recent call last):
        adapters_jax.data.tables.DataError: movieReviewSnippets_GroundTruth.txt: no such file
    """
    parts = {"train": movie_reviews(directory)}
    return _task_data("movie-reviews", parts, ("accuracy", "f1"), split_seed)
