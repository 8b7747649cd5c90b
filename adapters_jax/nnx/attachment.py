"""An adapter on an NNX module: its Variables as a child, and a class whose calls run it.

The module's class is replaced by a cached subclass, in which the weights that adapters change are
properties: whoever reads one gets the changed weight, and the functions of the class compute with
it as `adapters_jax.weights.lazy` describes. Every trained parameter is an `AdapterParam`, so
`nnx.split`, `nnx.DiffState` and `nnx.Optimizer(wrt=AdapterParam)` select what trains.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from flax.nnx import bridge
from jaxtyping import Array

from adapters_jax.attached import Attached, taken
from adapters_jax.errors import RecipeError
from adapters_jax.methods import Method, outputs
from adapters_jax.methods.base import AttachmentPoint, started
from adapters_jax.nnx.containers import as_module, has_modules, names_of, plain
from adapters_jax.nnx.graph import frozen_of, modules_of, own_params, params_of
from adapters_jax.trees import join
from adapters_jax.weights import attention, calls
from adapters_jax.weights.attention import Attention, AttentionFn
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.lazy import Lazy, computed_thin, current, lazy
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


class Held(NamedTuple):
    """One method on one module, as the module keeps it: hashable, without arrays.

    Attributes:
        method: the method.
        path: the path of its target.
        node: where its arrays are within the module: `("lora",)`, or `("lora", "up")`.
        weight: the name of the weight that it changes; empty for other methods.
        axes: the roles of that weight's axes.
        attention: the sizes of the attention module that a prompt is in.
        module: the path of the module.
    """

    method: Any
    path: str
    node: tuple[str, ...]
    weight: str = ""
    axes: Axes | None = None
    attention: Attention | None = None
    module: str = ""


def holds(module: Any) -> tuple[Held, ...]:
    """The methods on a module."""
    return getattr(module, "adapter_methods", ())


def point_of(module: Any, held: Held, width: int = 0) -> AttachmentPoint:
    """The attachment point of a method on a module whose output has the given width."""
    own = {name: tuple(x.shape) for name, x in own_params(module).items()}
    precision = getattr(module, "precision", None)
    weight = held.weight or next((name for name, shape in own.items() if len(shape) > 1), "")
    axes = held.axes and held.axes.inside(held.axes.ndim - len(own[weight]))
    return AttachmentPoint(held.path, width, weight, axes, own, precision, held.attention)


class Seen:
    """The attribute of a module class whose value is a changed weight, or a container of some.

    Under `thin()` a weight is computed as the reader needs it, elsewhere it is formed.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        variable = vars(module)[self.name]
        if not isinstance(variable, nnx.Variable):
            return plain(variable)
        value = variable.get_raw_value()
        if value is None or isinstance(value, Lazy):  # a weight whose reads are recorded
            return variable
        trace = current()
        changed = _changed(module, self.name, training=trace is not None)
        if trace is None and not changed.changes:
            return variable  # of a quantised weight, which opens itself
        path = next((join(held.module, self.name) for held in holds(module)), self.name)
        return _seen(variable, lazy(trace, changed, path) if trace else changed.formed())

    def __set__(self, module: Any, value: Any) -> None:
        given = isinstance(value, dataclasses.Field)  # by nnx.data, which newer flax passes on
        vars(module)[self.name] = value.metadata["nnx_value"] if given else value

    def __delete__(self, module: Any) -> None:
        del vars(module)[self.name]


def _changed(module: Any, name: str, training: bool) -> Changed:
    """A weight of a module with the changes of its methods, whose dropout may be in training."""
    changes: list[Any] = []
    for held in holds(module):
        if held.method.acts_on == "leaf":
            read = functools.partial(_floats, module, held.weight)
            key = key_of(node_of(module, held)) if training else None
            found = held.method.changes(leaves_of(module, held), point_of(module, held), read, key)
            changes += found.get(name, ())
    return Changed.of(vars(module)[name].get_raw_value(), changes)


def _floats(module: Any, name: str) -> Array:
    value = vars(module)[name].get_raw_value()
    return value.unbox() if is_quantized(value) else value


def _seen(variable: nnx.Variable[Any], value: Any) -> Any:
    """A weight as the module's code sees it: a Variable of the same class with another value."""
    seen = variable.copy(value, seen_from=variable)
    seen.__class__ = _seen_class(type(variable))  # type: ignore[assignment]
    return seen


@functools.cache
def _seen_class(cls: type[Any]) -> type[Any]:
    """The class of a changed weight as code sees it: what is written to it goes to the weight."""

    def forwarded(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.get_metadata()["seen_from"], name)(*args, **kwargs)

        return method

    names = ("set_value", "set_raw_value", "update_from_state", "copy_from")
    about = {"adapted_from": cls, "__module__": cls.__module__, "__slots__": ()}
    return type(cls.__name__, (cls,), {**about, **{name: forwarded(name) for name in names}})


