"""A function of parameters, `fn(params, *inputs)`, as a model whose parameters are given by path.

The parameters are any pytree. Its arrays are a nested dictionary by their names in the tree, so
that adapters live beside them as in a linen model, and whatever takes a linen model takes the
function. The function itself gets its own tree, with changed arrays.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from adapters_jax.errors import TargetError, UserError, first_few, shortened
from adapters_jax.linen import Adapted, points
from adapters_jax.linen.functions.attention import Attending, attentions_of
from adapters_jax.linen.functions.modules import Front, attached, fronts_of, is_equinox
from adapters_jax.methods.mixed import Rows
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around, selects
from adapters_jax.trace.inputs import Inputs, filled, inputs_text, is_array
from adapters_jax.trace.program import reaching
from adapters_jax.trees import Tree, flatten, unflatten

# Arguments of a call that are not the function's.
_OWN = ("adapters", "rngs", "method", "mutable", "capture_intermediates")


def names_of(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree, each with its name: keys, fields and positions joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    # A tree that is one array has no names.
    return [(jax.tree_util.keystr(p, simple=True, separator="/") or "w", x) for p, x in leaves]


def arrays_of(tree: Any) -> Tree:
    """The arrays in a pytree as a nested dictionary by their names."""
    return unflatten({path: x for path, x in names_of(tree) if is_array(x)})


class Signature:
    """How a function is called: how its parameters are nested, and its example inputs.

    Args:
        tree: the parameters, arrays or `jax.ShapeDtypeStruct` in any pytree.
        fronts: what knows the modules in it; without one, all leaves have to be arrays.

    Attributes:
        example: the example inputs, whose arrays are shapes and dtypes.
        shapes: the arrays of the tree by name, as shapes and dtypes.
        attentions: its attentions, once they were asked for.

    Raises:
        UserError: a leaf is no array, two arrays have one name, or there is no array.

    Example:
        >>> params = [{"w": jnp.ones((4, 3))}, {"w": jnp.ones((3, 2))}]
        >>> signature = Signature(params, Inputs((), {}))
        >>> signature.shapes["1/w"]
        ShapeDtypeStruct(shape=(3, 2), dtype=float32)
        >>> signature.tree({"0": {"w": 1}, "1": {"w": 2}})
        [{'w': 1}, {'w': 2}]
    """

    def __init__(self, tree: Any, example: Inputs, fronts: Sequence[Front] = ()):
        self.example, self.fronts = example.shapes(), fronts
        self.attentions: list[Attending] | None = None
        self._definition: Any = jax.tree.structure(tree)
        leaves = names_of(tree)
        self._others = {path: x for path, x in leaves if not is_array(x)}
        self._static = {path: x for front in fronts for path, x in front.static(tree).items()}
        self._paths = [path for path, _ in leaves]
        arrays = {path: x for path, x in leaves if path not in self._others}
        self.shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in arrays.items()}
        others = [f"{path} is {shortened(repr(x))}" for path, x in self._others.items()]
        if others and not any(front.keeps_others for front in fronts):
            raise UserError(
                f"adapt: in params, {first_few(others)}, expected arrays alone; write "
                "jnp.asarray(...) for a number, and let the function close over the rest"
            )
        if not arrays:
            raise UserError(
                "adapt: params holds no array, so there is nothing to adapt; pass the arrays that "
                "the function computes with as its first argument, fn(params, x), where it closes "
                "over them now"
            )
        if any(path.split("/")[0] == "params" for path in arrays):
            raise UserError(
                "adapt: params has 'params' at its top, which flax takes for a mistake; adapt what "
                "is below it, lambda p, x: fn({'params': p, **rest}, x), or put the whole into a "
                "list: aj.adapt(lambda p, x: fn(p[0], x), [params], recipe, ...)"
            )
        parents = {above for path in arrays for above in around(path)}
        twice = sorted({p for p in self._paths if self._paths.count(p) > 1} | (parents & {*arrays}))
        if twice:
            raise UserError(
                f"adapt: several parts of params have the path {first_few(twice)}; use keys "
                "without a slash, or rename one"
            )

    def __eq__(self, other: Any) -> bool:
        """Whether trees of both are nested alike; functions of such trees may then be equal."""
        same = isinstance(other, Signature) and self._definition == other._definition
        return same and (self.shapes, self._others) == (other.shapes, other._others)

    def __hash__(self) -> int:
        return hash(tuple(self._paths))

    def others(self, recipe: Recipe) -> str:
        """What targets of a recipe match that is no array, for a message; empty where none does."""
        named = [
            f"{path} is {shortened(repr(x), 60)}"
            for path, x in {**self._others, **self._static}.items()
            if any(selects(method.targets, path) for method in recipe)
        ]
        return f"No arrays, and so nothing to adapt: {first_few(named)}" if named else ""

    def tree(self, named: Tree) -> Any:
        """The tree with the arrays of a nested dictionary; what else is there, adapters, is not."""
        flat = flatten(named)
        leaves = [self._others[p] if p in self._others else flat[p] for p in self._paths]
        return jax.tree.unflatten(self._definition, leaves)


class Function(nn.Module):
    """A function of parameters as a linen module: its variables are the function's parameters."""

    adapted_class: ClassVar[Any] = None  # below, since each of the two names the other

    fn: Callable[..., Any]
    signature: Signature

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the parameters of this module's scope."""
        scope: Any = self.scope
        if self.is_initializing() and not scope.variables().get("params"):
            zeros = {p: jnp.zeros(x.shape, x.dtype) for p, x in self.signature.shapes.items()}
            for name, part in unflatten(zeros).items():
                scope.put_variable("params", name, part)
        params, signature = scope.variables()["params"], self.signature
        with attached(signature.fronts, self, signature.shapes, self._attentions) as call:
            return call(self.fn, signature.tree(params), params, args, kwargs)

    @nn.nowrap
    def _attentions(self) -> list[Attending]:
        """The attentions of the function, where it has no modules."""
        signature = self.signature
        if signature.attentions is None:
            signature.attentions = attentions_of(
                lambda named, *args, **kwargs: self.fn(signature.tree(named), *args, **kwargs),
                signature.shapes,
                signature.example,
            )
        return signature.attentions


