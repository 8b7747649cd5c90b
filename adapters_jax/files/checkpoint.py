"""Training checkpoints: the trained part, the optimiser, statistics and keys, for an exact resume.

orbax writes them; the base is never saved, only the frozen leaves of methods. A save copies the
trained part on its device, which is all that a step waits for, and writes the copy in a thread. A
file beside what orbax wrote has the SHA-256 checksums of its files, so that a damaged checkpoint is
detected and the one before it used.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock
from jax.experimental import multihost_utils

from adapters_jax.distributed.mesh import place
from adapters_jax.errors import (
    FileSystemError,
    UserError,
    check_size,
    compare_trees,
    file_errors,
)
from adapters_jax.files.atomic import remove
from adapters_jax.files.checkpointed import (
    copied,
    identity_of,
    kept_of,
    plain_arrays,
    rebuilt,
    whole,
)
from adapters_jax.files.checksums import damage, write_checksums
from adapters_jax.files.lock import lock_directory, unlock_directory
from adapters_jax.files.stores import Mirror, address_of
from adapters_jax.recipe import as_compared
from adapters_jax.training.state import TrainState, check_kind, check_state
from adapters_jax.trees import Tree

_LOG = logging.getLogger(__name__)
_TEMPORARY = "*.orbax-checkpoint-tmp*"
_LOOKS, _PAUSE = 100, 0.02  # seconds between looks for the remains of a save that failed
_BESIDE, _BESIDE_EACH = 2**20, 2**13  # bytes of orbax's own files, and of those of each array
# What orbax raises of files that have another content; tensorstore's is a ValueError.
OF_ORBAX = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, or there is none to restore."""


@dataclass(frozen=True)
class Checkpoint:
    """A training run as it was saved.

    Attributes:
        state: the saved state, with the base of the state that it was restored into.
        best: the best adapters so far, a tree like `state.adapters`; None if none were saved.
        progress: the `progress` that was given to `save`.

    Example:
        >>> Checkpoint(state=None, best=None, progress={"epoch": 3}).progress["epoch"]
        3
    """

    state: TrainState
    best: Tree | None
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """The number of steps made."""
        return int(self.state.step)


