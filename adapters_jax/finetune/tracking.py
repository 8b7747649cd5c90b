"""Trackers: the records of `metrics.jsonl`, written by the clients of tracking libraries as well.

A record has the number of a step and metrics by name. `Run.log` writes records as lines of
`metrics.jsonl`; what `tracked` yields writes them to trackers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError, file_errors, needed
from adapters_jax.files.atomic import write_file
from adapters_jax.files.untrusted import read_json

_LOG = logging.getLogger(__name__)

Write = Callable[[int, dict[str, float]], None]  # writes the metrics of a step
PROJECT = "adapters-jax"  # unless the library's own variable names another one
KEPT = "tracking.json"  # by what the trackers know a run, to go on with it


class TrackingError(UserError, RuntimeError):
    """A tracker's library raised an error, such as of the network."""


@contextlib.contextmanager
def tracked(
    trackers: str | Iterable[str], directory: str | Path, *, config: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Opens trackers; within, a function writes records to all of them.

    Their settings are those of the libraries: `wandb login`, `WANDB_MODE=offline` and
    `WANDB_PROJECT`; `MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME`; `TRACKIO_DIR`,
    `TRACKIO_SPACE_ID` and `TRACKIO_PROJECT`. The project is "adapters-jax" unless they name one.

    Args:
        trackers: "tensorboard", "wandb", "mlflow" or "trackio", or several of them.
        directory: a directory, whose name is that of the run. The files of TensorBoard and W&B are
            in it, and `tracking.json`: a second call on it goes on with the same run.
        config: settings that are written with a new run; values are what JSON can hold.

    Yields:
        The function. A record has numbers by name, and "step", which is 0 by default; mappings of
        numbers are joined by /, as "dev/accuracy". Arrays of one number are read from the device.

    Raises:
        UserError: a tracker is unknown, nobody is logged in, or a metric is not a number.
        MissingPackageError: its library is not installed.
        TrackingError: its library raised an error.

    Example:
        >>> with tracked([], "logs/first", config={"rank": 8}) as log:  # of no tracker
        ...     log({"step": 1, "loss": 0.7, "dev": {"accuracy": 0.5}})
    """
    names = [trackers] if isinstance(trackers, str) else [*dict.fromkeys(trackers)]
    check_trackers(names)
    place = _Place(Path(directory), config or {})
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(_opened(name, place)) for name in names}

        def log(record: Mapping[str, Any]) -> None:
            found = _numbers(record)
            for name, write in writers.items():
                with _errors(name):
                    write(int(record.get("step", 0)), found)

        yield log


@contextlib.contextmanager
def _opened(name: str, place: _Place) -> Iterator[Write]:
    """Opens a tracker, and closes it; what it raises then does not hide what ended the run."""
    tracker = TRACKERS[name].open(place)
    with _errors(name):
        write = tracker.__enter__()
    try:
        yield write
    except BaseException as reason:
        try:
            tracker.__exit__(type(reason), reason, reason.__traceback__)
        except Exception as error:
            _LOG.warning("warning: the tracker %s: %s: %s", name, type(error).__name__, error)
        raise
    with _errors(name):
        tracker.__exit__(None, None, None)


def check_trackers(names: Iterable[str]) -> None:
    """Raises what `tracked` raises for trackers that are unknown, not installed or not logged in.

    Example:
        >>> check_trackers(["clearml"])
        Traceback (most recent call last):
        adapters_jax.errors.UserError: there is no tracker 'clearml'; there are tensorboard, ...
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}; there are {', '.join(TRACKERS)}")
        package = TRACKERS[name].package
        with needed(f"the tracker {name}", package, name):
            importlib.import_module(package)
        if name == "wandb":
            _check_login()


