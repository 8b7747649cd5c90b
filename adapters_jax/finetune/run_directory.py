"""The directory of a run of the command line: its files, written and read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from adapters_jax.errors import OF_DAMAGE, AdapterFileError, FileSystemError, UserError, file_errors
from adapters_jax.files import hub
from adapters_jax.files.adapter import FILES
from adapters_jax.files.atomic import new_directory, write_file
from adapters_jax.files.lock import lock_directory, unlock_directory
from adapters_jax.files.manifest import CONFIG
from adapters_jax.files.stores import Mirror, address_of, names
from adapters_jax.files.untrusted import read_json

FORMAT = 1
_NEEDED: dict[str, Any] = {
    "format": int,
    "model": str,
    "base_sha256": str,
    "dtype": str,
    "max_length": int,
}
_COMBINED: dict[str, Any] = {"results": []}  # what export writes of a run of combined ones
_SCORES = {str: float}
_RESULT = {"method": str, "trainable_parameters": int, "test": _SCORES}
_TRAINED: dict[str, Any] = {  # what pages and cards show of a run with results
    "task": str,
    "method": str,
    "metrics": [str],
    "rows": {"train": int, "dev": int, "test": int},
    "optimizer": {},
    "data_sha256": str,
    "summary": {"dev": _SCORES, "results": [_RESULT]},
}


class RunError(UserError):
    """A run's directory exists but must not, is absent, or is damaged."""


class RunConfigError(RunError):
    """A run's `config.json` is absent, or cannot be read."""


@contextlib.contextmanager
def damage_errors(what: object, again: str = "") -> Iterator[None]:
    """Within, what damaged content raises becomes a RunError."""
    try:
        yield
    except OF_DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise RunError(f"{what} is damaged: {error!r}" + (f"; {again}" if again else "")) from error


