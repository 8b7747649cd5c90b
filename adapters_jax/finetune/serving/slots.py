"""The rows of a decoder's batch, each with a cache, an adapter and a way to choose tokens.

A prompt is read in pieces, a row at a time; then every call gives one token to each row that wants
one. Rows are at different lengths, so the model is mapped over them: each has its own cache.
All shapes are static, so the programs are compiled once, whatever the requests are. That of the
longest piece can do all work; the others do it faster.
"""

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.distributed.mesh import shard_batch
from adapters_jax.finetune.models.parts.cache import Kept
from adapters_jax.finetune.serving import programs
from adapters_jax.finetune.serving.choosing import Choice, Likely, Marks, Token
from adapters_jax.methods.mixed import Rows
from adapters_jax.transforms.bank import Bank
from adapters_jax.transforms.fitting import Fitted
from adapters_jax.weights.meshes import mesh_of

_Program = tuple[str, int]  # what it does, and the tokens of a piece or the width of a step


class Slots:
    """The rows, their caches, and the adapters that they use.

    Args:
        bank: the places of adapters on the device, with their NNX decoder.
        rows: the number of rows.
        context: the largest number of tokens of a row, prompt and completion together.
        pieces: the lengths of the parts that prompts are read in, in ascending order.

    Attributes:
        needed: the programs that suffice for all requests.
        programs: all of them, in the order that they are compiled.
    """

    def __init__(self, bank: Bank, *, rows: int, context: int, pieces: Sequence[int]) -> None:
        self.rows, self.context, self.pieces = rows, context, tuple(pieces)
        # A piece of a prompt begins at a multiple of the longest one. In place of a piece of one
        # token, the longest may begin at the last slot, and writes behind it.
        rounded = -(-context // pieces[-1]) * pieces[-1]
        whole = rounded + pieces[-1] * (pieces[-1] > 1)
        mesh = mesh_of(nnx.state(bank.model))
        # A step's attention costs as much as the cache is wide, so it sees no more than it needs.
        self._widths = sorted({max(1, rounded // 4), max(1, rounded // 2), whole})
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
        self.bank, self._model = bank, programs.Model(*bank.split, mesh, context)
        self._last: dict[int, tuple[Sequence[Fitted | None], Rows]] = {}
        self.needed: tuple[_Program, ...] = ("mark", 0), ("read", self.pieces[-1])
        more = [("read", piece) for piece in reversed(self.pieces)]
        more[1:1] = [("step", self._widths[-1])]
        more += [("step", width) for width in reversed(self._widths)]
        more += [("copy", 0)] if self._cuts else []
        self.programs: tuple[_Program, ...] = tuple(dict.fromkeys([*self.needed, *more]))
        self._compiled: set[_Program] | None = None  # None: each is compiled when it is used
        self._thread: threading.Thread | None = None
        self._closing = False
        rows_of = {n: self._rows_of([None] * n) for n in (1, rows)}
        arrays = self._model, self._caches, self._marks, rows_of
        self._shapes = jax.tree.map(_shape_of, arrays)

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
        padded = np.zeros(self._fitting("read", self.pieces, len(ids)), np.int32)
        padded[: len(ids)] = ids
        place = np.array([row, len(ids), first, made], np.int32)
        rows, feed = self._rows_of([adapter]), Choice.stacked([choice])
        gate = np.pad(acting, (0, len(padded) - len(ids))) if self._gated else None
        then = np.full(len(padded), -1, np.int32)
        then[: len(following)] = following
        self._caches, self._marks, token, given = programs.read(
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
        if not n or not self._cuts or not self._has("copy"):
            return 0
        self._caches = programs.copied(
            self._caches, np.array([source, row, n], np.int32), self._model.mesh
        )
        self._begun[row], self._open[row], self._used[row] = wanted[:n], True, n
        self._asked[source] = self._asked[row] = next(self._turns)
        return n

    def mark(self, row: int, choice: Choice) -> None:
        """Gives a row the bias of a choice, and no tokens yet; nothing for one without marks."""
        if choice.marked:
            bias = np.zeros(self._marks.bias.shape[1], np.float32)
            for token, value in choice.bias:
                bias[token] += value
            self._marks = programs.marked(self._marks, np.int32(row), bias, self._model.mesh)

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
        width = self._fitting("step", self._widths, most)
        for row, begun in enumerate(self._begun):
            if live[row]:
                self._used[row], self._open[row] = self._used[row] + 1, False
            else:
                del begun[width - 1 :]  # where it writes if its own last token is behind
        gate = np.array([True] * self.rows if acts is None else acts) if self._gated else None
        self._caches, self._marks, token = programs.step(
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

    @property
    def steps(self) -> bool:
        """Whether a program makes a token of every row at once."""
        return self._has("step", self._widths[-1])

    def compile(
        self,
        compiled: Callable[[int, int], None] = lambda n, of: None,
        later: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compiles every program; it runs none.

        Args:
            compiled: is called after each program, with how many there are so far and in all.
            later: if given, only `needed` are compiled here. Another thread compiles the rest, and
                calls it after each one. Until then other programs do their work: a longer piece, a
                wider step, and a piece for each row in place of a step.
        """
        self._compiled = set()
        n = len(self.programs if later is None else self.needed)
        self._compile(self.programs[:n], compiled)
        if later is not None:
            self._thread = threading.Thread(target=self._compile, args=(self.programs[n:], later))
            self._thread.start()

    def close(self) -> None:
        """Compiles nothing more; waits for the program that is being compiled."""
        self._closing = True
        if self._thread is not None:
            self._thread.join()

    def _compile(self, names: Sequence[_Program], compiled: Callable[[int, int], None]) -> None:
        for name in names:
            if self._closing:
                return
            self._lowered(*name).compile()
            self._compiled.add(name)  # type: ignore[union-attr]
            compiled(len(self._compiled), len(self.programs))  # type: ignore[arg-type]

    def _has(self, what: str, size: int = 0) -> bool:
        """Whether a program can be used."""
        return self._compiled is None or (what, size) in self._compiled

    def _fitting(self, what: str, sizes: Sequence[int], n: int) -> int:
        """The least size of a program for n tokens."""
        return next((size for size in sizes if size >= n and self._has(what, size)), sizes[-1])

    def _lowered(self, what: str, size: int) -> Any:
        """A program before it is compiled; a call with the same shapes finds the compiled one."""
        model, caches, marks, rows_of = self._shapes
        if what == "mark":
            bias = np.zeros(marks.bias.shape[1], np.float32)
            return programs.marked.lower(marks, np.int32(0), bias, model.mesh)
        if what == "copy":
            return programs.copied.lower(caches, np.zeros(3, np.int32), model.mesh)
        n = self.rows if what == "step" else 1
        rows, feed, bits = rows_of[n], Choice.stacked([Choice()] * n), self._any[n]
        gate = np.ones(n if what == "step" else size, bool) if self._gated else None
        if what == "step":
            ids, live = np.zeros(n, np.int32), np.ones(n, bool)
            return programs.step.lower(
                model, caches, marks, ids, live, rows, feed, size, gate, bits
            )
        ids, place = np.zeros(size, np.int32), np.zeros(4, np.int32)
        return programs.read.lower(model, caches, marks, ids, ids, place, rows, feed, gate, bits)


def _shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, and where it has to be; so that it can be donated meanwhile."""
    place = array.sharding if array.committed else None
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _tokens(chosen: Token) -> list[Token]:
    """The tokens of all rows, on the host."""
    ids, finite, logprobs, top, _ = jax.device_get(chosen)
    return [
        Token(int(i), bool(f), float(p), Likely(*pair))
        for i, f, p, *pair in zip(ids, finite, logprobs, *top, strict=True)
    ]


# A token, the adapter that acted when it was read, and whether its invocation was there; None is
# the base. An adapter that is gone lives on in no row's memory.
_Read = tuple[int, "weakref.ref[Fitted] | None", bool]


def _readers(
    ids: Sequence[int], adapter: Fitted | None, acts: Sequence[bool] | None
) -> list[_Read]:
    """Tokens, each with the adapter that acts when it is read; without `acts`, on all of them."""
    if adapter is None:
        return [(token, None, False) for token in ids]
    reader = weakref.ref(adapter)
    before = reader if adapter.partly else None
    on = itertools.repeat(True, len(ids)) if acts is None else acts
    return [(token, reader if act else before, act) for token, act in zip(ids, on, strict=True)]


def _common(one: Sequence[_Read], other: Sequence[_Read]) -> int:
    """The number of tokens that two texts begin with alike, read by the same."""
    pairs = enumerate(zip(one, other, strict=False))
    unlike = (i for i, (a, b) in pairs if a[0] != b[0] or a[1] is not b[1] or a[2] != b[2])
    return next(unlike, min(len(one), len(other)))
