"""Trees of other JAX libraries with LoRA as adapters of ours, merged, and for PEFT; and back."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.dtypes import canonicalize_dtype

from adapters_jax.errors import MismatchError, OtherBaseError, RecipeError, UserError, first_few
from adapters_jax.files.jax_lora.pairs import Flat, Pair, find_pairs, leaves_of, nested
from adapters_jax.files.patterns import pattern_of, shortest
from adapters_jax.methods import LoRA
from adapters_jax.nnx import AdapterParam, recipe_of
from adapters_jax.nnx.adapted import adapt_at, placements_of
from adapters_jax.placement import Placement, Placements, in_tree, named_node, own_leaves
from adapters_jax.recipe import Recipe
from adapters_jax.targets import selects
from adapters_jax.trees import Tree, adapter_leaves, flatten, unflatten, with_leaves
from adapters_jax.weights.factors import Factor
from adapters_jax.weights.quantized import is_quantized, unboxed

Alpha = float | Mapping[str, float] | None
# Hugging Face's modules in a layer, by the name of ours or of the module that fuses them.
_NAMES: dict[str, tuple[str, ...]] = {
    "q_einsum": ("self_attn.q_proj",),
    "kv_einsum": ("self_attn.k_proj", "self_attn.v_proj"),
    "qkv_einsum": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_vec_einsum": ("self_attn.o_proj",),
    "gating_einsum": ("mlp.gate_proj", "mlp.up_proj"),
    "linear": ("mlp.down_proj",),
    **{name: (f"self_attn.{name}",) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: (f"mlp.{name}",) for name in ("gate_proj", "up_proj", "down_proj")},
}
_LAYER = re.compile(r"(?:.*/)?layers?(?:[_/](\d+))?/(?:.+?/)?(\w+?)(?:/(?:w|kernel))?")


def from_jax_lora(
    tree: Any, base: Any = None, *, alpha: Alpha = None, rank_stabilized: bool = False
) -> Any:
    """An adapter of openpi, gemma, qwix, tunix, MaxText or flax.nnx as one of ours.

    These libraries keep LoRA's factors in the tree of parameters. Each leaf of the tree has to be a
    factor of a pair, or the base's: nothing is left out.

    Args:
        tree: their parameters: a nested mapping, an NNX state or model, or the directory of one
            that orbax wrote.
        base: None where the tree holds the base. Else its parameters as a tree, or the base as an
            NNX model, without LoRA.
        alpha: theirs, which the tree does not hold, or alphas by pattern of weight. gemma and
            flax.nnx have none.
        rank_stabilized: alpha is divided by the root of the rank, as in openpi with `rslora`.

    Returns:
        `(recipe, params)`: the recipe, and the base's parameters with our leaves beside them. For
        an NNX base the adapted model.

    Raises:
        AdapterMismatchError: half of a pair, a pair whose weight is absent or of another shape, two
            pairs for a weight, or other leaves with LoRA in their path; the message names them.
        OtherBaseError: the tree holds leaves that `base` does not have, or has with other values.
        UserError: there is no LoRA, or an alpha is missing, is not used, or is one of two.
        RecipeError: a rank exceeds the sizes of its weight.

    Example:
        >>> pair = {"w_lora_a": np.ones((6, 2)), "w_lora_b": np.ones((2, 3, 4))}
        >>> recipe, params = from_jax_lora({"q": {"w": np.ones((6, 3, 4)), **pair}}, alpha=4)
        >>> recipe.attached[0].targets, {k: x.shape for k, x in params["q"]["lora"].items()}
        (('q',), {'a': (6, 2), 'b': (2, 3, 4)})
    """
    pairs, leaves = _read("from_jax_lora", tree, base, alpha, rank_stabilized)
    recipe, placements = _placed(pairs, leaves)
    arrays: dict[str, Any] = {}
    for pair, placed in zip(pairs, placements, strict=True):
        arrays |= zip(placed.paths().values(), (x.array for x in pair.factors()), strict=True)
    if isinstance(base, nnx.Module):
        model = adapt_at(base, recipe, placements)
        nnx.update(model, with_leaves(nnx.state(model, AdapterParam), arrays))
        return model
    return recipe, nested({**leaves, **arrays}, tree, base)


def merge_jax_lora(
    tree: Any, base: Any = None, *, alpha: Alpha = None, rank_stabilized: bool = False
) -> Tree:
    """The base with the LoRA of openpi, gemma, qwix, tunix, MaxText or flax.nnx folded in.

    No model is needed. Sums are taken in float32, and cast once to the base's dtype.

    Args:
        tree, base, alpha, rank_stabilized: as in `from_jax_lora`.

    Returns:
        The base's parameters as a nested mapping, without any leaf of LoRA.

    Raises:
        RecipeError: a weight is quantised.
        UserError: as in `from_jax_lora`.

    Example:
        >>> tree = {"w": np.eye(2), "lora_a": np.ones((2, 1)), "lora_b": np.ones((1, 2))}
        >>> merge_jax_lora(tree, alpha=0.5)["w"].tolist()
        [[1.5, 0.5], [0.5, 1.5]]
    """
    pairs, leaves = _read("merge_jax_lora", tree, base, alpha, rank_stabilized)
    for pair in pairs:
        boxed, axes = leaves[pair.weight], pair.layout.axes
        if is_quantized(boxed):
            raise RecipeError(f"merge_jax_lora: {pair.weight} is quantised; give a float base")
        weight, (fan_in, fan_out, copies) = unboxed(boxed), axes.sizes(pair.shape)
        a, b = (each.array for each in pair.factors())
        a, b = a.reshape(copies, fan_in, -1), b.reshape(copies, -1, fan_out)
        # By default a TPU multiplies float32 in bfloat16.
        change = axes.from_matrix(jnp.matmul(a, b, precision="highest"), pair.shape)
        total = jnp.asarray(weight, jnp.float32) + pair.scale * change
        leaves[pair.weight] = nn.meta.replace_boxed(
            boxed, total.astype(canonicalize_dtype(weight.dtype))
        )
    return nested(leaves, tree, base)


def to_jax_lora(
    adapted: Any, like: Any, *, alpha: float | None = None, rank_stabilized: bool = False
) -> Any:
    """An adapter of ours in the names, shapes and scale of another JAX library's LoRA.

    Args:
        adapted: an adapted NNX model, or `(recipe, params)` with the whole tree of parameters.
        like: their LoRA for the same base and rank, which says names, shapes and dtypes: a tree,
            NNX state or model as they initialise it, with or without the base.
        alpha: theirs; None for the recipe's.
        rank_stabilized: as in `from_jax_lora`.

    Returns:
        `like` with the adapter in its pairs: the change of each weight is the same. The other pairs
        keep their A, and their B is zero.

    Raises:
        RecipeError: the adapter is more than LoRA, or changes a weight that has no pair in `like`.
        MismatchError: a pair of theirs cannot hold the factors, or has another rank.
        UserError: as in `from_jax_lora`, about `like`.

    Example:
        >>> ours = {"w": np.ones((3, 2)), "lora": {"a": np.ones((3, 1)), "b": np.ones((1, 2))}}
        >>> like = {"w_lora_a": np.zeros((3, 1)), "w_lora_b": np.zeros((1, 2))}
        >>> made = to_jax_lora((LoRA("**", rank=1, alpha=2), ours), like, alpha=1)
        >>> made["w_lora_b"].tolist()
        [[2.0, 2.0]]
    """
    if isinstance(adapted, nnx.Module):
        recipe, flat = recipe_of(adapted), flatten(nnx.state(adapted, nnx.Param))
        placements = placements_of(adapted)
    else:
        recipe, flat = adapter_leaves(adapted, "to_jax_lora")
        placements = in_tree(recipe, {path: tuple(x.shape) for path, x in flat.items()})
    if several := placements.several():
        raise RecipeError(
            f"to_jax_lora: {first_few(several)}, and a weight has one pair there; give the recipe "
            "of one name, recipe['...'], or sum the adapters with aj.combine"
        )
    alphas = []
    for method in recipe:
        if type(method) is not LoRA or method.slices or method.from_weight:
            raise RecipeError(
                f"to_jax_lora: the recipe has {method}, and their pairs are LoRA of whole weights "
                "on an unchanged base; merge the adapter instead"
            )
        alphas.append(method.rank if method.alpha is None else method.alpha)
    like = nnx.state(like, nnx.Param) if isinstance(like, nnx.Module) else like
    theirs, added = leaves_of(like), recipe.owners(flat)
    pairs, _ = find_pairs(theirs, {path: x for path, x in flat.items() if path not in added})
    given = {"**": alphas[0] if alpha is None else alpha}
    pairs = _with_alphas("to_jax_lora", pairs, given, rank_stabilized)
    ours = {each.weight_path: each for each in placements}
    if absent := sorted(ours.keys() - {pair.weight for pair in pairs}):
        raise RecipeError(
            f"to_jax_lora: like has no pairs for {first_few(absent)}, which the adapter changes"
        )
    made: dict[str, Any] = {}
    for pair in pairs:
        placed = ours.get(pair.weight)
        a, b = pair.arrays
        same = a, jnp.zeros(b.shape, canonicalize_dtype(b.dtype))
        made |= zip(pair.paths, _theirs(pair, placed, flat) if placed else same, strict=True)
    if isinstance(like, nnx.State):
        return with_leaves(like, made)
    return nested({**theirs, **made}, like)


def as_peft(
    tree: Any,
    base: Any = None,
    *,
    alpha: Alpha = None,
    rank_stabilized: bool = False,
    prefix: str = "model.",
    names: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Recipe, Tree, dict[str, str], Tree]:
    """LoRA of gemma, openpi, qwix or tunix by Hugging Face's names, for `save_peft`.

    Known are the projections of their Gemmas, Llamas and Qwens. Where their weight is several
    modules of Hugging Face's, each gets its part of B; stacked layers are unstacked. The pairs of
    openpi's heads are one pair of as many times their rank, with the same product.

    Args:
        tree, base, alpha, rank_stabilized: as in `from_jax_lora`.
        prefix: begins the names, before `layers`; "model.language_model." in models with images.
        names: further modules: the name of theirs, and those in a layer of Hugging Face's.

    Returns:
        `(recipe, adapters, names, base)`, the arguments of `save_peft` after the directory.

    Raises:
        UserError: as in `from_jax_lora`, or a pair belongs to no module that is known.

    Example:
        >>> pair = {"w_lora_a": np.ones((6, 2)), "w_lora_b": np.ones((2, 3, 4))}
        >>> tree = {"layers": {"0": {"attn": {"q_proj": {"w": np.ones((6, 3, 4)), **pair}}}}}
        >>> recipe, adapters, names, base = as_peft(tree, alpha=4)
        >>> list(names)
        ['model.layers.0.self_attn.q_proj']
    """
    pairs, _ = _read("as_peft", tree, base, alpha, rank_stabilized)
    paths, numbers, leaves, unknown = {}, list[tuple[str, int, float]](), dict[str, Any](), []
    for pair in pairs:
        layer, module = (_LAYER.fullmatch(pair.weight) or re.match("()()", "")).groups()  # type: ignore[union-attr]
        own = {**_NAMES, **(names or {})}.get(module, ())
        stacked = [0] if layer is None else []
        parts = [len(stacked)] if len(own) > 1 else []
        rest = len(pair.shape) - len(stacked) - len(parts)
        alike = all(pair.shape[axis] == len(own) for axis in parts)
        # Experts, too, have weights of such names, with an axis more.
        if not own or not alike or (rest != 2 and own[0].startswith("mlp.")):
            unknown.append(f"{pair.weight} {list(pair.shape)}")
            continue
        for index in np.ndindex(*(pair.shape[axis] for axis in (*stacked, *parts))):
            number = index[0] if stacked else layer
            name = f"{prefix}layers.{number}.{own[index[-1] if parts else 0]}"
            path = paths[name] = name.replace(".", "/")
            a, b = _matrices(pair, dict(zip((*stacked, *parts), index, strict=True)))
            leaves |= {f"{path}/lora/a": a, f"{path}/lora/b": b}
            root = math.sqrt(len(b)) if rank_stabilized else len(b)
            numbers.append((path, len(b), pair.scale * root))
    if unknown:
        raise UserError(
            f"as_peft: Hugging Face's names of {first_few(unknown)} are not known; give them as in "
            "names={'q_einsum': ('self_attn.q_proj',)}, or leave these pairs out of the tree"
        )
    sizes = {p: (len(leaves[f"{p}/lora/a"]), leaves[f"{p}/lora/b"].shape[1]) for p, *_ in numbers}
    kernels = {f"{p}/kernel": jax.ShapeDtypeStruct(x, jnp.float32) for p, x in sizes.items()}
    most = {path: min(size) for path, size in sizes.items()}
    recipe = _recipe(numbers, sizes, rank_stabilized, most)
    return recipe, unflatten(leaves), paths, unflatten(kernels)


def _read(
    caller: str, tree: Any, base: Any, alpha: Alpha, rank_stabilized: bool
) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs in a tree, and the base's leaves by path."""
    own = {} if base is None else leaves_of(base)
    pairs, rest = find_pairs(leaves_of(tree), own)
    given = alpha if isinstance(alpha, Mapping) else {"**": alpha}
    pairs = _with_alphas(caller, pairs, given, rank_stabilized)
    used = {p for pair in pairs if not pair.unscaled for p in given if _named(p, pair.weight)}
    if idle := [p for p, number in given.items() if number is not None and p not in used]:
        raise UserError(
            f"{caller}: alpha={given[idle[0]]} for {idle[0]!r} is that of no pair, since gemma, "
            "flax.nnx and openpi's feed-forwards add their products as they are; leave it out"
        )
    if base is None:
        return pairs, rest
    if other := [path for path, x in rest.items() if path not in own or not _same(x, own[path])]:
        raise OtherBaseError(
            f"{caller}: the tree holds {first_few(other)}, which the base lacks or has with other "
            "values; leave out the base if the tree's own is meant, else leave these out"
        )
    return pairs, own