@functools.cache
def adapted_class(cls: type[Any], names: frozenset[str]) -> type[Any]:
    """The subclass of a module class that computes with adapters.

    Args:
        cls: the module class.
        names: the module's weights that are changed, or quantised, and its containers of such.
    """
    body: dict[str, Any] = {name: Seen(name) for name in names}
    for base in cls.__mro__:
        for name, function in vars(base).items():
            own = base not in _FLAX and (name == "__call__" or not name.startswith("__"))
            if own and inspect.isfunction(function) and name not in body:
                body[name] = _thin_call(function, name)
    if issubclass(cls, bridge.ToNNX):
        body["__call__"] = _thin_call(_linen_call, "__call__")
    for container, functions in _CONTAINERS.items():
        body |= functions if issubclass(cls, container) else {}
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapted{cls.__name__}", (cls,), {**body, **about})


_FLAX = {*nnx.Dict.__mro__, *nnx.List.__mro__, bridge.ToNNX, nnx.Module}
# A dictionary has adapters beside its parts, which are none of them; the names of a list's parts
# become text, since flax sorts them together with the adapters' names.
_CONTAINERS: dict[type, dict[str, Any]] = {
    nnx.Dict: {"__iter__": lambda self: iter(names_of(self))},
    nnx.List: {
        "_pytree__has_int_keys": False,
        "_graph_node_set_key": lambda self, key, value: nnx.Pytree._graph_node_set_key(
            self, str(key), value
        ),
    },
}


