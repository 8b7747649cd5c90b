"""The class of an NNX module with adapters, whose calls run them.

It is a cached subclass of the module's class, where the weights that adapters change are
properties: whoever reads one gets the changed weight, and the functions of the class compute with
it as `adapters_jax.weights.lazy` describes.
"""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx
from flax.nnx import bridge
from jaxtyping import Array

from adapters_jax.errors import other_names
from adapters_jax.methods import outputs
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.methods.invocation import call_gate
from adapters_jax.methods.mixed import Rows, by_rows, needs_rows
from adapters_jax.methods.prompt import inserted
from adapters_jax.nnx.containers import (
    AddedDict,
    NumberedDict,
    has_modules,
    names_of,
    plain,
    standing,
)
from adapters_jax.nnx.graph import (
    ADAPTERS,
    BY_ROWS,
    CALLS,
    holds,
    key_of,
    leaves_of,
    modules_of,
    node_of,
    original,
    own_params,
    params_of,
    point_of,
    sharing,
)
from adapters_jax.nnx.linen_inside import INSIDE, called
from adapters_jax.nnx.seen import Seen, changed_weight
from adapters_jax.placement import Placement
from adapters_jax.trace import calls, registry
from adapters_jax.trace.registry import AttentionFn
from adapters_jax.trace.through import holding
from adapters_jax.trace.watch import watched
from adapters_jax.trees import join, leaves_by_path, with_leaves
from adapters_jax.weights.lazy import Thin, computed_thin, current, lazy, lowered, thin
from adapters_jax.weights.quantized import is_quantized


@functools.cache
def adapted_class(cls: type[Any], names: frozenset[str]) -> type[Any]:
    """The subclass of a module class that computes with adapters.

    Args:
        names: the module's weights that are changed, or quantised, and its containers of such.
    """
    body: dict[str, Any] = {name: Seen(name) for name in names}
    for base in cls.__mro__:
        for name, function in vars(base).items():
            own = base not in _FLAX and (name == "__call__" or not name.startswith("__"))
            if own and inspect.isfunction(function) and name not in body:
                body[name] = _thin_call(function, name)
    body["__getattr__"] = _explained(cls)
    if issubclass(cls, bridge.ToNNX):
        body["__call__"] = computed_thin(called)
    for containers, functions in _CONTAINERS.items():
        body |= functions if issubclass(cls, containers) else {}
    about = {"adapted_from": cls, "__module__": cls.__module__}
    # Cached: jax compares the types of two models' nodes to find a compiled program again.
    return type(f"Adapted{cls.__name__}", (cls,), {**body, **about})


_FLAX = {*nnx.Dict.__mro__, *nnx.List.__mro__, bridge.ToNNX, nnx.Module}
# A dictionary has adapters beside its parts, which are none of them. The numbers of a list's parts
# become names, since flax sorts them together with the adapters' names.
_CONTAINERS: dict[tuple[type, ...], dict[str, Any]] = {
    (nnx.Dict,): {"__iter__": lambda self: iter(names_of(self))},
    (nnx.List, NumberedDict): {
        "_pytree__has_int_keys": False,
        "_graph_node_set_key": lambda self, key, value: nnx.Pytree._graph_node_set_key(
            self, str(key), value
        ),
    },
}


# What a call of a module changes; but for counters of keys, so that no key is drawn twice.
_CHANGING = nnx.Not(nnx.Any(nnx.Param, nnx.Intermediate, nnx.RngState))


def _explained(cls: type[Any]) -> Callable[[Any, str], Any]:
    """`__getattr__` of a module class, whose error says what other libraries' names are here."""
    inherited: Any = getattr(cls, "__getattr__", cls.__getattribute__)

    def found(self: Any, name: str) -> Any:
        try:
            return inherited(self, name)
        except AttributeError as error:
            if instead := other_names().instead_of(name):
                raise AttributeError(f"{error}{instead}") from None
            raise

    return found


