"""The linen front door: adapters inside modules that nobody edits.

`adapt` wraps a module. While the wrapper runs, an interceptor sees every call of a submodule and,
where the recipe targets it, adds the adapter's leaves to the submodule's own scope. So the base
keeps its parameter paths, and lifted transforms (scan, remat, vmap) carry the leaves along.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import contraction, methods
from adapters_jax.errors import RecipeError, compare_trees
from adapters_jax.examples import explained, filled, is_abstract
from adapters_jax.methods import Attached, base
from adapters_jax.methods.base import Site
from adapters_jax.partition import Tree, flatten, join, merge_trees, unflatten, without_adapters
from adapters_jax.recipe import Recipe, require_sites
from adapters_jax.targets import require_match

# The arguments by which flax modules say that they run in evaluation, and the value that says so.
_EVALUATION_FLAGS = {"deterministic": True, "train": False, "training": False, "is_training": False}
_RUNS = itertools.count()


def _run(
    module: nn.Module,
    scope: Any,
    method: Attached,
    site: Site,
    x: Any,
    y: Array,
    evaluation: bool | None,
) -> Array:
    """One method on a module's output, its leaves in the given scope."""
    leaves = {}
    for name, leaf in method.leaves(site).items():
        *groups, last = name.split("/")
        holder = functools.reduce(lambda s, group: s.push(group, reuse=True), groups, scope)
        leaves[name] = nn.meta.unbox(holder.param(last, leaf.init, leaf.shape))
    if evaluation is None:
        evaluation = not module.has_rng("dropout")
    key = module.make_rng("dropout") if method.dropout and not evaluation else None
    return method.forward(leaves, site, x, y, key)


def _site(module: Any, path: str, call: str, args: Any, kwargs: Any, y: Any) -> Site:
    """What methods need to know of a module that has just run."""
    found = contraction.find(module, call, *args, **kwargs)
    shape: tuple[int, ...] = ()
    if found is not None:
        if not module.scope.has_variable("params", found.weight):
            raise RecipeError(
                f"{type(module).__name__} at {path!r} has no parameter {found.weight!r}; correct "
                "weight=... in aj.register_contraction"
            )
        shape = nn.meta.unbox(module.scope.get_variable("params", found.weight)).shape
    array = hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.inexact) and y.ndim > 0
    return Site(
        path, call, y.shape[-1] if array else 0, found, shape, getattr(module, "precision", None)
    )


