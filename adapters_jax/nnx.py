"""The NNX front door: adapters inside modules that nobody edits.

`adapt` copies a model's structure (not its arrays), gives each targeted module the adapter's
Variables as a child, and swaps the module's class for a cached subclass whose calls run the
adapters. Base paths stay, and everything that trains is an `AdapterParam`, so `nnx.split`,
`nnx.DiffState` and `nnx.Optimizer(wrt=AdapterParam)` do what they say.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adapters_jax import contraction, methods
from adapters_jax.errors import RecipeError
from adapters_jax.examples import explained, filled, is_abstract
from adapters_jax.methods import Attached
from adapters_jax.methods.base import Site
from adapters_jax.partition import join
from adapters_jax.recipe import Recipe, require_sites
from adapters_jax.targets import require_match


class AdapterParam(nnx.Param):
    """A parameter that the recipe trains: an adapter's own, or one of the base that is unfrozen."""

    adapted_from: ClassVar[type[nnx.Param]] = nnx.Param


@functools.cache
def _trained_class(cls: type[Any]) -> type[AdapterParam]:
    """`AdapterParam` for a parameter of some class, which it stays an instance of."""
    if issubclass(cls, AdapterParam):
        return cls
    if cls is nnx.Param:
        return AdapterParam
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapter{cls.__name__}", (AdapterParam, cls), about)


def variable_path(path: tuple[Any, ...]) -> str:
    """An NNX graph path as names joined by slashes."""
    return "/".join(map(str, path))


@functools.cache
def _adapted_class(cls: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a module class whose calls run the adapters attached to the module."""

    def adapted(name: str) -> Callable[..., Any]:
        call = getattr(cls, name)

        @functools.wraps(call)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            y = call(self, *args, **kwargs)
            for attached, path in self.adapter_methods:
                y = _run(self, attached, path, name, args, kwargs, y)
            return y

        return method

    body = {name: adapted(name) for name in contraction.calls(cls)}
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapted{cls.__name__}", (cls,), {**body, **about})


def _site(
    module: Any, path: str, width: int, call: str = "__call__", *args: Any, **kwargs: Any
) -> Site:
    """What methods need to know of a module whose output is so wide."""
    layer = contraction.find(module, call, *args, **kwargs)
    if layer and not hasattr(module, layer.weight):
        raise RecipeError(
            f"{type(module).__name__} at {path!r} has no parameter {layer.weight!r}; correct "
            "weight=... in aj.register_contraction"
        )
    shape = getattr(module, layer.weight).shape if layer else ()
    weight = shape[len(shape) - layer.ndim :] if layer else ()
    return Site(path, call, width, layer, weight, getattr(module, "precision", None))


def _run(
    module: Any, method: Attached, path: str, call: str, args: Any, kwargs: Any, y: Array
) -> Array:
    """One method on a module's output, its leaves in the module's child of the method's name."""
    site = _site(module, path, y.shape[-1], call, *args, **kwargs)
    if not method.fits(site):
        return y
    x = contraction.input_of(module, call, args, kwargs)
    key = _key(getattr(module, method.slot))
    return method.forward(leaves_of(module, method), site, x, y, key)


def _children(
    method: Attached, site: Site, layers: tuple[int, ...], rngs: nnx.Rngs
) -> dict[str, Any]:
    """The Variables of a method at a site, nested as their names say, and its dropout."""
    children: dict[str, Any] = {}
    for name, leaf in method.leaves(site).items():
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


def _read(child: Any, method: Attached) -> dict[str, Array]:
    """A method's arrays by name, out of the node that holds them."""

    def step(node: Any, name: str) -> Any:
        return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)

    return {name: functools.reduce(step, name.split("/"), child)[...] for name in method.leaf_names}


def _key(child: Any) -> Array | None:
    """A key for dropout, or None in evaluation and where there is no dropout."""
    drop = getattr(child, "dropout", None)
    return None if drop is None or drop.deterministic else drop.rngs()


def leaves_of(module: Any, method: Attached) -> dict[str, Array]:
    """The arrays of a method that is attached to a module, by name."""
    return _read(getattr(module, method.slot), method)


def _grow(
    module: Any, method: Attached, site: Site, layers: tuple[int, ...], rngs: nnx.Rngs
) -> None:
    """Gives a module the leaves of a method, under the layer axes that its own weights have."""
    if hasattr(module, method.slot):
        raise _taken(site.path, method)
    setattr(module, method.slot, nnx.Dict(_children(method, site, layers, rngs)))
    module.adapter_methods = (*getattr(module, "adapter_methods", ()), (method, site.path))
    if not hasattr(type(module), "adapted_from"):
        module.__class__ = _adapted_class(type(module))  # type: ignore[arg-type]


def _taken(path: str, method: Attached) -> RecipeError:
    """The error where the base already has something of the name that a method would use."""
    return RecipeError(
        f"{type(method).__name__} keeps its parameters in {join(path, method.slot)}, but the base "
        "has something of that name there; rename it or do not target it"
    )


