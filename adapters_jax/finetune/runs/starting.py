"""`--init-from`: a run that starts with the recipe and the arrays of an adapter."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import AdapterMismatchError, shown
from adapters_jax.files import hub
from adapters_jax.files.untrusted import read_json
from adapters_jax.finetune.formats import every_file
from adapters_jax.finetune.formats.base import HEAD
from adapters_jax.finetune.leaving import found, is_run, open_source, whole
from adapters_jax.finetune.options.flags import from_plain, given
from adapters_jax.finetune.options.method import PRESETS, MethodOptions
from adapters_jax.finetune.options.settings import RunOptions
from adapters_jax.finetune.run_directory import damage_errors
from adapters_jax.finetune.tasks.base import Prepared
from adapters_jax.methods.lora import CHANGING
from adapters_jax.presets import head_only
from adapters_jax.recipe import Owner, Recipe
from adapters_jax.trees import adapters_of, flatten, with_leaves

# Fields of methods that say where they are, how large, and how they train: the arrays show the
# sizes, and a training may differ from the one before.
_FREE = (
    *("targets", "name", "train", "dropout", "bottleneck_dim", "reduction_factor"),
    *("rank", "alpha", "rank_pattern", "alpha_pattern"),
)


@dataclass(frozen=True)
class Start:
    """An adapter that a run starts from.

    Attributes:
        name: its directory, its file, or its id with its commit.
        adapted: its recipe.
        leaves: its arrays, by path.
        pooling: what its head reads, as far as a run says so.
        labels: the classes of its head, as far as a run says so.
        task: the task of its head, as far as a run says so.
        own: makes the recipe of the run's flags; None if they name no method.
    """

    name: str
    adapted: Recipe
    leaves: Mapping[str, Any]
    pooling: str | None
    labels: tuple[str, ...]
    task: str | None
    own: Callable[..., Recipe] | None

    @classmethod
    def of(cls, options: RunOptions) -> Start | None:
        """Reads the adapter that the options name, if they name one.

        Raises:
            UserError: it cannot be read, or was trained on another base; see `open_source`.
        """
        if options.init_from is None:
            return None
        name = _pinned(options.init_from)
        source = open_source(_directory(name), options.model, options.pooling, headed=True)
        own = options.method.build if given(options.method) else None
        pooling, task = (source.config or {}).get("pooling"), (source.config or {}).get("task_type")
        # Not the source itself, whose base would stay in memory.
        labels = tuple(source.labels)
        return cls(name, source.recipe, source.leaves, pooling, labels, task, own)

    def recipe(self, *, head: str | None = None, **more: Any) -> Recipe:
        """The recipe of the run: that of its flags or of the adapter, with a head that trains."""
        if self.own is not None:
            return self.own(head=head, **more)
        recipe = self.adapted
        if head is None:  # a base with a head of its own keeps it
            return Recipe([each for each in recipe if Recipe(each) != head_only()])
        return recipe if recipe.trains(f"{head}/x") else recipe + head_only(head=head)

    def begin(self, prepared: Prepared, task: str, say: Callable[[str], None]) -> Prepared:
        """A problem of a task that starts with the adapter's arrays.

        Its head is new if the adapter has none, or one of another task or of other classes, which
        is said.

        Raises:
            AdapterMismatchError: the recipe has other arrays or other methods than the adapter; the
                message names the first one.
        """
        problem: Any = prepared.problem
        state = nnx.state(problem.model, nnx.Param) if problem.params is None else None
        tree = problem.params if state is None else nnx.to_pure_dict(state)
        expected, got = flatten(adapters_of(tree, problem.recipe)), self.leaves
        new_head = not any(path.startswith(HEAD) for path in got)
        labels = tuple(prepared.config.get("target", {}).get("names", ()))
        if not new_head and self.task not in (None, task):
            say(f"--init-from {self.name}: its head is left out, as it is of --task {self.task}")
            new_head = True
        if not new_head and self.labels and labels != self.labels:
            classes = f"{shown(self.labels)} there and {shown(labels)} in this run"
            say(f"--init-from {self.name}: the head is new, since the classes are {classes}")
            new_head = True
        if new_head:
            expected, got = (
                {k: x for k, x in tree.items() if not k.startswith(HEAD)}
                for tree in (expected, got)
            )
        here = prepared.config.get("pooling")
        if self.pooling not in (None, here) and not new_head:
            raise AdapterMismatchError(
                f"--init-from {self.name}: its head reads {self.pooling}, and that of this run "
                f"{here}; give --pooling {self.pooling}"
            )
        for difference in self._differences(got, expected, problem.recipe):
            raise AdapterMismatchError(
                f"--init-from {self.name}: {difference}; leave the flags of the method out to "
                "take its recipe, or train a new adapter"
            )
        leaves = {path: jnp.asarray(got[path], leaf.dtype) for path, leaf in expected.items()}
        if state is None:
            problem = dataclasses.replace(problem, params=with_leaves(tree, leaves))
        else:
            nnx.update(problem.model, with_leaves(state, leaves))
        return dataclasses.replace(prepared, problem=problem)

    def _differences(
        self, got: Mapping[str, Any], expected: Mapping[str, Any], recipe: Recipe
    ) -> Iterator[str]:
        """In words, how the arrays and the methods of a run are others than the adapter's."""
        for path in sorted(expected.keys() | got.keys()):
            shapes = [[*np.shape(tree[path])] if path in tree else None for tree in (got, expected)]
            if shapes[0] != shapes[1]:
                there, here = ("absent" if shape is None else shape for shape in shapes)
                yield f"{path} is {there} there and {here} in this run"
            elif (a := self.adapted.owner(path)) and (b := recipe.owner(path)):
                yield from _between(a, b)

    def sha256(self) -> str:
        """The checksum of the adapter's arrays."""
        digest = hashlib.sha256()
        for path, leaf in sorted(self.leaves.items()):
            array = np.asarray(leaf)
            digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


