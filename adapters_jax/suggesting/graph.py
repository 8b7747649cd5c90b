"""A traced model as a flat graph: operations on numbered values, in the order of the program.

Calls, loops and branches are written out: the body of a scan once, as one layer reads like
another. A kernel that cannot be looked into is one operation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from adapters_jax.trace.reach import operands_of_scan

Value = int | None  # None is a number written in the program
# Operations whose outputs are their first input's numbers, moved or cast.
_MOVES = ("concatenate", "expand_dims", "gather", "pad", "reshape", "rev", "squeeze", "transpose")
_PARTS = ("dynamic_slice", "layer", "slice", "split", "unstack")
_COPIES = ("broadcast_in_dim", "convert_element_type", "copy", "name", "reduce_precision", "stack")
_HINTS = ("pvary", "sharding_constraint", "stop_gradient")
LAYOUT = frozenset(_MOVES + _PARTS + _COPIES + _HINTS)
# Products and sums, and what is linear in one input while the others are numbers.
PRODUCTS = ("conv_general_dilated", "dot_general", "ragged_dot_general")
_SUMS = ("add", "add_any", "cumsum", "psum", "reduce_sum", "scatter", "scatter-add", "sub")
LINEAR = LAYOUT | {*PRODUCTS, *_SUMS, "div", "dynamic_update_slice", "mul", "neg", "select_n"}


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation: the name of its primitive, its values, and the primitive's parameters."""

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]


class Graph:
    """The operations of a jaxpr.

    Args:
        closed: a traced function.

    Attributes:
        operations: in the order of the program.
        shapes: the shape of every value.
        floating: whether a value holds floats.
        inputs: the values of the function's arguments, flattened.
        outputs: the values that it returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> graph = Graph(jax.make_jaxpr(jax.jit(lambda x: jnp.sin(x) + 1))(jnp.ones(2)))
        >>> [operation.name for operation in graph.operations]
        ['sin', 'add']
    """

    def __init__(self, closed: core.ClosedJaxpr):
        self.operations: list[Operation] = []
        self.shapes: list[tuple[int, ...]] = []
        self.floating: list[bool] = []
        self.inputs = [self._value(var.aval) for var in closed.jaxpr.invars]
        self.outputs = [x for x in self._inlined(closed, self.inputs) if x is not None]

    def _value(self, aval: Any) -> int:
        """A new value."""
        self.shapes.append(tuple(map(int, getattr(aval, "shape", ()))))
        self.floating.append(jnp.issubdtype(getattr(aval, "dtype", jnp.int32), jnp.inexact))
        return len(self.shapes) - 1

    def _new(self, name: str, inputs: Sequence[Value], avals: Sequence[Any], params: Any) -> list:
        """The outputs of a new operation."""
        outputs = [self._value(aval) for aval in avals]
        self.operations.append(Operation(name, tuple(inputs), tuple(outputs), params))
        return outputs

    def _inlined(self, closed: Any, given: Sequence[Value]) -> list[Value]:
        """The values that a jaxpr returns for the given ones, after adding its operations."""
        jaxpr = getattr(closed, "jaxpr", closed)
        values: dict[Any, Value] = {var: self._value(var.aval) for var in jaxpr.constvars}
        values.update(zip(jaxpr.invars, given, strict=True))

        def read(atom: Any) -> Value:
            return None if isinstance(atom, core.Literal) else values[atom]

        for eqn in jaxpr.eqns:
            outputs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list[Value]) -> Sequence[Value]:
        """The outputs of an equation: those of the body where it has one."""
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(params, inputs, eqn.outvars)
        if name == "while":
            return self._inlined(params["body_jaxpr"], inputs[params["cond_nconsts"] :])
        if name == "cond":
            ends = [self._inlined(branch, inputs[1:]) for branch in params["branches"]]
            avals = [var.aval for var in eqn.outvars]
            return [
                self._new("select_n", [inputs[0], *options], [aval], {})[0]
                for *options, aval in zip(*ends, avals, strict=True)
            ]
        if name == "optimization_barrier":  # its outputs are its inputs, each by itself
            return inputs
        for body in _bodies(params):
            if [_rank(var) for var in body.invars] == [_rank(atom) for atom in eqn.invars]:
                return self._inlined(body, inputs)
        return self._new(name, inputs, [var.aval for var in eqn.outvars], params)

    def _scan(self, params: Mapping[str, Any], inputs: list[Value], outvars: Any) -> list[Value]:
        """The outputs of a scan; its carry enters the body as what it is before the first layer."""
        body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        consts, carry, xs = operands_of_scan(inputs, params)
        variables = body.invars[len(consts) + len(carry) :]
        layers = [
            self._new("layer", [x], [var.aval], {})[0] for x, var in zip(xs, variables, strict=True)
        ]
        ends = self._inlined(params["jaxpr"], [*consts, *carry, *layers])
        n = len(carry)
        stacked = [
            self._new("stack", [x], [var.aval], {})[0]
            for x, var in zip(ends[n:], outvars[n:], strict=True)
        ]
        return [*ends[:n], *stacked]


def _bodies(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs among the parameters of a primitive."""
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _rank(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))
