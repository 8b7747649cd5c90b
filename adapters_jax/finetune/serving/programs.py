"""The compiled programs of a server's rows: a step of all, a piece of one, marks, and a copy."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.distributed.mesh import batch_sharding
from adapters_jax.finetune.models.parts.cache import Cache
from adapters_jax.finetune.serving.choosing import (
    Choice,
    Likely,
    Marks,
    Token,
    choose,
    likeliest_of,
    logprobs_of,
)
from adapters_jax.methods.mixed import Rows
from adapters_jax.trace.mapping import vmap
from adapters_jax.weights.meshes import groups_split, on_mesh, over_groups


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "base"],
    meta_fields=["graphdef", "mesh", "context"],
)
@dataclass(frozen=True)
class Model:
    """A bank's decoder, as the programs take it.

    Attributes:
        context: the largest number of tokens of a row. Rotations that depend on the length are of
            it in all programs, since keys outlive the width of a step.
    """

    graphdef: Any
    adapters: Any
    base: Any
    mesh: Mesh | None
    context: int

    def merged(self) -> Any:
        """The decoder, with new Variables."""
        # Otherwise nnx.merge shares Variables with the state, and a trace writes into them.
        model = nnx.merge(self.graphdef, self.adapters, self.base, copy=True)
        model.eval()
        return model


@partial(jax.jit, static_argnames="width", donate_argnames=("caches", "marks"))
def step(
    model: Model,
    caches: Cache,
    marks: Marks,
    ids: Int[Array, " rows"],
    live: Bool[Array, " rows"],
    rows: Rows,
    feed: Choice,
    width: int,
    gate: Bool[Array, " rows"] | None,
    allowed: Int[Array, "rows words"],
) -> tuple[Cache, Marks, Token]:
    """A token for each row that is live; attention sees the first `width` slots."""
    decoder = model.merged()

    def one(cache: Cache, token: Array, live: Array, index: Any, acts: Any) -> tuple[Array, Cache]:
        of_row = jax.tree.map(lambda x: x[None], index)
        seen, ids = cache.narrow(width), token[None, None]
        given = {"adapters": of_row} | ({} if acts is None else {"invoked": acts[None]})
        hidden, new = decoder.extend(ids, live[None, None], seen, model.context, **given)
        logits = decoder.logits(hidden[:, 0], **given)[0]
        return logits, new.widen(cache)._replace(used=cache.used + live)

    with on_mesh(model.mesh):
        axis = over_groups(len(ids))
        with groups_split(axis):
            logits, caches = vmap(one, 0, axis)(caches, ids, live, rows, gate)
    marks = marks._replace(counts=marks.counts.at[jnp.arange(len(ids)), ids].add(live))
    caches, marks = _split((caches, marks), model.mesh)
    return caches, marks, choose(logits, feed, lambda: marks, allowed)


@partial(jax.jit, donate_argnames=("caches", "marks"))
def read(
    model: Model,
    caches: Cache,
    marks: Marks,
    ids: Int[Array, " piece"],
    following: Int[Array, " piece"],
    place: Int[Array, "4"],
    rows: Rows,
    feed: Choice,
    gate: Bool[Array, " piece"] | None,
    allowed: Int[Array, "1 words"],
) -> tuple[Cache, Marks, Token, tuple[Any, Likely]]:
    """Reads a piece of one row; `place` is the row, its tokens, and whether it begins or was made.

    Returns:
        The caches and marks, the token that follows, and the log-probabilities of those given.
    """
    decoder = model.merged()
    row, count, first, made = place
    each = {} if gate is None else {"invoked": gate[None]}
    last = {} if gate is None else {"invoked": gate[count - 1][None]}
    # Numbers that are not finite would outlive their request: a mask multiplies them by zero.
    old = jax.tree.map(lambda x: jnp.where(first, jnp.zeros_like(x[0]), x[row]), caches)
    mask = jnp.arange(len(ids)) < count
    with on_mesh(model.mesh):
        hidden, new = decoder.extend(
            ids[None], mask[None], old, model.context, adapters=rows, **each
        )
    logits = decoder.logits(hidden[:, count - 1], adapters=rows, **last)
    new = new._replace(used=old.used + count)

    def given() -> tuple[Array, Likely]:
        logits = decoder.logits(hidden, adapters=rows, **each)[0]
        return logprobs_of(logits, jnp.maximum(following, 0)), likeliest_of(logits)

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(given))
    seen = jax.lax.cond((following >= 0).any(), given, lambda: none)
    caches = jax.tree.map(lambda x, y: x.at[row].set(y), caches, new)
    marks = marks._replace(counts=marks.counts.at[row, ids[0]].add(made))
    caches, marks = _split((caches, marks), model.mesh)
    token = choose(logits, feed, lambda: jax.tree.map(lambda x: x[row][None], marks), allowed)
    return caches, marks, token, seen


@partial(jax.jit, donate_argnames="marks", static_argnames="mesh")
def marked(
    marks: Marks, row: Int[Array, ""], bias: Float[Array, " vocab"], mesh: Mesh | None
) -> Marks:
    """The marks with a row that has a bias and no tokens."""
    return _split(Marks(marks.counts.at[row].set(0), marks.bias.at[row].set(bias)), mesh)


@partial(jax.jit, donate_argnames="caches", static_argnames="mesh")
def copied(caches: Cache, place: Int[Array, "3"], mesh: Mesh | None) -> Cache:
    """The caches with the first tokens of one row in another."""
    source, row, n = place
    part = jax.tree.map(lambda x: x[source], caches).until(n)
    return _split(jax.tree.map(lambda x, y: x.at[row].set(y), caches, part), mesh)


def _split(rows: Any, mesh: Mesh | None) -> Any:
    """Arrays of all rows, split over the mesh as they were before: so nothing compiles again."""
    if mesh is None:
        return rows
    n = jax.tree.leaves(rows)[0].shape[0]
    return jax.lax.with_sharding_constraint(rows, batch_sharding(n, mesh))
