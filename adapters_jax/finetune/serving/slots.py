"""The rows of a decoder's batch, each with a cache, an adapter and a way to choose tokens.

A prompt is read in pieces, a row at a time; then every call gives one token to each row that wants
one. Rows are at different lengths, so the model is mapped over them: each has its own cache.
All shapes are static, so the programs are compiled once, whatever the requests are.
"""

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.distributed.mesh import batch_sharding, shard_batch
from adapters_jax.finetune.models.parts.cache import Cache, Kept
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
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.fitting import Fitted
from adapters_jax.weights.meshes import groups_split, mesh_of, on_mesh, over_groups


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "base"],
    meta_fields=["graphdef", "mesh"],
)
@dataclass(frozen=True)
class _Model:
    """A bank's decoder, as the programs take it."""

    graphdef: Any
    adapters: Any
    base: Any
    mesh: Mesh | None

    def merged(self) -> Any:
        # Otherwise nnx.merge shares Variables with the state, and a trace writes into them.
        model = nnx.merge(self.graphdef, self.adapters, self.base, copy=True)
        model.eval()
        return model


class Slots:
    """The rows, their caches, and the adapters that they use.

    Args:
        bank: the places of adapters on the device, with their NNX decoder.
        rows: the number of rows.
        context: the largest number of tokens of a row, prompt and completion together.
        pieces: the lengths of the parts that prompts are read in, in ascending order.
    """

    def __init__(self, bank: Bank, *, rows: int, context: int, pieces: Sequence[int]) -> None:
        self.rows, self.context, self.pieces = rows, context, tuple(pieces)
        # A piece begins at a multiple of the longest one, so none is longer than what is left.
        whole = -(-context // pieces[-1]) * pieces[-1]
        mesh = mesh_of(nnx.state(bank.model))
        # A step's attention costs as much as the cache is wide, so it sees no more than it needs.
        self._widths = sorted({max(1, whole // 4), max(1, whole // 2), whole})
        self._used = [0] * rows
        one = jax.eval_shape(lambda: bank.model.empty_cache(1, whole))
        layers = jax.tree.leaves(one.layers, is_leaf=lambda x: isinstance(x, Kept))
        self._cuts = not any(layer.state for layer in layers)  # a recurrence has no earlier state
        # Of each row, the first tokens that were read in whole pieces, each with its reader; and
        # whether the next ones follow them.
        self._begun: list[list[_Read]] = [[] for _ in range(rows)]
        self._open = [False] * rows
        self._turns, self._asked = itertools.count(1), [0] * rows  # when each was wanted last
        self._gated = any(method.gated for method in bank.recipe.attached)
        self._caches = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), one)
        sizes = rows, bank.model.config.vocab_size
        self._marks = Marks(jnp.zeros(sizes, jnp.int32), jnp.zeros(sizes, jnp.float32))
        if mesh is not None:
            self._caches, self._marks = shard_batch((self._caches, self._marks), mesh)
        self._words = -(-sizes[1] // 32)
        # Made once, so that steps without grammars send nothing to the device.
        self._any = {n: jnp.full((n, self._words), -1, jnp.int32) for n in (1, rows)}
        self.bank, self._model = bank, _Model(*bank.split, mesh)
        self._last: dict[int, tuple[Sequence[Fitted | None], Rows]] = {}

    def read(
        self,
        row: int,
        ids: Sequence[int],
        first: bool,
        adapter: Fitted | None,
        choice: Choice,
        acts: Sequence[bool] | None = None,
        following: Sequence[int] = (),
        made: bool = False,
        allowed: np.ndarray | None = None,
    ) -> Token:
        """Reads tokens of one row; the first ones of a prompt empty the row.

        Args:
            row: the row.
            ids: tokens, at most as many as the longest piece. Only the last ones of a prompt may be
                fewer.
            first: whether a prompt begins with them.
            adapter: what the bank's `fit` made of the adapter; None is the base.
            choice: how the token after them is chosen.
            acts: which of them the adapter acts on; None for all.
            following: the tokens that follow them in the prompt, if their log-probabilities are
                wanted; behind the prompt's last token there is none.
            made: whether the only one of them is a token that the row has made.
            allowed: the tokens that may follow, as bits, (vocab / 32,), int32; None for all.

        Returns:
            The token that follows them.
        """
        acting = np.ones(len(ids), bool) if acts is None else np.asarray(acts, bool)
        self._note(row, _readers(ids, adapter, acts), first)
        padded = np.zeros(next(p for p in self.pieces if p >= len(ids)), np.int32)
        padded[: len(ids)] = ids
        place = np.array([row, len(ids), first, made], np.int32)
        rows, feed = self._rows_of([adapter]), Choice.stacked([choice])
        gate = np.pad(acting, (0, len(padded) - len(ids))) if self._gated else None
        then = np.full(len(padded), -1, np.int32)
        then[: len(following)] = following
        self._caches, self._marks, token, given = _read(
            self._model,
            self._caches,
            self._marks,
            padded,
            then,
            place,
            rows,
            feed,
            gate,
            self._bits([allowed]),
        )
        self._used[row] = len(ids) + (0 if first else self._used[row])
        (chosen,) = _tokens(token)
        if not len(following):
            return chosen
        seen = jax.tree.map(lambda x: x[: len(following)], jax.device_get(given))
        return chosen._replace(given=seen)

    def _note(self, row: int, read: "list[_Read]", first: bool) -> None:
        """Keeps what a row has read, with the same program for equal ones."""
        if first:
            self._begun[row] = []
        self._open[row] = len(read) == self.pieces[-1] and (first or self._open[row])
        if self._open[row]:
            self._begun[row] += read
            self._asked[row] = next(self._turns)

    def place(
        self,
        rows: Sequence[int],
        ids: Sequence[int],
        adapter: Fitted | None = None,
        acts: Sequence[bool] | None = None,
    ) -> int:
        """The row of some for a prompt, where the fewest beginnings are lost.

        It is one whose beginning the prompt has as well, or that whose beginning nobody has wanted
        for longest.

        Args:
            rows: the rows.
            ids, adapter, acts: as for `reuse`.
        """
        wanted = _readers(ids, adapter, acts)

        def cost(row: int) -> tuple[int, int]:
            begun = self._begun[row]
            whole = len(begun) if _common(begun, wanted) == len(begun) else 0
            return (-whole if whole else bool(begun)), self._asked[row]

        return min(rows, key=cost)

    def reuse(
        self,
        row: int,
        ids: Sequence[int],
        adapter: Fitted | None = None,
        acts: Sequence[bool] | None = None,
    ) -> int:
        """Gives an empty row the tokens that any row has read alike, instead of reading them.

        So requests with the same adapter read a common beginning once, and so do requests of the
        base, and of adapters that are invoked later. What they compute then is what they would have
        computed. A changed adapter is another one.

        Args:
            row: the row.
            ids: the tokens of a prompt.
            adapter, acts: as for `read`.

        Returns:
            How many of them the row has, a multiple of the longest piece.
        """
        wanted = _readers(ids, adapter, acts)
        found = [_common(begun, wanted) for begun in self._begun]
        source = int(np.argmax(found))
        n = found[source] // self.pieces[-1] * self.pieces[-1]
        if not n or not self._cuts:
            return 0
        self._caches = _copied(self._caches, np.array([source, row, n], np.int32), self._model.mesh)
        self._begun[row], self._open[row], self._used[row] = wanted[:n], True, n
        self._asked[source] = self._asked[row] = next(self._turns)
        return n

    def mark(self, row: int, choice: Choice) -> None:
        """Gives a row the bias of a choice, and no tokens yet; nothing for one without marks."""
        if choice.marked:
            bias = np.zeros(self._marks.bias.shape[1], np.float32)
            for token, value in choice.bias:
                bias[token] += value
            self._marks = _marked(self._marks, np.int32(row), bias, self._model.mesh)

    def step(
        self,
        last: Sequence[int | None],
        adapters: Sequence[Fitted | None],
        choices: Sequence[Choice],
        acts: Sequence[bool] | None = None,
        allowed: Sequence[np.ndarray | None] | None = None,
    ) -> list[Token]:
        """The next token of each row.

        Args:
            last: the token before; None for a row that has no use for one, whose tokens stay.
            adapters: the adapter of each row.
            choices: how its token is chosen.
            acts: whether the row's adapter acts on these tokens; None for all.
            allowed: the tokens that each row may get, as for `read`.
        """
        bits = self._bits(allowed or [None] * self.rows)
        live = np.array([token is not None for token in last])
        ids = np.array([token or 0 for token in last], np.int32)
        rows, feed = self._rows_of(adapters), Choice.stacked(choices)
        # A row that is not live writes behind its last token, too; nothing sees what it writes.
        most = 1 + max(self._used)
        width = next((width for width in self._widths if width >= most), self._widths[-1])
        for row, begun in enumerate(self._begun):
            if live[row]:
                self._used[row], self._open[row] = self._used[row] + 1, False
            else:
                del begun[width - 1 :]  # where it writes if its own last token is behind
        gate = np.array([True] * self.rows if acts is None else acts) if self._gated else None
        self._caches, self._marks, token = _step(
            self._model, self._caches, self._marks, ids, live, rows, feed, width, gate, bits
        )
        return _tokens(token)

    def _bits(self, allowed: Sequence[np.ndarray | None]) -> Any:
        """The tokens that rows may get: (rows, words), all of them where nothing else is said."""
        if all(each is None for each in allowed):
            return self._any[len(allowed)]
        every = np.full(self._words, -1, np.int32)
        return np.stack([every if each is None else each for each in allowed])

    def _rows_of(self, adapters: Sequence[Fitted | None]) -> Rows:
        """The rows' adapters, which are the same from most steps to the next."""
        before, rows = self._last.get(len(adapters), (None, None))
        if rows is None or before != adapters:
            del rows  # with its arrays, before the next are made
            self._last.pop(len(adapters), None)
            self._last[len(adapters)] = adapters, self.bank.rows(adapters)
        return self._last[len(adapters)][1]

    def free(self, row: int) -> None:
        """Forgets a row's tokens, so that steps need not be wide enough for them."""
        self._used[row] = 0

    def compile(self, compiled: Callable[[int, int], None] = lambda n, of: None) -> None:
        """Runs every program once, on empty rows; `compiled` is called with how many there are."""
        self.mark(0, Choice(presence=1.0))
        programs = len(self.pieces) + len(self._widths) + self._cuts
        for n, length in enumerate(self.pieces, 1):
            self.read(0, [0] * length, True, None, Choice())
            compiled(n, programs)
        for n, width in enumerate(self._widths, len(self.pieces) + 1):
            self._used = [width - 1] * self.rows
            self.step([0] * self.rows, [None] * self.rows, [Choice()] * self.rows)
            compiled(n, programs)
        if self._cuts:
            self._caches = _copied(self._caches, np.zeros(3, np.int32), self._model.mesh)
            compiled(programs, programs)
        self._used, self._begun = [0] * self.rows, [[] for _ in range(self.rows)]


def _tokens(chosen: Token) -> list[Token]:
    """The tokens of all rows, on the host."""
    ids, finite, logprobs, top, _ = jax.device_get(chosen)
    return [
        Token(int(i), bool(f), float(p), Likely(*pair))
        for i, f, p, *pair in zip(ids, finite, logprobs, *top, strict=True)
    ]


@partial(jax.jit, static_argnames="width", donate_argnames=("caches", "marks"))
def _step(
    model: _Model,
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
    decoder = model.merged()

    def one(cache: Cache, token: Array, live: Array, index: Any, acts: Any) -> tuple[Array, Cache]:
        of_row = jax.tree.map(lambda x: x[None], index)
        seen, ids = cache.narrow(width), token[None, None]
        given = {"adapters": of_row} | ({} if acts is None else {"invoked": acts[None]})
        hidden, new = decoder.extend(ids, live[None, None], seen, **given)
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
def _read(
    model: _Model,
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
    decoder = model.merged()
    row, count, first, made = place
    each = {} if gate is None else {"invoked": gate[None]}
    last = {} if gate is None else {"invoked": gate[count - 1][None]}
    # Numbers that are not finite would outlive their request: a mask multiplies them by zero.
    old = jax.tree.map(lambda x: jnp.where(first, jnp.zeros_like(x[0]), x[row]), caches)
    mask = jnp.arange(len(ids)) < count
    with on_mesh(model.mesh):
        hidden, new = decoder.extend(ids[None], mask[None], old, adapters=rows, **each)
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
def _marked(
    marks: Marks, row: Int[Array, ""], bias: Float[Array, " vocab"], mesh: Mesh | None
) -> Marks:
    """The marks with a row that has a bias and no tokens."""
    return _split(Marks(marks.counts.at[row].set(0), marks.bias.at[row].set(bias)), mesh)


@partial(jax.jit, donate_argnames="caches", static_argnames="mesh")
def _copied(caches: Cache, place: Int[Array, "3"], mesh: Mesh | None) -> Cache:
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


# A token, and the adapter that acted when it was read; None is the base. An adapter that is gone
# lives on in no row's memory.
_Read = tuple[int, "weakref.ref[Fitted] | None"]


def _readers(
    ids: Sequence[int], adapter: Fitted | None, acts: Sequence[bool] | None
) -> list[_Read]:
    """Tokens, each with the adapter that acts when it is read; without `acts`, on all of them."""
    reader = None if adapter is None else weakref.ref(adapter)
    on = itertools.repeat(True, len(ids)) if acts is None else acts
    return [(token, reader if act else None) for token, act in zip(ids, on, strict=True)]


def _common(one: Sequence[_Read], other: Sequence[_Read]) -> int:
    """The number of tokens that two texts begin with alike, read by the same."""
    pairs = enumerate(zip(one, other, strict=False))
    unlike = (i for i, (a, b) in pairs if a[0] != b[0] or a[1] is not b[1])
    return next(unlike, min(len(one), len(other)))
