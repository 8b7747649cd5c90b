"""Rows with labels, as the tasks on them load them."""

from pathlib import Path

from adapters_jax.finetune.tasks import TASKS


def load_labelled(train, dev=None, test=None, task="classification", metrics=(), **columns):
    """What a task makes of one to three files with these columns."""
    named = {"train": train, "dev": dev, "test": test}
    files = {part: Path(path) for part, path in named.items() if path is not None}
    return TASKS[task].load(files, columns, metrics)
