"""The linen API: a wrapper with the base's calls and paths, and the initial adapter leaves."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.errors import RecipeError, compare_trees, other_names
from adapters_jax.linen.cache import Cache, plain
from adapters_jax.linen.interceptor import Interceptor, evaluation_flag, grow_in
from adapters_jax.linen.points import points_of, shapes_of
from adapters_jax.linen.weights import changed_weights, leaf_methods
from adapters_jax.methods import arrays
from adapters_jax.methods.base import started
from adapters_jax.methods.calibration import Calibration, inputs_for
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.methods.mixed import Rows, by_rows, checked_rows, needs_rows
from adapters_jax.placement import Known, Placements
from adapters_jax.recipe import Recipe, check_loaded
from adapters_jax.trace.inputs import Inputs, inputs_text, is_abstract
from adapters_jax.trees import (
    Tree,
    check_params,
    flatten,
    join,
    leaves_by_path,
    merge_trees,
    split_adapters,
    unflatten,
    with_leaves,
    without_adapters,
)
from adapters_jax.weights.fingerprints import remember
from adapters_jax.weights.lazy import lowered, thin
from adapters_jax.weights.quantized import is_quantized, unboxed


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
            **kwargs: further arguments of the function, and flax's, such as `rngs`, `mutable`.

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
        with thin() as trace, self._weights(trace, unbound, args, kwargs):  # noqa: SIM117
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
            whole = with_shared(merge_trees(grown), found)
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
        if not _adapted_paths(self.recipe, frozenset(flatten(params))):
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
    def _weights(self, trace: Any, function: Any, args: Any, kwargs: Any) -> Iterator[None]:
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
        inner.scope._variables["params"] = changed_weights(own, placements, trace, key)
        try:
            yield
        finally:
            inner.scope._variables["params"] = own


@functools.lru_cache
def _adapted_paths(recipe: Recipe, paths: frozenset[str]) -> bool:
    """Whether parameters, if there are any, have leaves of a recipe that adds some."""
    return not (recipe.attached and paths) or any(map(recipe.owner, paths))


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


def adapt(model: nn.Module, recipe: Recipe) -> Adapted:
    """Gives a linen model adapters; `adapters_jax.adapt` calls it, and takes a method as well.

    Args:
        model: a linen module; it is not changed. One with adapters gets more.
        recipe: which modules get adapters, and what else trains.

    Returns:
        A module with the same methods, fields and parameter paths, whose adapter leaves
        `init_adapters` makes. Nothing runs yet, so patterns are checked there.

    Example:
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> model, x = adapt(nn.Dense(3), aj.Recipe(aj.LoRA("**", rank=2))), jnp.ones((1, 4))
        >>> jax.tree.map(jnp.shape, model.init(jax.random.key(0), x)["params"])
        {'bias': (3,), 'kernel': (4, 3), 'lora': {'a': (4, 2), 'b': (2, 3)}}
    """
    if isinstance(model, Adapted):
        return adapt(model.inner, model.recipe + recipe)
    wrapper = getattr(model, "adapted_class", None) or _adapted_class(type(model))  # type: ignore[arg-type]
    return wrapper(inner=model, recipe=recipe)


def points(
    model: Adapted, /, *args: Any, method: Any = None, **kwargs: Any
) -> tuple[Placements, Tree]:
    """Finds where the recipe's methods attach, by abstract runs of the model, which then knows it.

    Args:
        model: an adapted linen module.
        *args: example inputs, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.
        method: another function of the model than `__call__`, which takes the inputs.
        **kwargs: further arguments of that function.

    Returns:
        A placement for each method on each module or weight, with `method`, `module` and `path`,
        `prefix` (where its leaves are), `weight` and `axes`; and all parameters as shapes and
        dtypes, the adapters' in float32.

    Raises:
        TargetError: a pattern matches nothing that its method can attach to, the model's outputs do
            not depend on a target, or one method attaches to an attention twice.
        RecipeError: methods on one module exclude each other, or the base has a name of theirs.
        UserError: the model takes other arguments than the example inputs.

    Example:
        >>> import jax.numpy as jnp, adapters_jax as aj
        >>> model = aj.adapt(nn.Dense(3), aj.LoRA("**", rank=2))
        >>> (each,), params = points(model, jnp.ones((1, 4)))
        >>> each.prefix, each.weight, params["lora"]["b"]
        ('lora', 'kernel', ShapeDtypeStruct(shape=(2, 3), dtype=float32))
    """
    found, params = points_of(model.inner, model.recipe, Inputs.of_call(args, kwargs, method))
    model.adapter_placements.placements = found
    return found, params


def init_adapters(
    model: Adapted,
    params: Tree,
    key: PRNGKeyArray,
    /,
    *args: Any,
    method: Any = None,
    calibration: Calibration | None = None,
    **kwargs: Any,
) -> Tree:
    """Adds freshly initialised adapter leaves to the base's parameters.

    Args:
        model: an adapted linen module.
        params: the base's parameter tree, as pretrained; arrays of any dtype, or abstract. With the
            leaves of frozen entries, which stay as they are.
        key: seeds the adapters.
        *args: example inputs of the model, arrays or `jax.ShapeDtypeStruct`; only shapes matter.
            One `aj.inputs(...)` says all of them, and the method.
        method: a function of the model to run instead of `__call__`, its name or
            `lambda model, x: model.encode(x)`; it must use every target.
        calibration: what `aj.calibrate` saw, for methods that start from activations.
        **kwargs: further arguments of that function.

    Returns:
        The base's tree with the adapters' leaves beside its own; abstract where `params` is. PiSSA
        subtracts its factors from the weights, whose arrays are then new.

    Raises:
        TargetError: a pattern of the recipe matches nothing, or nothing its method can attach to.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        RecipeError: `params` hold nothing of a frozen entry.
        UserError: the model takes other arguments than the example inputs, `params` is no tree of
            parameters, or `key` no random key; or a method starts from activations, and the
            calibration is missing or of another model.
        TypeError: `model` is no adapted linen model, or `params` is None.

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
    call = "aj.init_adapters(model, params, key, *example_inputs)"
    if not isinstance(model, Adapted):
        fix = "an adapted linen model; write model = aj.adapt(base, recipe), then params = " + call
        if isinstance(model, nnx.Module):
            fix = "a linen model; an NNX model has its adapters from aj.adapt"
        raise TypeError(f"init_adapters: got {type(model).__name__}, expected {fix}")
    params = model.named(params)
    check_params("init_adapters", params, call)
    key = arrays.checked_key("init_adapters", key)
    given = shapes_of(without_adapters(params, model.recipe))
    loaded = {
        path: leaf
        for path, leaf in flatten(params).items()
        if (owner := model.recipe.owner(path)) and not owner.method.train
    }
    check_loaded("init_adapters", model.recipe, loaded)
    inputs = model.inputs(Inputs.of_call(args, kwargs, method))
    found, whole = points_of(model.inner, model.recipe, inputs, given)
    compare_trees(
        "params",
        flatten(given),
        flatten(without_adapters(whole, model.recipe)),
        "Pass the base's own parameter tree, variables['params'], of this very model, and example "
        f"inputs as it takes them (it ran on {inputs_text(inputs.args, inputs.kwargs)}). For "
        "parameters that __call__ does not use, give a function that does: "
        "init_adapters(..., method=...).",
    )
    model.adapter_placements.placements = found
    fresh = Placements(each for each in found if loaded.keys().isdisjoint(each.array_shapes))
    frozen = {p: x for each in found if each not in fresh for p, x in each.array_shapes.items()}
    compare_trees(
        "the frozen adapters in params",
        {path: unboxed(leaf) for path, leaf in loaded.items()},
        {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in frozen.items()},
        "Pass the params that aj.load_adapter returned, with the recipe that it was trained with.",
    )
    abstract = is_abstract(params)  # whoever asks for shapes has no activations
    seen = {} if abstract else inputs_for("init_adapters", fresh, calibration)
    params = grown(model.recipe, fresh, params, key, seen)
    params = unflatten({**flatten(params), **loaded}, params)
    remember(flatten(split_adapters(params, model.recipe)[1]))
    return params


