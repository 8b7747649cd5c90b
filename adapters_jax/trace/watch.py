"""Finds the attention that a module computes in line: two products with a softmax between.

Inside `watched(...)` every operation of the running code passes a `Watch`. It follows the columns
of each projection to the first product, the scores to the softmax, and the softmax to the second
product, whose result a function may change. The code gets plain values, none of the watch's own,
so that nothing is left behind in caches and Variables.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.extend.linear_util as lu
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.trace import parts
from adapters_jax.trace.activations import Operation, Seen
from adapters_jax.trace.following import facts_of, read
from adapters_jax.trace.heads import (
    Computed,
    Inline,
    Second,
    UnknownAttention,
    attention_at,
    together,
)
from adapters_jax.trace.primitives import operands_of_scan
from adapters_jax.trace.program import Graph
from adapters_jax.trace.registry import Attention, Names
from adapters_jax.trace.through import Through

Insert = Callable[[Inline, Array], Array]  # takes and gives (..., heads, head_dim)
Facts = Sequence[Seen | None]


@dataclass
class Found:
    """What a watch saw.

    Attributes:
        reasons: why prompts cannot act in others.
        checkpoints: how many bodies of `jax.checkpoint` are running.
    """

    attentions: list[Computed] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    checkpoints: int = 0

    @property
    def attention(self) -> Attention | None:
        """The only attention, perhaps head by head; None if there is none, or another one."""
        return None if self.reasons else together(self.attentions)

    def why_not(self) -> str:
        """Why there is not one attention, as the end of a sentence about the module."""
        if self.reasons:
            return self.reasons[0]
        if self.attentions:
            return (
                f"computes {len(self.attentions)} attentions, which are no single heads of one "
                "input, and prompts act in one; adapt its projections with aj.LoRA or its output "
                "with aj.Bottleneck, write it as one attention with an axis of heads, or, if "
                "modules inside it compute one each, target these"
            )
        return (
            "shows no softmax between two products of activations, of queries and keys and then of "
            "weights and values, in its own call and outside of loops such as lax.scan; prompts "
            "act there, and aj.LoRA acts on its projections anywhere"
        )

    def check(self, owner: str, path: str, module: Any) -> None:
        """Raises RecipeError unless there is one attention, which has read a method's tokens."""
        if self.attention is None:
            raise RecipeError(
                f"{owner} at {path!r}: in this call {type(module).__name__} {self.why_not()}"
            )


class Layered:
    """Arrays with layer axes, whose layers a loop over layers in watched code gets beside its own.

    Args:
        arrays: the arrays by a number, each with its layer axes.

    Attributes:
        arrays: those of the layer that is running.
        around: the lengths of the loops that are running.
        count: how many attentions were seen; one in a loop is one, however often its body is read.
    """

    def __init__(self, arrays: Mapping[int, tuple[tuple[int, ...], Any]]):
        self.arrays, self.count = dict(arrays), 0
        self.around: tuple[int, ...] = ()

    def of_loop(self, length: int) -> tuple[dict[int, Any], Callable[[Any], Any]]:
        """The arrays that a loop of some length may need, and a context that one layer runs in."""
        begin = self.count
        own = {i: x for i, (layers, x) in self.arrays.items() if layers[:1] == (length,)}

        @contextlib.contextmanager
        def layer(rows: Mapping[int, Any]) -> Iterator[None]:
            kept, around = self.arrays, self.around
            self.arrays = kept | {i: (kept[i][0][1:], x) for i, x in rows.items()}
            self.around, self.count = (*around, length), begin
            try:
                yield
            finally:
                self.arrays, self.around = kept, around

        return own, layer


@contextlib.contextmanager
def watched(insert: Insert, layered: Layered | None = None) -> Iterator["Watch"]:
    """Watches the code in its body; its inputs are to be those that the watch's `enter` returns.

    Args:
        insert: gets every attention with its result, and returns what the code goes on with.
        layered: arrays for loops over layers, whose bodies are then watched as well.
    """
    with jex.take_current_trace() as current:
        outer = current if isinstance(current, Watch) else None
        # Beside an outer watch, not on top of it: an attention belongs to the innermost one.
        watch = Watch(outer.parent if outer else current, insert, Found(), layered)
        # Where operations run at once, jax would call its compiled functions past the watch.
        at_once = contextlib.nullcontext() if _stages(watch.parent) else jax.disable_jit()
        with at_once, jex.set_current_trace(watch):
            yield watch
        if outer:
            outer.begin([seen.value for seen in watch._seen.values()])


def _stages(trace: Any) -> bool:
    """Whether a trace writes operations down, rather than running them at once."""
    with jex.set_current_trace(trace):
        return isinstance(jax.lax.neg(np.float32(0)), jax.core.Tracer)


@contextlib.contextmanager
def looking(inputs: Any, total: bool = False) -> Iterator[Found]:
    """Watches the code in its body, which gets these inputs, and changes nothing.

    Args:
        total: whether prompts will need `Inline.total`.
    """

    def look(inline: Inline, mixed: Array) -> Array:
        if total:
            inline.total()
        return mixed

    with watched(look) as watch:
        watch.begin(inputs)
        yield watch.found