def _modules(model: nnx.Module) -> dict[str, Any]:
    """Every module by path, the model itself under the empty one."""
    return {variable_path(path): module for path, module in nnx.iter_modules(model)}


def copy(model: Any) -> Any:
    """A model, or another NNX object, with Variables of its own that hold the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)


@functools.cache
def _recording_class(cls: type[Any]) -> type[Any]:
    """The subclass of a module class that shows every output to the module's `adapter_trace`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = cls.__call__(self, *args, **kwargs)
        self.adapter_trace(self, y)
        return y

    return type(cls.__name__, (cls,), {"__call__": call})


def _trace(model: nnx.Module, args: tuple[Any, ...]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By an abstract run: each module's output width, and the layer axes it is stacked on."""
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}

    def record(path: str, outside: tuple[int, ...], module: nnx.Module, y: Any) -> None:
        array = hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.inexact) and y.ndim > 0
        layers = outside[: len(outside) - len(_first_shape(module))]
        seen[path] = (y.shape[-1] if array else 0, layers)

    probe = copy(model)
    for path, module in list(_modules(probe).items()):
        if callable(module):
            module.adapter_trace = functools.partial(record, path, _first_shape(module))
            module.__class__ = _recording_class(type(module))  # type: ignore[arg-type]
    with explained(model, args):
        nnx.eval_shape(lambda m: m(*filled(args)), probe)
    return seen


def _first_shape(module: nnx.Module) -> tuple[int, ...]:
    """The shape of some Variable of a module, other than of its random streams; empty without."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Not(nnx.RngState)))
    return leaves[0].shape if leaves else ()


def _sites(
    model: nnx.Module, examples: tuple[Any, ...] | None
) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """What methods need to know of each module, with the layer axes its weights are stacked on."""
    traced = _trace(model, examples) if examples is not None else {}
    sites = {}
    for path, module in _modules(model).items():
        site = _site(module, path, _known_width(module))
        layers = _first_shape(module)[:-1] if isinstance(module, _NORMS) else ()
        if site.contraction:
            stacked = getattr(module, site.contraction.weight).shape
            layers = stacked[: len(stacked) - len(site.weight_shape)]
        width, layers = traced.get(path, (site.width, layers))
        sites[path] = dataclasses.replace(site, width=width), layers
    return sites


# Layers without a weight to contract that say how wide they are, and how often they are stacked.
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


def _known_width(module: Any) -> int:
    """The width of a plain layer's output, read off the layer; 0 where it does not say."""
    layer = contraction.find(module, "__call__")
    if layer:
        return getattr(getattr(module, layer.weight, None), "shape", (0,))[-1]
    shape = _first_shape(module) if isinstance(module, _NORMS) else ()
    return shape[-1] if shape else 0


def _check(recipe: Recipe, model: nnx.Module, sites: dict[str, Any], traced: bool) -> None:
    """Raises TargetError for a pattern that meets nothing, or nothing its method can attach to."""
    modules, shared = _modules(model), _other_names(model)
    hint = "" if traced else "; pass example_inputs=(...) so that its output is known"
    for method in recipe.attached:
        usable = [path for path, (site, _) in sites.items() if method.fits(site)]
        other = {p: method.why_not(m) for p, m in modules.items() if p not in usable}
        if method.slot == "adapter":
            other = {path: f"{why}{hint}" for path, why in other.items()}
        require_sites(method, usable, other | shared)
    require_match("Unfreeze", recipe.unfrozen, _params(model), shared)


def _other_names(model: nnx.Module) -> dict[str, str]:
    """The further paths of shared modules and tied parameters, with the one that they go by."""
    known = _modules(model).keys() | _params(model).keys()
    names: dict[str, str] = {}
    for paths in nnx.find_duplicates(model):
        places = list(map(variable_path, paths))
        own = next((path for path in places if path in known), None)
        if own is not None:
            names |= {path: f"shared, it goes by {own}" for path in places if path != own}
    return names


def _params(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by path."""
    nodes = nnx.iter_graph(model)
    return {variable_path(path): node for path, node in nodes if isinstance(node, nnx.Param)}


def adapt(
    model: nnx.Module,
    recipe: Recipe,
    rngs: nnx.Rngs,
    example_inputs: tuple[Any, ...] | None = None,
) -> nnx.Module:
    """See `adapters_jax.adapt`."""
    _check_streams(recipe, rngs)
    if is_abstract(nnx.state(model)):
        # Abstract in, abstract out: the caller's streams stay where they are.
        return nnx.eval_shape(
            lambda model, rngs: _adapted(model, recipe, rngs, example_inputs), model, copy(rngs)
        )
    return _adapted(model, recipe, rngs, example_inputs)


def _check_streams(recipe: Recipe, rngs: nnx.Rngs) -> None:
    """Raises TypeError for something that is not Rngs, ValueError for a stream that it lacks."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"adapt: rngs is of {type(rngs).__name__}, wanted nnx.Rngs; write rngs=nnx.Rngs(0)"
        )
    wanted = {"params": bool(recipe.attached), "dropout": any(m.dropout for m in recipe.attached)}
    missing = [name for name, used in wanted.items() if used and not hasattr(rngs, name)]
    if missing:
        raise ValueError(
            f"adapt: rngs has no stream {' and no '.join(missing)}; write rngs=nnx.Rngs(0), or "
            f"name it: rngs=nnx.Rngs({', '.join(f'{name}={i}' for i, name in enumerate(wanted))})"
        )


