"""Haiku: the parameters of a transformed function have its modules' names, and `hk` marks calls.

A transformed function inside another, as in a loop over layers, starts its names anew. So for a
call, the parameters of a module carry further arrays: a mark, which is one of its arrays, and those
of adapters. Their names say the path in the whole. Loops and batches treat them like the others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax

from adapters_jax.errors import RecipeError
from adapters_jax.linen.functions.modules import Calls, Held
from adapters_jax.trace.inputs import is_array
from adapters_jax.trees import Tree, flatten, join, unflatten

_MARK, _BETWEEN = "adapters_jax", "|"  # what modules carry is named: mark, module, array
keeps_others = False

# Without it, `jax.jit` would take up the trace of an earlier call with other adapters, or none.
_running = jax.make_user_context(default_value=None)


def static(tree: Any) -> dict[str, Any]:
    """Nothing: the parameters are all there is."""
    return {}


@contextlib.contextmanager
def entered(tree: Any, run: Calls, held: Mapping[str, Held]) -> Iterator[Any]:
    """Intercepts the calls of modules within the function."""

    def call(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":  # in `__init__` it has no name yet
            return function(*args, **kwargs)
        start, stacked, carried = _carried(shapes)
        path = None if start is None else join(start, context.module.module_name)
        if path is None or not (run.init or path in held):
            return function(*args, **kwargs)
        if path in held and path not in carried:
            raise RecipeError(
                f"{path!r} is adapted, but has no parameters to carry its adapters to where "
                f"it runs; target a module around it, or exclude it: '!{path}'"
            )
        arrays = functools.partial(_arrays, context.module)
        if run.init and stacked and not arrays():  # nothing says how many layers it has
            return function(*args, **kwargs)
        here = unflatten(carried.get(path, {}))
        return run(path, context.module, arrays, function, args, kwargs, here)

    shapes = {path: own[min(own)].shape for path, own in modules(tree).items()}
    with hk.intercept_methods(call), _running(run):
        yield _carrying(tree, held) if run.init or held else tree


def calls_modules(run: Callable[[], Any]) -> bool:
    """Whether a function calls modules of Haiku; `run` calls the function, and is traced."""
    called = []

    def call(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        called.append(context.method_name)
        return function(*args, **kwargs)

    with hk.intercept_methods(call), _running(called.append):
        jax.make_jaxpr(lambda: [x for x in jax.tree.leaves(run()) if is_array(x)])()
    return "__call__" in called


def modules(tree: Any, path: str = "") -> dict[str, Mapping[str, Any]]:
    """The mappings in a tree that hold arrays alone, as those of modules do, by their path."""
    if not isinstance(tree, Mapping):
        return {}
    if path and tree and all(map(is_array, tree.values())):
        return {path: tree}
    parts = (modules(part, join(path, str(name))) for name, part in tree.items())
    return {name: own for part in parts for name, own in part.items()}


def _carrying(tree: Any, held: Mapping[str, Held]) -> Any:
    """The tree with what its modules carry."""
    found = modules(tree)
    # The mark is one of its arrays, so loops and batches can treat it like the others.
    added = {path: {_named(path): own[min(own)]} for path, own in found.items()}
    for path, slots in held.items():
        carrier = next((x for x in found if f"{x}/".startswith(f"{path}/")), next(iter(found)))
        added[carrier] |= {_named(path, name): x for name, x in flatten(slots).items()}
    return _with(tree, added)


def _named(path: str, array: str = "") -> str:
    return _BETWEEN.join((_MARK, path, array))


def _with(tree: Any, added: Mapping[str, Tree], path: str = "") -> Any:
    """A tree with further arrays in the mappings at some paths."""
    if not isinstance(tree, Mapping):
        return tree
    parts = {name: _with(part, added, join(path, str(name))) for name, part in tree.items()}
    return {**parts, **added.get(path, {})}


def _carried(shapes: Mapping[str, Any]) -> tuple[str | None, bool, dict[str, Tree]]:
    """The path of the running function's parameters in the tree, and the adapters in them.

    The path is None where they are no part of the tree. Between both is whether the function sees
    less axes than the tree has, by the shapes of the first array of each module there.
    """
    start, stacked, found = None, False, dict[str, Tree]()
    for module, own in hk.get_params().items():
        for key, x in own.items():
            if key.startswith(_MARK + _BETWEEN):
                _, path, name = key.split(_BETWEEN)
                if name:
                    found.setdefault(path, {})[name] = x
                elif path.endswith(module):
                    start = path.removesuffix(module).rstrip("/")
                    stacked |= x.ndim < len(shapes[path])
    return start, stacked, found


def _arrays(module: Any) -> dict[str, Any]:
    """The arrays of a module that ran, by their paths in it."""
    start, own = f"{module.module_name}/", module.params_dict().items()
    return {name.removeprefix(start): x for name, x in own if _MARK + _BETWEEN not in name}
