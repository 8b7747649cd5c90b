"""The NNX front door: adapters inside modules that nobody edits.

`adapt` copies a model's structure (not its arrays), gives each targeted module the adapter's
Variables as a child, and swaps the module's class for a cached subclass whose calls run the
adapters. Base paths stay, and everything that trains is an `AdapterParam`, so `nnx.split`,
`nnx.DiffState` and `nnx.Optimizer(wrt=AdapterParam)` do what they say.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from adapters_jax import contraction, methods
from adapters_jax.errors import RecipeError
from adapters_jax.examples import explained, filled
from adapters_jax.methods import Attached
from adapters_jax.methods.base import Site
from adapters_jax.recipe import Recipe
from adapters_jax.targets import require_match


class AdapterParam(nnx.Param):
    """A parameter that the recipe trains: an adapter's own, or one of the base that is unfrozen."""


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
        streams = rngs.split(layers) if layers else rngs
        children["dropout"] = nnx.Dropout(method.dropout, rngs=streams)
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
        raise RecipeError(
            f"{type(method).__name__} keeps its parameters in {site.path}/{method.slot}, but the "
            "base has something of that name there; rename it or do not target it"
        )
    setattr(module, method.slot, nnx.Dict(_children(method, site, layers, rngs)))
    module.adapter_methods = (*getattr(module, "adapter_methods", ()), (method, site.path))
    if not hasattr(type(module), "adapted_from"):
        module.__class__ = _adapted_class(type(module))  # type: ignore[arg-type]


def _modules(model: nnx.Module) -> dict[str, Any]:
    """Every module by path, the model itself under the empty one."""
    return {variable_path(path): module for path, module in nnx.iter_modules(model)}


def copy(model: nnx.Module) -> Any:
    """A model with Variables of its own that hold the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)


def _trace(model: nnx.Module, args: Any, kwargs: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """By an abstract run: each module's output width, and the layer axes it is stacked on."""
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}
    whole = {path: _first_shape(module) for path, module in _modules(model).items()}

    def recording(cls: type[Any]) -> type[Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            y = cls.__call__(self, *args, **kwargs)
            array = hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.inexact) and y.ndim > 0
            outside, inside = whole[self.adapter_trace], _first_shape(self)
            layers = outside[: len(outside) - len(inside)]
            seen[self.adapter_trace] = (y.shape[-1] if array else 0, layers)
            return y

        return type(cls.__name__, (cls,), {"__call__": call})

    probe = copy(model)
    for path, module in list(_modules(probe).items()):
        if callable(module):
            module.adapter_trace = path
            module.__class__ = recording(type(module))
    with explained(model, (*args, *kwargs.values())):
        nnx.eval_shape(lambda m: m(*filled(args), **filled(kwargs)), probe)
    return seen


def _first_shape(module: nnx.Module) -> tuple[int, ...]:
    """The shape of some Variable of a module; empty where it has none."""
    leaves = jax.tree.leaves(nnx.state(module))
    return leaves[0].shape if leaves else ()


def _sites(model: nnx.Module, examples: Any) -> dict[str, tuple[Site, tuple[int, ...]]]:
    """What methods need to know of each module, with the layer axes its weights are stacked on."""
    traced = _trace(model, *examples) if examples is not None else {}
    sites = {}
    for path, module in _modules(model).items():
        site = _site(module, path, _known_width(module))
        layers: tuple[int, ...] = ()
        if site.contraction:
            stacked = getattr(module, site.contraction.weight).shape
            layers = stacked[: len(stacked) - len(site.weight_shape)]
        width, layers = traced.get(path, (site.width, layers))
        sites[path] = dataclasses.replace(site, width=width), layers
    return sites


def _known_width(module: Any) -> int:
    """The width of a plain layer's output, read off the layer; 0 where it does not say."""
    layer = contraction.find(module, "__call__")
    if layer:
        return getattr(module, layer.weight).shape[-1]
    width = getattr(module, "out_features", getattr(module, "num_features", 0))
    return width if isinstance(width, int) else 0


def _check(recipe: Recipe, model: nnx.Module, sites: dict[str, Any], traced: bool) -> None:
    """Raises TargetError for a pattern that meets nothing, or nothing its method can attach to."""
    modules = _modules(model)
    hint = "" if traced else "; pass example_inputs=(...) so that its output is known"
    for method in recipe.attached:
        usable = [path for path, (site, _) in sites.items() if method.fits(site)]
        other = {p: method.why_not(m) for p, m in modules.items() if p not in usable}
        if method.slot == "adapter":
            other = {path: f"{why}{hint}" for path, why in other.items()}
        require_match(type(method).__name__, method.targets, usable, other)
    require_match("Unfreeze", recipe.unfrozen, _params(model))


def _params(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by path."""
    nodes = nnx.iter_graph(model)
    return {variable_path(path): node for path, node in nodes if isinstance(node, nnx.Param)}


def adapt(
    model: nnx.Module,
    recipe: Recipe,
    rngs: nnx.Rngs,
    example_inputs: tuple[Any, ...] | None = None,
    **kwargs: Any,
) -> nnx.Module:
    """See `adapters_jax.adapt`."""
    adapted = copy(model)
    examples = None if example_inputs is None else (example_inputs, kwargs)
    sites = _sites(adapted, examples)
    _check(recipe, adapted, sites, examples is not None)
    modules = _modules(adapted)
    frozen = _params(adapted)
    for path, (site, layers) in sites.items():
        for method in recipe.at(path):
            if method.fits(site):
                _grow(modules[path], method, site, layers, rngs)
    for path, variable in frozen.items():
        if recipe.trains(path):
            variable.__class__ = AdapterParam
    adapted.adapter_recipe = getattr(adapted, "adapter_recipe", Recipe()) + recipe
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
        if type(variable) is AdapterParam:
            variable.__class__ = nnx.Param  # type: ignore[assignment]
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
