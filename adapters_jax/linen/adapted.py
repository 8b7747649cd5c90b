"""The linen API: a wrapper with the calls and paths of its base."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import linen as nn

from adapters_jax.errors import RecipeError, other_names
from adapters_jax.linen.cache import Cache, plain
from adapters_jax.linen.interceptor import Interceptor, evaluation_flag, grow_in
from adapters_jax.linen.points import points_of, with_copies
from adapters_jax.linen.weights import changed_weights, leaf_methods
from adapters_jax.methods import Method
from adapters_jax.methods.invocation import call_gate
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.methods.mixed import Rows, by_rows, checked_rows, needs_rows
from adapters_jax.placement import Known, Placements
from adapters_jax.placement.patterns import check_loaded
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import Inputs
from adapters_jax.trees import (
    Tree,
    flatten,
    leaves_by_path,
    merge_trees,
    split_adapters,
    with_leaves,
)
from adapters_jax.weights.lazy import lowered, thin
from adapters_jax.weights.quantized import unboxed


class Adapted(nn.Module):
    """A linen module with adapters: the same calls, the base's parameters and the adapters' leaves.

    Made by `adapt`, which also gives it the base's methods and fields.

    Args:
        inner: the base.
        recipe: the recipe of its adapters.
        adapters_by_rows: whether it is a bank's model, whose calls need `adapters`.
        adapter_placements: where its adapters are, once `init_adapters`, `load_adapter` or `init`
            has found it; until then it is read off the shapes of the parameters.

    Raises:
        RecipeError: when it is called, the parameters have no adapters.
        UserError: when it is called, the leaves are those of a bank and `adapters` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> base, x = nn.Dense(3), jnp.ones((1, 4))
        >>> model = aj.adapt(base, aj.LoRA("**", rank=2))
        >>> isinstance(model, Adapted), model.features, model.inner is base
        (True, 3, True)
        >>> params = base.init(jax.random.key(0), x)["params"]
        >>> model.apply({"params": params}, x)
        Traceback (most recent call last):
        adapters_jax.errors.RecipeError: AdaptedDense: the parameters hold nothing of LoRA; ...
    """

    inner: nn.Module
    recipe: Recipe
    adapters_by_rows: bool = False  # of a bank, so that a call brings those of its rows
    adapter_placements: Known = dataclasses.field(default_factory=Known, repr=False)

    def setup(self) -> None:
        """Shares the scope with the base, whose parameters so keep their paths."""
        scope: Any = self.scope
        # flax has reserved the name of the field for a submodule. The base takes over this scope
        # instead, so that its paths are those of its checkpoints, and may have a part of that name.
        scope.reservations.pop("inner", None)
        nn.share_scope(self, self.inner)
        _with_paths(self.inner, scope.path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the base with its adapters."""
        return self._call(None, args, kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """What the base's `setup` makes, and its private functions, of a bound model."""
        if name.startswith("__") or self.__dict__.get("scope") is None:
            owner, instead = type(self).__name__, other_names().instead_of(name)
            raise AttributeError(f"{owner!r} object has no attribute {name!r}{instead}")
        self._try_setup()  # `bind` does not, and before it the base has no scope
        return getattr(Part(self, self.inner), name)

    @nn.nowrap
    def apply(
        self,
        variables: Tree,
        *args: Any,
        method: Any = None,
        adapters: Rows | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in flax; a function given as `method` gets the base, which runs with its adapters.

        Args:
            variables: the collections, "params" with the adapters' leaves, or a bank's parameters.
            *args: the inputs of the base.
            method: the function to run, a name or a function of the base; by default `__call__`.
            adapters: the adapter of each row, as `Bank.rows` gives them.
            **kwargs: further arguments of the function, and flax's, such as `rngs`, `mutable`; with
                `invoked` the tokens that an `ActivatedLoRA` acts on, as `aj.invoked` gives them.

        Returns:
            What the base returns, and with `mutable` the changed collections as well.
        """
        if adapters is not None:
            return self._by_rows(variables, args, method, adapters, kwargs)

        def run(self: Adapted, *args: Any, **kwargs: Any) -> Any:
            return self._call(method, args, kwargs)

        return super().apply(variables, *args, method=run, **kwargs)

    @nn.nowrap
    def _by_rows(
        self, variables: Tree, args: Any, method: Any, rows: Rows, kwargs: dict[str, Any]
    ) -> Any:
        """Applies the model to rows with an adapter each.

        Of the collections, a cache has rows; statistics and others are the same for all of them,
        also where an axis is as long as there are rows.
        """
        params, rngs = variables["params"], kwargs.pop("rngs", None)
        own, base = split_adapters(params, self.recipe)
        cache = Cache.of(variables.get("cache", {}), checked_rows(rows).total)

        def run(leaves: Any, inputs: Any, keys: Any) -> Any:
            cache, args, kwargs = inputs
            whole = {**variables, "params": merge_trees(with_leaves(own, leaves), base)}
            whole |= {"cache": cache.tree} if cache.tree else {}
            result = single.apply(whole, *args, method=method, rngs=keys, **kwargs)
            return cache.marking(result) if kwargs.get("mutable") else result

        single = self.clone(adapters_by_rows=False)
        mine = rows.within("", leaves_by_path(own))
        result = by_rows(run, mine, (cache, args, kwargs), rngs)
        return plain(result)

    def _call(self, method: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of the base, by name or as a function of the base."""
        inner: Any = self.inner
        gate, kwargs = call_gate(self.recipe.attached, kwargs)
        function = Inputs(args, kwargs, method).function(inner)
        if inner.scope is None:
            return function(*args, **kwargs)
        if self.adapters_by_rows:
            raise needs_rows(type(inner))
        init = self.is_initializing()
        if init:
            check_loaded("init", self.recipe)
        called = "__call__" if method is None else method
        unbound = getattr(type(inner), called) if isinstance(called, str) else called
        unbound = getattr(unbound, "__func__", unbound)
        with thin() as trace, self._weights(trace, unbound, args, kwargs, gate):  # noqa: SIM117
            with self._intercepted():
                y = lowered(function(*args, **kwargs))
        # While it initialises, the base runs without changed weights, whose arrays are not there
        # yet; how it reads them is then seen in another run.
        if init and method is None:
            own = flatten(inner.scope.variables().get("params", {}))
            given = Inputs(args, kwargs)
            found, _ = points_of(inner.clone(parent=None), self.recipe, given)
            self.adapter_placements.placements = found
            for each in found:
                if isinstance(each.method, LeafMethod) and each.weight_path in own:
                    grow_in(inner.scope.rewound(), each)
            grown = inner.scope._variables["params"]
            whole = with_copies(merge_trees(grown), found)
            for name, part in whole.items():  # under the base's own keys
                grown[name] = part
        if not any(map(_is_module, jax.tree.leaves(y))):
            return y  # the very tree, since jax would sort its dictionaries
        return jax.tree.map(lambda part: Part(self, part) if _is_module(part) else part, y)

    @nn.nowrap
    def _intercepted(self) -> AbstractContextManager[Any]:
        """Adapts the calls of submodules; changed weights without dropout need no look at them."""
        inner: Any = self.inner
        init, methods = self.is_initializing(), self.recipe.attached
        if not init and not any(m.acts_on != "weight" or m.dropout for m in methods):
            return contextlib.nullcontext()
        interceptor = inner.scope.flags.get(Interceptor.flag(inner))
        if interceptor is None or interceptor.recipe != self.recipe:
            interceptor = Interceptor(self.recipe, inner, init)
        return nn.intercept_methods(interceptor)

    @nn.nowrap
    def check_adapters(self, params: Tree) -> None:
        """Raises RecipeError where parameters have no adapters, as those of the base."""
        paths = flatten(params)
        if self.recipe.attached and paths and not any(map(self.recipe.owner, paths)):
            names = dict.fromkeys(type(method).__name__ for method in self.recipe.attached)
            raise RecipeError(
                f"{type(self).__name__}: the parameters hold nothing of {', '.join(names)}; pass "
                '{"params": params, ...} with the params that aj.init_adapters(model, params, key, '
                "*example_inputs) or aj.load_adapter returned, or call the base, model.inner"
            )

    @nn.nowrap
    def named(self, params: Any) -> Tree:
        """The base's parameters as a nested mapping of arrays by path, which those of linen are."""
        return params

    @nn.nowrap
    def restored(self, params: Tree) -> Any:
        """The inverse of `named`, of the base's parameters."""
        return params

    @nn.nowrap
    def inputs(self, given: Inputs) -> Inputs:
        """The example inputs to run on, where these are given."""
        return given

    @nn.nowrap
    def placements_in(self, params: Tree) -> Placements:
        """Where the adapters in parameters are.

        Args:
            params: the whole tree, arrays or abstract.

        Raises:
            MismatchError: an adapter lacks arrays, or fits no weight of its module.
        """
        shapes = {path: tuple(unboxed(leaf).shape) for path, leaf in flatten(params).items()}
        return self.adapter_placements.of(self.recipe, shapes)

    @nn.nowrap
    @contextlib.contextmanager
    def _weights(
        self, trace: Any, function: Any, args: Any, kwargs: Any, gate: Any
    ) -> Iterator[None]:
        """Gives the base its changed weights for the time of a call."""
        inner: Any = self.inner
        own = inner.scope.variables().get("params", {})
        if self.is_initializing():
            yield
            return
        self.check_adapters(own)
        key = None
        if any(method.dropout for method in leaf_methods(self.recipe)):
            evaluation = evaluation_flag(inner, function, args, kwargs)
            if self.has_rng("dropout"):
                key = inner.scope.rngs["dropout"].as_jax_rng()
            elif evaluation is False:
                inner.make_rng("dropout")  # raises, as flax's own dropout
        placements = self.placements_in(own)
        # `put_variable` would need a mutable collection. Submodules take their part of this one
        # when they are called, so they see the change, and nobody else does after the call.
        inner.scope._variables["params"] = changed_weights(own, placements, trace, key, gate)
        try:
            yield
        finally:
            inner.scope._variables["params"] = own


def _with_paths(module: Any, path: tuple[str, ...]) -> None:
    """Gives parts that are fields of a module, which flax moves to another scope, its path."""
    for part in module._state.children.values():
        if isinstance(part, nn.Module) and part.scope is not None:
            scope: Any = part.scope
            scope.path = (*path, scope.name)
            _with_paths(part, scope.path)


def _is_module(x: Any) -> bool:
    return isinstance(x, nn.Module)


class Part:
    """A submodule of a bound adapted model: its calls run with the model's adapters.

    It is what `bound.encoder` and `bound.get_encoder()` return, and has the submodule's attributes.
    """

    def __init__(self, model: Adapted, module: nn.Module):
        self._model, self._module = model, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the submodule with its adapters."""
        return self._model._call(lambda _, *a, **k: self._module(*a, **k), args, kwargs)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        def read(_: Any) -> Any:  # within a call, since `setup` may read weights
            return getattr(self._module, name)

        def call(_: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._module, name)(*args, **kwargs)

        value = self._model._call(read, (), {})
        if not inspect.ismethod(value):
            return value
        return lambda *args, **kwargs: self._model._call(call, args, kwargs)


@functools.cache
def _adapted_class(cls: type[nn.Module]) -> type[Adapted]:
    """`Adapted` with the public methods and the fields of one base class."""

    def forward(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def method(self: Adapted, *args: Any, **kwargs: Any) -> Any:
            return self._call(name, args, kwargs)

        del method.__wrapped__  # flax would take the signature of the base's function for ours
        return method

    def read(name: str) -> property:
        def value(self: Adapted) -> Any:
            bound = self.inner.scope is not None
            return getattr(Part(self, self.inner) if bound else self.inner, name)

        return property(value)

    own = set(dir(Adapted)) | set(Adapted.__dataclass_fields__)
    fields, names = set(cls.__dataclass_fields__) - own, set(dir(cls)) - own
    body: dict[str, Any] = {name: read(name) for name in fields}
    for name in names - fields:
        if not name.startswith("_"):
            method = inspect.isfunction(inspect.getattr_static(cls, name))
            body[name] = forward(name) if method else read(name)
    return type(f"Adapted{cls.__name__}", (Adapted,), {**body, "__module__": cls.__module__})


def adapt(model: nn.Module, recipe: Recipe | Method | Sequence[Method]) -> Adapted:
    """Gives a linen model adapters; `adapters_jax.adapt` calls it.

    Args:
        model: a linen module; it is not changed. One with adapters gets more.
        recipe: which modules get adapters, and what else trains: a recipe, or methods.

    Returns:
        A module with the same methods, fields and parameter paths, whose adapter leaves
        `init_adapters` makes. Nothing runs yet, so patterns are checked there.

    Example:
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> model, x = adapt(nn.Dense(3), aj.LoRA("**", rank=2)), jnp.ones((1, 4))
        >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0), x)["params"])
        {'bias': (3,), 'kernel': (4, 3), 'lora': {'a': (4, 2), 'b': (2, 3)}}
    """
    # A recipe is taken as it is: `beyond` leaves entries whose members the model has.
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(recipe)
    if isinstance(model, Adapted):
        return adapt(model.inner, model.recipe + recipe)
    wrapper = getattr(model, "adapted_class", None) or _adapted_class(type(model))  # type: ignore[arg-type]
    return wrapper(inner=model, recipe=recipe)
