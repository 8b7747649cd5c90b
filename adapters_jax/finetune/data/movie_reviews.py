"""The demo's data: sentences from movie reviews, positive or negative."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from adapters_jax.finetune.data.datasets import TaskData, hold_out, numbers_of
from adapters_jax.finetune.data.files import Rows
from adapters_jax.finetune.data.readers import DataError, FilePath, read_bytes, read_tsv
from adapters_jax.finetune.data.tables import Table, read_rows


def movie_reviews(directory: FilePath) -> Table:
    """Reads the 10,605 sentences of Hutto and Gilbert, positive if their valence is above 0.

    Args:
        directory: the directory of the unpacked asset "movie-reviews".

    Returns:
        Sentences with the classes "negative" and "positive"; a valence of 0 counts as negative.

    Raises:
        DataError: the file is absent, or does not have these 10,605 rows.

    Example:
        >>> movie_reviews(".")
        Traceback (most recent call last):
        adapters_jax.finetune.data.files.DataError: movieReviewSnippets_GroundTruth.txt: ...

    Reference:
        C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis
        of Social Media Text", ICWSM 2014.
    """
    path = Path(directory) / "movieReviewSnippets_GroundTruth.txt"
    rows = Rows.of(path, *read_tsv(path, read_bytes(path)))
    table = read_rows(rows, label="sentiment")
    valence = numbers_of(table)
    if len(valence) != 10_605 or not all(-4 <= number <= 4 for number in valence):
        raise DataError(
            f"{path.as_posix()}: {len(valence)} rows with valences from {min(valence)} to "
            f"{max(valence)}, expected 10605 from -4 to 4; delete its directory and fetch it again"
        )
    labels = np.array([number > 0 for number in valence], np.int32)
    return replace(table, labels=labels, label_names=("negative", "positive"))


def load_movie_reviews(directory: FilePath) -> TaskData:
    """Loads the demo's data: sentences from movie reviews, a tenth each held out for dev and test.

    Returns:
        The rows; accuracy is the metric to select on.

    Raises:
        DataError: as for `movie_reviews`.

    Example:
        >>> load_movie_reviews(".")
        Traceback (most recent call last):
        adapters_jax.finetune.data.files.DataError: movieReviewSnippets_GroundTruth.txt: ...
    """
    parts = {"train": movie_reviews(directory)}
    return hold_out("movie-reviews", parts, ("accuracy", "f1"))