class _File:
    """The path of a file of a run, or of a directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class Run:
    """One run's directory.

    Args:
        path: the path of the directory.
        mirror: its copy in an object store, for a run there.

    Example:
        >>> Run(Path("runs/demo")).adapter.as_posix()
        'runs/demo/adapter'
    """

    path: Path
    mirror: Mirror | None = None
    # The run's options, and what `predict` needs beside the adapter.
    config = _File("config.json")
    # The losses by step, and evaluations: one JSON object a line.
    metrics = _File("metrics.jsonl")
    # A plot of the loss and the dev metric, and the page that reports the run.
    curves, report = _File("curves.png"), _File("report.html")
    # What the page shows beside the configuration and the metrics: predictions, counts.
    findings = _File("findings.json")
    # What it resumes from; removed when the run is finished.
    checkpoints = _File("checkpoints")
    # The log-probabilities of a preference run's rows by the base without adapters.
    reference = _File("reference.safetensors")

    @property
    def adapter(self) -> Path:
        """The adapter's directory; an exported run has its files beside the configuration."""
        return self.path if (self.path / CONFIG).is_file() else self.path / "adapter"

    @classmethod
    def at(cls, name: str | Path) -> Run:
        """The run at a path; of an address in an object store, its directory on this machine.

        Example:
            >>> Run.at("gs://bucket/runs/demo").where
            'gs://bucket/runs/demo'
        """
        address = address_of(name)
        if address is None:
            return cls(Path(name))
        own = f"adapters-jax-{secrets.token_hex(8)}"
        path = Path(tempfile.gettempdir(), own, address.rpartition("/")[2])
        return cls(path, Mirror(path, address))

    @property
    def where(self) -> str:
        """The path for messages, or the address."""
        return self.mirror.address if self.mirror else self.path.as_posix()

    def named(self, path: Path) -> str:
        """A path in the run for messages: below its address, if it has one."""
        inside = path.relative_to(self.path).as_posix()
        return f"{self.mirror.address}/{inside}" if self.mirror else str(path)

    def pull(self) -> None:
        """Copies a run at an address to this machine.

        Raises:
            RunConfigError: there is none.
            FileSystemError: the store does not answer, or refuses.
        """
        if self.mirror is not None:
            self._make_parent()
            self.mirror.pull()
            if not self.path.exists():
                raise RunConfigError(f"no run at {self.where}: there are no files")

    def push(self) -> None:
        """Copies what changed to the run's address, if it has one.

        Raises:
            FileSystemError: the store does not answer, or refuses.
        """
        if self.mirror is not None:
            self.mirror.push()

    def writing(self) -> contextlib.AbstractContextManager[Any]:
        """Within, a directory of the run may be replaced: nothing is copied meanwhile."""
        return self.mirror.writing if self.mirror else contextlib.nullcontext()

    def leave(self) -> None:
        """Copies the run to its address, and removes it here; nothing is done without an address.

        Raises:
            FileSystemError: the store does not answer, or refuses; the run stays here.
        """
        if self.mirror is not None and self.path.exists():
            try:
                self.push()
            except FileSystemError as error:
                raise FileSystemError(f"{error}; the whole run is in {self.path}") from error
            self.drop()

    def drop(self) -> None:
        """Removes the directory of a run at an address."""
        if self.mirror is not None:
            shutil.rmtree(self.path.parent, ignore_errors=True)

    def _make_parent(self) -> None:
        # The copy of a run is for this user alone, as the store may be.
        self.path.parent.mkdir(0o700 if self.mirror else 0o777, parents=True, exist_ok=True)

    def refuse_existing(self) -> None:
        """Raises RunError if there is anything: a run is never overwritten."""
        if self.path.exists() or (self.mirror and names(self.mirror.address)):
            raise RunError(
                f"{self.where} exists already; give this run another --name, remove that one, or "
                f"resume it if it was interrupted: adapters-jax finetune --resume {self.where}"
            )

    def create(self, config: dict[str, Any]) -> None:
        """Creates the directory, which appears with its configuration or not at all."""
        self.refuse_existing()
        with file_errors(self.path, "made"):
            self._make_parent()
            beside = new_directory(self.path)
        try:
            with file_errors(self.path, "made"):
                Run(beside).write_config(config)
                beside.rename(self.path)
        except FileSystemError:
            shutil.rmtree(beside)
            self.refuse_existing()  # another process was faster
            raise
        try:
            self.push()
        except UserError:
            self.drop()
            raise

    def lock(self) -> FileLock:
        """Locks the run for this process, until the process ends or calls `unlock`.

        Raises:
            RunError: another process has locked it.
            FileSystemError: the directory cannot be written.
        """
        return lock_directory(self.path, RunError)

    def unlock(self, lock: FileLock) -> None:
        """Releases the lock."""
        unlock_directory(self.path, lock)

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes the configuration; an old one is replaced."""
        text = json.dumps({"format": FORMAT, **config}, indent=2, ensure_ascii=False)
        write_file(self.config, f"{text}\n".encode())

    def write_log(self, records: Iterable[dict[str, Any]]) -> None:
        """Writes all metrics; an old file is replaced."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_file(self.metrics, lines.encode())

    def log(self, record: dict[str, Any]) -> None:
        """Appends one record to the metrics; the file is valid after every line."""
        line = json.dumps(record) + "\n"
        with file_errors(self.metrics, "written"), self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)

    def read_log(self) -> list[dict[str, Any]]:
        """Reads all metrics; raises RunError if a line of the file is damaged."""
        with file_errors(self.metrics, "read", error=RunError):
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{self.metrics} is damaged: {error}") from error

    def read_config(self, kind: str | None = None) -> dict[str, Any]:
        """Reads the configuration; `finetune.tasks.read_run` also checks what its task needs.

        Args:
            kind: the expected kind of base, "encoder" or "decoder"; None accepts any.

        Raises:
            RunConfigError: it is absent or damaged.
            RunError: it lacks a key, or the base is of another kind.
        """
        if not os.path.isfile(self.config):
            raise RunConfigError(f"no run at {self.where}: it has no config.json{self._instead()}")
        try:
            config = read_json(self.config)
        except AdapterFileError as error:
            fix = f"there is no other copy: remove {self.where} and train again"
            if self.checkpoints.is_dir():
                fix = f"adapters-jax finetune --resume {self.where} restores it from a checkpoint"
            raise RunConfigError(f"{error}; {fix}") from error
        check_keys(self, config, _NEEDED)
        if config.get("summary", _COMBINED) != _COMBINED:
            check_keys(self, config, _TRAINED)
        found = config.get("kind", "encoder")
        if kind not in (None, found):
            raise RunError(f"{self.where} is a run on a base of kind {found}, expected {kind}")
        return config

    def _instead(self) -> str:
        """What a directory that is no run has, and the runs near it, to end a message."""
        if os.path.isfile(self.path / CONFIG):
            return (
                f", but an adapter without a run ({CONFIG}); give the run that it was made of, "
                "or load it in Python with aj.load_adapter; of a decoder, "
                f"adapters-jax serve BASE {self.path} answers with it"
            )
        places = [*self.path.parent.glob("*/config.json"), *Path("runs").glob("*/config.json")]
        near = sorted({p.parent.as_posix() for p in places if _is_run(p)})
        return f"; there are: {', '.join(near[:5])}" if near else ""


