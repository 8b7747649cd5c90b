"""A frozen base in few bits: its weights as qwix's quantised arrays, with adapters on top.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. Only
weights are quantised: layers get them in floats, one at a time, and compute as before.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from adapters_jax.errors import UserError, check_choice, check_size, compare_trees, shortened, warn
from adapters_jax.linen import Adapted, reads_of, seen, shapes_of
from adapters_jax.nnx import (
    ADAPTERS,
    adapted_points,
    copy,
    float_again,
    modules_of,
    own_params,
    params_of,
    quantized_in_place,
    weights_of,
)
from adapters_jax.nnx.graph import frozen_leaves, original
from adapters_jax.placement import Placement
from adapters_jax.recipe import Recipe
from adapters_jax.targets import around, as_patterns, join, require_match, selects
from adapters_jax.trace.inputs import Inputs, explained
from adapters_jax.trees import Tree, check_params, flatten, unflatten, without_adapters
from adapters_jax.weights.axes import Axes, from_reads
from adapters_jax.weights.fingerprints import remember
from adapters_jax.weights.packed import tiles_of
from adapters_jax.weights.quantized import Quantized, is_quantized, opened, pack, unboxed

# By our name: the name in qwix, and the default block.
DTYPES: dict[str, tuple[Any, int | None]] = {
    "int8": (jnp.int8, None),
    "int4": (jnp.int4, 64),
    "nf4": ("nf4", 64),
}


def quantize(
    model: nn.Module | nnx.Module,
    params: Tree = None,
    /,
    *args: Any,
    dtype: str = "int8",
    block: int | None = None,
    targets: str | Iterable[str] = "**",
    **kwargs: Any,
) -> Any:
    """Quantises the weights of linear layers and embeddings; all else stays as it is.

    The result is a base like any other, and an adapter's file fits the quantised and the float
    base. A model by `adapt` (an empty recipe will do) and an NNX model hold a weight in floats only
    during one layer's call, and again for its gradient. `audit` reports how much is quantised.

    Args:
        model: a base, or an adapted model, whose adapters and unfrozen parameters stay in float;
            a function has to be adapted.
        params: linen only: the parameter tree; arrays or abstract.
        *args: example inputs; only their shapes matter. They show how each weight meets its
            input. In NNX they come after the model, and flax's own layers need none.
        dtype: "int8", "int4", or "nf4" (QLoRA's 4-bit numbers, the quantiles of a normal).
        block: the number of entries along a weight's inputs, or along an embedding's row, that
            share a scale; by default all of them in int8, and 64 in four bits.
        targets: patterns of the modules whose weights are quantised.
        **kwargs: further arguments of the model's call.

    Returns:
        linen: the tree for the same model, with `Quantized` leaves at the same paths. NNX: a model
        with `QuantizedParam` weights at the same paths. Layers get floats of the weight's dtype.

    Raises:
        UserError: an unknown dtype, a weight that is not float, or one that blocks do not divide.
        TargetError: a pattern matches no module with a weight.
        TypeError: `model` is not a linen or NNX module, or its parameters are missing or misplaced.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        MissingPackageError: qwix is not installed.

    Warns:
        AdapterWarning: NNX without inputs: weights of your own modules, whose use is not known,
            stay in float.

    Example:
        >>> import adapters_jax as aj
        >>> base = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
        >>> small = aj.quantize(base, dtype="int8")
        >>> small.kernel.get_raw_value().array.qvalue.dtype
        dtype('int8')
        >>> error = jnp.abs(small.kernel[...] - base.kernel[...]).max()
        >>> bool(error < 0.005 * jnp.abs(base.kernel[...]).max())
        True
    """
    check_choice("quantize", "dtype", dtype, DTYPES)
    if block is not None:
        check_size("quantize", "block", block)
    qtype, usual = DTYPES[dtype]
    plan = _Plan(qtype, usual if block is None else block, as_patterns(targets, "quantize"))
    if isinstance(model, nn.Module):
        return _linen(model, params, args, kwargs, plan)
    if isinstance(model, nnx.Module):
        given = args if params is None else (params, *args)
        return _nnx(model, plan, Inputs.of_call(given, kwargs) if given or kwargs else None)
    raise TypeError(
        f"quantize: expected a linen or NNX module, got {type(model).__name__}; of a function, "
        "quantise the tree once it has adapters: params = aj.quantize(adapted, params)"
    )


def dequantize(subject: Any) -> Any:
    """A quantised base in floats again.

    Args:
        subject: a linen parameter tree or an NNX model, adapted or not.

    Returns:
        A new tree or model with float weights, each of the dtype that it had before.

    Example:
        >>> import adapters_jax as aj
        >>> model = aj.quantize(nnx.Linear(64, 4, rngs=nnx.Rngs(0)), dtype="nf4")
        >>> type(aj.dequantize(model)).__name__, type(aj.dequantize(model).kernel).__name__
        ('Linear', 'Param')
    """
    if not isinstance(subject, nnx.Module):
        return jax.tree.map(
            lambda leaf: opened(leaf) if is_quantized(leaf) else leaf, subject, is_leaf=is_quantized
        )
    model = copy(subject)
    float_again(model)
    return model


@dataclass(frozen=True)
class _Plan:
    """How weights are quantised; all of them are checked before the first is."""

    qtype: Any
    block: int | None
    targets: tuple[str, ...]

    def chosen(
        self,
        weights: Mapping[str, Axes],
        others: Mapping[str, str],
        weight_at: Callable[[str], Any],
    ) -> dict[str, Axes]:
        """The roles of the axes of the weights to quantise, by path.

        Args:
            weights: those of all weights that can be quantised.
            others: the paths of modules and weights that cannot, each with the reason.
        """
        modules = {path.rpartition("/")[0] for path in weights}
        require_match("quantize", self.targets, [*modules, *weights], others)
        chosen = {
            path: axes
            for path, axes in weights.items()
            if selects(self.targets, path.rpartition("/")[0], path)
        }
        self._check({path: (axes, weight_at(path)) for path, axes in chosen.items()})
        return chosen

    def _check(self, weights: Mapping[str, tuple[Axes, Any]]) -> None:
        """Raises UserError for weights that are no floats, or that the blocks do not divide."""
        for path, (_, weight) in weights.items():
            if is_quantized(weight) or not jnp.issubdtype(weight.dtype, jnp.inexact):
                kind = "quantised already" if is_quantized(weight) else f"of {weight.dtype}"
                raise UserError(
                    f"quantize: {path} is {kind}, expected floats; leave it out of targets"
                )
        shared = {p: _shared(layer, weight.shape) for p, (layer, weight) in weights.items()}
        block = self.block or 1
        bad = [path for path, sizes in shared.items() if tiles_of(sizes, block) is None]
        if bad:
            raise UserError(_unfit(bad, weights[bad[0]][1].shape, shared, block))

    def apply(self, layer: Axes, box: Any) -> Quantized:
        """Quantises a weight."""
        spec = box.get_partition_spec() if isinstance(box, nn.Partitioned) else None
        weight = unboxed(box)
        shared = _shared(layer, weight.shape)
        tiles = shared if self.block is None else tiles_of(shared, self.block) or {}
        whole = tuple(i for i in range(len(weight.shape)) if tiles.get(i, 1) == 1)
        blocks = tuple((i, size) for i, size in tiles.items() if size > 1)
        how = functools.partial(pack, qtype=self.qtype, whole=whole, blocks=blocks)
        # A plan quantises bases that are nowhere in memory.
        abstract = isinstance(weight, jax.ShapeDtypeStruct)
        array = jax.eval_shape(how, weight) if abstract else how(jnp.asarray(weight))
        return Quantized(array, jnp.dtype(weight.dtype), spec)


def _shared(axes: Axes, shape: tuple[int, ...]) -> dict[int, int]:
    """The sizes of the axes along which scales are shared: a weight's inputs, a table's row."""
    # A product sums over its inputs, whose common scale can be taken out of the sum; a lookup takes
    # a row, which has its own scale.
    return {i: shape[i] for i in (axes.outputs if axes.lookup else axes.inputs)}


def _unfit(
    bad: Sequence[str], shape: tuple[int, ...], shared: Mapping[str, Mapping[int, int]], block: int
) -> str:
    """The message about weights that blocks do not divide."""
    path, *others = bad
    numbers = " x ".join(map(str, shared[path].values()))
    # 1 divides everything, so that there is always an answer.
    fits = next(n for n in range(block, 0, -1) if all(tiles_of(s, n) for s in shared.values()))
    more = f" (so do {len(others)} others, such as {others[0]})" if others else ""
    return (
        f"quantize: {path} has the shape {list(shape)}, and blocks of {block} do not divide the "
        f"{numbers} numbers that share scales{more}; write block={fits}, which divides all, or "
        f"leave it in float: targets=('**', '!{path.rpartition('/')[0]}')"
    )


def _linen(model: nn.Module, params: Tree, args: Any, kwargs: Any, plan: _Plan) -> Tree:
    check_params("quantize", params, "params = aj.quantize(model, params, *example_inputs)")
    adapted = isinstance(model, Adapted)
    base, recipe = (model.inner, model.recipe) if adapted else (model, Recipe())
    given = Inputs.of_call(args, kwargs)
    inputs = model.inputs(given) if isinstance(model, Adapted) else given
    interceptor, variables = seen(base, Recipe(), inputs)
    whole = variables.get("params", {})
    compare_trees(
        "params",
        flatten(without_adapters(shapes_of(params), recipe)),
        flatten(whole),
        "Pass the base's own parameter tree, variables['params'], of this very model.",
    )
    with explained(base, inputs):
        reads, _ = reads_of(base, variables, inputs)
    shapes = flatten(whole)
    weights = {
        path: from_reads(leaf.reads, len(shapes[path].shape))
        for path, leaf in reads.items()
        if len(shapes[path].shape) > 1
        and any(read.inputs for read in leaf.reads)
        and not recipe.keeps(path)
    }
    others = dict.fromkeys(interceptor.visited, "it has no weight that meets an input")
    others |= {path: "it is trained" for path in shapes if recipe.keeps(path)}
    flat = flatten(params)
    chosen = plan.chosen(weights, others, lambda path: unboxed(flat[path]))
    made: dict[str, Any] = {path: plan.apply(axes, flat[path]) for path, axes in chosen.items()}
    placed = model.placements_in(params) if isinstance(model, Adapted) else ()
    made |= _started(placed, flat, plan, chosen)
    small = unflatten(flat | made, params)
    for base in (flat, flatten(small)):  # an adapter fits the floats as well
        remember({path: x for path, x in base.items() if not recipe.keeps(path)})
    return small


def _nnx(model: nnx.Module, plan: _Plan, inputs: Inputs | None) -> nnx.Module:
    small = copy(model)
    modules, params = modules_of(small), params_of(small)
    trained = {path for path, x in params.items() if isinstance(x, ADAPTERS)}
    weights = {p: axes for p, axes in weights_of(small, inputs).items() if p not in trained}
    others = dict.fromkeys(modules, "it has no weight that is known; pass example inputs")
    others |= dict.fromkeys(params, "how the model uses it is not known; pass example inputs")
    others |= dict.fromkeys(trained, "it is trained")
    chosen = plan.chosen(weights, others, lambda path: params[path].get_raw_value())
    if inputs is None:
        _warn_of_unknown(model, plan.targets, weights, trained)
    raw = {path: variable.get_raw_value() for path, variable in params.items()}
    values = {path: plan.apply(axes, raw[path]) for path, axes in chosen.items()}
    values |= _started([each for _, each, _ in adapted_points(small)], raw, plan, chosen)
    for path in values.keys() - chosen.keys():  # of adapters
        params[path].set_raw_value(values.pop(path))
    quantized_in_place(small, values)
    for base in (model, small):  # an adapter fits the floats as well
        remember(frozen_leaves(base))
    return small


def _started(
    placed: Iterable[Placement], flat: Mapping[str, Any], plan: _Plan, chosen: Mapping[str, Axes]
) -> dict[str, Any]:
    """The leaves and quantised weights, by path, of starts that see both weights.

    Args:
        flat: all leaves of the model by path, the weights in floats.
        chosen: the roles of the axes of the weights to quantise.
    """
    made: dict[str, Any] = {}
    for each in [each for each in placed if each.method.from_weight == "changes"]:
        path, weight = each.weight_path, unboxed(flat[each.weight_path])

        def quantize(floats: Any, path: str = path, dtype: Any = weight.dtype) -> Quantized:
            return plan.apply(chosen[path], nn.meta.replace_boxed(flat[path], floats)).astype(dtype)

        how = quantize if path in chosen else None
        leaves = {name: unboxed(leaf) for name, leaf in each.leaves(flat).items()}
        leaves, stored = each.method.quantized(leaves, each.point(), weight, how)
        made |= {each.paths()[name]: leaf for name, leaf in leaves.items()}
        made |= {path: stored} if path in chosen else {}
    return made


def _warn_of_unknown(
    model: nnx.Module, targets: tuple[str, ...], weights: Mapping[str, Axes], trained: set[str]
) -> None:
    """Gives an AdapterWarning for targeted weights of modules that are not flax's own."""
    left = [
        weight
        for path, module in modules_of(model).items()
        if not original(type(module)).__module__.startswith("flax.")
        for name, x in own_params(module).items()
        if (weight := join(path, name)) not in weights
        and weight not in trained
        and not is_quantized(value := x.get_raw_value())
        and jnp.issubdtype(value.dtype, jnp.floating)
        # A stack of biases has two axes as well.
        and value.ndim > 1 + _layers(weight, weights)
        and selects(targets, path, weight)
    ]
    if left:
        warn(
            f"quantize: {original(type(model)).__name__} has weights in modules that are not "
            f"flax's, which stay in float: {shortened(', '.join(left))}; pass example inputs, "
            "which show how they are used: aj.quantize(model, *inputs)"
        )


def _layers(path: str, weights: Mapping[str, Axes]) -> int:
    """The number of layer axes in front of a parameter's own, by the known weights beside it."""
    found = [
        [len(axes.shared) for other, axes in weights.items() if other.startswith(f"{parent}/")]
        for parent in around(path)
    ]
    return max((min(counts) for counts in found if counts), default=0)
