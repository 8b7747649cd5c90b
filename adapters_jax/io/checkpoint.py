"""Training checkpoints: what trains and all that moves it, so that a training goes on exactly.

orbax writes them; the base is never among them. A save copies the trained part on its device, which
is all that a step waits for, and writes the copy in a thread. Beside what orbax wrote lie the
SHA-256 sums of its files, so that a damaged checkpoint is noticed and the one before it taken.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from adapters_jax.checks import check_size
from adapters_jax.errors import UserError, compare_trees
from adapters_jax.io.checksums import damage, write_sums
from adapters_jax.io.identity import tree_sha256
from adapters_jax.training.state import TrainState
from adapters_jax.trees import Tree, path_of

_LOG = logging.getLogger(__name__)
_TEMPORARY = "*.orbax-checkpoint-tmp*"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written, or none that can be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A training as it was.

    Attributes:
        state: with the base of the state that it was restored into.
        best: the best adapters so far, a tree like `state.adapters`; None where none were saved.
        progress: what was saved as it.
    """

    state: TrainState
    best: Tree | None
    progress: dict[str, Any]

    @property
    def step(self) -> int:
        """How many steps were made."""
        return int(self.state.step)


class Checkpoints:
    """The checkpoints of one training, in a directory of their own.

    A save returns at once and is written in a thread, one at a time. Kept are the last `keep` and
    the one with the highest score. What is not whole is put aside when the directory is opened.
    Where the batch is a function of the step's number, as with grain's `MapDataset`, a resumed
    training is the uninterrupted one to the last bit.

    Args:
        directory: made if it is absent. What is left in it of a save that was cut off is removed.
        keep: how many of the last to keep, at least 2: while one is written, one is whole.

    Raises:
        ValueError: `keep` is below 2.

    Example:
        >>> import adapters_jax as aj, jax, jax.numpy as jnp, optax, tempfile
        >>> from flax import nnx
        >>> base = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.Unfreeze("bias"), rngs=nnx.Rngs(0))
        >>> state = aj.TrainState.create(model, tx=optax.adam(0.1), key=jax.random.key(0))
        >>> step = aj.make_train_step(lambda model, batch, key: jnp.mean(model(batch)))
        >>> with tempfile.TemporaryDirectory() as directory, Checkpoints(directory) as checkpoints:
        ...     if checkpoints.steps:  # go on where a training was cut off
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
    ) -> None:
        import orbax.checkpoint as ocp  # takes a second
        from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

        check_size("Checkpoints", "keep", keep)
        if keep < 2:
            raise UserError("Checkpoints: keep is 1; give at least 2, so that one is always whole")
        self.directory = Path(directory).absolute()
        if jax.process_index() == 0:
            self._clean()
            self._put_damaged_aside()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoints of {self.directory}")
        kept = [
            policies.LatestN(keep),
            policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_score,
            enable_async_checkpointing=False,  # it blocks for 0.1 s; the thread is ours
        )
        self._args = ocp.args
        handlers = {
            "arrays": ocp.StandardCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._pending: concurrent.futures.Future[None] | None = None
        self._identity: dict[str, Any] | None = None

    @property
    def steps(self) -> list[int]:
        """After how many steps there are checkpoints, ascending; those still being written not."""
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
        """Saves a training after a step, in a thread.

        Args:
            step: how many steps were made; told, since asking the state would wait for the device.
            state: what to save: all of it but the base. The next step may use it up at once.
            best: the best adapters so far, like `state.adapters`.
            score: how good this state is, higher is better; the best one's checkpoint is kept.
            progress: whatever else is needed to go on, as JSON has it; arrays without axes in it
                become numbers. It is read by the thread, so leave it as it is.

        Raises:
            CheckpointError: this or the save before it could not be written; those before are
                intact.
        """
        self.wait()
        leaves, structure = jax.tree.flatten(_moving(state, best))
        # One program copies all; names and files are for the thread. What is the host's stays.
        on_device = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        for i, copied in zip(on_device, _copy([leaves[i] for i in on_device]), strict=True):
            leaves[i] = copied
        moving = jax.tree.unflatten(structure, leaves)
        self._identity = self._identity or _identity(state)
        self._pending = self._thread.submit(self._write, step, moving, score, progress)

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
            CheckpointError: what was being written could not be; earlier checkpoints are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, moving: dict[str, Any], score: float | None, progress: Any) -> None:
        """Writes what `save` copied; this is what the thread does."""
        about = {
            **(self._identity or {}),
            "best": moving["best"] is not None,
            "progress": json.loads(json.dumps(progress or {}, default=_number)),
        }
        parts = {
            "arrays": self._args.StandardSave(_arrays(moving)),
            "about": self._args.JsonSave(about),
        }
        try:
            saved = self._manager.save(
                step,
                args=self._args.Composite(**parts),
                metrics={"score": -math.inf if score is None else float(score)},
            )
            if saved and jax.process_index() == 0:
                write_sums(self.directory / str(step))
        except (OSError, ValueError) as error:  # tensorstore's is a ValueError
            self._clean()
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.directory}: "
                f"{_short(error)}; {self._intact()}"
            ) from error
        if not saved:
            raise CheckpointError(
                f"step {step} is not saved: {self.directory} has one of step {max(self.steps)}; "
                "restore that one, or give another directory"
            )

    def _intact(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return f"earlier ones are intact (step {steps})" if steps else "there is no earlier one"

    def restore(self, state: TrainState, step: int | None = None) -> Checkpoint:
        """A training as it was saved.

        Args:
            state: of the same training, before its first step: it gives the base, the shapes and
                the layout over devices, which may be another one than when it was saved.
            step: of another checkpoint than the newest.

        Raises:
            CheckpointError: there is none, or its recipe or base is another one.
            MismatchError: arrays of other shapes or dtypes; all are named.
        """
        self.wait()
        there = self.steps
        if not there or step not in (None, *there):
            which = "" if step is None else f" of step {step}; there are {there}"
            raise CheckpointError(f"{self.directory} has no checkpoint{which}")
        step = there[-1] if step is None else step
        where = f"the checkpoint of step {step} in {self.directory}"
        about = self._read(step, about=self._args.JsonRestore())["about"]
        for name, own in _identity(state).items():
            if about[name] != own:
                raise CheckpointError(
                    f"{where} is of another {name}: {json.dumps(about[name])}, and the state's is "
                    f"{json.dumps(own)}; restore it into a state of the model and the recipe that "
                    "it was trained with"
                )
        wanted = _arrays(_moving(state, state.adapters if about["best"] else None))
        saved = dict(self._manager.item_metadata(step)["arrays"].items())
        fix = "Restore it into a state of the model, the recipe and the optimiser of its training."
        compare_trees(where, saved, wanted, fix, dtypes=True)
        abstract = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for path, x in wanted.items()
        }
        arrays = self._read(step, arrays=self._args.StandardRestore(abstract))["arrays"]
        moving, best = _rebuilt(state, arrays, about["best"])
        return Checkpoint(replace(state, **moving), best, about["progress"])

    def close(self) -> None:
        """Waits for what is being written; afterwards nothing can be saved."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=self._args.Composite(**items))

    def _clean(self) -> None:
        """Removes what a save left that was cut off."""
        for path in self.directory.glob(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)

    def _put_damaged_aside(self) -> None:
        """Renames what is not whole, and says so; orbax then finds only what is."""
        steps = {int(p.name): p for p in self.directory.glob("*") if p.name.isdecimal()}
        damaged = {n: why for n in sorted(steps) if (why := damage(steps[n]))}
        there = ", ".join(str(n) for n in sorted(steps) if n not in damaged)
        for number, why in damaged.items():
            aside = self.directory / f"damaged-{number}"
            shutil.rmtree(aside, ignore_errors=True)
            steps[number].replace(aside)
            others = f"is that of step {there}" if there else "is no other"
            _LOG.warning(
                "the checkpoint of step %d is damaged: %s; it is now %s, and there %s",
                number,
                why,
                aside,
                others,
            )