def usual(options: RunOptions) -> MethodOptions:
    """The method whose defaults a run has: its own, or that of the run that it starts from."""
    name, seen = options.init_from, set[str]()
    while name and not given(options.method) and name not in seen:
        run, config = found(_directory(name)), {}
        if is_run(run):
            config = read_json(run.config)
        with damage_errors(run.config):
            stored = config.get("options") or {}
            if config.get("method") in PRESETS:
                width = stored.get("method", {}).get("bottleneck_dim")
                return from_plain(
                    MethodOptions, {"method": config["method"], "bottleneck_dim": width}
                )
            seen.add(name)
            before = stored.get("init_from")  # which may be gone
            name = before if before and Path(before).exists() else None
    return options.method


def _pinned(name: str) -> str:
    """The name of an adapter; an id on the Hub gets its commit."""
    if Path(name).exists() or not hub.is_id(name):
        return name
    commit = hub.commit_of(found(name).path)
    return f"{hub.split(name)[0]}@{commit}" if commit else name


def _directory(name: str) -> str:
    """The directory of an adapter whose file may be named; its run's, if it is in one."""
    path = Path(name)
    return whole(str(path.parent) if path.is_file() and path.name in every_file() else name)


def _between(there: Owner, here: Owner) -> Iterator[str]:
    """In words, how two methods on one module compute other things."""
    before, now, at = there.method, here.method, f"at {here.path}"
    if type(before) is not type(now):
        yield f"{at}, {type(before).__name__} there and {type(now).__name__} in this run"
        return
    for field in dataclasses.fields(now):
        was, is_ = getattr(before, field.name), getattr(now, field.name)
        begins = "init" in field.name and was not in CHANGING and is_ not in CHANGING
        if field.name not in _FREE and not begins and was != is_:
            yield f"{at}, {field.name} is {was!r} there and {is_!r} in this run"
    if hasattr(now, "scale_at"):
        was, is_ = (each.method.scale_at(each.path) for each in (there, here))  # type: ignore[attr-defined]
        if was != is_:
            yield f"{at}, the scale is {was:g} there and {is_:g} in this run"
