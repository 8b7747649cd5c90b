"""Methods on outputs: which of the arrays that a module returns each one acts on, and their run.

Where a module returns several, its methods act on the only array of floats, or else the only one
that has the shape of the module's input, unless their `output` says which. The rest is returned as
it is. Entries that a composition names run where it runs them. Every API uses this file.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import AttachmentPoint, Leaves, Method
from adapters_jax.trace.calls import Returned, part_of, with_part

Again = Callable[[Any], Any]
# Of an output: the method's arrays by name, its attachment point, and a key for its dropout.
Bound = Callable[[Array], tuple[Leaves, AttachmentPoint, Any]]


@dataclass(frozen=True)
class State:
    """What methods on one output have come to in a call.

    Attributes:
        x: the module's input, with the methods so far that change it.
        y: its output, with the methods so far.
        again: the output of another input, with the methods so far that change outputs.
        added: what the last method added, where it says so by `branch`.
    """

    x: Any
    y: Array
    again: Callable[[Any], Array]
    added: Array | None = None

    def moved(self, stream: Array, of_input: bool, added: Array | None = None) -> "State":
        """The state with another input or output."""
        if of_input:
            return State(stream, self.again(stream), self.again, added)
        return replace(self, y=stream, added=added)


Run = Callable[[State], State]
Named = dict[str, list[tuple[Method, Run]]]  # the entries of a module so far, by their names


def adapted(
    methods: Sequence[tuple[Method, Bound]], path: str, again: Again, x: Any, y: Any
) -> Any:
    """What a module returns, after its methods on outputs.

    Args:
        methods: each with what gives its arrays for an output, in the order of the recipe.
        again: runs the module on another input.

    Raises:
        RecipeError: a method finds no array that is plainly meant, or a composition lacks a member.
    """
    members = {name for method, _ in methods for name in method.members}
    named: Named = {}
    for method, bound in methods:
        run = functools.partial(_run, method, bound, named)
        if method.name:
            named.setdefault(method.name, []).append((method, run))
        own = _alone(method, named)
        if len({each.output for each in own}) > 1:
            raise RecipeError(
                f"{method.kind}: its members act on several outputs of the module at {path!r}; "
                "give all of them the same output="
            )
        if own and not (method.name and method.name in members):
            x, y, again = _step(run, own[0].output, method, path, again, x, y)
    return y


def _alone(method: Method, named: Named) -> list[Method]:
    """The methods, and no compositions, that an entry runs at a module."""
    own = [m for name in method.members for m, _ in named.get(name, [])]
    return [m for each in own for m in _alone(each, named)] if method.members else [method]


def _run(method: Method, bound: Bound, named: Named, state: State) -> State:
    """One method, or one composition of those before it."""
    leaves, point, key = bound(state.y)
    if method.members:
        after = method.compose(leaves, point, functools.partial(_member, named), state, key)
    elif type(method).branch is Method.branch:
        new = method.forward(leaves, point, state.x, state.y, key)
        after = state.moved(new, method.changes_input)
    else:
        added = method.branch(leaves, point, state.x, state.y, key)
        stream = state.x if method.changes_input else state.y
        after = state.moved(stream + added.astype(stream.dtype), method.changes_input, added)
    if after.x is not state.x:
        return after

    def again(x: Any) -> Array:
        return _run(method, bound, named, replace(state, x=x, y=state.again(x))).y

    return replace(after, again=again)


def _member(named: Named, name: str, state: State) -> State | None:
    """The entries of a name, one after the other; None where there is none at the module."""
    runs = [run for method, run in named.get(name, []) if _alone(method, named)]
    for run in runs:
        state = run(state)
    return state if runs else None


def _step(
    run: Run, output: str | None, method: Method, path: str, again: Again, x: Any, y: Any
) -> tuple[Any, Any, Again]:
    """A module's input and what it returns, after one entry; and the latter of another input."""
    returned = Returned.of(x, y)
    where = returned.chosen(output)
    if where is None:
        raise RecipeError(
            f"{type(method).__name__}: the module at {path!r} {returned.why_not(output)}"
        )
    state = run(State(x, part_of(y, where), lambda x: part_of(again(x), where)))

    def later(x: Any) -> Any:
        return with_part(again(x), where, state.again(x)) if where else state.again(x)

    return state.x, with_part(y, where, state.y), later
