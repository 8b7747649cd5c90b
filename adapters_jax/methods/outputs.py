"""Methods on outputs: which of the arrays that a module returns each one acts on, and their run.

Where a module returns several, its methods act on the only array of floats, or else the only one
that has the shape of the module's input, unless their `output` says which. The rest is returned as
it is. Both APIs use this file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods.base import Method
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