def _is_run(config: Path) -> bool:
    """Whether a config.json is that of a run: those of models have the same name."""
    try:
        return _NEEDED.keys() <= read_json(config).keys()
    except AdapterFileError:
        return False


def check_keys(run: Run, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raises RunError if a configuration has another format, or lacks a key of some form."""
    wrong = [key for key, form in needed.items() if not _fits(config.get(key), form)]
    if wrong and "model_type" in config:
        raise RunError(
            f"{run.where} is a model, expected a run; give the run itself (of a merged model, the "
            f"one that was merged), or train on the model: finetune --model {run.path}"
        )
    if wrong or config["format"] != FORMAT:
        raise RunError(
            f"{run.config} is not the configuration of a run of format {FORMAT}"
            + (f": it has no good {', '.join(wrong)}" if wrong else "")
        )


def _fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form: a type; `[form]`, of each; or `{key: form}`, which needs
    these keys, where the key `str` stands for any.

    Example:
        >>> _fits({"f1": 1}, {str: float}), _fits({"f1": "1"}, {str: float}), _fits({}, {"f1": int})
        (True, False, False)
    """
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(each, form[0]) for each in value)
    if isinstance(form, dict):
        every = form.get(str)
        wanted = dict.fromkeys(value, every) if every and isinstance(value, dict) else form
        return isinstance(value, dict) and all(_fits(value.get(k), f) for k, f in wanted.items())
    return type(value) in ((int, float) if form is float else (form,))


def find_run(name: str | Path, revision: str | None = None) -> Run:
    """Finds a run: its directory, or an exported run by its id on the Hugging Face Hub.

    Args:
        name: a directory, or an id such as `"user/name"` or `"user/name@revision"`, or an address
            in an object store.
        revision: a branch, tag or commit on the Hub.

    Raises:
        RunError: the Hub or the store does not have the run.
    """
    if not hub.is_adapter_id(name):
        return Run(Path(name))
    found = hub.find(name, revision, ("config.json", *FILES), "a run", RunError)
    address = address_of(name)
    return Run(found, Mirror(found, address) if address else None)


def check_finished(run: Run, config: dict[str, Any]) -> None:
    """Raises RunError if a run is not finished."""
    if not {"summary", "combined"} & config.keys():
        raise RunError(
            f"{run.where} is not finished; go on with: adapters-jax finetune --resume {run.where}"
        )


def run_name(*parts: str) -> str:
    """Makes the name of a run's directory from its model, data and method.

    Example:
        >>> run_name("google-bert/bert-base-uncased", "SST 2", "lora")
        'bert-base-uncased-SST-2-lora'
    """
    names = [re.sub(r"[^\w.]+", "-", Path(part).name).strip("-.") for part in parts]
    return "-".join(name for name in names if name)
