"""The start of adapters in a linen model: where they are, and their first arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.errors import compare_trees
from adapters_jax.linen.adapted import Adapted
from adapters_jax.linen.points import points_of, shapes_of
from adapters_jax.methods import arrays
from adapters_jax.methods.base import started
from adapters_jax.methods.calibration import Calibration, inputs_for
from adapters_jax.placement import Placements
from adapters_jax.placement.patterns import check_loaded
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import Inputs, inputs_text, is_abstract
from adapters_jax.trees import (
    Tree,
    check_params,
    flatten,
    split_adapters,
    unflatten,
    without_adapters,
)
from adapters_jax.weights.fingerprints import remember
from adapters_jax.weights.quantized import is_quantized, unboxed


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
