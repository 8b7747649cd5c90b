"""A frozen base in few bits: its weights as qwix's quantised arrays, with adapters on top.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv:2305.14314. Only
weights are quantised: layers get them in floats, one at a time, and compute as ever.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from adapters_jax.checks import check_choice, check_size
from adapters_jax.errors import UserError, compare_trees
from adapters_jax.linen import Adapted, seen, shapes_of
from adapters_jax.nnx import AdapterParam, copy, float_again, modules_of, quantized_in_place
from adapters_jax.recipe import Recipe
from adapters_jax.targets import as_patterns, require_match, selects
from adapters_jax.trees import Tree, flatten, join, unflatten, without_adapters
from adapters_jax.weights import linear
from adapters_jax.weights.contraction import Contraction
from adapters_jax.weights.quantized import Quantized, is_quantized, opened, pack, unboxed

# What qwix calls them, and the block that is used where none is given.
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

    `adapt` and all that follows take the result as any other base, and an adapter's file fits both.
    A model by `adapt` (an empty recipe will do), and an NNX model, have a weight in floats for the
    time of one layer's call, and again for its gradient. `audit` says how much is quantised.

    Args:
        model: a base, or an adapted model, whose adapters and unfrozen parameters stay in float.
        params: linen only: the parameter tree; arrays or abstract.
        *args: linen only: example inputs, of which only shapes matter; they tell how each weight
            meets its input.
        dtype: "int8", "int4", or "nf4" (the 4-bit numbers of QLoRA, even in a normal's quantiles).
        block: how many numbers along a weight's inputs, or along an embedding's row, share a scale.
            By default all of them in int8, and 64 in four bits.
        targets: patterns of the modules whose weights are quantised.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen: the tree, with `Quantized` leaves at the same paths, which the same model takes. NNX:
        a model with `QuantizedParam` weights at the same paths. Layers get floats of the dtype that
        the weight had.

    Raises:
        ValueError: an unknown dtype, a weight that is not float, or one that blocks do not divide.
        TargetError: a pattern meets no module with a weight.
        MismatchError: `params` is not the tree of this model; every difference is listed.
        ImportError: qwix is not installed.

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
        if params is not None or args or kwargs:
            raise TypeError("quantize: an NNX model holds its parameters; pass the model alone")
        return _nnx(model, plan)
    raise TypeError(f"quantize wants a linen or NNX module, got {type(model).__name__}")


def dequantize(subject: Any) -> Any:
    """The float base that a quantised one stands for.

    Args:
        subject: a linen parameter tree or an NNX model, adapted or not.

    Returns:
        The same with float weights, each of the dtype that it had before; a new one.

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
    """How weights are quantised; all are checked before any is."""

    qtype: Any
    block: int | None
    targets: tuple[str, ...]

    def chosen(
        self, layers: Mapping[str, Contraction | str], weight_at: Callable[[str], Any]
    ) -> dict[str, Contraction]:
        """How the weights that are quantised are contracted, by their paths.

        Args:
            layers: every module by path; where it has no weight to quantise, why.
            weight_at: the weight at a path.
        """
        known = {path: layer for path, layer in layers.items() if isinstance(layer, Contraction)}
        others = {path: why for path, why in layers.items() if isinstance(why, str)}
        require_match("quantize", self.targets, known, others)
        chosen = {
            join(path, layer.weight): layer
            for path, layer in known.items()
            if selects(self.targets, path)
        }
        self._check({place: (layer, weight_at(place)) for place, layer in chosen.items()})
        return chosen

    def _check(self, weights: Mapping[str, tuple[Contraction, Any]]) -> None:
        """Raises ValueError for weights that are no floats, or that the blocks do not divide."""
        for place, (_, weight) in weights.items():
            if is_quantized(weight) or not jnp.issubdtype(weight.dtype, jnp.inexact):
                kind = "quantised already" if is_quantized(weight) else f"of {weight.dtype}"
                raise UserError(
                    f"quantize: {place} is {kind}, expected floats; leave it out of targets"
                )
        shared = {p: _shared(layer, weight.shape) for p, (layer, weight) in weights.items()}
        block = self.block or 1
        bad = [place for place, sizes in shared.items() if _tiles(sizes, block) is None]
        if bad:
            raise UserError(_unfit(bad, weights[bad[0]][1].shape, shared, block))

    def apply(self, layer: Contraction, box: Any) -> Quantized:
        """A weight, quantised."""
        spec = box.get_partition_spec() if isinstance(box, nn.Partitioned) else None
        weight = unboxed(box)
        shared = _shared(layer, weight.shape)
        tiles = shared if self.block is None else _tiles(shared, self.block) or {}
        whole = tuple(i for i in range(len(weight.shape)) if tiles.get(i, 1) == 1)
        blocks = tuple((i, size) for i, size in tiles.items() if size > 1)
        how = functools.partial(pack, qtype=self.qtype, whole=whole, blocks=blocks)
        abstract = isinstance(weight, jax.ShapeDtypeStruct)
        array = jax.eval_shape(how, weight) if abstract else how(jnp.asarray(weight))
        return Quantized(array, jnp.dtype(weight.dtype), spec)