def _adapted(
    model: nnx.Module, recipe: Recipe, rngs: nnx.Rngs, example_inputs: tuple[Any, ...] | None
) -> nnx.Module:
    """The model adapted, after every check."""
    adapted = copy(model)
    whole = getattr(adapted, "adapter_recipe", Recipe()) + recipe
    sites = _sites(adapted, example_inputs)
    _check(recipe, adapted, sites, example_inputs is not None)
    modules, frozen = _modules(adapted), _params(adapted)
    for path, (site, layers) in sites.items():
        for method in recipe.at(path):
            if method.fits(site):
                whole.at(path)  # two rounds of adapting clash as two methods of one recipe do
                _grow(modules[path], method, site, layers, rngs)
    for path, variable in frozen.items():
        owner = recipe.owner(path)
        if owner and type(variable) is not AdapterParam:
            raise _taken(*owner)  # it would pass for an adapter's
        if recipe.trains(path):
            variable.__class__ = _trained_class(type(variable))  # type: ignore[arg-type]
    adapted.adapter_recipe = whole
    return adapted


def recipe_of(model: Any) -> Recipe:
    """The recipe that a model was adapted by.

    Raises:
        ValueError: it was not adapted.
    """
    if not hasattr(model, "adapter_recipe"):
        raise ValueError(
            f"{type(model).__name__} has no adapters; call aj.adapt(model, recipe) first"
        )
    return model.adapter_recipe


def adapted_sites(model: nnx.Module) -> list[tuple[Any, Attached, Site]]:
    """Every module that has adapters of its own, with each method attached to it and where."""
    return [
        (module, method, _site(module, path, _known_width(module)))
        for module in _modules(model).values()
        for method, path in getattr(module, "adapter_methods", ())
    ]


def detach(model: Any) -> None:
    """Takes every adapter off a model of one's own, and gives its modules their classes back."""
    for module in list(_modules(model).values()):
        if hasattr(module, "adapter_methods"):
            for method, _ in module.adapter_methods:
                delattr(module, method.slot)
            del module.adapter_methods
            module.__class__ = type(module).adapted_from
    for variable in _params(model).values():
        if isinstance(variable, AdapterParam):
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
    del model.adapter_recipe


class Bottleneck(nnx.Module):
    """A bottleneck adapter to write into a model by hand: `x + up(f(down(x)))`.

    Args:
        features: d, the width of its input and output.
        bottleneck_dim: m.
        rngs: seeds the kernels, and dropout.
        **fields: scale, activation, dropout and init_std as in `adapters_jax.Bottleneck`.

    Example:
        >>> adapter = Bottleneck(768, 64, rngs=nnx.Rngs(0))
        >>> adapter.down["kernel"].shape, adapter(jnp.ones((2, 768))).shape
        ((768, 64), (2, 768))

    Reference: Houlsby et al. 2019, arXiv:1902.00751.
    """

    def __init__(self, features: int, bottleneck_dim: int, *, rngs: nnx.Rngs, **fields: Any):
        self.method = methods.Bottleneck("**", bottleneck_dim, **fields)
        self.site = Site("", "__call__", features)
        for name, child in _children(self.method, self.site, (), rngs).items():
            setattr(self, name, child)

    def __call__(self, x: Float[Array, "... d"], y: Array | None = None) -> Float[Array, "... d"]:
        """The adapter on x; or, given the output y of a sublayer of x, beside that sublayer.

        Args:
            x: (..., d).
            y: (..., d), for the parallel form.
        """
        placement = "sequential" if y is None else "parallel"
        method = dataclasses.replace(self.method, placement=placement)  # type: ignore[arg-type]
        return method.forward(_read(self, method), self.site, x, x if y is None else y, _key(self))


class LoRALinear(nnx.Linear):
    """A linear layer with low-rank factors, to write into a model by hand.

    Its parameters are `kernel` and `bias` as in `nnx.Linear`, and `lora/a` and `lora/b`.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: r.
        alpha: the scale is alpha / r; None follows the rank.
        rngs: seeds all parameters, and dropout.
        lora: further fields of `adapters_jax.LoRA`, as a mapping.
        **fields: further arguments of `nnx.Linear`.

    Example:
        >>> layer = LoRALinear(4, 3, rank=2, rngs=nnx.Rngs(0))
        >>> layer.lora["a"].shape, layer.lora["b"].shape
        ((4, 2), (2, 3))

    Reference: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rngs: nnx.Rngs,
        lora: Mapping[str, Any] | None = None,
        **fields: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **fields)
        method = methods.LoRA("**", rank, alpha, **(lora or {}))
        _grow(self, method, _site(self, "", out_features), (), rngs)
