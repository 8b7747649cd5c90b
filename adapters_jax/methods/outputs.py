"""Methods on outputs: which of the arrays that a module returns each one acts on, and their run.

Where a module returns several, its methods act on the only array of floats, or else the only one
that has the shape of the module's input, unless their `output` says which. The rest is returned as
it is. Both APIs use this file, for calls and, on shapes, for the width of what a method adapts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from flax import linen, nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods.base import AttachmentPoint, Method
from adapters_jax.trace.calls import Returned, part_of, with_part

Again = Callable[[Any], Any]
Forward = Callable[[Again, Any, Array], Array]


def as_path(owner: str, output: Any) -> str | None:
    """An `output` as a path of names and positions; None stays None.

    Raises:
        UserError: it is neither a name, a path nor a position.
    """
    if isinstance(output, str) and output:
        return output
    if isinstance(output, int) and not isinstance(output, bool) and output >= 0:
        return str(output)
    if output is not None:
        raise UserError(
            f"{owner}: output={output!r}, expected None, a position such as 1, a name such as "
            "'hidden_states', or a path of them such as '0/hidden_states'"
        )
    return None


def seen_by(method: Method, point: AttachmentPoint) -> AttachmentPoint:
    """A point with the width of the output that a method acts on."""
    if method.acts_on != "output":
        return point
    where = None if point.returned is None else point.returned.chosen(method.output)
    if point.returned is None or where is None:
        return replace(point, width=0)
    return replace(point, width=point.returned.parts[where].shape[-1])


def why_not(method: Method, module: Any, point: AttachmentPoint | None) -> str:
    """Why a method cannot attach to a module.

    Args:
        method: the method.
        module: the module.
        point: its attachment point; None where it has none, since its `__call__` did not run.
    """
    if method.acts_on == "attention" and point is not None and point.no_attention:
        return f"{type(module).__name__} {point.no_attention}"
    if method.acts_on != "output":
        return method.why_not(module)
    name, owner = type(module).__name__, type(method).__name__
    if point is None or point.returned is None:
        own = _functions(module)
        others = f"; {name} has the functions {', '.join(own)}" if own else ""
        if not callable(module):
            return f"{name} has no `__call__`, on whose output {owner} acts{others}"
        return (
            f"{name} did not run its `__call__`, on whose output {owner} acts; pass inputs that "
            f"run it, in NNX as example_inputs=(...){others}"
        )
    if point.returned.chosen(method.output) is None:
        return f"{name} {point.returned.why_not(method.output)}"
    return method.why_not(module)


def _functions(module: Any) -> list[str]:
    """The names of the public functions of a module's own class; none of flax's own layers."""
    if type(module).__module__.startswith("flax."):
        return []
    known = {*dir(linen.Module), *dir(nnx.Module), "setup"}
    own = [name for name in dir(type(module)) if not name.startswith("_") and name not in known]
    return [name for name in own if callable(getattr(type(module), name))]


def adapted(
    methods: Sequence[tuple[Method, Forward]], path: str, again: Again, x: Any, y: Any
) -> Any:
    """What a module returns, after its methods on outputs.

    Args:
        methods: each with its arithmetic: `forward(again, x, y)` gives y, one array, adapted, and
            `again(x)` is that array of another input.
        path: path of the module.
        again: runs the module on another input.
        x: the module's input.
        y: what it returned.

    Raises:
        RecipeError: a method finds no array that is plainly meant.
    """
    for method, forward in methods:
        step = functools.partial(_step, method, forward, path, again)
        y, again = step(x, y), _after(step, again)
    return y


def _step(method: Method, forward: Forward, path: str, again: Again, x: Any, y: Any) -> Any:
    """What a module returns, after one method."""
    returned = Returned.of(x, y)
    where = returned.chosen(method.output)
    if where is None:
        raise RecipeError(
            f"{type(method).__name__}: the module at {path!r} {returned.why_not(method.output)}"
        )
    adapted = forward(lambda x: part_of(again(x), where), x, part_of(y, where))
    return with_part(y, where, adapted)


def _after(step: Callable[[Any, Any], Any], again: Again) -> Again:
    """Runs a module and a method on another input."""
    return lambda x: step(x, again(x))
