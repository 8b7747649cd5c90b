"""Loads finished runs; the task of a run makes the object, such as a predictor."""

from pathlib import Path
from typing import Any

from adapters_jax.finetune.pretrained.record import ANY_BASE, record_of
from adapters_jax.finetune.run_directory import find_run
from adapters_jax.finetune.tasks import read_run
from adapters_jax.finetune.tasks.generator import Generator
from adapters_jax.finetune.tasks.prediction import Predictor


def load_predictor(
    path: str | Path,
    *,
    revision: str | None = None,
    model: str | None = None,
    any_base: bool = False,
) -> Predictor:
    """Loads a finished run that predicts: its base, with its adapter on it.

    Args:
        path: the run's directory, or the id of an exported run on the Hugging Face Hub.
        revision: a branch, tag or commit on the Hub.
        model: the directory or id of the base, if it has changed since training.
        any_base: warn of files of the base that changed since training, instead of refusing them.

    Returns:
        The predictor; `predictor.predict([text])` returns a `Prediction` for each text.

    Raises:
        RunError: the run is absent or damaged, its task generates, or files of the base changed.
        AdapterFileError: the adapter is damaged, or was trained on another base.
        AssetError: the pinned model could not be fetched.

    Example:
        >>> predictor = load_predictor("runs/reviews")  # doctest: +SKIP
        >>> predictor.predict(["A great film."])  # doctest: +SKIP
        [ClassPrediction(text='A great film.', text_pair=None, label='1', probabilities={...})]
        >>> load_predictor("./no-run")
        Traceback (most recent call last):
        adapters_jax.finetune.run_directory.RunConfigError: no run at no-run: it has no ...
    """
    return _open("predict", path, revision, model, any_base)


def load_generator(
    path: str | Path,
    *,
    revision: str | None = None,
    model: str | None = None,
    any_base: bool = False,
) -> Generator:
    """Loads a finished run that generates: its base, with its adapter on it.

    Args:
        path, revision, model, any_base: as in `load_predictor`.

    Returns:
        The generator; `generator.generate([prompt])` yields a text for each prompt.

    Raises:
        RunError: the run is absent or damaged, its task predicts, or files of the base changed.
        AdapterFileError, AssetError: as in `load_predictor`.

    Example:
        >>> generator = load_generator("runs/restaurants")  # doctest: +SKIP
        >>> print(*generator.generate(["name: Aromi, food: Thai"]))  # doctest: +SKIP
        Aromi serves Thai food.
    """
    return _open("generate", path, revision, model, any_base)


def _open(
    command: str, path: str | Path, revision: str | None, model: str | None, any_base: bool
) -> Any:
    run = find_run(path, revision)
    task, config = read_run(run, command)
    config |= {"model": model or config["model"], ANY_BASE: any_base}
    record_of(config["model"]).check(run, config, any_base)
    return task.open(run, config)
