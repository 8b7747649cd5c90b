"""The linen API: a wrapper with the base's calls and paths, and the initial adapter leaves."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.abstract import explained, filled, is_abstract
from adapters_jax.errors import compare_trees
from adapters_jax.linen.interceptor import Interceptor
from adapters_jax.methods import Method, arrays
from adapters_jax.methods.base import AttachmentPoint, contraction_of, started
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree, flatten, join, unflatten, without_adapters
from adapters_jax.weights.quantized import is_quantized, unboxed


class Adapted(nn.Module):
    """A linen module with adapters: the same calls, the base's parameters and the adapters' leaves.

    Made by `adapt`, which also gives it the base's methods and fields.
    """

    inner: nn.Module
    recipe: Recipe

    def setup(self) -> None:
        """Shares the scope with the base, whose parameters so keep their paths."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with its adapters."""
        return self._call("__call__", args, kwargs)

    @nn.nowrap
    def apply(self, variables: Tree, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As in flax; `method=Base.encode`, of the base's class, runs with the adapters too."""
        function = getattr(method, "__func__", method)
        name = getattr(function, "__name__", "")
        if function is not None and getattr(type(self.inner), name, None) is function:
            method = name
        return super().apply(variables, *args, method=method, **kwargs)

    def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        inner: Any = self.inner
        if inner.scope is None:
            return getattr(inner, name)(*args, **kwargs)
        init = self.is_initializing()
        interceptor = inner.scope.flags.get(Interceptor.flag(inner))
        if interceptor is None or interceptor.recipe != self.recipe:
            interceptor = Interceptor(self.recipe, inner, init)
        with nn.intercept_methods(interceptor):
            y = getattr(inner, name)(*args, **kwargs)
        if init and name == "__call__":
            interceptor.check(self.variables.get("params", {}))
        return y


@functools.cache
def _adapted_class(cls: type[nn.Module]) -> type[Adapted]:
    """`Adapted` with the public methods and the fields of one base class."""

    def forward(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def method(self: Adapted, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        del method.__wrapped__
        return method

    def read(name: str) -> property:
        return property(lambda self: getattr(self.inner, name))

    own = set(dir(Adapted)) | set(Adapted.__dataclass_fields__)
    fields, names = set(cls.__dataclass_fields__) - own, set(dir(cls)) - own
    body: dict[str, Any] = {name: read(name) for name in fields}
    for name in names - fields:
        if not name.startswith("_"):
            method = inspect.isfunction(inspect.getattr_static(cls, name))
            body[name] = forward(name) if method else read(name)
    return type(f"Adapted{cls.__name__}", (Adapted,), {**body, "__module__": cls.__module__})


def adapt(model: nn.Module, recipe: Recipe) -> Adapted:
    """See `adapters_jax.adapt`."""
    if isinstance(model, Adapted):
        return adapt(model.inner, model.recipe + recipe)
    return _adapted_class(type(model))(inner=model, recipe=recipe)  # type: ignore[arg-type]


def points(
    model: Adapted, /, *args: Any, **kwargs: Any
) -> tuple[dict[tuple[str, str], tuple[Method, AttachmentPoint]], Tree]:
    """Finds the attachment points of the recipe by an abstract run of the model.

    Args:
        model: an adapted linen module.
        *args: example inputs; only shapes matter.
        **kwargs: further arguments of the model's `__call__`.

    Returns:
        The method and attachment point of every `(module path, slot)`; all parameters, abstract.

    Raises:
        TargetError: a pattern matches nothing, or nothing that its method can attach to.
        UserError: the example inputs do not fit the model.
    """
    interceptor, params = seen(model.inner, model.recipe, args, kwargs)
    interceptor.check(params)
    found = {
        (path, method.slot): (method, point)
        for (path, _), (_, point) in interceptor.visited.items()
        for method in model.recipe.at(path)
        if method.fits(point)
    }
    return found, params


def seen(base: nn.Module, recipe: Recipe, args: Any, kwargs: Any) -> tuple[Interceptor, Tree]:
    """Runs a model abstractly; gives the interceptor that saw every module, and all parameters."""
    interceptors: list[Interceptor] = []

    def run(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        interceptors.append(Interceptor(recipe, module, init=True))
        with nn.intercept_methods(interceptors[-1]):
            return module(*inputs, **options)  # type: ignore[operator]

    def init(key: PRNGKeyArray) -> Tree:
        inputs, options = filled((args, kwargs))
        variables = base.init(key, *inputs, method=run, **options)
        return nn.meta.unbox(variables.get("params", {}))

    with explained(base, args, kwargs):
        params = jax.eval_shape(init, jax.random.key(0))
    (interceptor,) = interceptors
    return interceptor, params


def shapes_of(params: Tree) -> Tree:
    """A tree as shapes and dtypes, without the boxes of partitioned parameters."""
    return jax.eval_shape(nn.meta.unbox, params)


def init_adapters(
    model: Adapted, params: Tree, key: PRNGKeyArray, /, *args: Any, **kwargs: Any
) -> Tree:
    """Adds freshly initialised adapter leaves to the base's parameters.

    Args:
        model: an adapted linen module.
        params: the base's parameter tree, as pretrained; arrays of any dtype, or abstract.
        key: seeds the adapters.
        *args: example inputs of the model, arrays or `jax.ShapeDtypeStruct`; only shapes matter.
        **kwargs: further arguments of the model's `__call__`.

    Returns:
        The base's tree with the adapters' leaves beside its own; abstract where `params` is. PiSSA
        subtracts its factors from the weights, whose arrays are then new.

    Raises:
        TargetError: a pattern of the recipe matches nothing, or nothing its method can attach to.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        UserError: the example inputs do not fit the model.

    Warns:
        AdapterWarning: as for `adapt`.

    Example:
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> from flax import linen as nn
        >>> base = nn.Dense(3)
        >>> params = base.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        >>> model = aj.adapt(base, aj.LoRA("**", rank=2))
        >>> params = aj.init_adapters(model, params, jax.random.key(1), jnp.ones((1, 4)))
        >>> jax.tree.map(jnp.shape, params)
        {'bias': (3,), 'kernel': (4, 3), 'lora': {'a': (4, 2), 'b': (2, 3)}}
    """
    found, whole = points(model, *args, **kwargs)
    compare_trees(
        "params",
        flatten(without_adapters(shapes_of(params), model.recipe)),
        flatten(without_adapters(whole, model.recipe)),
        "Pass the base's own parameter tree, variables['params'], of this very model.",
    )
    shapes = {path: leaf.shape for path, leaf in flatten(whole).items()}

    def grow(key: PRNGKeyArray, weights: Mapping[str, Array]) -> dict[str, Array]:
        grown = {}
        for (module, slot), (method, point) in found.items():
            leaves = {
                name: leaf.init(arrays.key_at(key, path), shapes[path])
                for name, leaf in method.leaves(point).items()
                if (path := join(module, slot, name))
            }
            if method.from_weight:
                path = join(module, contraction_of(point).weight)
                leaves, grown[path] = started(method, leaves, point, unboxed(weights[path]))
            grown |= {join(module, slot, name): leaf for name, leaf in leaves.items()}
        return grown

    own = flatten(without_adapters(params, model.recipe))
    weights = {
        path: own[path]
        for (module, _), (method, point) in found.items()
        if method.from_weight and (path := join(module, contraction_of(point).weight))
    }
    grown = jax.eval_shape(grow, key, weights) if is_abstract(params) else grow(key, weights)
    rest = {path: grown.pop(path) for path in weights}
    boxed = {
        path: nn.meta.replace_boxed(own[path], leaf)
        for path, leaf in rest.items()
        if not is_quantized(own[path])
    }
    return unflatten({**own, **boxed, **grown})