def current() -> "Watch | None":
    """The watch around the caller; None outside, and within another trace."""
    with jex.take_current_trace() as trace:
        return trace if isinstance(trace, Watch) else None


def note_returned(name: str, y: Any) -> None:
    """Notes that a module returned an array, for `check_names`."""
    watch = current()
    seen = watch._seen.get(id(y)) if watch else None
    if watch and seen and seen.columns:
        watch._returned.setdefault(seen.columns.projection, name)


def check_names(module: Any, names: Names, arguments: Sequence[Any], children: str = "") -> None:
    """Checks that an attention function gets what the projections return that it should get.

    Args:
        names: the names of its parts.
        arguments: query, key and value.
        children: the path of the module with a slash, if `note_returned` had paths.

    Raises:
        RecipeError: it gets what another one returns. Where that cannot be seen, nothing is raised.
    """
    watch = current()
    for part, x in zip(("query", "key", "value"), arguments, strict=False):
        seen = watch._seen.get(id(x)) if watch else None
        found = (
            watch._returned.get(seen.columns.projection)
            if watch and seen and seen.columns
            else None
        )
        own = f"{children}{getattr(names, part)}"
        if found is not None and found != own:
            raise RecipeError(
                f"{type(module).__name__}: its {names.attention_fn} gets as {part} what {found!r} "
                f"returns, not what {own!r} does; correct the names in aj.register_attention"
            )


