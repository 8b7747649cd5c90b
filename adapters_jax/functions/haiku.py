"""Haiku: the parameters of a transformed function have its modules' names, and `hk` marks calls."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import haiku as hk

from adapters_jax.functions.modules import Calls, Held


class _Front:
    """See `adapters_jax.functions.modules.Front`."""

    keeps_others = False

    def static(self, tree: Any) -> dict[str, Any]:
        """Nothing: the parameters are all there is."""
        return {}

    @contextlib.contextmanager
    def entered(self, tree: Any, run: Calls, held: Mapping[str, Held]) -> Iterator[Any]:
        """Intercepts the calls of modules within the function."""

        def call(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
            # Of `__init__` as well, in which a module has no name yet.
            path = context.module.module_name if context.method_name == "__call__" else None
            if path is None or not (run.init or path in held):
                return function(*args, **kwargs)
            arrays = functools.partial(_arrays, context.module, path, leaves)
            return run(path, context.module, arrays, function, args, kwargs, held.get(path, {}))

        leaves = {f"{path}/{name}": x for path, own in tree.items() for name, x in own.items()}
        with hk.intercept_methods(call):
            yield tree


FRONT = _Front()


def has_parameters(tree: Any) -> bool:
    """Whether a tree is nested as the parameters of a transformed function."""
    return isinstance(tree, Mapping) and all(
        isinstance(path, str) and isinstance(own, Mapping) for path, own in tree.items()
    )


def _arrays(module: Any, path: str, leaves: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arrays of a module that ran, by their paths in it; None where they are not its own.

    A transformed function inside another, as in loops over layers, starts its names anew: a module
    in there has the path of another one, or of none.
    """
    own = module.params_dict()
    if any(leaves.get(name) is not x for name, x in own.items()):
        return None
    return {name.removeprefix(f"{path}/"): x for name, x in own.items()}
