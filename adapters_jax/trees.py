"""Splits trees of parameters into what trains and what is frozen, and merges them again.

A partition is two trees without holes: `adapters` has the leaves that train and nothing else,
`base` the others, each under its path in the whole tree. Since only `adapters` is differentiated,
gradients, optimiser state and a step's outputs are as small as the adapters.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx, traverse_util

from adapters_jax.errors import MismatchError, UserError
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join as join
from adapters_jax.weights.quantized import is_quantized

Tree = Any
Adapter = tuple[Recipe | Method, Tree]  # a recipe, and the tree of its trained leaves


def flatten(tree: Tree) -> dict[str, Any]:
    """The leaves of a nested mapping or NNX state by path, `{"layer_0/query/kernel": leaf}`."""
    if isinstance(tree, nnx.State):
        # A quantised weight is one parameter, though it is a pytree of two arrays.
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
        return {path_of(path): leaf for path, leaf in leaves}
    return {"/".join(map(str, path)): leaf for path, leaf in _flat(tree).items()}


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """The leaves of any pytree by path; boxes and Variables around them have no name there."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def with_leaves(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """A pytree with some of its leaves replaced, by the paths of `leaves_by_path`."""
    new = lambda path, leaf: leaves.get(path_of(path), leaf)  # noqa: E731
    return jax.tree_util.tree_map_with_path(new, tree)


def unflatten(flat: Mapping[str, Any], *like: Tree) -> Tree:
    """The nested mapping of leaves by path.

    Names are strings without a slash, except those that are others in the trees `like`: linen
    modules that wrap NNX modules number the parts of a list, and weight norms join names.
    """
    other = _other_keys(like)
    return traverse_util.unflatten_dict({_keys(path, other): x for path, x in flat.items()})


def _other_keys(trees: Iterable[Tree]) -> dict[str, tuple[Any, ...]]:
    """The keys that lead to each node by its path, where they are not the names in the path."""
    keys = {path[:i] for tree in trees for path in _flat(tree) for i in range(1, len(path) + 1)}
    # `("a", 0)` and `("a/b",)` are such keys.
    paths = (("/".join(map(str, each)), each) for each in keys)
    return {path: each for path, each in paths if each != tuple(path.split("/"))}


def _keys(path: str, other: Mapping[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    """The keys that lead to the leaf at a path, given those that are not names in a path."""
    names = path.split("/")
    for i in range(len(names), 0, -1) if other else ():
        keys = other.get("/".join(names[:i]))
        if keys is not None:
            return (*keys, *names[i:])
    return tuple(names)


def numbered_paths(tree: Tree) -> set[str]:
    """The paths of leaves whose own key is a number, as in a list of an NNX module."""
    return {"/".join(map(str, keys)) for keys in _flat(tree) if not isinstance(keys[-1], str)}


def _flat(tree: Tree) -> dict[tuple[Any, ...], Any]:
    """The leaves of a nested mapping by their keys; raises UserError for anything else."""
    if not isinstance(tree, Mapping):
        raise UserError(
            f"expected parameters as a nested mapping, got {type(tree).__name__}; in linen pass "
            'variables["params"]'
        )
    # flax flattens dict and FrozenDict alone, and takes other mappings for leaves.
    return traverse_util.flatten_dict(_plain(tree))


def _plain(tree: Tree) -> Any:
    """Nested mappings of any kind as plain dictionaries."""
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def check_params(caller: str, params: Any, call: str) -> None:
    """Checks that an argument can be the parameter tree of a linen model or of a function.

    Args:
        caller: the function whose argument it is.
        params: what was given.
        call: what to write, such as `aj.merge(model, params, *inputs)`.

    Raises:
        TypeError: it is None.
        UserError: it is not a nested mapping.
        MismatchError: it holds all collections of variables, expected the parameters alone.

    Example:
        >>> check_params("merge", {"params": {}}, "aj.merge(model, params, *inputs)")
        Traceback (most recent call last):
        adapters_jax.errors.MismatchError: merge: params holds collections (params), expected ...
    """
    if params is None:
        raise TypeError(f"{caller}: a linen model or a function needs its parameters; write {call}")
    expected = (
        'expected the tree of parameters, such as variables["params"] or state.params; write '
        + call
    )
    if not isinstance(params, Mapping):
        raise UserError(f"{caller}: params is a {type(params).__name__}, {expected}")
    # No linen model has a module of this name at its root, but an NNX model may.
    if isinstance(params.get("params"), Mapping) and not isinstance(params, nnx.State):
        names = ", ".join(map(str, params))
        raise MismatchError(f"{caller}: params holds collections ({names}), {expected}")


def _split(tree: Tree, kept: Callable[[Iterable[str]], Container[str]]) -> tuple[Tree, Tree]:
    """The parts of a nested mapping whose paths are kept, and are not."""
    flat = _flat(tree)
    paths = {keys: "/".join(map(str, keys)) for keys in flat}
    keep = kept(paths.values())
    inside = {keys: x for keys, x in flat.items() if paths[keys] in keep}
    outside = {keys: x for keys, x in flat.items() if paths[keys] not in keep}
    return traverse_util.unflatten_dict(inside), traverse_util.unflatten_dict(outside)


def partition(params: Tree, recipe: Recipe | Method) -> tuple[Tree, Tree]:
    """Splits a parameter tree into what a recipe trains and the rest.

    Args:
        params: nested mapping of parameters, arrays or abstract; it is not changed.
        recipe: what trains.

    Returns:
        `(adapters, base)`: the leaves that train, and the frozen ones.

    Raises:
        UserError: `params` is not a nested mapping; where it holds all variables, a MismatchError.

    Example:
        >>> from adapters_jax import Unfreeze
        >>> partition({"head": {"bias": 1.0}, "body": {"bias": 2.0}}, Unfreeze("head/*"))
        ({'head': {'bias': 1.0}}, {'body': {'bias': 2.0}})
    """
    recipe = Recipe(recipe)
    if isinstance(params, Mapping):
        check_params("partition", params, "aj.partition(params, recipe)")
    return _split(params, recipe.trained)


def adapters_of(params: Tree, recipe: Recipe | Method) -> Tree:
    """Every leaf that an adapter's file holds: those that train, and the frozen ones of methods.

    Where a recipe has no frozen entries and methods without frozen leaves, this is what trains.

    Args:
        params, recipe: as in `partition`.

    Returns:
        The leaves under their paths, in a nested dictionary.

    Raises:
        UserError: as in `partition`.

    Example:
        >>> from adapters_jax import LoRA, Recipe
        >>> params = {"q": {"kernel": 1.0, "lora_old": {"a": 2.0, "b": 3.0}}}
        >>> adapters_of(params, LoRA("q", name="old", train=False))
        {'q': {'lora_old': {'a': 2.0, 'b': 3.0}}}
    """
    if isinstance(params, Mapping):
        check_params("adapters_of", params, "aj.adapters_of(params, recipe)")
    return split_adapters(params, Recipe(recipe))[0]


def split_adapters(params: Tree, recipe: Recipe) -> tuple[Tree, Tree]:
    """What an adapter's file and a bank hold, frozen adapters too, and the base that is left."""

    def kept(paths: Iterable[str]) -> Container[str]:
        return dict.fromkeys(filter(recipe.keeps, paths))

    return _split(params, kept)