def _linen_call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the linen module in a `ToNNX` with the changed weights, without their adapters."""
    cls = original(type(module))
    view: Any = object.__new__(cls)
    given = {name: _for_linen(name, getattr(module, name)) for name in names_of(module)}
    state = {name: x for name, x in vars(module).items() if name.startswith("_pytree__")}
    vars(view).update(state, **given)
    y = cls.__call__(view, *args, **kwargs)
    for name in names_of(view):
        if vars(view)[name] is not given.get(name):
            _store(module, name, vars(view)[name])
    return y


def _for_linen(name: str, value: Any) -> Any:
    """An attribute of a `ToNNX` with Variables of the classes that flax's bridge knows."""

    def known(x: Any) -> Any:
        if not hasattr(type(x), "adapted_from"):
            return x
        bare = x.copy(x.get_raw_value())
        bare.__class__ = original(type(x))
        if "seen_from" in bare.get_metadata():
            bare.del_metadata("seen_from")
        return bare

    if name.startswith("to_nnx__"):
        return value
    return jax.tree.map(known, value, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _store(node: Any, name: str, value: Any) -> None:
    """Stores what a linen module returned of its state; its parameters stay as they are."""
    parts = node if isinstance(node, dict) else vars(node)
    if isinstance(value, dict) and name in parts:
        for inner, part in value.items():
            _store(parts[name], inner, part)
    elif isinstance(node, dict):
        parts[name] = parts.get(name) if isinstance(value, nnx.Param) else value
    elif not isinstance(value, nnx.Param):
        setattr(node, name, nnx.data(value))


def _thin_call(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a module class, computed thin; `__call__` with the adapters on outputs."""

    @functools.wraps(call)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attending(self):
            y = call(self, *args, **kwargs)
        acting = [held for held in holds(self) if held.method.acts_on == "output"]
        if name != "__call__" or not acting:
            return y
        methods = [(held.method, functools.partial(run_method, self, held)) for held in acting]
        x = calls.input_of(self, args, kwargs)
        again = calls.with_input(functools.partial(call, self), self, args, kwargs)
        return outputs.adapted(methods, acting[0].path, again, x, y)

    return computed_thin(method)


def attending(module: Any) -> AbstractContextManager[None, bool | None]:
    """Wraps an attention module's function in the prompts for the time of a call."""
    prompts = [held for held in holds(module) if held.method.acts_on == "attention"]
    names = attention.names_of(module)
    if not prompts or names is None:
        return contextlib.nullcontext()

    def attend(function: AttentionFn, *args: Any, **kwargs: Any) -> Array:
        for held in prompts:
            project = lambda name, x: getattr(module, getattr(names, name))(x)  # noqa: E731
            leaves, point = leaves_of(module, held), point_of(module, held)
            function = functools.partial(held.method.attend, leaves, point, project, function)
        return function(*args, **kwargs)

    return attention.replaced(module, names.attention_fn, attend)


def run_method(module: Any, held: Held, again: Callable[[Any], Any], x: Any, y: Array) -> Array:
    """Applies a method, whose leaves are in a child of the module, to an output."""
    point = dataclasses.replace(point_of(module, held, y.shape[-1]), again=again)
    key = key_of(node_of(module, held))
    return held.method.forward(leaves_of(module, held), point, x, y, key, frozen_of(module))


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
        outside = () if method.acts_on == "leaf" else layers
        holder[last] = AdapterParam(leaf.init(rngs.params(), outside + leaf.shape))
    if method.dropout:
        drop = children["dropout"] = nnx.Dropout(method.dropout, rngs=rngs)
        if layers:
            drop.rngs = drop.rngs.split(layers)
    return children


def read(child: Any, method: Method) -> dict[str, Array]:
    """A method's arrays by name, read from the node that holds them."""
    return {name: _step(child, name.split("/"))[...] for name in method.leaf_names}


def _step(node: Any, names: Iterable[str]) -> Any:
    """The node that is reached by names."""
    for name in names:
        node = node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
    return node


def key_of(child: Any) -> Array | None:
    """A key for dropout; None in evaluation and where there is no dropout."""
    drop = getattr(child, "dropout", None)
    return None if drop is None or drop.deterministic else drop.rngs()


def node_of(module: Any, held: Held) -> Any:
    """The node that holds a method's arrays."""
    return _step(module, held.node)


def leaves_of(module: Any, held: Held) -> dict[str, Array]:
    """The arrays of a method that is attached to a module, by name."""
    return read(node_of(module, held), held.method)


def grow(module: Any, each: Attached, layers: tuple[int, ...], rngs: nnx.Rngs) -> None:
    """Adds the leaves of a method to a module.

    Args:
        module: the module.
        each: the method, and where it is attached.
        layers: the layer axes that the module is stacked on.
        rngs: seeds the leaves and their dropout.
    """
    method, point = each.method, each.point
    node = tuple(each.prefix.removeprefix(each.module).strip("/").split("/", 1))
    held = Held(method, point.path, node, point.weight, point.axes, point.attention, each.module)
    children = nnx.Dict(children_of(method, point, layers, rngs))
    if len(node) == 1:
        if hasattr(module, method.slot):
            raise taken(each.module, method)
        setattr(module, method.slot, children)
    else:
        if not any(other.node[0] == node[0] for other in holds(module)):
            if hasattr(module, method.slot):
                raise taken(each.module, method)
            setattr(module, method.slot, nnx.Dict())
        setattr(getattr(module, method.slot), node[1], children)
    if method.from_weight:
        weight = vars(module)[point.weight]
        value = weight.get_raw_value()
        leaves, rest = started(method, leaves_of(module, held), point, value)
        if not is_quantized(value):
            weight[...] = rest
        for name, leaf in leaves.items():
            children[name][...] = leaf
    module.adapter_methods = (*holds(module), held)
    refresh(module)


def refresh(module: Any) -> None:
    """Gives a module the class that its adapters and quantised weights need.

    A whole model computes thin, and so does a linen module inside with parameters that train.
    """
    for name in names_of(module):
        value = vars(module)[name]
        if has_modules(value) and not has_modules(value, _is_needed):
            vars(module)[name] = plain(value, lambda node, part: vars(node)[part])
    names = _changed_names(module)
    names |= {name for name in names_of(module) if has_modules(vars(module)[name])}
    cls: Any = original(type(module))
    thin = hasattr(module, "adapter_recipe") or (
        isinstance(module, bridge.ToNNX) and any(map(_is_trained, params_of(module).values()))
    )
    adapted = names or holds(module) or thin
    new = adapted_class(cls, frozenset(names)) if adapted else cls
    object.__setattr__(module, "__class__", new)  # flax would list it among the attributes


def _changed_names(module: Any) -> set[str]:
    """The names of a module's own weights that are quantised or changed by adapters."""
    own = own_params(module)
    names = {name for name, x in own.items() if is_quantized(x.get_raw_value())}
    for held in holds(module):
        if held.method.acts_on == "leaf":
            names |= set(held.method.names(point_of(module, held)))
    return names


def _is_needed(module: Any) -> bool:
    """Whether a container has to be a module."""
    return bool(holds(module) or _changed_names(module))


def _is_trained(variable: Any) -> bool:
    return isinstance(variable, AdapterParam)


def original(cls: type[Any]) -> type[Any]:
    """The class that the author of a model gave a module or Variable of this class."""
    while hasattr(cls, "adapted_from"):
        cls = cls.adapted_from
    return cls


def module_at(model: Any, path: str, weight: str) -> Any:
    """The module at a path, made of the plain container there.

    Args:
        model: the model.
        path: the path of the module.
        weight: the path of the weight for which it is needed, for the message.

    Raises:
        RecipeError: what is there is no container that can become a module.
    """
    node = model
    for name in path.split("/") if path else ():
        child = as_module(vars(node).get(name))
        if child is None:
            raise RecipeError(
                f"{weight!r} cannot be changed: the container around it is no nnx.Dict, nnx.List, "
                "list, tuple or dictionary with names; keep it in one of these, or exclude it: "
                f"'!{weight}'"
            )
        vars(node)[name] = node = child
    return node


def refresh_all(model: Any) -> None:
    """Gives every module of a model the class that it needs."""
    for module in list(modules_of(model).values()):
        refresh(module)
