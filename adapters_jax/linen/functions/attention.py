"""Attention in a plain function, in whose trace a softmax between two products shows where it is.

Each attention has the path of what holds the weights before it: `layers/attn` for a softmax of
queries from `layers/attn/wq` and keys from `layers/attn/wk`. Where it runs in a loop over layers,
the loop gets the layers of its prompts beside its own.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from adapters_jax.methods.prompt import inserted
from adapters_jax.placement import Visit
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around
from adapters_jax.trace.flow import Trace
from adapters_jax.trace.heads import Inline
from adapters_jax.trace.inputs import Inputs, is_array
from adapters_jax.trace.program import Graph, named
from adapters_jax.trace.registry import Attention
from adapters_jax.trace.roles import around_attentions
from adapters_jax.trace.watch import Layered, watched
from adapters_jax.trees import flatten, path_of, unflatten

# The arrays of a module's adapters: by the slot of a method, by their names.
Held = Mapping[str, Mapping[str, Any]]


class Attending(NamedTuple):
    """An attention of a function.

    Attributes:
        path: the path of what holds the weights before it.
        sizes: its sizes; None where prompts cannot act in it.
        layers: the lengths of the loops around it, which are its layer axes.
        why_not: why prompts cannot act in it.
    """

    path: str
    sizes: Attention | None
    layers: tuple[int, ...]
    why_not: str

    @property
    def visit(self) -> Visit:
        """What the run shows where prompts attach."""
        return Visit(self.path, attention=self.sizes, no_attention=self.why_not)


def attentions_of(
    call: Callable[..., Any], shapes: Mapping[str, Any], inputs: Inputs
) -> list[Attending]:
    """The attentions of a function, in the order of the program.

    Args:
        call: the function, which takes a nested dictionary of its arrays.
        shapes: the arrays by name, as shapes and dtypes.
    """
    arrays, whole = inputs.split()
    seen: dict[int, tuple[Attention, tuple[int, ...]]] = {}
    layered = Layered({})

    def run(tree: Any, arrays: Any) -> list[Any]:
        y = whole(arrays).call(functools.partial(call, tree))
        return [x for x in jax.tree.leaves(y) if is_array(x)]

    def look(inline: Inline, mixed: Array) -> Array:
        inline.total()  # raises where it cannot be followed, as prompts with one softmax need
        seen[layered.count] = inline.sizes, layered.around
        layered.count += 1
        return mixed

    def watching(tree: Any, arrays: Any) -> list[Any]:
        with watched(look, layered) as watch:
            y = run(tree, watch.enter(arrays))
        reasons.extend(watch.found.reasons)
        return y

    reasons: list[str] = []
    tree = unflatten(shapes)
    jax.make_jaxpr(watching)(tree, arrays)
    graph = Graph(jax.make_jaxpr(run)(tree, arrays))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    modules = {above for path in shapes for above in around(path)}
    given = frozenset(graph.inputs[len(leaves) :])
    parameters = {i: path_of(path) for i, (path, _) in enumerate(leaves)}
    paths = around_attentions(Trace(graph, parameters, given, frozenset(modules)))
    several, why = Counter(paths), next(iter(reasons), "")
    if len(seen) != len(paths) and not why:
        why = "is computed in a way that prompts cannot follow"
    found = []
    for i, path in enumerate(paths):
        sizes, layers = seen.get(i, (None, ()))
        reason = why
        if several[path] > 1:
            reason = (
                f"holds the weights of {several[path]} attentions, and prompts act in one; adapt "
                "them with aj.LoRA, or keep those of each attention in a dictionary of their own"
            )
        found.append(Attending(path, None if reason else sizes, layers, reason))
    return found


def prompted(
    attentions: Sequence[Attending],
    recipe: Recipe,
    fn: Callable[..., Any],
    tree: Any,
    held: Mapping[str, Held],
    inputs: tuple[Any, Any],
) -> Any:
    """Calls a function with prompts in its attentions.

    Args:
        held: the arrays of the prompts by their paths; none while they are placed.
        inputs: its arguments after the parameters, by position and by name.
    """
    prompts: dict[int, list[Any]] = {}
    for i, each in enumerate(attentions):
        slots = held.get(each.path, {})
        methods = [m for m in recipe.at(each.path) if m.acts_on == "attention" and m.slot in slots]
        if methods:
            prompts[i] = methods

    def run(tree: Any, held: Any, inputs: Any) -> Any:
        arrays: dict[int, Any] = {}
        for i, methods in prompts.items():
            slots = held[attentions[i].path]
            leaves = [{n: flatten(slots[m.slot])[n] for n in m.leaf_names} for m in methods]
            arrays[i] = attentions[i].layers, leaves
        layered = Layered(arrays)

        def insert(inline: Inline, mixed: Array) -> Array:
            number, layered.count = layered.count, layered.count + 1
            path = attentions[number].path
            if number not in arrays:
                return named(mixed, path)  # while prompts are placed; see `reaching`
            _, leaves = layered.arrays[number]
            pairs = zip(prompts[number], leaves, strict=True)
            each = [(method, own, Visit(path).at(method)) for method, own in pairs]
            return inserted(each, inline, mixed)

        with watched(insert, layered) as watch:
            args, kwargs = watch.enter(inputs)
            return fn(tree, *args, **kwargs)

    return _staged(run)(tree, held, inputs)


def _staged(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that jax writes down before it computes, whose arguments may hold anything."""

    # Where operations run at once, a watch switches `jax.jit` off, and with it jax runs a loop as
    # Python does: its body would be seen once for each layer.
    def call(*trees: Any) -> Any:
        leaves, definition = jax.tree.flatten(trees)
        others: list[Any] = [None, None]

        def staged(arrays: Mapping[int, Any]) -> list[Any]:
            whole = [arrays.get(i, x) for i, x in enumerate(leaves)]
            found, structure = jax.tree.flatten(run(*jax.tree.unflatten(definition, whole)))
            others[:] = [structure, [None if is_array(x) else x for x in found]]
            return [x if is_array(x) else None for x in found]

        results = jax.jit(staged)({i: x for i, x in enumerate(leaves) if is_array(x)})
        structure, rest = others
        return jax.tree.unflatten(
            structure, [b if a is None else a for a, b in zip(results, rest, strict=True)]
        )

    return call
