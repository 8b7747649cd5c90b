"""Trees of parameters taken apart and put together: what trains, and what stays.

A partition is two trees without holes: `adapters` has the leaves that train and nothing else,
`base` the others, each under the path it has in the whole. Differentiating `adapters` alone is what
keeps gradients, optimiser state and a step's outputs as small as the adapters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx, traverse_util

from adapters_jax.methods import Method
from adapters_jax.methods.fields import check_number
from adapters_jax.quantized import is_quantized
from adapters_jax.recipe import Recipe
from adapters_jax.targets import matches, require_match

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """A nested mapping or NNX state as a flat one, `{"layer_0/query/kernel": leaf}`."""
    if isinstance(tree, nnx.State):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
        return {path_of(path): leaf for path, leaf in leaves}
    flat = traverse_util.flatten_dict(_plain(tree))
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`, with names as strings."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): x for path, x in flat.items()})


def _plain(tree: Tree) -> Any:
    """Nested mappings of any kind as plain dictionaries."""
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _where(tree: Tree, keep: Callable[[str], bool]) -> Tree:
    """The part of a nested mapping whose paths are kept."""
    flat = traverse_util.flatten_dict(_plain(tree))
    kept = {path: leaf for path, leaf in flat.items() if keep("/".join(map(str, path)))}
    return traverse_util.unflatten_dict(kept)


def partition(params: Tree, recipe: Recipe | Method) -> tuple[Tree, Tree]:
    """Takes a parameter tree apart by a recipe.

    Args:
        params: nested mapping of parameters, arrays or abstract; it is not changed.
        recipe: says what trains.

    Returns:
        `(adapters, base)`: the leaves that train, and the frozen ones.

    Example:
        >>> from adapters_jax import Unfreeze
        >>> partition({"head": {"bias": 1.0}, "body": {"bias": 2.0}}, Unfreeze("head/*"))
        ({'head': {'bias': 1.0}}, {'body': {'bias': 2.0}})
    """
    recipe = Recipe(recipe)
    return _where(params, recipe.trains), _where(params, lambda path: not recipe.trains(path))


def without_adapters(params: Tree, recipe: Recipe) -> Tree:
    """The tree that the base alone has: every leaf but those the recipe's methods added."""
    return _where(params, lambda path: recipe.owner(path) is None)


def merge_trees(*trees: Tree) -> Tree:
    """Puts parts of one tree together; the inverse of `partition`.

    Raises:
        ValueError: two parts have a leaf at one path, or one a leaf where the other has a subtree.

    Example:
        >>> merge_trees({"a": {"x": 1}}, {"a": {"y": 2}})
        {'a': {'x': 1, 'y': 2}}
    """
    whole: dict[tuple[Any, ...], Any] = {}
    twice: set[tuple[Any, ...]] = set()
    for tree in trees:
        part = traverse_util.flatten_dict(_plain(tree))
        twice |= part.keys() & whole.keys()
        whole.update(part)
    twice |= {path[:i] for path in whole for i in range(1, len(path)) if path[:i] in whole}
    if twice:
        places = sorted("/".join(map(str, path)) for path in twice)
        raise ValueError(f"merge_trees: more than one tree has something at {', '.join(places)}")
    return traverse_util.unflatten_dict(whole)


def join(*names: str) -> str:
    """Parts of a path joined by slashes; empty ones, such as a model's own path, vanish."""
    return "/".join(filter(None, names))


def path_of(key_path: tuple[Any, ...]) -> str:
    """A jax key path as names joined by slashes; the `value` of an NNX Variable is left out."""
    names = []
    for key in key_path:
        name = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        names.append(str(name))
    if isinstance(key_path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return "/".join(names)


def freeze_base(
    tx: optax.GradientTransformation,
    recipe: Recipe | Method,
    groups: Mapping[str, optax.GradientTransformation] | None = None,
) -> optax.GradientTransformation:
    """An optimiser that moves what the recipe trains and leaves the rest of the tree alone.

    It is `optax.multi_transform` with labels by path: `tx` for trained leaves, zero updates and no
    state for frozen ones. It takes a whole parameter tree, the trained part alone, or an NNX state.

    Args:
        tx: the optimiser of trained leaves.
        recipe: says what trains.
        groups: optimisers of their own for some trained leaves, by pattern of the parameter's path,
            first match wins: `{"**/lora/b": optax.adamw(2e-3)}`.

    Returns:
        A gradient transformation.

    Raises:
        TargetError: at `init`, where a group's pattern matches no trained leaf.

    Example:
        >>> import jax.numpy as jnp
        >>> from adapters_jax import Unfreeze
        >>> params = {"head": {"bias": jnp.ones(2)}, "body": {"bias": jnp.ones(2)}}
        >>> frozen = freeze_base(optax.sgd(0.5), Unfreeze("head/*"))
        >>> updates, _ = frozen.update(params, frozen.init(params), params)
        >>> float(updates["head"]["bias"][0]), float(updates["body"]["bias"][0])
        (-0.5, 0.0)
    """
    recipe, groups = Recipe(recipe), dict(groups or {})

    def label(key_path: tuple[Any, ...], _: Any) -> str:
        path = path_of(key_path)
        if not recipe.trains(path):
            return "base"
        group = next((pattern for pattern in groups if matches(pattern, path)), None)
        return "adapter" if group is None else f"group {group}"

    def labels(params: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(label, params)

    own = {f"group {pattern}": group_tx for pattern, group_tx in groups.items()}
    transform = optax.multi_transform({"adapter": tx, "base": optax.set_to_zero(), **own}, labels)

    def init(params: Tree) -> optax.OptState:
        paths = [path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(params)]
        require_match("freeze_base groups", tuple(groups), filter(recipe.trains, paths))
        return transform.init(params)

    return optax.GradientTransformationExtraArgs(init, transform.update)


def lora_plus(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    recipe: Recipe | Method,
    *,
    ratio: float = 16.0,
    **options: Any,
) -> optax.GradientTransformation:
    """LoRA+: B learns at a higher rate than A and all else.

    Args:
        optimizer: makes an optimiser of a learning rate, such as `optax.adamw`.
        learning_rate: of A and of everything else that trains; a number or a schedule.
        recipe: says what trains.
        ratio: the rate of B over that of A; 16 in the paper's code, larger than 1.
        **options: further arguments of the optimiser.

    Returns:
        `freeze_base` with a group for B.

    Raises:
        ValueError: the ratio is not a positive number.
        TargetError: at `init`, where there is no B.

    Example:
        >>> import jax.numpy as jnp
        >>> from adapters_jax import LoRA
        >>> params = {"query": {"lora": {"a": jnp.ones(1), "b": jnp.ones(1)}}}
        >>> tx = lora_plus(optax.sgd, 0.25, LoRA("query", 1), ratio=4.0)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> float(updates["query"]["lora"]["a"][0]), float(updates["query"]["lora"]["b"][0])
        (-0.25, -1.0)

    Reference: Hayou et al. 2024, arXiv:2402.12354.
    """
    check_number("lora_plus", "ratio", ratio)
    if callable(learning_rate):
        schedule = learning_rate
        faster: optax.ScalarOrSchedule = lambda step: ratio * schedule(step)  # noqa: E731
    else:
        faster = ratio * learning_rate
    groups = {"**/lora/b": optimizer(faster, **options)}
    return freeze_base(optimizer(learning_rate, **options), recipe, groups)
