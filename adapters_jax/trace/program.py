"""A traced program as a flat graph: operations on numbered values, in the order of the program.

Calls, loops and branches are written out: the body of a loop once, as one layer reads like another.
A kernel that cannot be looked into is one operation. This is the only recursion over the programs
inside a program; whoever asks something of a program walks the graph.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from adapters_jax.trace.primitives import COPIES, operands_of_scan


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation.

    Attributes:
        name: the name of its primitive; "layer" and "layers" for a scan's operand and result.
        inputs: the numbers of the values that it reads.
        outputs: the numbers of its results.
        primitive: the primitive; None for "layer" and "layers".
        effects: whether it does something beside computing its results.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    primitive: Any = None
    effects: bool = False


class Loop(NamedTuple):
    """The body of a loop, whose operations are `begin` to `end`.

    Attributes:
        begin, end: the numbers of its first operation, and of the one after its last.
        carried: pairs of a value at the start of a round, and what the next round has in its place.
        goes_on: the values that say whether there is a next round.
    """

    begin: int
    end: int
    carried: list[tuple[int, int]]
    goes_on: list[int]


class Graph:
    """The operations of a jaxpr.

    Args:
        closed: a traced function.
        entered: the names of primitives whose operands each pass an operation of that name before
            their body, which is written out.

    Attributes:
        operations: in the order of the program.
        avals: the shape and dtype of every value.
        literals: the numbers that are written in the program, by their values.
        inputs: the values of the function's arguments, flattened.
        outputs: the values that it returns.
        loops: the loops, the inner ones before those around them.
        own_gradient: the numbers of operations within functions that have a gradient of their own.

    Example:
        >>> graph = Graph(jax.make_jaxpr(jax.jit(lambda x: jnp.sin(x) + 1))(jnp.ones(2)))
        >>> [operation.name for operation in graph.operations]
        ['sin', 'add']
    """

    def __init__(self, closed: Any, entered: Collection[str] = ()):
        self._entered = entered
        self.operations: list[Operation] = []
        self.avals: list[Any] = []
        self.literals: dict[int, Any] = {}
        self.loops: list[Loop] = []
        self.own_gradient: set[int] = set()
        self.inputs = [self._value(var) for var in getattr(closed, "jaxpr", closed).invars]
        self.outputs = self._inlined(closed, self.inputs)

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""
        return tuple(map(int, getattr(self.avals[value], "shape", ())))

    def is_float(self, value: int) -> bool:
        """Whether a value holds floats."""
        return jnp.issubdtype(getattr(self.avals[value], "dtype", jnp.int32), jnp.inexact)

    def _value(self, var: Any) -> int:
        """A new value."""
        self.avals.append(var.aval)
        return len(self.avals) - 1

    def _new(self, name: str, inputs: Sequence[int], outvars: Any, eqn: Any = None) -> list[int]:
        """The outputs of a new operation."""
        outputs = [self._value(var) for var in outvars]
        params, primitive = (eqn.params, eqn.primitive) if eqn else ({}, None)
        effects = bool(eqn and eqn.effects)
        self.operations.append(
            Operation(name, tuple(inputs), tuple(outputs), params, primitive, effects)
        )
        return outputs

    def _inlined(self, closed: Any, given: Sequence[int]) -> list[int]:
        """The values that a jaxpr returns for the given ones, after adding its operations."""
        jaxpr = getattr(closed, "jaxpr", closed)
        values: dict[Any, int] = {var: self._value(var) for var in jaxpr.constvars}
        values.update(zip(jaxpr.invars, given, strict=True))

        def read(atom: Any) -> int:
            if not isinstance(atom, core.Literal):
                return values[atom]
            value = self._value(atom)
            self.literals[value] = atom.val
            return value

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[int]) -> Sequence[int]:
        """The outputs of an equation: those of the body where it has one."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, inputs, eqn.outvars)
        if name == "while":
            return self._while(params, inputs)
        if name == "cond":
            ends = [self._inlined(branch, inputs[1:]) for branch in params["branches"]]
            return [
                self._new("select_n", [inputs[0], *options], [var])[0]
                for *options, var in zip(*ends, eqn.outvars, strict=True)
            ]
        if name == "optimization_barrier":  # its outputs are its inputs, each by itself
            return inputs
        # jit, checkpoint, custom derivatives and shard_map have one body, which takes the operands;
        # jax has no common name for that parameter. The body of a kernel takes others, such as
        # references to its results, and stays closed.
        for body in _bodies(params):
            if [_rank(var) for var in body.invars] == [_rank(atom) for atom in eqn.invars]:
                if name in self._entered:
                    pairs = zip(inputs, body.invars, strict=True)
                    inputs = [self._new(name, [x], [var])[0] for x, var in pairs]
                begin = len(self.operations)
                outputs = self._inlined(body, inputs)
                if name.startswith("custom_"):
                    self.own_gradient.update(range(begin, len(self.operations)))
                return outputs
        return self._new(name, inputs, eqn.outvars, eqn)

    def _scan(self, params: Mapping[str, Any], inputs: list[int], outvars: Any) -> list[int]:
        """The outputs of a scan; its carry enters the body as what it is before the first layer."""
        body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        consts, carry, xs = operands_of_scan(inputs, params)
        begin, n = len(self.operations), len(carry)
        variables = body.invars[len(consts) + n :]
        layers = [self._new("layer", [x], [var])[0] for x, var in zip(xs, variables, strict=True)]
        ends = self._inlined(params["jaxpr"], [*consts, *carry, *layers])
        self._loop(begin, carry, ends[:n], [])
        stacked = [
            self._new("layers", [x], [var])[0] for x, var in zip(ends[n:], outvars[n:], strict=True)
        ]
        return [*ends[:n], *stacked]

    def _while(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        """The outputs of a while loop, as those of a scan."""
        n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        begin, carry = len(self.operations), inputs[m:]
        # In front of the body: a walk backwards meets the body first, and then what it needs.
        goes_on = self._inlined(params["cond_jaxpr"], [*inputs[:n], *carry])
        ends = self._inlined(params["body_jaxpr"], inputs[n:])
        self._loop(begin, carry, ends, goes_on)
        return ends

    def _loop(self, begin: int, carry: Sequence[int], ends: Sequence[int], goes_on: Any) -> None:
        if begin == len(self.operations):  # a body that only hands its values on has a place too
            self._new("loop", [], [])
        carried = list(zip(carry, ends, strict=True))
        self.loops.append(Loop(begin, len(self.operations), carried, goes_on))


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among the parameters of a primitive."""
    for value in params.values():
        jaxpr = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(jaxpr, core.Jaxpr):
            yield jaxpr


def _rank(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


class Reach(NamedTuple):
    """What outputs depend on.

    Attributes:
        inputs: for each input, whether some output depends on it.
        names: the names of values that some output depends on.
    """

    inputs: list[bool]
    names: set[str]


def named(tree: Any, name: str) -> Any:
    """A tree whose float arrays have a name that `reaching` finds."""

    def mark(x: Any) -> Any:
        floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
        return checkpoint_name(x, name) if floats else x

    return jax.tree.map(mark, tree)


def reaching(closed: Any, outputs: Sequence[bool] | None = None, gradient: bool = False) -> Reach:
    """What the outputs of a traced function depend on.

    Args:
        closed: its jaxpr, or its `Graph`.
        outputs: which of the outputs count; by default all.
        gradient: only what a gradient of the outputs gets to counts. `stop_gradient` lets none
            through, nor does what gives no floats, unless all of the outputs are such.

    Example:
        >>> traced = jax.make_jaxpr(lambda x, y: (named(x, "one") + 1.0, named(y, "two"))[:1])
        >>> reaching(traced(1.0, 2.0).jaxpr)
        Reach(inputs=[True, False], names={'one'})
    """
    graph = closed if isinstance(closed, Graph) else Graph(closed)
    counted = [True] * len(graph.outputs) if outputs is None else outputs
    live = {value for value, counts in zip(graph.outputs, counted, strict=True) if counts}
    floats = any(map(graph.is_float, live))
    names: set[str] = set()
    loops: dict[int, list[Loop]] = {}
    for loop in graph.loops:
        loops.setdefault(loop.begin, []).append(loop)
    at = len(graph.operations)
    while at:
        at -= 1
        operation = graph.operations[at]
        stops = gradient and at not in graph.own_gradient and _stops(graph, operation, floats)
        if (operation.effects or not live.isdisjoint(operation.outputs)) and not stops:
            live.update(operation.inputs)
            if operation.name == "name":
                names.add(operation.params["name"])
        for loop in loops.get(at, ()):
            if more := _of_next_round(loop, live) - live:
                live |= more
                at = loop.end  # the body once more, now with these
                break
    return Reach([value in live for value in graph.inputs], names)


def _stops(graph: Graph, operation: Operation, floats: bool) -> bool:
    """Whether an operation lets no gradient through."""
    if operation.name == "stop_gradient":
        return True
    return floats and not any(map(graph.is_float, operation.outputs))


# What transforms of flax do with state that they hand on.
_HANDED_ON = {*COPIES, "layer", "layers", "transpose"} - {"convert_element_type"}


def read_without(
    graph: Graph, leaves: Mapping[int, str], name: str, last: str = ""
) -> dict[str, str]:
    """The leaves that a program reads, returns or writes otherwise than by values of a name.

    Args:
        leaves: the paths of leaves, by the numbers of the program's inputs.
        name: the name of a leaf's value, as `named` gives it.
        last: the name, without the path behind it, of what a leaf is in the end.

    Returns:
        For each leaf that is read otherwise the first operation, or "return", or "write".

    Example:
        >>> traced = jax.make_jaxpr(lambda x, y: (named(x, "seen") + 1.0, y.T + 2.0))
        >>> read_without(Graph(traced(1.0, 2.0)), {0: "x", 1: "y"}, "seen")
        {'y': 'add'}
    """
    held = {graph.inputs[number]: path for number, path in leaves.items()}
    found: dict[str, str] = {}
    for operation in graph.operations:
        given = operation.params.get("name") if operation.name == "name" else None
        if given == name:
            continue
        if last and given and given.startswith(last):
            path = given.removeprefix(last)
            if held.get(operation.inputs[0]) != path:
                found.setdefault(path, "write")
            continue
        paths = [held[x] for x in operation.inputs if x in held]
        if paths and operation.name in _HANDED_ON:  # all of them have one operand
            held.update(dict.fromkeys(operation.outputs, *paths))
            continue
        for path in paths:
            found.setdefault(path, operation.name)
    for path in (held[x] for x in graph.outputs if x in held):
        found.setdefault(path, "return")
    return {path: found[path] for path in leaves.values() if path in found}


def _of_next_round(loop: Loop, live: set[int]) -> set[int]:
    """What the rounds before the last must give, where something of the last counts."""
    ends = {end for begin, end in loop.carried if begin in live}
    counts = ends or any(end in live for _, end in loop.carried)
    return {*ends, *loop.goes_on} if counts else set()
