"""Models that read their parameters as state.

`nnx.state(self)`, `nnx.split(layer)`, `jax.tree.map(f, layer)`, `vars(layer)`: code that reads a
weight so asks no attribute of the module, and would see the weight of the base, and the adapters'
arrays beside it. An abstract run of the base without adapters shows which weights a call reads so.
For the time of such a call their modules are as in the base, with the changed weights as values.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from adapters_jax.errors import RecipeError
from adapters_jax.methods.invocation import everywhere
from adapters_jax.nnx.classes import leaf_names, without_adapters
from adapters_jax.nnx.graph import copy, holds, modules_of, original
from adapters_jax.nnx.points import mark, traced
from adapters_jax.trace.inputs import Inputs, is_array
from adapters_jax.trees import join

# What stops an abstract run of a model that computes on numbers: it may read all as its state.
_NEEDS_NUMBERS = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, TraceContextError)


class Calls:
    """What is known of the calls of a module: which modules' state each of them reads.

    The copies of a module share it. All are equal: what is known of a model does not make it
    another one.
    """

    def __init__(self) -> None:
        self._found: dict[Any, tuple[str, ...]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calls)

    def __hash__(self) -> int:
        return hash(Calls)

    def stated(self, model: Any, name: str, args: Any, kwargs: Any) -> tuple[str, ...]:
        """The paths of modules whose state a call reads, from an abstract run at its first time.

        Raises:
            RecipeError: the call reads adapters that it must not see.
        """
        inputs = Inputs(args, kwargs, name)
        key = _key(model, inputs)
        if key not in self._found:
            try:
                read = _read(model, inputs)
                self.note(model, inputs, read)
            except _NEEDS_NUMBERS:
                self._found[key] = _leaf_modules(model)
        return self._found[key]

    def note(self, model: Any, inputs: Inputs, read: Mapping[str, str]) -> None:
        """Keeps which weights a call reads as state, each with an operation, and checks that.

        Raises:
            RecipeError: the call reads adapters that it must not see.
        """
        key, names = _key(model, inputs), {path.rpartition("/")[0] for path in read}
        self._found[key] = tuple(path for path in _leaf_modules(model) if path in names)
        if read:
            try:
                _check(model, inputs, read)
            except BaseException:
                del self._found[key]
                raise


def _key(model: Any, inputs: Inputs) -> Any:
    """What tells calls apart: their function, flags, and the flags of the model."""
    leaves, structure = jax.tree.flatten((inputs.args, dict(inputs.kwargs)))
    flags = tuple(_flag(x) for x in leaves)
    return inputs.method or "__call__", repr(structure), flags, _flags(model)


def _flag(x: Any) -> Any:
    if isinstance(x, bool | str):
        return x
    return None if is_array(x) else type(x).__name__


def _flags(model: Any) -> tuple[Any, ...]:
    """The attributes of modules that are true or false, such as `deterministic`."""
    # Each call asks for this, so that it may not take the time of a walk with paths.
    flags, seen = list[Any](), set[int]()

    def walk(node: Any) -> None:
        if type(node) in (list, tuple):
            parts: Any = node
        elif nnx.Module in type(node).__mro__ and id(node) not in seen:
            seen.add(id(node))
            own = vars(node)
            parts = [own[name] for name in sorted(own)]
            flags.append(tuple(name for name in sorted(own) if own[name] is True))
        else:
            parts = node.values() if type(node) is dict else ()
        for part in parts:
            walk(part)

    walk(model)
    return tuple(flags)


def _leaf_modules(model: Any) -> tuple[str, ...]:
    """The paths of modules with methods on weights."""
    return tuple(path for path, module in modules_of(model).items() if leaf_names(module))


def _read(model: Any, inputs: Inputs) -> dict[str, str]:
    """The weights that a model without its adapters reads as state, each with an operation."""
    bare = copy(model)
    without_adapters(bare)
    mark(modules_of(bare).values())
    return traced(bare, inputs).stated()


def _check(model: Any, inputs: Inputs, read: Mapping[str, str]) -> None:
    """Raises RecipeError where a call reads as state what is the adapters' or was changed by them.

    Args:
        inputs: the arguments of the call.
        read: the weights that it reads as state, each with an operation.
    """
    modules = modules_of(model)
    own = {join(path, name): path for path, x in modules.items() for name in leaf_names(x)}
    for path, module in modules.items():
        for held in holds(module):
            names = (join(path, *held.nodes, name) for name in held.method.leaf_names)
            own.update(dict.fromkeys(names, path))
    methods = [held.method for module in modules.values() for held in holds(module)]
    inputs = everywhere(methods, inputs)  # where they act changes no reading
    if left := traced(copy(model), inputs).stated(own):
        path, operation = next(iter(left.items()))
        raise RecipeError(
            f"{original(type(model)).__name__} reads parameters as state, as by nnx.state or "
            f"jax.tree.map, and would read {path!r} with them, in {operation!r}; exclude the "
            f"module, '!{own[path]}', or read the weights as attributes, as in layer.kernel[...]"
        )