def without_adapters(params: Tree, recipe: Recipe) -> Tree:
    """The base model's tree: every leaf except those that the recipe's methods added."""
    return _split(params, recipe.owners)[1]


def merge_trees(*trees: Tree) -> Tree:
    """Merges the parts of one tree; the inverse of `partition`.

    Args:
        *trees: nested mappings of parameters, arrays or abstract, without common paths.

    Returns:
        One nested dictionary with the leaves of all of them.

    Raises:
        UserError: two parts have a leaf at one path, one a leaf where the other has a subtree, or a
            part is not a nested mapping.

    Example:
        >>> merge_trees({"a": {"x": 1}}, {"a": {"y": 2}})
        {'a': {'x': 1, 'y': 2}}
    """
    whole: dict[tuple[Any, ...], Any] = {}
    twice: set[tuple[Any, ...]] = set()
    other = _other_keys(trees)
    for tree in trees:
        part = {_keys("/".join(map(str, path)), other): x for path, x in _flat(tree).items()}
        twice |= part.keys() & whole.keys()
        whole.update(part)
    # unflatten_dict would let one of the two replace the other without a word.
    twice |= {path[:i] for path in whole for i in range(1, len(path)) if path[:i] in whole}
    if twice:
        paths = sorted("/".join(map(str, path)) for path in twice)
        raise UserError(
            f"merge_trees: more than one tree has a value at {', '.join(paths)}; "
            "pass trees without common paths"
        )
    return traverse_util.unflatten_dict(whole)


def path_of(key_path: tuple[Any, ...]) -> str:
    """A JAX key path as names joined by slashes, without the `value` of an NNX Variable."""
    names = []
    for key in key_path:
        name = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        names.append(str(name))
    if isinstance(key_path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        # Paths are those of linen: a Variable's value has no name there.
        names.pop()
    return "/".join(names)


def adapter_leaves(adapter: Adapter, caller: str) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of an adapter, and its leaves by path.

    Args:
        adapter: a recipe with its trained tree, as `read_adapter` returns them.
        caller: the function whose argument it is, for the message.

    Raises:
        TypeError: `adapter` is not a pair of a recipe and a tree.
    """
    if not (isinstance(adapter, tuple) and len(adapter) == 2):
        given = repr(adapter) if isinstance(adapter, str) else f"a {type(adapter).__name__}"
        raise TypeError(
            f"{caller}: got {given} for an adapter, expected its recipe and its tree; "
            "write aj.read_adapter(directory), (state.recipe, state.trained) for a TrainState, or "
            "(aj.nnx.recipe_of(model), nnx.state(model, aj.nnx.AdapterParam))"
        )
    recipe, tree = adapter
    return Recipe(recipe), {path: nn.meta.unbox(leaf) for path, leaf in flatten(tree).items()}
