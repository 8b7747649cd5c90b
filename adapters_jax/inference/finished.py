"""Loads finished runs; what comes back is the task's own, such as a predictor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters_jax.io.run_directory import find_run
from adapters_jax.tasks import read_run
from adapters_jax.tasks.base import Predictor
from adapters_jax.tasks.completion import Generator


def load_predictor(
    path: str | Path, *, revision: str | None = None, model: str | None = None
) -> Predictor:
    """Loads a run whose task predicts: its base again, and its adapter onto it.

    Args:
        path: of the run's directory, or the id of an exported run on the Hugging Face Hub.
        revision: a branch, tag or commit there.
        model: where the base is, if it is not where it was in training; it must be the same one.

    Returns:
        The predictor; `predictor.predict([(text, None)])` has a `Prediction` for each text.

    Raises:
        ValueError: no run, a damaged one, one whose task generates, or a base that is not the one
            it was trained on (`RunError`, `AdapterFileError`).
        AssetError: the pinned model could not be fetched.
    """
    return _open("predict", path, revision, model)


def load_generator(
    path: str | Path, *, revision: str | None = None, model: str | None = None
) -> Generator:
    """Loads a run whose task generates: its base again, and its adapter onto it.

    Args:
        path: of the run's directory, or the id of an exported run on the Hugging Face Hub.
        revision: a branch, tag or commit there.
        model: where the base is, if it is not where it was in training; it must be the same one.

    Returns:
        The generator; `generator.generate([prompt])` gives a text for each prompt.

    Raises:
        ValueError: no run, a damaged one, one whose task predicts, or a base that is not the one it
            was trained on (`RunError`, `AdapterFileError`).
        AssetError: the pinned model could not be fetched.
    """
    return _open("generate", path, revision, model)


def _open(command: str, path: str | Path, revision: str | None, model: str | None) -> Any:
    run = find_run(path, revision)
    task, config = read_run(run, command)
    return task.open(run, {**config, "model": model or config["model"]})