def _thin_call(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function of a module class, computed thin, and with the state that the base would have."""

    def rerun(self: Any, before: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:  # statistics are of the changed input alone
            nnx.update(self, before)
        return call(self, *args, **kwargs)

    def adapted(self: Any, *args: Any, **kwargs: Any) -> Any:
        acting = [held for held in holds(self) if held.method.acts_on == "output"]
        before = None
        if any(held.method.changes_input for held in acting):
            before = jax.tree.map(lambda x: x, nnx.state(self, _CHANGING))
        with attending(self, name) as enter:
            args, kwargs = enter((args, kwargs))
            y = call(self, *args, **kwargs)
        if name != "__call__" or not acting:
            return y
        methods = [(held.method, functools.partial(_bound, self, held)) for held in acting]
        x = calls.input_of(self, args, kwargs)
        again = calls.with_input(functools.partial(rerun, self, before), self, args, kwargs)
        return outputs.adapted(methods, acting[0].path, again, x, y)

    @registry.calls_base
    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("adapters"), Rows):
            return _by_rows(self, name, args, kwargs)
        if name == "__call__" and BY_ROWS in vars(self):
            raise needs_rows(original(type(self)))
        gate, kwargs = call_gate(vars(self).get("adapter_recipe", ()), kwargs)
        with sharing(self, gate):
            if current():
                return adapted(self, *args, **kwargs)
            known, called = vars(self).get(CALLS), _CALLED.get()
            stated = known.stated(self, name, args, kwargs) if known and not called else ()
            around = holding(_CALLED, called or known is not None)
            with around, thin() as trace, _as_base(self, stated, trace):
                return lowered(adapted(self, *args, **kwargs))

    return run


# Within a call: what it calls sees the state as the call does.
_CALLED: contextvars.ContextVar[bool] = contextvars.ContextVar("called", default=False)


@contextlib.contextmanager
def _as_base(model: Any, stated: Iterable[str], trace: Thin) -> Iterator[None]:
    """In its body, modules are as those of the base, with the changed weights for their own.

    Transforms of flax, which split a module and write it back, then take the changed weights as
    they would take those of the base. What is written to such a weight lasts as long as the body.
    """
    if not stated:
        yield
        return
    modules = modules_of(model)
    chosen, values = [modules[path] for path in stated], dict[int, Any]()
    for module in chosen:
        for name in leaf_names(module):
            variable, path = vars(module)[name], join(holds(module)[0].module, name)
            value = lazy(trace, changed_weight(module, name, training=True), path)
            values[id(variable)] = seen = variable.copy(value)
            if is_quantized(variable.get_raw_value()):
                seen.__class__ = original(type(variable))
    before = [(module, type(module), _without_leaves(module)) for module in chosen]
    for module in modules.values():
        put = {name: x for name, x in vars(module).items() if id(x) in values}
        vars(module).update({name: values[id(x)] for name, x in put.items()})
        before.append((module, type(module), put))
    try:
        yield
    finally:
        for module, cls, attributes in reversed(before):
            vars(module).update(attributes)
            object.__setattr__(module, "__class__", cls)


def _without_leaves(module: Any) -> dict[str, Any]:
    """Takes the methods on weights from a module, and returns the attributes that they had."""
    weights, held = leaf_names(module), holds(module)
    rest = tuple(each for each in held if each.method.acts_on != "weight")
    slots = {each.nodes[0] for each in held} - {each.nodes[0] for each in rest}
    taken = {slot: vars(module).pop(slot) for slot in slots}
    # A dictionary of flax lists all of its attributes as its parts.
    del vars(module)["adapter_methods"]
    if rest:
        vars(module)["adapter_methods"] = rest
    cls: Any = original(type(module))
    seen = {name for name, x in vars(type(module)).items() if isinstance(x, Seen)} - weights
    if seen or rest or isinstance(module, bridge.ToNNX):
        cls = adapted_class(cls, frozenset(seen))
    object.__setattr__(module, "__class__", cls)
    return {**taken, "adapter_methods": held}


@computed_thin
def _by_rows(model: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a function of a model, or of a part, on rows with an adapter each.

    The model's other Variables stay as they are.
    """
    rows = kwargs.pop("adapters")
    parts: Any = nnx.split(model, nnx.RngKey, ADAPTERS, ...)
    graphdef, keys, own, rest = parts

    def run(leaves: Any, inputs: Any, keys: Any) -> Any:
        args, kwargs = inputs
        single = nnx.merge(graphdef, keys, with_leaves(own, leaves), rest, copy=True)
        for module in modules_of(single).values():
            if BY_ROWS in vars(module):
                delattr(module, BY_ROWS)
        return getattr(single, name)(*args, **kwargs)

    mine = rows.within(vars(model).get(BY_ROWS, ""), leaves_by_path(own))
    return by_rows(run, mine, (args, kwargs), keys)


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
def _watching(module: Any, prompts: list[Placement], call: str) -> Iterator[Callable[[Any], Any]]:
    """Adds prompts to an attention that is computed in line."""
    each = [(held.method, leaves_of(module, held), point_of(module, held)) for held in prompts]
    path = prompts[0].module
    inside = _WATCHING.get() | {path}
    with holding(_WATCHING, inside), watched(functools.partial(inserted, each)) as watch:
        yield watch.enter
    if call == "__call__":
        watch.found.check(type(prompts[0].method).__name__, path, module)


def _bound(
    module: Any, held: Placement, y: Array
) -> tuple[dict[str, Array], AttachmentPoint, Array | None]:
    """A method's arrays, its attachment point and a key for its dropout, for one output."""
    point = point_of(module, held, width=y.shape[-1])
    if not held.arrays:
        return {}, point, None
    return leaves_of(module, held), point, key_of(node_of(module, held))


def refresh(module: Any) -> None:
    """Gives a module the class that its adapters and quantised weights need.

    A module around adapters computes thin, and so does a linen module inside with parameters that
    train.
    """
    names = _changed_names(module)
    for name in standing(module):
        value = vars(module)[name]
        if has_modules(value, _is_needed):
            names.add(name)
        elif isinstance(value, AddedDict):
            delattr(module, name)
        else:
            vars(module)[name] = plain(value, lambda node, part: vars(node)[part])
    cls: Any = original(type(module))
    thin = CALLS in vars(module) or "adapter_recipe" in vars(module)
    if isinstance(module, bridge.ToNNX):
        thin |= any(isinstance(x, ADAPTERS) for x in params_of(module).values())
    adapted = names or holds(module) or thin
    new = adapted_class(cls, frozenset(names)) if adapted else cls
    object.__setattr__(module, "__class__", new)  # flax would list it among the attributes


def refresh_all(model: Any) -> None:
    """Gives every module of a model the class that it needs."""
    for module in list(modules_of(model).values()):
        refresh(module)


def without_adapters(model: Any) -> None:
    """Takes all adapters out of a model, in place, and restores its modules' classes."""
    for module in list(modules_of(model).values()):
        for name in dict.fromkeys(each.nodes[0] for each in holds(module) if each.arrays):
            delattr(module, name)
        for name in ("adapter_methods", CALLS, INSIDE):
            if name in vars(module):
                delattr(module, name)
    refresh_all(model)


def _changed_names(module: Any) -> set[str]:
    """The names of a module's own weights that are quantised or changed by adapters."""
    own = own_params(module)
    quantized = {name for name, x in own.items() if is_quantized(x.get_raw_value())}
    return quantized | leaf_names(module)


def leaf_names(module: Any) -> set[str]:
    """The names of a module's own weights that its methods change."""
    leaf = [held for held in holds(module) if held.method.acts_on == "weight"]
    return {name for held in leaf for name in held.method.names(point_of(module, held))}


def _is_needed(module: Any) -> bool:
    """Whether a container has to be a module."""
    return bool(holds(module) or _changed_names(module))