def _check_login() -> None:
    """Raises UserError where W&B would ask for a key in the middle of a run."""
    import wandb

    online = wandb.setup().settings.mode == "online"
    with _errors("wandb"):
        nobody = online and not wandb.login(prompt=False)
    if nobody:
        raise UserError(
            "the tracker wandb: nobody is logged in; write `wandb login` or set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to keep the files until `wandb sync`"
        )


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turns what a library raises into a TrackingError; their clients raise errors of all kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise TrackingError(f"the tracker {name}: {type(error).__name__}: {error}") from error


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a record by name, those of mappings with a path."""
    found = _flat(record)
    for name, value in found.items():
        if np.ndim(value) or isinstance(value, str):
            got = f"of shape {np.shape(value)}" if np.ndim(value) else repr(value)
            raise UserError(f"the metric {name} is {got}, expected a number")
    return {name: float(value) for name, value in found.items() if name != "step"}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The values of a mapping and of those in it, by path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = above + name
        found |= _flat(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return found


@dataclass(frozen=True)
class _Place:
    """Where a run is, and its configuration."""

    directory: Path
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.directory.resolve().name

    def kept(self) -> dict[str, str]:
        """By what each tracker knows the run, as far as it was opened before."""
        path = self.directory / KEPT
        return read_json(path) if path.is_file() else {}

    def keep(self, tracker: str, identity: str) -> None:
        """Notes by what a tracker knows the run."""
        with file_errors(self.directory, "made"):
            self.directory.mkdir(parents=True, exist_ok=True)
        known = json.dumps({**self.kept(), tracker: identity}, indent=2)
        write_file(self.directory / KEPT, f"{known}\n".encode())


@contextlib.contextmanager
def _tensorboard(place: _Place) -> Iterator[Write]:
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(place.directory / "tensorboard")) as writer:
        if "tensorboard" not in place.kept():
            text = json.dumps(place.config, indent=2, ensure_ascii=False)
            writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))
            place.keep("tensorboard", "tensorboard")

        def write(step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # nothing is lost with a killed process

        yield write


@contextlib.contextmanager
def _wandb(place: _Place) -> Iterator[Write]:
    import wandb

    identity = place.kept().get("wandb") or secrets.token_hex(4)
    place.keep("wandb", identity)
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=place.name,
        id=identity,
        resume="allow",
        dir=str(place.directory.resolve()),  # its service may have another working directory
        config=dict(place.config),
        settings=wandb.Settings(console="off"),  # which would wrap stdout, and keep progress bars
    ) as run:
        # W&B's own steps only rise, and those of a baseline begin again.
        run.define_metric("*", step_metric="step")
        yield lambda step, metrics: run.log({"step": step, **metrics})


@contextlib.contextmanager
def _mlflow(place: _Place) -> Iterator[Write]:
    import mlflow

    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    known = place.kept().get("mlflow")
    # What it prints goes to stderr, since stdout has the results of commands.
    with contextlib.redirect_stdout(sys.stderr):
        run = mlflow.start_run(run_id=known, run_name=None if known else place.name)
    ended = "FAILED"
    try:
        if known is None:
            place.keep("mlflow", run.info.run_id)
            # Its settings have no levels, nor may their names have a pattern's stars.
            flat = _flat(place.config).items()
            mlflow.log_params({re.sub(r"[^/\w.\- ]", "_", path): x for path, x in flat})
        yield lambda step, metrics: mlflow.log_metrics(metrics, step=step)
        ended = "FINISHED"
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            mlflow.end_run(ended)


@contextlib.contextmanager
def _trackio(place: _Place) -> Iterator[Write]:
    import trackio

    known = place.kept().get("trackio")
    with contextlib.redirect_stdout(sys.stderr):
        run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=known or place.name,
            config=dict(place.config),
            resume="must" if known else "never",
            embed=False,
        )
    place.keep("trackio", run.name)
    try:
        yield lambda step, metrics: run.log(metrics, step=step)
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()


class _Tracker(NamedTuple):
    """How to write to one library: its package, and what opens a run to write to.

    Its extra in `pyproject.toml` has the tracker's name.
    """

    package: str
    open: Callable[[_Place], AbstractContextManager[Write]]


TRACKERS = {
    "tensorboard": _Tracker("tensorboardX", _tensorboard),
    "wandb": _Tracker("wandb", _wandb),
    "mlflow": _Tracker("mlflow", _mlflow),
    "trackio": _Tracker("trackio", _trackio),
}