def with_shared(params: Tree, placements: Placements) -> Tree:
    """Parameters with one of the copies that flax made of each shared array, in its own place."""
    flat = flatten(params)
    for each in placements:
        for name in each.method.shared_leaves:
            copy = flat.pop(join(each.prefix, name), None)
            if copy is not None:
                flat.setdefault(each.paths()[name], copy[(0,) * len(each.layers)])
    return unflatten(flat, params)


def grown(
    recipe: Recipe,
    placements: Placements,
    params: Tree,
    key: PRNGKeyArray,
    inputs: Mapping[str, Any] | None = None,
) -> Tree:
    """The base's parameters with freshly initialised arrays at all placements."""
    inputs = inputs or {}

    def grow(key: PRNGKeyArray, weights: Mapping[str, Array]) -> dict[str, Array]:
        grown = {}
        for each in placements:
            point, shapes, paths = each.point(), dict(each.arrays), each.paths()
            leaves = {
                name: leaf.init(arrays.key_at(key, paths[name]), shapes[name])
                for name, leaf in each.method.leaves(point).items()
            }
            if each.weight_path in weights:
                weight, seen = unboxed(weights[each.weight_path]), inputs.get(each.weight_path)
                leaves, grown[each.weight_path] = started(each.method, leaves, point, weight, seen)
            grown |= {paths[name]: leaf for name, leaf in leaves.items()}
        return grown

    own = flatten(without_adapters(params, recipe))
    changed = {p.weight_path for p in placements if p.method.from_weight or p.weight_path in inputs}
    weights = {path: own[path] for path in changed}
    grown = jax.eval_shape(grow, key, weights) if is_abstract(params) else grow(key, weights)
    rest = {path: grown.pop(path) for path in weights}
    boxed = {
        path: nn.meta.replace_boxed(own[path], leaf)
        for path, leaf in rest.items()
        if not is_quantized(own[path])
    }
    return unflatten({**own, **boxed, **grown}, params)