def _shared(layer: Contraction, shape: tuple[int, ...]) -> dict[int, int]:
    """The axes along which scales are shared, by size: a weight's inputs, a table's row."""
    stacked = len(shape) - layer.ndim
    axes = set(range(layer.ndim)) - set(layer.inputs) if layer.lookup else layer.inputs
    return {stacked + i: shape[stacked + i] for i in sorted(axes)}


def _tiles(sizes: Mapping[int, int], block: int) -> dict[int, int] | None:
    """How long a block of n numbers is along each axis, the last one first; None: it cannot.

    Example:
        >>> _tiles({0: 12, 1: 32}, 64), _tiles({0: 12, 1: 32}, 16), _tiles({0: 12}, 64)
        ({1: 32, 0: 2}, {1: 16, 0: 1}, None)
    """
    tiles = {}
    for axis, size in sorted(sizes.items(), reverse=True):
        tiles[axis] = math.gcd(block, size)
        if tiles[axis] < min(block, size):
            return None
        block //= tiles[axis]
    return tiles if block == 1 else None


def _unfit(
    bad: Sequence[str], shape: tuple[int, ...], shared: Mapping[str, Mapping[int, int]], block: int
) -> str:
    """The message about weights that blocks do not divide."""
    place, *others = bad
    numbers = " x ".join(map(str, shared[place].values()))
    fits = next(n for n in range(block, 0, -1) if all(_tiles(s, n) for s in shared.values()))
    more = f" (so do {len(others)} others, such as {others[0]})" if others else ""
    return (
        f"quantize: {place} has the shape {list(shape)}, and blocks of {block} do not divide the "
        f"{numbers} numbers that share scales{more}; write block={fits}, which divides all, or "
        f"leave it in float: targets=('**', '!{place.rpartition('/')[0]}')"
    )


def _linen(model: nn.Module, params: Tree, args: Any, kwargs: Any, plan: _Plan) -> Tree:
    if params is None:
        raise TypeError(
            "quantize: a linen model needs its parameters and example inputs; write "
            "params = aj.quantize(model, params, *example_inputs)"
        )
    adapted = isinstance(model, Adapted)
    base, recipe = (model.inner, model.recipe) if adapted else (model, Recipe())
    interceptor, whole = seen(base, Recipe(), args, kwargs)
    compare_trees(
        "params",
        flatten(without_adapters(shapes_of(params), recipe)),
        flatten(whole),
        "Pass the base's own parameter tree, variables['params'], of this very model.",
    )
    layers = {
        path: _layer(module, path, point.contraction, recipe.trains)
        for (path, _), (module, point) in interceptor.visited.items()
    }
    flat = flatten(params)
    chosen = plan.chosen(layers, lambda place: unboxed(flat[place]))
    return unflatten(flat | {p: plan.apply(layer, flat[p]) for p, layer in chosen.items()})


def _nnx(model: nnx.Module, plan: _Plan) -> nnx.Module:
    small = copy(model)
    modules = modules_of(small)

    def parameter(place: str) -> Any:
        path, _, name = place.rpartition("/")
        return getattr(modules[path], name)

    layers = {
        path: _layer(
            module,
            path,
            linear.find(module, "__call__"),
            lambda place: isinstance(parameter(place), AdapterParam),
        )
        for path, module in modules.items()
    }
    chosen = plan.chosen(layers, lambda place: parameter(place).get_raw_value())
    for place, layer in chosen.items():
        value = plan.apply(layer, parameter(place).get_raw_value())
        quantized_in_place(modules[place.rpartition("/")[0]], layer.weight, value)
    return small


def _layer(
    module: Any, path: str, layer: Contraction | None, trained: Callable[[str], bool]
) -> Contraction | str:
    """How a module contracts its weight; or why there is none to quantise."""
    if layer is None:
        return linear.why_not(module)
    return f"its {layer.weight} is trained" if trained(join(path, layer.weight)) else layer
