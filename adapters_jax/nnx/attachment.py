"""An adapter on an NNX module: its Variables as a child, and a class whose calls run it.

The module's class is replaced by a cached subclass, in which the weights that adapters change are
properties: whoever reads one gets the changed weight, and the functions of the class compute with
it as `adapters_jax.weights.lazy` describes. Every trained parameter is an `AdapterParam`, so
`nnx.split`, `nnx.DiffState` and `nnx.Optimizer(wrt=AdapterParam)` select what trains.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from flax import nnx
from jaxtyping import Array

from adapters_jax.attached import Attached, taken
from adapters_jax.attention import registry
from adapters_jax.attention.registry import Attention, AttentionFn
from adapters_jax.attention.watch import watched
from adapters_jax.methods import Method, outputs
from adapters_jax.methods.base import AttachmentPoint, started
from adapters_jax.methods.prompt import inserted
from adapters_jax.nnx.graph import frozen_of, own_params
from adapters_jax.trees import join
from adapters_jax.weights import calls
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


class ChangedWeight:
    """The attribute of a module class whose value is a changed weight.

    Under `thin()` it is computed as the reader needs it, elsewhere it is formed.
    """

    def __init__(self, name: str):
        self.name = name

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self
        variable = vars(module)[self.name]
        value = variable.get_raw_value() if isinstance(variable, nnx.Variable) else None
        if value is None or isinstance(value, Lazy):  # a weight whose reads are recorded
            return variable
        trace = current()
        changed = _changed(module, self.name, training=trace is not None)
        if trace is None and not changed.changes:
            return variable  # of a quantised weight, which opens itself
        path = next((join(held.module, self.name) for held in holds(module)), self.name)
        return _seen(variable, lazy(trace, changed, path) if trace else changed.formed())

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self.name] = value

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
    about = {"__module__": cls.__module__, "__slots__": ()}
    return type(cls.__name__, (cls,), {**about, **{name: forwarded(name) for name in names}})


@functools.cache
def adapted_class(cls: type[Any], names: frozenset[str]) -> type[Any]:
    """The subclass of a module class that computes with adapters.

    Args:
        cls: the module class.
        names: the module's weights that are changed, or quantised.
    """
    body: dict[str, Any] = {name: ChangedWeight(name) for name in names}
    for base in cls.__mro__:
        for name, function in vars(base).items():
            own = base not in _FLAX and (name == "__call__" or not name.startswith("__"))
            if own and inspect.isfunction(function) and name not in body:
                body[name] = _thin_call(function, name)
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapted{cls.__name__}", (cls,), {**body, **about})


_FLAX = {*nnx.Module.__mro__, nnx.Module}


def _thin_call(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a module class, computed thin; `__call__` with the adapters on outputs."""

    @registry.calls_base
    @functools.wraps(call)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attending(self, name) as enter:
            args, kwargs = enter((args, kwargs))
            y = call(self, *args, **kwargs)
        acting = [held for held in holds(self) if held.method.acts_on == "output"]
        if name != "__call__" or not acting:
            return y
        methods = [(held.method, functools.partial(run_method, self, held)) for held in acting]
        x = calls.input_of(self, args, kwargs)
        again = calls.with_input(functools.partial(call, self), self, args, kwargs)
        return outputs.adapted(methods, acting[0].path, again, x, y)

    return registry.calls_base(computed_thin(method))


# The paths of the modules whose attention is being watched.
_WATCHING: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "watching", default=frozenset()
)


@contextlib.contextmanager
def attending(module: Any, call: str) -> Iterator[Callable[[Any], Any]]:
    """Adds the prompts of an attention module for the time of a call of one of its functions.

    Yields:
        What takes the arguments of the call, and returns those to call it with.
    """
    prompts = [held for held in holds(module) if held.method.acts_on == "attention"]
    if not prompts or prompts[0].module in _WATCHING.get():
        yield lambda inputs: inputs
        return
    names = registry.names_of(module)
    if names is None:
        with _watching(module, prompts, call) as enter:
            yield enter
        return

    def attend(function: AttentionFn, *args: Any, **kwargs: Any) -> Array:
        for held in prompts:
            project = lambda name, x: getattr(module, getattr(names, name))(x)  # noqa: E731
            leaves, point = leaves_of(module, held), point_of(module, held)
            function = functools.partial(held.method.attend, leaves, point, project, function)
        return function(*args, **kwargs)

    with registry.replaced(module, names.attention_fn, attend):
        yield lambda inputs: inputs


@contextlib.contextmanager
def _watching(module: Any, prompts: list[Held], call: str) -> Iterator[Callable[[Any], Any]]:
    """Adds prompts to an attention that is computed in line."""
    each = [(held.method, leaves_of(module, held), point_of(module, held)) for held in prompts]
    path = prompts[0].module
    token = _WATCHING.set(_WATCHING.get() | {path})
    try:
        with watched(functools.partial(inserted, each)) as watch:
            yield watch.enter
    finally:
        _WATCHING.reset(token)
    if call == "__call__":
        watch.found.check(type(prompts[0].method).__name__, path, module)


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


def refresh(module: Any, root: bool = False) -> None:
    """Gives a module the class that its adapters and quantised weights need.

    Args:
        module: the module.
        root: whether it is a whole model, whose functions compute thin.
    """
    own = own_params(module)
    names = {name for name, x in own.items() if is_quantized(x.get_raw_value())}
    for held in holds(module):
        if held.method.acts_on == "leaf":
            names |= set(held.method.names(point_of(module, held)))
    cls: Any = getattr(type(module), "adapted_from", type(module))
    if names or holds(module) or root:
        module.__class__ = adapted_class(cls, frozenset(names))
    else:
        module.__class__ = cls