@functools.lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _evaluation_flag(module: nn.Module, function: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether a call says, or else its module's field, that this is an evaluation; or None."""
    bound = _signature(function).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    for name, evaluating in _EVALUATION_FLAGS.items():
        for value in (bound.arguments.get(name), getattr(module, name, None)):
            if isinstance(value, bool | np.bool_):
                return bool(value) == evaluating
    return None


@dataclass
class _Running:
    """A call under way: the path and name of its method, and whether it is an evaluation."""

    where: tuple[tuple[str, ...], str] | None = None
    evaluation: bool | None = None
    hashed: int = 0


class _Interceptor:
    """Adapts the calls it sees, and remembers them for checks and error messages."""

    def __init__(self, recipe: Recipe, module: Any, init: bool):
        self.recipe, self.root = recipe, tuple(module.scope.path)
        self.visited: dict[tuple[str, str], tuple[nn.Module, Site]] = {}
        self._init = init
        self._run = next(_RUNS) if init else recipe.to_json()
        self._dropout = any(method.dropout for method in recipe.attached)
        self._running = [_Running()]
        module.scope.flags = module.scope.flags.copy({self.flag(module): self})

    @staticmethod
    def flag(module: Any) -> str:
        """The name under which a module's scope, and every scope below, holds its interceptor."""
        return f"adapters of {'/'.join(module.scope.path)}"

    def __hash__(self) -> int:
        """Differs from place to place of a run, but not from run to run of one recipe.

        By the hash of a scope's flags nn.jit finds an earlier trace: so it never takes up one of
        the base, of another recipe, of training in evaluation, or of another path.
        """
        running = self._running[-1]
        running.hashed += 1
        return hash((self._run, running.where, running.evaluation, running.hashed))

    def __call__(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, call = context.module, context.method_name
        names = None if module.scope is None else tuple(module.scope.path)
        if names is None or names[: len(self.root)] != self.root:
            return run(*args, **kwargs)
        evaluation: bool | None = True
        if self._dropout:
            evaluation = _evaluation_flag(module, context.orig_method.func, args, kwargs)
        if evaluation is None:
            evaluation = self._running[-1].evaluation
        # A method that calls its parent class's method of the same name is one call, not two.
        reentrant = any((names, call) == running.where for running in self._running)
        self._running.append(_Running((names, call), evaluation))
        try:
            y = run(*args, **kwargs)
        finally:
            self._running.pop()
        if reentrant or call not in contraction.calls(type(module)):
            return y
        path = "/".join(names[len(self.root) :])
        return self._adapted(module, path, call, args, kwargs, y, evaluation)

    def _adapted(
        self,
        module: Any,
        path: str,
        call: str,
        args: Any,
        kwargs: Any,
        y: Any,
        evaluation: bool | None,
    ) -> Any:
        """The output after every method that targets the module and fits it."""
        site = _site(module, path, call, args, kwargs, y)
        if self._init and all(seen != path for seen, _ in self.visited):
            self._refuse_taken_names(module, site)
        self.visited[path, call] = (module, site)
        for method in self.recipe.at(path):
            if method.fits(site):
                x = contraction.input_of(module, call, args, kwargs)
                scope = module.scope.push(method.slot, reuse=True)
                y = _run(module, scope, method, site, x, y, evaluation)
        return y

    def _refuse_taken_names(self, module: Any, site: Site) -> None:
        """Raises where the base already has something of the name that a method would use."""
        for method in self.recipe.at(site.path):
            taken = module.scope.get_variable("params", method.slot)
            leaves = flatten(taken) if isinstance(taken, Mapping) else {}
            mistakable = any(name in leaves for name in method.leaf_names)
            if taken is not None and (method.fits(site) or mistakable):
                raise RecipeError(
                    f"{type(method).__name__} keeps its parameters in "
                    f"{join(site.path, method.slot)}, but the base has something of that name "
                    "there; rename it or do not target it"
                )

    def check(self, params: Tree) -> None:
        """Raises TargetError for a pattern that meets nothing its method can attach to."""
        modules = {path: module for (path, _), (module, _) in self.visited.items()}
        for method in self.recipe.attached:
            usable = {path for (path, _), (_, site) in self.visited.items() if method.fits(site)}
            unusable = {p: method.why_not(m) for p, m in modules.items() if p not in usable}
            require_sites(method, sorted(usable), unusable)
        require_match("Unfreeze", self.recipe.unfrozen, flatten(params))


class Adapted(nn.Module):
    """A linen module with adapters: the same calls, the base's parameters and the adapters' leaves.

    Made by `adapt`, which also gives it the base's methods and fields.
    """

    inner: nn.Module
    recipe: Recipe

    def setup(self) -> None:
        """Lets the base keep the scope, and so its paths."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with the adapters in place."""
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
        interceptor = inner.scope.flags.get(_Interceptor.flag(inner))
        if interceptor is None or interceptor.recipe != self.recipe:
            interceptor = _Interceptor(self.recipe, inner, init)
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


def sites(
    model: Adapted, /, *args: Any, **kwargs: Any
) -> tuple[dict[tuple[str, str], tuple[Attached, Site]], Tree]:
    """Where the recipe attaches, by an abstract run of the model.

    Args:
        model: an adapted linen module.
        *args: example inputs; only shapes matter.
        **kwargs: further arguments of the model's `__call__`.

    Returns:
        The method and site of every `(module path, slot)`, and all parameters, abstract.

    Raises:
        TargetError: a pattern meets nothing, or nothing its method can attach to.
        ValueError: the example inputs do not fit the model.
    """
    interceptors: list[_Interceptor] = []

    def run(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        interceptors.append(_Interceptor(model.recipe, module, init=True))
        with nn.intercept_methods(interceptors[-1]):
            return module(*inputs, **options)  # type: ignore[operator]

    def init(key: PRNGKeyArray) -> Tree:
        inputs, options = filled((args, kwargs))
        variables = model.inner.init(key, *inputs, method=run, **options)
        return nn.meta.unbox(variables.get("params", {}))

    with explained(model.inner, (*args, *kwargs.values())):
        params = jax.eval_shape(init, jax.random.key(0))
    (interceptor,) = interceptors
    interceptor.check(params)
    found = {
        (path, method.slot): (method, site)
        for (path, _), (_, site) in interceptor.visited.items()
        for method in model.recipe.at(path)
        if method.fits(site)
    }
    return found, params


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
        The base's tree with the adapters' leaves beside its own; abstract where `params` is.

    Raises:
        TargetError: a pattern of the recipe meets nothing, or nothing its method can attach to.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        ValueError: the example inputs do not fit the model.

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
    found, whole = sites(model, *args, **kwargs)
    compare_trees(
        "params",
        flatten(without_adapters(shapes_of(params), model.recipe)),
        flatten(without_adapters(whole, model.recipe)),
        "Pass the base's own parameter tree, variables['params'], of this very model.",
    )
    shapes = {path: leaf.shape for path, leaf in flatten(whole).items()}

    def grow(key: PRNGKeyArray) -> dict[str, Array]:
        return {
            path: leaf.init(base.key_at(key, path), shapes[path])
            for (module, slot), (method, site) in found.items()
            for name, leaf in method.leaves(site).items()
            if (path := join(module, slot, name))
        }

    grown = jax.eval_shape(grow, key) if is_abstract(params) else grow(key)
    return merge_trees(without_adapters(params, model.recipe), unflatten(grown))


class Bottleneck(nn.Module):
    """A bottleneck adapter to write into a model by hand: `x + up(f(down(x)))`.

    Args: as in `adapters_jax.Bottleneck`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> adapter = Bottleneck(64)
        >>> params = adapter.init(jax.random.key(0), jnp.ones((2, 768)))["params"]
        >>> jax.tree.map(jnp.shape, params["down"])
        {'bias': (64,), 'kernel': (768, 64)}

    Reference: Houlsby et al. 2019, arXiv:1902.00751.
    """

    bottleneck_dim: int
    scale: float = 1.0
    activation: str = "gelu"
    dropout: float = 0.0
    init_std: float = 1e-2

    @nn.compact
    def __call__(
        self, x: Float[Array, "... d"], y: Array | None = None, deterministic: bool | None = None
    ) -> Float[Array, "... d"]:
        """The adapter on x; or, given the output y of a sublayer of x, beside that sublayer.

        Args:
            x: (..., d).
            y: (..., d), for the parallel form.
            deterministic: no dropout; by default there is dropout where a "dropout" key is given.
        """
        method = methods.Bottleneck(
            "**",
            self.bottleneck_dim,
            placement="sequential" if y is None else "parallel",
            scale=self.scale,
            activation=self.activation,
            dropout=self.dropout,
            init_std=self.init_std,
        )
        y = x if y is None else y
        site = Site("/".join(self.path), "__call__", x.shape[-1])
        return _run(self, self.scope, method, site, x, y, deterministic)


class LoRADense(nn.Dense):
    """A dense layer with low-rank factors, to write into a model by hand.

    Its parameters are `kernel` and `bias` as in `nn.Dense`, and `lora/a` and `lora/b`.

    Args: as in `nn.Dense` and `adapters_jax.LoRA`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = LoRADense(3, rank=2).init(jax.random.key(0), jnp.ones((1, 4)))["params"]
        >>> jax.tree.map(jnp.shape, params["lora"])
        {'a': (4, 2), 'b': (2, 3)}

    Reference: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    a_init: str = "gaussian"
    rank_stabilized: bool = False

    @nn.nowrap
    def method(self) -> methods.LoRA:
        """The configuration of the factors."""
        return methods.LoRA(
            "**", self.rank, self.alpha, self.dropout, self.a_init, self.rank_stabilized
        )

    def __call__(
        self, inputs: Float[Array, "... in"], deterministic: bool | None = None
    ) -> Float[Array, "... out"]:
        """The dense layer with its low-rank branch.

        Args:
            inputs: (..., in).
            deterministic: no dropout; by default there is dropout where a "dropout" key is given.
        """
        y = super().__call__(inputs)
        site = _site(self, "/".join(self.path), "__call__", (inputs,), {}, y)
        module: Any = self
        scope = module.scope.push("lora", reuse=True)
        return _run(self, scope, self.method(), site, inputs, y, deterministic)