class AdaptedFunction(Adapted):
    """A function with adapters: it takes the tree that `aj.init_adapters` makes in place of params.

    Made by `aj.adapt`. It is a linen module, so that everything that takes an adapted linen model
    takes it.

    Example:
        >>> import adapters_jax as aj
        >>> def predict(params, x):
        ...     return jnp.tanh(x @ params["in"]) @ params["out"]
        >>> params, x = {"in": jnp.ones((4, 3)), "out": jnp.ones((3, 2))}, jnp.ones((1, 4))
        >>> adapted = aj.adapt(predict, params, aj.LoRA("**", rank=2), example_inputs=(x,))
        >>> tree = aj.init_adapters(adapted, params, jax.random.key(0))
        >>> jax.tree.map(jnp.shape, tree["lora"])
        {'in': {'a': (4, 2), 'b': (2, 3)}, 'out': {'a': (3, 2), 'b': (2, 2)}}
        >>> bool((adapted(tree, x) == predict(params, x)).all())
        True
    """

    @nn.nowrap
    def __call__(
        self,
        params: Tree,
        *args: Any,
        adapters: Rows | None = None,
        rngs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the function with its adapters.

        Args:
            params: the tree of `aj.init_adapters`, of `TrainState.params`, or a bank's.
            *args: the inputs of the function.
            adapters: which adapter of a bank each row has, as `Bank.rows` gives it.
            rngs: `{"dropout": key}` for the adapters' dropout, in training; none in evaluation.
            **kwargs: further inputs of the function.
        """
        if not isinstance(params, Mapping):
            raise UserError(
                f"the first argument is a {type(params).__name__}, expected the tree that "
                "aj.init_adapters(adapted, params, key) or aj.load_adapter returned"
            )
        return self.apply({"params": params}, *args, adapters=adapters, rngs=rngs, **kwargs)

    @nn.nowrap
    def named(self, params: Any) -> Tree:
        """The arrays of the function's own parameters as a nested dictionary by their names."""
        return arrays_of(params)

    @nn.nowrap
    def restored(self, params: Tree) -> Any:
        """The function's own tree with the arrays of a nested dictionary."""
        return self.inner.signature.tree(params)

    @nn.nowrap
    def inputs(self, given: Inputs) -> Inputs:
        """The given inputs, or the example inputs of `aj.adapt` where there are none."""
        inputs = given if given.args or given.kwargs else self.inner.signature.example
        _check_call(self.inner.fn, inputs)
        return inputs


Function.adapted_class = AdaptedFunction


def is_function(model: Any) -> bool:
    """Whether a model is a function of parameters, or an Equinox module, which is one of itself."""
    flax = isinstance(model, nn.Module | nnx.Module)
    return callable(model) and not flax and not isinstance(model, type)


def function_of(model: Any, params: Any, inputs: Inputs) -> tuple[Function, Tree]:
    """A function as a linen module, and its parameters as a nested dictionary by their names.

    Args:
        model: `fn(params, *inputs)`, or an Equinox module.
        params: its parameters, arrays or `jax.ShapeDtypeStruct` in any pytree; None for a module.

    Raises:
        TypeError: it comes without its parameters.
        UserError: the function does not take the inputs, or the parameters are not all arrays.
    """
    if is_equinox(model) and params is None:
        model, params = type(model).__call__, model
    if params is None:
        raise TypeError(
            "a function needs its parameters; write aj.adapt(fn, params, recipe, "
            "example_inputs=(...)), or aj.load_adapter(directory, fn, params, *inputs)"
        )
    run = None
    if inputs.args or inputs.kwargs:
        _check_call(model, inputs)
        run = functools.partial(_run, model, params, inputs)
    base = Function(model, Signature(params, inputs, fronts_of(params, run)))
    return base, arrays_of(params)


def adapt(model: Any, params: Any, recipe: Recipe, example_inputs: Any) -> AdaptedFunction:
    """Gives a function adapters; `adapters_jax.adapt` calls it, and takes a method as well.

    Args:
        model, params: as in `function_of`.
        recipe: which arrays get adapters, by their paths in the tree, and what else trains.
        example_inputs: its further arguments; only their shapes and dtypes matter.

    Raises:
        TypeError: the parameters or the example inputs are missing.
        UserError: it does not take these arguments, or it reads none of the arrays in `params`.
        TargetError: a pattern matches nothing that its method can attach to.
    """
    inputs = Inputs.of(example_inputs)
    base, _ = function_of(model, params, inputs or Inputs((), {}))
    if inputs is None:
        raise TypeError(
            "adapt: a function needs example inputs, to see how it uses its parameters; write "
            "aj.adapt(fn, params, recipe, example_inputs=(x,)), for an Equinox module without "
            "params"
        )
    adapted = AdaptedFunction(inner=base, recipe=recipe)
    inputs = adapted.inputs(inputs)
    try:
        points(adapted, inputs)
    except TargetError as error:
        if not _reads(base):
            raise _unread(base) from error
        others = base.signature.others(recipe)
        raise TargetError(f"{error}\n{others}".strip()) from error
    if not (recipe.attached or _reads(base)):
        raise _unread(base)
    return adapted


def _check_call(fn: Callable[..., Any], inputs: Inputs) -> None:
    """Raises UserError where the function does not take its example inputs, or takes ours."""
    try:
        signature = inspect.signature(fn)
    except ValueError:  # of a function in C
        return
    taken = [name for name in _OWN if name in signature.parameters]
    if taken:
        raise UserError(
            f"adapt: the function has an argument {', '.join(taken)}, which calls of an adapted "
            "function have for themselves; rename it, as in lambda params, x, how: "
            f"fn(params, x, {taken[0]}=how)"
        )
    try:
        signature.bind(None, *inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise UserError(
            f"the function cannot be called with its parameters and the example inputs "
            f"({inputs_text(inputs.args, inputs.kwargs)}): {error}; give all its arguments after "
            "the parameters, as in aj.adapt(fn, params, recipe, example_inputs=(...))"
        ) from error


def _reads(base: Function) -> bool:
    """Whether what the function returns depends on any of its parameters."""
    signature = base.signature

    def run(named: Tree) -> list[Any]:
        params = signature.tree(named)
        y = signature.example.zeros().call(lambda *args, **kw: base.fn(params, *args, **kw))
        return [x for x in jax.tree.leaves(y) if is_array(x)]

    traced = jax.make_jaxpr(run)(unflatten(signature.shapes))
    return any(reaching(traced.jaxpr).inputs)


def _run(fn: Callable[..., Any], params: Any, inputs: Inputs) -> Any:
    """Calls a function on zeros."""
    return inputs.zeros().call(functools.partial(fn, filled(params)))


def _unread(base: Function) -> UserError:
    return UserError(
        f"adapt: what the function returns depends on none of the {len(base.signature.shapes)} "
        "arrays in params, so there is nothing to adapt; it may close over others: let it take "
        "them as its first argument, fn(params, x)"
    )