class Watch(Through):
    """The trace that follows activations; its values are those of `parent`."""

    watches_whole_weights = True  # `weights.lazy` computes beneath it

    def __init__(self, parent: Any, insert: Insert, found: Found, layered: Layered | None = None):
        super().__init__(parent)
        self.insert, self.found, self.layered = insert, found, layered
        # By the id of the value, since arrays compare by their numbers. Both hold the value itself,
        # since Python gives the id of an object that is gone to the next one.
        self._seen: dict[int, Seen] = {}  # activations
        self._repeated: dict[int, tuple[Any, frozenset[int]]] = {}  # other values; see `repeats`
        self._returned: dict[Any, str] = {}  # the module that returned a projection's columns

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return functools.partial(self._outside, found) if name.startswith("process_") else found

    def _outside(self, process: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lets the parent process what this trace cannot see into; the results are activations."""
        results = process(*args, **kwargs)
        self.begin(results)
        return results

    def process_custom_vjp_call(self, *args: Any, **kwargs: Any) -> Any:
        """A function with its own gradient; this trace does not look into it."""
        # Kernels of attention are such functions. Their code computes a softmax in blocks, and what
        # a prompt would add inside would be missing from the gradient.
        return self._outside(self.parent.process_custom_vjp_call, *args, **kwargs)

    def enter(self, inputs: Any) -> Any:
        """The inputs of the code, with jax's arrays in the place of numpy's of numbers."""
        self.begin(inputs)
        if not any(map(_is_numpy, jax.tree.leaves(inputs, is_leaf=_is_module))):
            return inputs  # the very tree, since jax would sort its dictionaries
        array = lambda x: jnp.asarray(x) if _is_numpy(x) else x  # noqa: E731
        with jax.ensure_compile_time_eval():  # still numbers, as for indices
            inputs = jax.tree.map(array, inputs, is_leaf=_is_module)
        self.begin(inputs)
        return inputs

    def begin(self, tree: Any) -> None:
        """Takes the arrays of a tree for activations."""
        for x in jax.tree.leaves(tree, is_leaf=_is_module):
            if isinstance(x, jax.Array) and id(x) not in self._seen:
                self._seen[id(x)] = Seen(x, parts.rows(x.shape))

    def process_primitive(self, primitive: Any, values: Any, params: Any, /) -> Any:
        """Computes an operation, and notes what is known of its results."""
        known, name = [self._seen.get(id(x)) for x in values], primitive.name
        if not any(known):
            result = self.parent.process_primitive(primitive, values, params)
            self._note_repeated(name, values, params, result)
            return result
        if name in ("jit", "pjit"):
            return self.inlined(params, values)
        if name in ("remat2", "checkpoint"):
            return self._remat(known, values, params)
        if name == "scan" and self.layered:
            return self._scan(self.layered, known, values, params)
        result = self.parent.process_primitive(primitive, values, params)
        outputs = result if primitive.multiple_results else [result]
        facts: Facts = known
        if name != "optimization_barrier":  # whose outputs are its inputs
            shapes = [x.shape for x in outputs]
            facts = facts_of(Operation(name, primitive, values, known, params, shapes, self))
        if name == "dot_general" and is_second(known, params):
            outputs = [self._second(known, params, outputs[0])]
        self._note(outputs, facts)
        return outputs if primitive.multiple_results else outputs[0]

    def process_custom_jvp_call(
        self, primitive: Any, fun: Any, jvp: Any, values: Any, /, **params: Any
    ) -> Any:
        """A function with its own derivative is called as it is, and its code is read."""
        # `jax.nn.softmax` is such a function. Inlined, it would be differentiated by its code and
        # not by its own rule, so the parent gets the call as it is.
        known = [self._seen.get(id(x)) for x in values]
        closed = None
        if any(seen and seen.softmax for seen in known):
            shapes = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in values]
            with jex.set_current_trace(self.parent):
                closed = jax.make_jaxpr(lambda *xs: fun.call_wrapped(*xs))(*shapes)
            # jax's wrapped functions can be called once: the parent gets the jaxpr in its place.
            fun = lu.wrap_init(jex.jaxpr_as_fun(closed), debug_info=fun.debug_info)
        results = self.parent.process_custom_jvp_call(primitive, fun, jvp, values, **params)
        if closed is not None:
            self._note(results, self._read(closed, known))
        if any(known):
            self.begin(results)
        return results

    def _note(self, results: Sequence[Any], facts: Facts) -> None:
        for x, seen in zip(results, facts, strict=True):
            if seen is not None:
                self._seen[id(x)] = replace(seen, value=x)

    def _read(self, closed: Any, given: Facts) -> Facts:
        """What is known of the results of a jaxpr, without computing them."""
        graph = Graph(closed)
        pairs = zip(graph.inputs, given, strict=True)
        known = {value: seen for value, seen in pairs if seen is not None}
        for number in range(len(graph.operations)):
            read(graph, number, known, self)
        return [known.get(x) for x in graph.outputs]

    def _remat(self, known: Facts, values: Sequence[Any], params: Mapping[str, Any]) -> Any:
        """The body of `jax.checkpoint`, checkpointed again; an attention is in it as a whole."""

        def body(*inside: Any) -> Any:
            self.found.checkpoints += 1
            results = self._within(params["jaxpr"], (), known, inside)
            self.found.checkpoints -= 1
            return results

        with jex.set_current_trace(self.parent):
            results = self.checkpointed(body, params)(*values)
        self.begin(results)
        return results

    def _within(self, jaxpr: Any, consts: Any, known: Facts, values: Sequence[Any]) -> Any:
        """Runs a body that jax traces anew, with values that this watch has never seen."""
        with jex.take_current_trace() as current:
            inner = Watch(current, self.insert, self.found, self.layered)
            inner.begin([x for x, seen in zip(values, known, strict=True) if seen])
            with jex.set_current_trace(inner):
                return jax.core.eval_jaxpr(jaxpr, consts, *values)

    def _scan(
        self, layered: Layered, known: Facts, values: Sequence[Any], params: Mapping[str, Any]
    ) -> Any:
        """A loop, written again so that its body is watched and gets rows of `layered`."""
        closed, length = params["jaxpr"], params["length"]
        consts, initial, xs = operands_of_scan(values, params)
        arrays, layer = layered.of_loop(length)

        def body(carry: Any, rows: Any) -> Any:
            own, mine = rows
            inside = (*consts, *carry, *own)
            with layer(mine):
                results = self._within(closed.jaxpr, closed.consts, known, inside)
            return results[: len(carry)], results[len(carry) :]

        with jex.set_current_trace(self.parent):
            carry, rows = jax.lax.scan(
                body,
                initial,
                (xs, arrays),
                length=length,
                reverse=params["reverse"],
                unroll=params["unroll"],
            )
        self.begin([*carry, *rows])
        return [*carry, *rows]

    def _note_repeated(self, name: str, values: Any, params: Any, result: Any) -> None:
        """Notes along which axes a value that is no activation repeats itself."""
        if name == "broadcast_in_dim":
            old, shape = jnp.shape(values[0]), params["shape"]
            where = enumerate(params["broadcast_dimensions"])
            kept = {j for i, j in where if old[i] == shape[j]}
            self._repeated[id(result)] = result, frozenset(range(len(shape))) - kept

    def repeats(self, x: Any) -> frozenset[int]:
        """The axes along which a value that is no activation repeats itself."""
        _, axes = self._repeated.get(id(x), (x, frozenset()))
        return axes | {i for i, n in enumerate(jnp.shape(x)) if n == 1}

    def _second(self, known: Facts, params: Any, y: Array) -> Array:
        """The result of the second product of an attention, changed."""
        left, right = known
        try:
            with jex.set_current_trace(self.parent):
                inline, there, back = attention_at(Second.of(left, right, params), y)  # type: ignore[arg-type]
                inline = inline.after(self.found.attentions)
                changed = back(self.insert(inline, there))
        except UnknownAttention as why:
            self.found.reasons.append(str(why))
            return y
        self.found.attentions.append(inline.computed)
        return changed


def is_second(known: Facts, params: Any) -> bool:
    """Whether a product is one of a softmax and a value."""
    past = [seen is not None and seen.softmax and seen.softmax.stage != "logits" for seen in known]
    (summed, _), _ = params["dimension_numbers"]
    return None not in known and any(past) and bool(summed)


def _is_numpy(x: Any) -> bool:
    return isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.number)


def _is_module(x: Any) -> bool:
    return isinstance(x, nn.Module | nnx.Module | nnx.Variable)