def _same(leaf: Any, own: Any) -> bool:
    """Whether a leaf is the base's; of abstract ones, whether their shapes are."""
    one, two = unboxed(leaf), unboxed(own)
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in (one, two))
    return one.shape == two.shape and (abstract or np.array_equal(one, two))


def _named(pattern: str, weight: str) -> bool:
    return selects((pattern,), weight.rpartition("/")[0], weight)


def _with_alphas(
    caller: str, pairs: Sequence[Pair], given: Mapping[str, Any], rank_stabilized: bool
) -> list[Pair]:
    """The pairs with their alphas, given by pattern; None where there is none."""
    made = []
    for pair in pairs:
        found = {x for p, x in given.items() if _named(p, pair.weight)} - {None}
        if pair.unscaled:
            found = {math.sqrt(pair.rank) if rank_stabilized else pair.rank}
        if len(found) != 1:
            raise UserError(
                f"{caller}: {pair.weight} has {'two alphas' if found else 'no alpha'} "
                f"{sorted(found) or ''}, and their tree does not hold it; write the one of their "
                "configuration, such as alpha=16"
            )
        alpha = float(*found)
        made.append(replace(pair, alpha=alpha, rank_stabilized=rank_stabilized))
    return made


def _placed(pairs: Sequence[Pair], leaves: Flat) -> tuple[Recipe, Placements]:
    """The recipe of the pairs, and where they are."""
    owned = own_leaves({path: tuple(unboxed(leaf).shape) for path, leaf in leaves.items()})
    names = [pair.weight.rpartition("/")[::2] for pair in pairs]
    targets = [
        module if module and sum(len(x) > 1 for x in owned[module].values()) == 1 else pair.weight
        for pair, (module, _) in zip(pairs, names, strict=True)
    ]
    numbers = [(t, pair.rank, pair.alpha) for t, pair in zip(targets, pairs, strict=True)]
    most = {
        target: min(pair.layout.axes.sizes(pair.shape)[:2])
        for target, pair in zip(targets, pairs, strict=True)
    }
    recipe = _recipe(numbers, [*owned, *leaves], pairs[0].rank_stabilized, most)
    placed = (
        Placement(recipe.attached[0], target, module, "", name, pair.shape, pair.layout.axes)
        for target, pair, (module, name) in zip(targets, pairs, names, strict=True)
    )
    return recipe, Placements(named_node(each, owned[each.module]) for each in placed)


