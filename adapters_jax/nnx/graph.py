"""An NNX model as modules, parameters and adapters by path.

Every trained parameter is an `AdapterParam`, so `nnx.split`, `nnx.DiffState` and
`nnx.Optimizer(wrt=AdapterParam)` select what trains. A module keeps the placements of its methods,
in `adapter_methods`, and their Variables in a child that has the name of the method's slot.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, ClassVar

import jax.extend.core as jex
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placement
from adapters_jax.trace.program import named
from adapters_jax.trace.through import holding


def variable_path(path: tuple[Any, ...]) -> str:
    """An NNX graph path as names joined by slashes."""
    return "/".join(map(str, path))


def modules_of(model: nnx.Module) -> dict[str, Any]:
    """Every module by path, the model itself under the empty one.

    A module that is reached by several paths has the first of them.

    Args:
        model: an NNX model.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))
        >>> sorted(modules_of(model))
        ['', 'layers', 'layers/0', 'layers/1']
    """
    return {variable_path(path): module for path, module in nnx.iter_modules(model)}


def params_of(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by path, those of adapters among them.

    A parameter that is tied to another one has the path of the first.

    Args:
        model: an NNX model.

    Returns:
        The `nnx.Param` Variables themselves, so that a write changes the model.

    Example:
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> {path: (x.shape, x.dtype.name) for path, x in params_of(model).items()}
        {'bias': ((3,), 'float32'), 'kernel': ((4, 3), 'float32')}
    """
    nodes = nnx.iter_graph(model)
    return {variable_path(path): node for path, node in nodes if isinstance(node, nnx.Param)}


def frozen_leaves(model: nnx.Module) -> dict[str, Any]:
    """The arrays of the base's parameters that no recipe trains, by path."""
    # Not the arrays that modules read, which may be changed ones, or opened ones.
    frozen = {p: x for p, x in params_of(model).items() if not isinstance(x, ADAPTERS)}
    return {path: variable.get_raw_value() for path, variable in frozen.items()}


def own_params(module: Any) -> dict[str, Any]:
    """The parameters of a module itself by name, without those of its submodules.

    Args:
        module: an NNX module.

    Returns:
        The `nnx.Param` Variables themselves.

    Example:
        >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> sorted(own_params(layer)), own_params(nnx.Sequential(layer))
        (['bias', 'kernel'], {})
    """
    # `isinstance` asks the metaclass of Variables, which takes ten times as long.
    return {name: x for name, x in vars(module).items() if issubclass(type(x), nnx.Param)}


def copy(model: Any) -> Any:
    """A copy of a model or another NNX object, with new Variables that hold the same arrays.

    Args:
        model: an NNX model, `nnx.Rngs`, or another object of NNX.

    Returns:
        An object of the same class. A write to it leaves the given one as it is, and no array is
        copied.

    Example:
        >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> other = copy(layer)
        >>> same = other.kernel[...] is layer.kernel[...]
        >>> other.bias[...] += 1
        >>> same, other.bias[...].tolist(), layer.bias[...].tolist()
        (True, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    return nnx.merge(*nnx.split(model), copy=True)


BY_ROWS = "adapters_by_rows"  # the mark of a module of a bank's model: its path
CALLS = "_adapter_calls"  # of a module around adapters: what is known of its calls


class AdapterParam(nnx.LoRAParam):
    """A parameter that the recipe trains: an adapter's own, or one of the base that is unfrozen.

    An adapter's own is float32; an unfrozen one keeps its dtype, and its own class beside this.
    As a filter of NNX it selects what trains. So does `nnx.LoRAParam`, by which other trainers
    select, as long as the base has no `nnx.LoRA` layers: their parameters are the base's, and
    `AdapterParam` leaves them frozen.

    Args: as in `nnx.Param`.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> nnx.to_pure_dict(nnx.state(adapted, AdapterParam))["lora"]["b"].shape
        (2, 3)
    """

    adapted_from: ClassVar[type[nnx.Param]] = nnx.Param


class FrozenAdapterParam(nnx.Param):
    """A leaf of an adapter that does not train: of a frozen entry, or by its method.

    Args: as in `nnx.Param`.

    Example:
        >>> import adapters_jax as aj, tempfile
        >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = aj.load_adapter(aj.save_adapter(f"{folder}/a", adapted), base, train=False)
        >>> type(model.lora.a).__name__
        'FrozenAdapterParam'
    """


ADAPTERS = (AdapterParam, FrozenAdapterParam)  # as a filter: what an adapter's file and a bank hold


@functools.cache
def param_class(kind: type[Any], cls: type[Any]) -> type[Any]:
    """The class of parameters of a kind, such as `AdapterParam`, that have their own class, too."""
    if issubclass(cls, kind):
        return cls
    if cls is nnx.Param:
        return kind
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"{kind.__name__.removesuffix('Param')}{cls.__name__}", (kind, cls), about)


def holds(module: Any) -> tuple[Placement, ...]:
    """The methods on a module, each with its placement."""
    return vars(module).get("adapter_methods", ())  # `getattr` would ask `__getattr__` of a model


def point_of(module: Any, placed: Placement, **fields: Any) -> AttachmentPoint:
    """The attachment point of a method on a module, as the module is now."""
    own = {name: tuple(x.shape) for name, x in own_params(module).items()}
    return placed.point(own, precision=getattr(module, "precision", None), **fields)


def original(cls: type[Any]) -> type[Any]:
    """The class that the author of a model gave a module or Variable of this class."""
    while hasattr(cls, "adapted_from"):
        cls = cls.adapted_from
    return cls


READ = "adapters_jax: read"  # the name of a value that is read as an attribute, or by a method
_MARKED: ContextVar[dict[Any, Any] | None] = ContextVar("marked", default=None)


def marking() -> AbstractContextManager[None]:
    """In its body, what is read of weights and adapters by attributes and methods has a name."""
    return holding(_MARKED, {})


def marked(value: Any) -> Any:
    """A value that is read as an attribute, or by a method; with its name in `marking()`.

    Not where a model differentiates its own parameters, whose gradients are those of its state.
    """
    differentiated = hasattr(value, "tangent")  # only jax's tracers of derivatives have it
    return named(value, READ) if _MARKED.get() is not None and not differentiated else value


def once(variable: Any, make: Callable[[Any, Any], Any]) -> Any:
    """What is made of a Variable and its `marked` value; in `marking()` once in each trace."""
    value, known = variable.get_raw_value(), _MARKED.get()
    if known is None:
        return make(variable, value)
    with jex.take_current_trace() as trace, jex.set_current_trace(trace):
        key = id(variable), id(value), id(trace)
        if key not in known:  # it also keeps what the numbers are of
            known[key] = make(variable, marked(value)), variable, value, trace
        return known[key][0]


def read(child: Any, method: Method) -> dict[str, Array]:
    """A method's arrays by name, read from the node that holds them."""
    if any(getattr(child, name) is None for name in method.shared_leaves):
        raise RecipeError(
            f"{type(method).__name__}: its modules share {', '.join(method.shared_leaves)}, which "
            "the whole model holds; call a function of the model, and not of a part alone"
        )
    leaves = {name: marked(_step(child, name.split("/"))[...]) for name in method.leaf_names}
    gate = child.invoked if method.gated else None
    if gate is not None:  # outside of a loop over layers, that of the first one is that of all
        layers = gate.ndim - gate.get_metadata("axes")
        leaves["invoked"] = gate[(0,) * layers] if layers else gate[...]
    return leaves


