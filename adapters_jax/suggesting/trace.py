"""Traces a linen or NNX model on shapes, so that every parameter and module can be found again.

What a module takes and returns passes an operation that does nothing and has the module's path in
its name. So the trace shows where each module begins and ends.
"""

import contextvars
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from adapters_jax.linen import Adapted
from adapters_jax.nnx import copy, detach, modules_of
from adapters_jax.suggesting.graph import Graph
from adapters_jax.trace.inputs import Inputs, explained, is_array
from adapters_jax.trees import flatten, join, path_of
from adapters_jax.weights.quantized import is_quantized

# The names of what a module takes and returns; the module's path follows.
ENTERS, RETURNS = "adapters_jax enters ", "adapters_jax returns from "


@dataclass(frozen=True)
class Trace:
    """A model's graph.

    Attributes:
        graph: the operations of a call of the model.
        parameters: the path of each value that is a parameter, or a part of one.
        arguments: the values that are example inputs; the others are the model's state.
        modules: the paths of the modules, the model itself under the empty one.
    """

    graph: Graph
    parameters: Mapping[int, str]
    arguments: frozenset[int]
    modules: frozenset[str]


@dataclass(frozen=True)
class _Parts:
    """A model as a function: `run(params, state, args, kwargs)`; `modules` grows as it runs."""

    run: Callable[..., Any]
    params: Any
    state: Any
    modules: set[str]


def trace(model: nn.Module | nnx.Module, given: Inputs) -> Trace:
    """Traces a call of a linen or NNX model, without its adapters; nothing is computed.

    Args:
        model: the model.
        given: example inputs; of arrays, only shapes and dtypes matter.

    Raises:
        UserError: the example inputs do not fit the model.
    """
    inputs, structure = jax.tree.flatten((given.args, dict(given.kwargs)))
    arrays = {i: x for i, x in enumerate(inputs) if is_array(x)}
    with explained(model, given):
        parts = _linen(model, given) if isinstance(model, nn.Module) else _nnx(model, given)

        def call(params: Any, state: Any, arrays: Mapping[int, Any]) -> Any:
            whole = [arrays.get(i, x) for i, x in enumerate(inputs)]
            y = parts.run(params, state, *jax.tree.unflatten(structure, whole))
            return [leaf for leaf in jax.tree.leaves(y) if is_array(leaf)]

        graph = Graph(jax.make_jaxpr(call)(parts.params, parts.state, arrays))
    leaves = jax.tree_util.tree_leaves_with_path(parts.params, is_leaf=is_quantized)
    paths = [path_of(path) for path, leaf in leaves for _ in jax.tree.leaves(leaf)]
    arguments = graph.inputs[len(graph.inputs) - len(arrays) :]
    return Trace(graph, dict(enumerate(paths)), frozenset(arguments), frozenset(parts.modules))


def _linen(model: nn.Module, given: Inputs) -> _Parts:
    """A linen model without its adapters; its parameters are found by an abstract `init`."""
    base = model.inner if isinstance(model, Adapted) else model

    def init(key: jax.Array) -> Any:
        zeros = given.zeros()
        variables = nn.Module.init(base, key, *zeros.args, method=given.method, **zeros.kwargs)
        return nn.meta.unbox(variables)

    def run(params: Any, state: Any, args: Any, kwargs: Any) -> Any:
        options = {"rngs": jax.random.key(0), "mutable": list(state), "method": given.method}
        with nn.intercept_methods(_marking(modules)):
            y, _ = base.apply({"params": params, **state}, *args, **options, **kwargs)
        return y

    state = dict(jax.eval_shape(init, jax.random.key(0)))
    params = state.pop("params", {})
    names = [path.split("/") for path in flatten(params)]
    modules = {join(*path[:i]) for path in names for i in range(len(path))}
    return _Parts(run, params, state, modules)


def _nnx(model: nnx.Module, given: Inputs) -> _Parts:
    """An NNX model without its adapters; it may have linen modules inside."""
    if hasattr(model, "adapter_recipe"):
        model = copy(model)
        detach(model)
    structure, params, state = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    modules = set(modules_of(model))

    def run(params: Any, state: Any, args: Any, kwargs: Any) -> Any:
        merged = nnx.merge(structure, params, state)
        for path, module in list(modules_of(merged).items()):
            if callable(module):
                module.__class__ = _marking_class(type(module), path)  # type: ignore[arg-type]
        with nn.intercept_methods(_marking(modules)):
            return Inputs(args, kwargs, given.method).call(merged)

    return _Parts(run, params, state, modules)


_AROUND: contextvars.ContextVar[str] = contextvars.ContextVar("path of the NNX module", default="")


@functools.cache
def _marking_class(cls: type[Any], path: str) -> type[Any]:
    """The subclass of an NNX module's class whose calls are marked with the module's path."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _AROUND.set(path)
        try:
            return _marked(path, functools.partial(cls.__call__, self), args, kwargs)
        finally:
            _AROUND.reset(token)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _marking(modules: set[str]) -> Callable[..., Any]:
    """An interceptor that marks the calls of linen modules, and adds their paths to a set."""

    def mark(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        scope = context.module.scope
        if scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        path = join(_AROUND.get(), *scope.path)
        modules.add(path)
        marks = context.method_name == "__call__"
        return _marked(path, call, args, kwargs) if marks else call(*args, **kwargs)

    return mark


def _marked(path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
    """Calls a module, and marks its first array and what it returns with its path."""
    given = list(args)
    first = next((i for i, x in enumerate(args) if isinstance(x, jax.Array)), None)
    if first is not None:
        given[first] = _named(args[first], ENTERS + path)
    y = call(*given, **kwargs)
    modules = (nn.Module, nnx.Module, nnx.Variable)
    return jax.tree.map(
        lambda x: _named(x, RETURNS + path), y, is_leaf=lambda x: isinstance(x, modules)
    )


def _named(x: Any, name: str) -> Any:
    """The same numbers with a name in the trace; what is no float array has none."""
    floats = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return checkpoint_name(x, name) if floats else x
