"""Checkpoints of models that train: directories by key, model, kind and name, whole or not at all.

`tinker://MODEL/weights/NAME` has the adapter in this library's format and the optimiser's state,
`sampler_weights` the adapter alone, `external_weights` PEFT's files.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import secrets
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapters_jax.errors import AdapterFileError, FileSystemError, UserError, file_errors, shown
from adapters_jax.files.adapter import read_adapter, save_adapter
from adapters_jax.files.atomic import Content, restore, write_directory, write_file
from adapters_jax.files.untrusted import read_json, read_tensors
from adapters_jax.finetune.serving.requests import UnknownModelError
from adapters_jax.finetune.serving.schemas import matches_name
from adapters_jax.finetune.tenants.requests import Snapshot
from adapters_jax.finetune.tinker.bodies import time_text
from adapters_jax.trees import flatten, unflatten

_log = logging.getLogger(__name__)
KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_ABOUT, _OPTIMIZER = "checkpoint.json", "optimizer.safetensors"
_SPARE = 2**28  # bytes of the disk that no checkpoint takes
_CENTURY = 100 * 365 * 86_400


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint.

    Attributes:
        owner: the key that may use it.
        model: the model that it is of.
        kind: weights, sampler_weights or external_weights.
        name: its name.
        folder: its directory.
        about: what is known of it: its time, its size, what the client says of it, its model.
    """

    owner: str
    model: str
    kind: str
    name: str
    folder: Path
    about: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Its address."""
        return f"tinker://{self.model}/{self.kind}/{self.name}"

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        until = self.about.get("expires")
        return until is not None and until < time.time()

    def shown(self) -> dict[str, Any]:
        """What a client sees of it."""
        return {
            "checkpoint_id": f"{self.kind}/{self.name}",
            "checkpoint_type": KINDS[self.kind],
            "time": self.about["time"],
            "tinker_path": self.path,
            "size_bytes": self.about["size"],
            "user_metadata": self.about["metadata"] or None,
            "expires_at": self.about.get("expires"),
        }

    def files(self) -> list[Path]:
        """The adapter's files."""
        return sorted(x for x in self.folder.iterdir() if x.name not in (_ABOUT, _OPTIMIZER))