def _step(node: Any, names: Iterable[str]) -> Any:
    """The node that is reached by names."""
    for name in names:
        node = node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
    return node


@contextlib.contextmanager
def sharing(model: Any, gate: Array | None = None) -> Iterator[None]:
    """In its body, each module has copies of the arrays that it shares with others.

    They have the layer axes of the module, since transforms of flax split all that it holds.

    Args:
        gate: the tokens that gated methods act on, which their modules then have as well.
    """
    recipe = vars(model).get("adapter_recipe", ())
    if not any(method.shared_leaves for method in recipe) and gate is None:
        yield
        return
    put: list[tuple[Any, str, Any]] = []

    def copied(node: Any, name: str, like: Any, value: Array, layers: Any, **about: Any) -> None:
        put.append((node, name, vars(node)[name]))
        # Not by `setattr`, which flax refuses for a model of another trace.
        vars(node)[name] = like(jnp.broadcast_to(value, (*layers, *value.shape)), **about)

    for module in modules_of(model).values():
        for placed in [placed for placed in holds(module) if placed.arrays]:
            node = node_of(module, placed)
            for name in placed.method.shared_leaves:
                if getattr(node, name) is None:
                    variable = getattr(vars(model)[placed.method.slot], name)
                    value = variable.get_raw_value()
                    copied(node, name, type(variable), value, placed.layers)
            if placed.method.gated and gate is not None:
                # In float, as code that differentiates or casts all parameters expects.
                given, axes = gate.astype(jnp.float32), gate.ndim
                copied(node, "invoked", FrozenAdapterParam, given, placed.layers, axes=axes)
    try:
        yield
    finally:
        for node, name, before in reversed(put):
            vars(node)[name] = before


def key_of(child: Any) -> Array | None:
    """A key for dropout; None in evaluation and where there is no dropout."""
    drop = getattr(child, "dropout", None)
    return None if drop is None or drop.deterministic else drop.rngs()


def node_of(module: Any, placed: Placement) -> Any:
    """The node that holds a method's arrays."""
    return _step(module, placed.nodes)


def leaves_of(module: Any, placed: Placement) -> dict[str, Array]:
    """The arrays of a method that is attached to a module, by name.

    Args:
        module: an adapted NNX module.
        placed: the method, as `adapted_points` gives it beside the module.

    Returns:
        The arrays by the names of the method, such as `a` of shape (in, r) and `b` of (r, out) of
        LoRA, or `down/kernel` of a bottleneck.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> ((module, placed, _),) = aj.nnx.adapted_points(adapted)
        >>> leaves_of(module, placed)["b"].tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return read(node_of(module, placed), placed.method)
