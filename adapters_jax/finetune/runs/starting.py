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

from adapters_jax.errors import AdapterMismatchError
from adapters_jax.finetune.formats import HEAD, every_file
from adapters_jax.finetune.leaving import open_source
from adapters_jax.finetune.options.flags import given
from adapters_jax.finetune.options.settings import RunOptions
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
        name: its directory, file or id.
        adapted: its recipe.
        leaves: its arrays, by path.
        pooling: what its head reads, as far as a run says so.
        own: makes the recipe of the run's flags; None if they name no method.
    """

    name: str
    adapted: Recipe
    leaves: Mapping[str, Any]
    pooling: str | None
    own: Callable[..., Recipe] | None

    @classmethod
    def of(cls, options: RunOptions) -> Start | None:
        """Reads the adapter that the options name, if they name one.

        Raises:
            UserError: it cannot be read, or was trained on another base; see `open_source`.
        """
        if options.init_from is None:
            return None
        path = Path(options.init_from)
        whole = path.parent if path.is_file() and path.name in every_file() else path
        source = open_source(str(whole), options.model, options.pooling, headed=True)
        own = options.method.build if given(options.method) else None
        pooling = (source.config or {}).get("pooling")
        # Not the source itself, whose base would stay in memory.
        return cls(options.init_from, source.recipe, source.leaves, pooling, own)

    def recipe(self, *, head: str | None = None, **layers: Any) -> Recipe:
        """The recipe of the run: that of its flags or of the adapter, with a head that trains."""
        if self.own is not None:
            return self.own(head=head, **layers)
        recipe = self.adapted
        return recipe + head_only(head=head) if head and not recipe.trains(f"{head}/x") else recipe

    def begin(self, prepared: Prepared) -> Prepared:
        """A problem that starts with the adapter's arrays; its head is new if the adapter has none.

        Raises:
            AdapterMismatchError: the recipe has other arrays or other methods than the adapter; the
                message names the first one.
        """
        problem: Any = prepared.problem
        state = nnx.state(problem.model, nnx.Param) if problem.params is None else None
        tree = problem.params if state is None else nnx.to_pure_dict(state)
        expected, got = flatten(adapters_of(tree, problem.recipe)), self.leaves
        new_head = not any(path.startswith(HEAD) for path in got)
        expected = {k: x for k, x in expected.items() if not (new_head and k.startswith(HEAD))}
        here = prepared.config.get("pooling")
        if self.pooling not in (None, here) and not new_head:
            raise AdapterMismatchError(
                f"--init-from {self.name}: its head reads {self.pooling}, and that of this run "
                f"{here}; give --pooling {self.pooling}"
            )
        for difference in self._differences(expected, problem.recipe):
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

    def _differences(self, expected: dict[str, Any], recipe: Recipe) -> Iterator[str]:
        """In words, how the arrays and the methods of a run are others than the adapter's."""
        got = self.leaves
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