class Checkpoints:
    """The checkpoints in a directory; several threads may use it.

    Args:
        directory: the directory; what a kill left half-written there is removed.
        most: bytes that the checkpoints of one key may have.

    Raises:
        FileSystemError: it cannot be made or read.
    """

    def __init__(self, directory: Path, most: int = 2**36) -> None:
        self._directory, self._most = directory, most
        self._lock = threading.RLock()
        with file_errors(directory, "made"):
            directory.mkdir(parents=True, exist_ok=True)
            for parent in directory.glob("*/*/*"):
                restore(parent)
            found = map(_read, directory.glob(f"*/*/*/*/{_ABOUT}"))
            self._all = {(each.owner, each.path): each for each in found if each is not None}

    def of(self, owner: str, model: str | None = None) -> list[Checkpoint]:
        """The checkpoints of a key, and of a model of it, in the order of their time."""
        own = [each for (key, _), each in [*self._all.items()] if key == owner]
        for each in [each for each in own if each.expired]:
            self.drop(each)
            own.remove(each)
        chosen = [each for each in own if model is None or each.model == model]
        return sorted(chosen, key=lambda each: each.about["time"])

    def find(self, owner: str, path: str) -> Checkpoint:
        """The checkpoint of an address.

        Raises:
            UnknownModelError: this key has none there.
        """
        # A look-up of the whole text, so that no part of it is ever a path of the disk.
        found = self._all.get((owner, path))
        if found is None or found.expired:
            raise UnknownModelError(f"there is no checkpoint {shown(path)}; list those that are")
        return found

    def save(
        self,
        owner: str,
        model: str,
        kind: str,
        name: str,
        snapshot: Snapshot,
        files: Mapping[str, Content],
        about: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Checkpoint:
        """Writes a checkpoint, which is on the disk when this returns.

        Args:
            owner, model, kind, name: what it is.
            snapshot: its adapter and optimiser; of the latter only `weights` have something.
            files: the adapter's files, for `external_weights`.
            about: what is known of it, for JSON.
            overwrite: whether one of the same name is replaced.

        Raises:
            UserError: it cannot have this name, the key has too many bytes already, or the disk
                has no room to spare.
            FileSystemError: the disk is full or cannot be written; nothing of it is left.
        """
        if not matches_name(name):
            raise UserError(
                f"a checkpoint cannot be named {shown(name)}, expected up to 64 letters, digits, "
                "dots, dashes and underscores"
            )
        path = f"tinker://{model}/{kind}/{name}"
        folder = self._directory.joinpath(owner, model.replace(":", "-"), kind, name)
        with _unplaced(path), tempfile.TemporaryDirectory(prefix="adapters-jax-") as beside:
            if kind != "external_weights":
                tree = unflatten(dict(snapshot.leaves))
                save_adapter(Path(beside, "a"), tree, snapshot.recipe)
                files = {x.name: partial(shutil.copyfile, x) for x in Path(beside, "a").iterdir()}
            if kind == "weights":
                files = {**files, _OPTIMIZER: _optimizer(snapshot)}
            size = sum(_size(content) for content in files.values())
            with self._lock:
                used = sum(each.about["size"] for each in self.of(owner) if each.path != path)
                if (owner, path) in self._all and not overwrite:
                    raise UserError(
                        f"there is a checkpoint {path}; give another name, or overwrite it"
                    )
                if used + size > self._most:
                    raise UserError(
                        f"the checkpoints of this key would have {used + size} bytes, expected at "
                        f"most {self._most}; delete some"
                    )
                with file_errors(self._directory, "read"):
                    self._directory.mkdir(parents=True, exist_ok=True)
                    free = shutil.disk_usage(self._directory).free
                if size > free - _SPARE:
                    raise UserError(
                        f"the server's disk has {free} bytes left, {_SPARE} of them are kept free, "
                        f"and the checkpoint has {size}; delete some, or ask who runs it for room"
                    )
                now = time_text(time.time())
                values = {**about, "owner": owner, "model": model, "time": now, "size": size}
                write_directory(folder, {**files, _ABOUT: json.dumps(values).encode()})
                saved = self._all[owner, path] = Checkpoint(
                    owner, model, kind, name, folder, values
                )
        return saved

    def expire(self, checkpoint: Checkpoint, seconds: float | None) -> None:
        """Has a checkpoint removed some seconds from now; None keeps it."""
        values = {**checkpoint.about, "expires": until(seconds)}
        with _unplaced(checkpoint.path), self._lock:
            if not self._has(checkpoint):
                raise UnknownModelError(f"there is no checkpoint {checkpoint.path} any more")
            write_file(checkpoint.folder / _ABOUT, json.dumps(values).encode())
            self._all[checkpoint.owner, checkpoint.path] = replace(checkpoint, about=values)

    def drop(self, checkpoint: Checkpoint) -> None:
        """Removes a checkpoint, unless it is removed or replaced already."""
        gone = checkpoint.folder.with_name(f".{checkpoint.name}.new.{secrets.token_hex(4)}")
        with _unplaced(checkpoint.path), file_errors(checkpoint.folder, "removed"):
            with self._lock:
                if not self._has(checkpoint):
                    return
                checkpoint.folder.replace(gone)
                del self._all[checkpoint.owner, checkpoint.path]
            shutil.rmtree(gone)

    def _has(self, checkpoint: Checkpoint) -> bool:
        """Whether this is the one of its address, and no later one has its place."""
        return self._all.get((checkpoint.owner, checkpoint.path)) is checkpoint

    def load(self, checkpoint: Checkpoint) -> Snapshot:
        """What a checkpoint has; without the optimiser, its means are empty.

        Raises:
            UserError: it is PEFT's.
            AdapterFileError: its files are damaged.
        """
        if checkpoint.kind == "external_weights":
            raise UserError(f"{checkpoint.path} has PEFT's files; load weights or sampler_weights")
        # Else its files could be those of two, where a save overwrites it meanwhile.
        with _unplaced(checkpoint.path), self._lock:
            return _load(checkpoint)


def _load(checkpoint: Checkpoint) -> Snapshot:
    recipe, tree = read_adapter(checkpoint.folder)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    means: dict[str, dict[str, np.ndarray]] = {"mean": {}, "square": {}}
    step = 0
    if (checkpoint.folder / _OPTIMIZER).is_file():
        tensors = read_tensors(checkpoint.folder / _OPTIMIZER)
        step = int(tensors.pop("step"))
        for name, value in tensors.items():
            which, _, path = name.partition("/")
            means[which][path] = np.asarray(value)
    return Snapshot(recipe, leaves, **means, step=step)


def _read(file: Path) -> Checkpoint | None:
    """The checkpoint of a file; None for what is none of ours."""
    try:
        about = read_json(file)
    except (AdapterFileError, FileSystemError):
        return None
    if not {"owner", "model", "time", "size", "metadata"} <= about.keys():
        return None
    folder = file.parent
    return Checkpoint(
        about["owner"], about["model"], folder.parent.name, folder.name, folder, about
    )


def _optimizer(snapshot: Snapshot) -> bytes:
    means = {"mean": snapshot.mean, "square": snapshot.square}
    tensors = {
        f"{n}/{p}": np.ascontiguousarray(x) for n, of in means.items() for p, x in of.items()
    }
    return save({**tensors, "step": np.array(snapshot.step, np.int64)})


def _size(content: Content) -> int:
    if isinstance(content, bytes):
        return len(content)
    return Path(content.args[0]).stat().st_size  # type: ignore[attr-defined]


@contextlib.contextmanager
def _unplaced(path: str) -> Iterator[None]:
    """Errors of files name a checkpoint by its address: where it is on the disk, the log has."""
    try:
        yield
    except FileSystemError as error:
        _log.error("%s: %s", path, error)
        raised = FileSystemError(f"{path}: {os.strerror(error.errno or errno.EIO)}")
        raised.errno = error.errno
        raise raised from error
    except AdapterFileError as error:
        _log.error("%s: %s", path, error)
        raise AdapterFileError(f"the files of {path} are damaged") from error


def until(seconds: float | None) -> float | None:
    """The time some seconds from now; None for None.

    Raises:
        UserError: they are more than a hundred years, or negative.
    """
    if seconds is not None and not 0 <= seconds <= _CENTURY:
        raise UserError(f"ttl_seconds is {shown(seconds)}, expected 0 to {_CENTURY}, or none")
    return None if seconds is None else time.time() + seconds


def packed(files: Mapping[str, bytes]) -> bytes:
    """A tar.gz of some files."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as tar:
        for name, data in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    return whole.getvalue()