def _identity(state: TrainState) -> dict[str, Any]:
    """What a checkpoint is of: the recipe, and the paths and shapes of the base."""
    tree = tree_sha256((state.adapters, state.base), state.recipe)
    return {"recipe": json.loads(state.recipe.to_json()), "base": tree}


def _short(error: Exception) -> str:
    """An error's first line; of a long one the beginning, and the end, where the reason is."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) < 240 else f"{line[:80]} ... {line[-150:]}"


def _score(metrics: Mapping[str, float]) -> float:
    return metrics.get("score", -math.inf)


def _moving(state: TrainState, best: Tree | None) -> dict[str, Any]:
    """What a checkpoint has of a state."""
    return {**state.moving, "best": best}


def _arrays(moving: dict[str, Any]) -> dict[str, jax.Array]:
    """The same as plain arrays by path; orbax takes no empty ones."""
    leaves = jax.tree_util.tree_leaves_with_path(moving)
    return {path_of(p): _plain(x) for p, x in leaves if jnp.size(x)}


def _rebuilt(
    state: TrainState, arrays: Mapping[str, jax.Array], with_best: bool
) -> tuple[dict[str, Any], Tree | None]:
    """The inverse of `_arrays`: a state's fields, and the best adapters."""

    def leaf(path: Any, like: Any) -> Any:
        array = arrays.get(path_of(path), like)
        if not _is_key(like):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))

    moving = jax.tree_util.tree_map_with_path(
        leaf, _moving(state, state.adapters if with_best else None)
    )
    return moving, moving.pop("best")


def _number(x: Any) -> Any:
    """An array without axes as Python's number; JSON asks for what it does not know."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return x.item()
    raise TypeError(
        f"Checkpoints.save: progress holds {type(x).__name__}, which JSON does not have"
    )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    """A key's words; any other array as it is."""
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


@jax.jit
def _copy(arrays: Any) -> Any:
    """Copies on the device, in one program."""
    return jax.tree.map(jnp.copy, arrays)