def _recipe(
    numbers: Sequence[tuple[str, int, float]],
    among: Iterable[str],
    rank_stabilized: bool,
    most: Mapping[str, int],
) -> Recipe:
    """One LoRA for targets with a rank and an alpha each; `most` is each one's min(in, out)."""
    ranks, alphas = {t: rank for t, rank, _ in numbers}, {t: alpha for t, _, alpha in numbers}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    lora = LoRA(
        shortest(ranks, among),
        rank=rank,
        alpha=alpha,
        rank_stabilized=rank_stabilized,
        rank_pattern=pattern_of(ranks, rank, [t for t, r, _ in numbers if r > most[t]]),
        alpha_pattern=pattern_of(alphas, alpha),
    )
    return Recipe(lora)


def _at(factor: Factor, axis: int, index: int) -> Factor:
    """A factor at one index of an axis that it may have."""
    if axis not in factor.axes:
        return factor
    place = factor.axes.index(axis)
    left = (*factor.axes[:place], *factor.axes[place + 1 :])
    return Factor(jnp.take(factor.array, index, axis=place), left)


def _matrices(pair: Pair, taken: Mapping[int, int]) -> tuple[jax.Array, jax.Array]:
    """A (in, r) and B (r, out) of a part of a weight: of one index of some of its axes."""
    a, b = pair.factors()
    for axis, index in taken.items():
        a, b = _at(a, axis, index), _at(b, axis, index)
    heads, outputs = (
        [i for i in axes if i not in taken]
        for axes in (pair.layout.axes.shared, pair.layout.axes.outputs)
    )
    n, order = math.prod(pair.shape[i] for i in heads), [*heads, *outputs]
    rows = a.array.reshape(n, -1, pair.rank).transpose(1, 0, 2)
    # The pair of a head changes its outputs alone.
    columns = b.array.reshape(n, pair.rank, 1, -1) * jnp.eye(n)[:, None, :, None]
    columns = columns.reshape(n * pair.rank, *(pair.shape[i] for i in order))
    columns = columns.transpose(0, *(1 + order.index(i) for i in sorted(order)))
    return rows.reshape(len(rows), -1), columns.reshape(len(columns), -1)