class Checkpoints:
    """The checkpoints of one training run, in a directory of their own.

    A save returns at once; a thread writes one save at a time. The last `keep` checkpoints and the
    one with the highest score are kept. Opening the directory renames those that are damaged or
    cannot be read to `damaged-<step>`. If the batch is a function of the step's number, as with
    grain's `MapDataset`, a resumed run equals the uninterrupted one bit for bit.

    Args:
        directory: created if it is absent. The remains of an interrupted save are removed. At an
            address in an object store, `"gs://bucket/run"`, everything below belongs to the
            checkpoints; every process works in a directory on its own machine, and the first one
            copies. A store has no locks: let one job at a time write there.
        keep: the number of latest checkpoints to keep, at least 2, so that one is always whole.
        on_saved: called in the thread after each checkpoint is written.

    Raises:
        UserError: `keep` is not a whole number of at least 2.
        FileSystemError: the directory cannot be made or written.
        CheckpointError: another `Checkpoints`, of any process, has the directory open.
        MissingPackageError: the package for an address is not installed.

    Example:
        >>> import adapters_jax as aj, jax, jax.numpy as jnp, optax, tempfile
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> state = aj.TrainState.create(model, tx=optax.adam(0.1), key=jax.random.key(0))
        >>> step = aj.make_train_step(lambda model, batch, key: jnp.mean(model(batch)))
        >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
        ...     if checkpoints.steps:  # resume an interrupted run
        ...         state = checkpoints.restore(state).state
        ...     for i in range(int(state.step), 3):
        ...         state, metrics = step(state, jnp.ones((4, 2)))
        ...         checkpoints.save(i + 1, state, progress={"loss": metrics["loss"]})
        ...     checkpoints.wait()
        ...     checkpoints.steps, checkpoints.restore(state).step
        ([2, 3], 3)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 2,
        on_saved: Callable[[], None] = lambda: None,
    ) -> None:
        self._lock: FileLock | None = None
        check_size("Checkpoints", "keep", keep)
        if keep < 2:
            raise UserError(
                f"Checkpoints: keep={keep}, expected at least 2, so that one is always whole"
            )
        self._on_saved = on_saved
        self._mirror = None
        if address := address_of(directory):
            self._mirror = Mirror(Path(tempfile.mkdtemp(prefix="adapters-jax-")), address)
        self.directory = self._mirror.directory if self._mirror else Path(directory).absolute()
        self._alone = self._mirror is not None and jax.process_count() > 1
        try:
            self._open_directory()
            self._open_manager(keep)
        except UserError:
            self._leave()
            raise
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future[None] | None = None
        self._identity: dict[str, Any] | None = None

    def _open_directory(self) -> None:
        """Makes, locks and cleans the directory."""
        if self._mirror is not None:
            self._mirror.pull()
        if self._mirror is not None or jax.process_index() == 0:
            with file_errors(self.directory, "used for checkpoints"):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = lock_directory(self.directory, CheckpointError)
                self._clean()
                self._rename_damaged()
        # The other hosts open the directory once the first has cleaned it.
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoints of {self.where}")

    def _open_manager(self, keep: int) -> None:
        import orbax.checkpoint as ocp  # takes a second
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        many = ocp.options.MultiprocessingOptions()
        if self._alone:
            own = jax.process_index()
            many = ocp.options.MultiprocessingOptions(own, {own}, f"of-process-{own}")
        kept = [
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_score,
            enable_async_checkpointing=False,  # it blocks for 0.1 s, so save has its own thread
            multiprocessing_options=many,
            create=False,
        )
        self._args = ocp.args
        handlers = {
            "arrays": ocp.StandardCheckpointHandler(multiprocessing_options=many),
            "about": ocp.JsonCheckpointHandler(multiprocessing_options=many),
        }
        with self._reading():
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    @property
    def where(self) -> str:
        """The directory, or its address."""
        return self._mirror.address if self._mirror else str(self.directory)

    @property
    def steps(self) -> list[int]:
        """The steps of the finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the highest score."""
        scored = [s for s in self.steps if _score(self._manager.metrics(s) or {}) > -math.inf]
        return self._manager.best_step() if scored else None

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        best: Tree | None = None,
        score: float | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a state after a step, in a thread.

        Args:
            step: the number of steps made; reading it from the state would wait for the device.
            state: the state to save, without its base. The next step may donate it at once.
            best: the best adapters so far, like `state.adapters`, without statistics: for a model
                that has these, give `score`.
            score: the score of this state, higher is better; the best checkpoint is kept.
            progress: whatever else is needed to resume, as JSON; scalar arrays in it become
                numbers. The thread reads it, so do not change it afterwards.

        Raises:
            UserError: `progress` of the save before this one held an array with axes, or a step has
                taken over the arrays of the state.
            CheckpointError: the disk has no room, or the save before this one failed; earlier
                checkpoints are intact. A failure of this save is raised by the next `save`, `wait`,
                `restore` or `close`.
        """
        check_state("Checkpoints.save", state)
        self.wait()
        leaves, structure = jax.tree.flatten(kept_of(state, best))
        # One program copies all device arrays; the thread does the rest. numpy arrays stay.
        on_device = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        for i, copy in zip(on_device, copied([leaves[i] for i in on_device]), strict=True):
            leaves[i] = copy
            if self._alone:
                leaves[i] = whole(leaves[i])
        kept = jax.tree.unflatten(structure, leaves)
        self._identity = self._identity or identity_of(state)
        self._require_room([x.nbytes for x in leaves])
        self._pending = self._thread.submit(self._write, step, kept, score, progress)

    def wait(self) -> None:
        """Waits until the last save is written.

        Raises:
            CheckpointError: it failed; earlier checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, kept: dict[str, Any], score: float | None, progress: Any) -> None:
        """Writes what `save` copied; runs in the thread."""
        about = {
            **(self._identity or {}),
            "best": kept["best"] is not None,
            "progress": json.loads(json.dumps(progress or {}, default=_number)),
        }
        arrays = plain_arrays(kept)
        if self._alone:  # orbax takes arrays of jax for those of all processes
            arrays = {path: np.asarray(x) for path, x in arrays.items()}  # type: ignore[misc]
        parts = {
            "arrays": self._args.StandardSave(arrays),
            "about": self._args.JsonSave(about),
        }
        try:
            saved = self._manager.save(
                step,
                args=self._args.Composite(**parts),
                metrics={"score": -math.inf if score is None else float(score)},
            )
            # Last, since a directory without checksums counts as damaged.
            if saved and (self._mirror or jax.process_index() == 0):
                write_checksums(self.directory / str(step))
        except (OSError, ValueError) as error:  # tensorstore's is a ValueError
            self._clean_up_failure()
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.where}: "
                f"{_short(error)}; {self._intact()}"
            ) from error
        try:
            if saved and self._mirror and jax.process_index() == 0:
                self._mirror.push()
            self._on_saved()
        except FileSystemError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be copied: {error}; the earlier ones "
                "that are there are whole"
            ) from error
        if not saved:
            raise CheckpointError(
                f"step {step} is not saved: {self.where} has a checkpoint of step "
                f"{max(self.steps)}; restore that one, or give another directory"
            )

    def _require_room(self, sizes: list[int]) -> None:
        """Raises CheckpointError if the disk has less room; orbax fails in many threads at once."""
        free = shutil.disk_usage(self.directory).free
        size = sum(sizes) + _BESIDE + _BESIDE_EACH * len(sizes)
        if free < size:
            raise CheckpointError(
                f"{self.directory} has room for {free:,} bytes, and a checkpoint takes up to "
                f"{size:,}: {os.strerror(errno.ENOSPC)}; {self._intact()}"
            )

    def _intact(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return f"the earlier ones are intact: {steps}" if steps else "there is no earlier one"

    def restore(self, state: TrainState, step: int | None = None) -> Checkpoint:
        """Restores a checkpoint.

        Args:
            state: a state of the same training run, before its first step. It gives the base, the
                shapes and the layout over devices, which may differ from the layout at saving.
            step: the step of the checkpoint; None is the newest.

        Raises:
            CheckpointError: it is absent, cannot be read, or has another recipe or base.
            MismatchError: arrays differ in shape or dtype; the message names all of them.
        """
        check_kind("Checkpoints.restore", state)
        step = self._found(step)
        where = f"the checkpoint of step {step} in {self.where}"
        about = self._about(step)
        for name, own in identity_of(state).items():
            if as_compared(about[name]) != as_compared(own):
                raise CheckpointError(
                    f"{where} has the {name} {json.dumps(about[name])}, and the state has "
                    f"{json.dumps(own)}; restore it into a state of the model and the recipe that "
                    "it was trained with"
                )
        expected = plain_arrays(kept_of(state, state.adapters if about["best"] else None))
        with self._reading(step):
            saved = dict(self._manager.item_metadata(step)["arrays"].items())
        fix = "Restore it into a state with the model, recipe, optimiser and collections it is of."
        compare_trees(where, saved, expected, fix, dtypes=True)
        abstract = {
            path: np.empty(x.shape, x.dtype)
            if self._alone
            else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in expected.items()
        }
        got = self._read(step, arrays=self._args.StandardRestore(abstract))["arrays"]
        # orbax binds what it reads to devices; a step refuses that beside a base on a mesh.
        arrays = {k: x if expected[k].committed else jnp.array(np.array(x)) for k, x in got.items()}
        if self._alone:
            arrays = {k: place(x, expected[k].sharding) for k, x in got.items()}
        kept, best = rebuilt(state, arrays, about["best"])
        return Checkpoint(replace(state, **kept), best, about["progress"])

    def progress(self, step: int | None = None) -> dict[str, Any]:
        """The `progress` that was given to `save`; reading it needs no state.

        Args:
            step: the step of the checkpoint; None is the newest.

        Raises:
            CheckpointError: the checkpoint does not exist, or cannot be read.
        """
        return self._about(self._found(step))["progress"]

    def close(self) -> None:
        """Waits for the last save and closes the directory; nothing can be saved afterwards."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()
            self._leave()

    def _leave(self) -> None:
        if self._lock is not None:
            unlock_directory(self.directory, self._lock)
            self._lock = None
        if self._mirror is not None:
            shutil.rmtree(self.directory)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _found(self, step: int | None) -> int:
        """The given step, or the newest, of a finished checkpoint."""
        self.wait()
        steps = self.steps
        if not steps or step not in (None, *steps):
            which = "" if step is None else f" of step {step}; its steps are {steps}"
            raise CheckpointError(f"{self.where} has no checkpoint{which}")
        return steps[-1] if step is None else step

    def _about(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself beside its arrays."""
        about = self._read(step, about=self._args.JsonRestore())["about"]
        with self._reading(step):
            kept = {name: about[name] for name in ("recipe", "base", "best")}
            return {"progress": dict(about["progress"]), **kept}

    def _read(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=self._args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int | None = None) -> Iterator[None]:
        """Turns what orbax raises of a spoilt checkpoint into a CheckpointError."""
        try:
            yield
        except OF_ORBAX as error:
            again = "open the directory again to go on with the one before it"
            one, fix = (
                (f"the checkpoint of step {step}", again) if step else ("a checkpoint", "remove it")
            )
            message = f"{one} in {self.where} cannot be read: {_short(error)}; {fix}"
            raise CheckpointError(message) from error

    def _clean(self) -> bool:
        """Removes the remains of interrupted saves; says whether there were some."""
        left = list(self.directory.glob(_TEMPORARY))
        for path in left:
            remove(path)
        return bool(left)

    def _clean_up_failure(self) -> None:
        """Removes the remains of a save that has just failed.

        Where one part of a save fails, orbax's threads go on with the others for a moment, and make
        the directory again. So this looks until nothing new has come for a while.
        """
        quiet = 0
        for _ in range(_LOOKS):
            quiet = 0 if self._clean() else quiet + 1
            if quiet == 3:
                return
            time.sleep(_PAUSE)

    def _rename_damaged(self) -> None:
        """Renames damaged checkpoints, with a warning, so that orbax finds only whole ones."""
        steps = {int(p.name): p for p in self.directory.glob("*") if p.name.isdecimal()}
        damaged = {n: why for n in sorted(steps) if (why := damage(steps[n]))}
        whole = ", ".join(str(n) for n in sorted(steps) if n not in damaged)
        for number, why in damaged.items():
            aside = self.directory / f"damaged-{number}"
            remove(aside)
            steps[number].replace(aside)
            others = f"the whole ones are of step {whole}" if whole else "there is no other"
            message = "the checkpoint of step %d is damaged: %s; it was renamed to %s; %s"
            _LOG.warning(message, number, why, aside, others)


def _short(error: Exception) -> str:
    """An error's first line; a long one is cut in the middle, since its reason is at the end."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 240 else f"{line[:80]} ... {line[-150:]}"


def _score(metrics: Mapping[str, float]) -> float:
    """The score of a checkpoint; NaN, which is in no order with others, counts as none."""
    score = metrics.get("score", -math.inf)
    return -math.inf if math.isnan(score) else score


def _number(x: Any) -> Any:
    """A scalar array as a Python number, for `json.dumps`."""
    if isinstance(x, jax.Array | np.ndarray | np.generic) and x.size == 1:
        return x.item()
    if isinstance(x, jax.Array | np.ndarray):
        raise UserError(
            f"Checkpoints.save: progress holds an array of shape {x.shape}, expected JSON, and "
            "scalar arrays; write its numbers as a list: x.tolist()"
        )
    raise TypeError(
        f"Checkpoints.save: progress holds a {type(x).__name__}, which JSON cannot hold"
    )
