"""An adapter on an NNX module: its Variables as a child, and a class whose calls run it.

The module's class is replaced by a cached subclass. Every trained parameter is an `AdapterParam`,
so `nnx.split`, `nnx.DiffState` and `nnx.Optimizer(wrt=AdapterParam)` select what trains.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint, after, contraction_of, started
from adapters_jax.nnx.points import frozen_of, point_of
from adapters_jax.trees import join
from adapters_jax.weights import attention, linear
from adapters_jax.weights.attention import AttentionFn
from adapters_jax.weights.quantized import is_quantized


class AdapterParam(nnx.Param):
    """A parameter that the recipe trains: an adapter's own, or one of the base that is unfrozen."""

    adapted_from: ClassVar[type[nnx.Param]] = nnx.Param


@functools.cache
def trained_class(cls: type[Any]) -> type[AdapterParam]:
    """The `AdapterParam` that is also an instance of a parameter's own class."""
    if issubclass(cls, AdapterParam):
        return cls
    if cls is nnx.Param:
        return AdapterParam
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapter{cls.__name__}", (AdapterParam, cls), about)


@functools.cache
def adapted_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a module class whose calls run the adapters attached to the module."""

    def adapted(name: str) -> Callable[..., Any]:
        call = getattr(cls, name)

        @functools.wraps(call)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            with _attending(self):
                y = call(self, *args, **kwargs)
            if not any(m.acts_on == "output" for m, _ in self.adapter_methods):
                return y
            x = linear.input_of(self, name, args, kwargs)
            again = linear.with_input(functools.partial(call, self), self, name, args, kwargs)
            for attached, path in self.adapter_methods:
                if attached.acts_on == "output":
                    run = functools.partial(run_method, self, attached, path, name, args, kwargs)
                    step = functools.partial(run, again)
                    y, again = step(x, y), after(step, again)
            return y

        return method

    body = {name: adapted(name) for name in linear.calls(cls)}
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapted{cls.__name__}", (cls,), {**body, **about})


def _attending(module: Any) -> AbstractContextManager[None, bool | None]:
    """Wraps an attention module's function in the prompts for the time of a call."""
    prompts = [(m, path) for m, path in module.adapter_methods if m.acts_on == "attention"]
    names = attention.names_of(module)
    if not prompts or names is None:
        return contextlib.nullcontext()

    def attend(function: AttentionFn, *args: Any, **kwargs: Any) -> Array:
        for method, path in prompts:
            point = point_of(module, path, 0)
            project = lambda name, x: getattr(module, getattr(names, name))(x)  # noqa: E731
            leaves = leaves_of(module, method)
            function = functools.partial(method.attend, leaves, point, project, function)
        return function(*args, **kwargs)

    return attention.replaced(module, names.attention_fn, attend)


def run_method(
    module: Any,
    method: Method,
    path: str,
    call: str,
    args: Any,
    kwargs: Any,
    again: Callable[[Any], Array],
    x: Any,
    y: Array,
) -> Array:
    """Applies a method, whose leaves are in a child of the module, to the module's output."""
    point = point_of(module, path, y.shape[-1], call, *args, **kwargs)
    if not method.fits(point):
        return y
    point = dataclasses.replace(point, again=again)
    key = key_of(getattr(module, method.slot))
    return method.forward(leaves_of(module, method), point, x, y, key, frozen_of(module))


def children_of(
    method: Method, point: AttachmentPoint, layers: tuple[int, ...], rngs: nnx.Rngs
) -> dict[str, Any]:
    """The Variables of a method at a point, nested by their names, and its dropout."""
    children: dict[str, Any] = {}
    for name, leaf in method.leaves(point).items():
        *groups, last = name.split("/")
        holder = functools.reduce(
            lambda d, group: d.setdefault(group, nnx.Dict()), groups, children
        )
        holder[last] = AdapterParam(leaf.init(rngs.params(), layers + leaf.shape))
    if method.dropout:
        drop = children["dropout"] = nnx.Dropout(method.dropout, rngs=rngs)
        if layers:
            drop.rngs = drop.rngs.split(layers)
    return children


def read(child: Any, method: Method) -> dict[str, Array]:
    """A method's arrays by name, read from the node that holds them."""

    def step(node: Any, name: str) -> Any:
        return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)

    return {name: functools.reduce(step, name.split("/"), child)[...] for name in method.leaf_names}


def key_of(child: Any) -> Array | None:
    """A key for dropout; None in evaluation and where there is no dropout."""
    drop = getattr(child, "dropout", None)
    return None if drop is None or drop.deterministic else drop.rngs()


def leaves_of(module: Any, method: Method) -> dict[str, Array]:
    """The arrays of a method that is attached to a module, by name."""
    return read(getattr(module, method.slot), method)


def grow(
    module: Any, method: Method, point: AttachmentPoint, layers: tuple[int, ...], rngs: nnx.Rngs
) -> None:
    """Adds the leaves of a method to a module, stacked on the module's layer axes."""
    if hasattr(module, method.slot):
        raise taken(point.path, method)
    setattr(module, method.slot, nnx.Dict(children_of(method, point, layers, rngs)))
    if method.from_weight:
        weight = getattr(module, contraction_of(point).weight)
        packed = is_quantized(weight.get_raw_value())
        value = weight.get_raw_value() if packed else weight[...]
        leaves, rest = started(method, leaves_of(module, method), point, value)
        if not packed:
            weight[...] = rest
        for name, leaf in leaves.items():
            getattr(module, method.slot)[name][...] = leaf
    module.adapter_methods = (*getattr(module, "adapter_methods", ()), (method, point.path))
    if not hasattr(type(module), "adapted_from"):
        module.__class__ = adapted_class(type(module))  # type: ignore[arg-type]


def taken(path: str, method: Method) -> RecipeError:
    """The error for a base that already uses the name of a method's leaves."""
    return RecipeError(
        f"{type(method).__name__} keeps its parameters in {join(path, method.slot)}, but the base "
        "has something of that name there; rename it or do not target it"
    )
