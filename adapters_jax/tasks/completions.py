"""Rows that a decoder learns from: prompts with completions, or texts alone."""

from __future__ import annotations

from pathlib import Path

from adapters_jax.data.datasets import TaskData, key_of, split_rows, spread
from adapters_jax.data.glue import SPLIT_SEED
from adapters_jax.data.tables import FilePath, read_rows

METRICS = ("perplexity", "exact_match")


def load_completions(
    train: FilePath,
    dev: FilePath | None,
    test: FilePath | None,
    prompt: str,
    completion: str | None,
    *,
    limit: int | None = None,
    split_seed: int = SPLIT_SEED,
) -> TaskData:
    """A task from one to three files of the same columns.

    Args:
        train: the file to train on.
        dev: the file to select on; None holds out a tenth of `train`.
        test: the file to report on; None holds out a tenth of `train`.
        prompt: the column of the prompt. Rows of one prompt are held out together.
        completion: the column of what follows; None where `prompt` is of texts alone.
        limit: train on so many rows only, spread evenly.
        split_seed: of the rows held out.

    Returns:
        The task, its parts tables, named after the training file.

    Raises:
        DataError: as for `read_rows` and `split`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "rows.csv")
        >>> _ = path.write_text("p,c\\n" + "".join(f"{i // 2},{i}\\n" for i in range(40)))
        >>> data = load_completions(path, None, None, "p", "c")
        >>> len(data.train), len(data.dev), len(data.test)
        (32, 4, 4)
    """
    paths = {"train": train, "dev": dev, "test": test}
    parts = {n: read_rows(p, prompt, completion, None) for n, p in paths.items() if p is not None}
    fractions = {part: 0.0 if part in parts else 0.1 for part in ("dev", "test")}
    table = parts["train"]
    keys = [key_of(text) for text, _ in table.texts]
    rows = split_rows(keys, [0] * len(keys), split_seed, **fractions)
    held = {part: table.take(taken) for part, taken in zip(paths, rows, strict=True)}
    name = Path(train).name.partition(".")[0]
    few = held["train"].take(spread(len(held["train"]), limit))
    return TaskData(
        name, few, parts.get("dev", held["dev"]), parts.get("test", held["test"]), METRICS
    )