def _theirs(pair: Pair, placed: Placement, flat: Flat) -> tuple[jax.Array, ...]:
    """Our factors in the shapes of a pair of theirs; raises MismatchError where they do not fit."""
    layout, ours = pair.layout, placed.point().axes
    a, b = (jnp.asarray(unboxed(flat[path]), jnp.float32) for path in placed.paths().values())
    if a.shape[-1] != pair.rank:
        raise MismatchError(
            f"to_jax_lora: {pair.weight} has rank {a.shape[-1]}, and {pair.rank} in like"
        )
    ratio = placed.method.scale_at(placed.path) / pair.scale
    factors = Factor(a, ours.a), Factor(b if ratio == 1 else ratio * b, ours.b)
    theirs = [[i for group in groups for i in group] for groups in (layout.a(), layout.b())]
    made = []
    for factor, axes, others, like in zip(factors, theirs, theirs[::-1], pair.arrays, strict=True):
        # An axis that only one of our factors has may be in both of theirs: the other repeats.
        repeated = set(axes) - set(factor.axes)
        if set(factor.axes) - set(axes) or repeated - set(others):
            raise MismatchError(
                f"to_jax_lora: our factors of {pair.weight} have the axes {ours.text}, and theirs "
                f"{layout.axes.text} (inputs>outputs), which cannot hold them; merge the adapter"
            )
        for axis in repeated:
            n = pair.shape[axis]
            array = factor.array / n if axis in layout.summed else factor.array
            factor = Factor(jnp.broadcast_to(array, (n, *array.shape)), (axis, *factor.axes))
        array = factor.array.transpose(factor.at(axes)).reshape(like.shape)
        made.append(array.astype(canonicalize_dtype(like.dtype)))
    return tuple(made)
