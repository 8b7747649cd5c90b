"""The operations of a step's products: those it cannot do without, and those of a TPU's program.

A product of m x k and k x n numbers is 2 m k n operations. Its gradient is one product more for
each of its two inputs that depends on what trains. A frozen weight is no such input, and neither is
an activation in front of the first adapter.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from adapters_jax.distributed.program import Hlo

_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
_CONVOLUTION = re.compile(
    r"= \w+\[[\d,]*\]\S* convolution\(%?([\w.-]+), %?([\w.-]+)\)(.*?)dim_labels=(\w+)_(\w+)->(\w+)"
)
_KERNEL = re.compile(r'"tpu_custom_call".*"cost_estimate":\{"flops":"(\d+)"')


class Floor(NamedTuple):
    """Operations of a loss and its gradient, and those that recomputed blocks do once more."""

    needed: int
    recomputed: int


def floor(loss: Callable[..., Any], trained: Any, *rest: Any) -> Floor:
    """The operations of the products in a loss and its gradient by `trained`; all abstract."""
    traced = jax.make_jaxpr(loss)(trained, *rest)
    count = len(jax.tree.leaves(trained))
    marks = [i < count for i in range(len(traced.jaxpr.invars))]
    return _count(traced.jaxpr, marks)[0]


def _count(jaxpr: Any, marks: list[bool]) -> tuple[Floor, list[bool]]:
    """The operations, and which of the outputs depend on what trains."""
    depends = dict(zip(jaxpr.invars, marks, strict=True))
    needed = recomputed = 0
    for eqn in jaxpr.eqns:
        given = [not isinstance(x, Literal) and depends.get(x, False) for x in eqn.invars]
        found, marked = Floor(0, 0), [any(given)] * len(eqn.outvars)
        if eqn.primitive.name == "stop_gradient":
            marked = [False] * len(eqn.outvars)
        elif eqn.primitive.name == "dot_general":
            found = Floor(_product(eqn) * (1 + sum(given)), 0)
        elif inner := next(_bodies(eqn), None):
            found, marked = _inside(eqn, inner, given)
        needed, recomputed = needed + found.needed, recomputed + found.recomputed
        depends |= dict(zip(eqn.outvars, marked, strict=True))
    out = [not isinstance(x, Literal) and depends.get(x, False) for x in jaxpr.outvars]
    return Floor(needed, recomputed), out


def _inside(eqn: Any, body: Any, given: list[bool]) -> tuple[Floor, list[bool]]:
    """The operations of the program that an operation runs."""
    given = given[len(given) - len(body.invars) :]
    found, marked = _count(body, given)
    if eqn.primitive.name == "scan":  # what one round gives the next depends on what trains too
        carried = _alike(eqn.outvars, body.outvars)
        last = _alike(eqn.invars, body.invars)
        given = [*given[: last - carried], *marked[:carried], *given[last:]]
        found, marked = _count(body, given)
        return Floor(*(eqn.params["length"] * x for x in found)), marked
    if "remat" in eqn.primitive.name or "checkpoint" in eqn.primitive.name:
        return Floor(found.needed, _count(body, [False] * len(given))[0].needed), marked
    return found, marked


def _alike(outside: list[Any], inside: list[Any]) -> int:
    """How many of a scan's inputs or outputs come first that every round has whole."""
    pairs = zip(outside, inside, strict=True)
    return sum(x.aval.shape == y.aval.shape for x, y in pairs)


def _bodies(eqn: Any) -> Iterator[Any]:
    """The programs that an operation runs; of a choice by platform, the last one."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call", "branches"):
        body = eqn.params.get(name)
        body = body[-1] if isinstance(body, tuple) else body
        if body is not None:
            yield getattr(body, "jaxpr", body)


def _product(eqn: Any) -> int:
    ((contracted, _), _) = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    return 2 * math.prod(out) * math.prod(left[i] for i in contracted)


def products(text: str) -> int:
    """The operations of the products in a TPU's program, over all rounds of its loops.

    The program has them as convolutions, or as kernels that state what they compute. The axes that
    both sides have, such as the heads of attention, are windows most of whose positions fall beside
    the input.
    """
    module = Hlo(text)
    times, total = module.times(), 0
    for name, lines in module.lines.items():
        heads = (_RESULT.match(line) for line in lines)
        shapes = {x[1]: [int(n) for n in x[2].split(",") if n] for x in heads if x}
        for line in lines:
            if found := _CONVOLUTION.search(line):
                left, right, window, *labels = found.groups()
                out = shapes[_RESULT.match(line)[1]]
                total += times.get(name, 1) * _convolution(
                    [shapes[left], shapes[right], out], window, labels
                )
            elif found := _KERNEL.search(line):
                total += times.get(name, 1) * int(found[1])
    return total


def _convolution(shapes: list[list[int]], window: str, labels: list[str]) -> int:
    left, right, out = (dict(zip(x, y, strict=True)) for x, y in zip(labels, shapes, strict=True))
    total = 2 * out["b"] * out["f"] * left["f"]
    for axis in sorted(right.keys() - {"i", "o"}):
        total *= _met(left[axis], right[axis], out[axis], int(axis), window)
    return total


def _met(left: int, size: int, out: int, axis: int, window: str) -> int:
    """How many pairs of an output and a position of the window meet an entry of the input."""

    def option(name: str, default: str) -> str:
        found = re.search(rf"\b{name}=(\S+?)[ }}]", window)
        return found[1].split("x")[axis] if found else default

    low = int(option("pad", "0_0").split("_")[0])
    stride, spread, between = (
        int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    at = (o * stride + k * between - low for o in range(out) for k in range(size))
    return sum(x % spread == 0 and 0 <= x // spread < left for x in at)
