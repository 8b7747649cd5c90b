"""Inputs with a prompt's placeholders in front, and prompts that start from tokens."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import Method
from adapters_jax.methods.prompt_tuning import PromptTuning
from adapters_jax.recipe import Recipe
from adapters_jax.trees import flatten, with_leaves
from adapters_jax.weights.quantized import is_quantized, unboxed


class Prompted(NamedTuple):
    """What `with_prompt` returns; None for what it was not given.

    Attributes:
        ids: with placeholders in front.
        mask: with ones in front.
        labels: with `ignore` in front.
    """

    ids: Any
    mask: Any = None
    labels: Any = None


def with_prompt(
    recipe: Recipe | Method,
    ids: Int[Array | np.ndarray, "... length"],
    mask: Array | np.ndarray | None = None,
    labels: Array | np.ndarray | None = None,
    *,
    ignore: int = -100,
) -> Prompted:
    """Ids with a prompt's placeholders in front of each text, and what lies beside them.

    Where a mask says that a row begins with padding, they are behind it, next to the text.
    Positions need nothing: a model that counts them counts the placeholders, too.

    Args:
        recipe: has a `PromptTuning`.
        ids: of tokens, NumPy's or jax's; packed rows need placeholders before each text instead.
        mask: which tokens are there, of the shape of ids.
        labels: of each token, of the shape of ids.
        ignore: the label of a token without a loss.

    Returns:
        Arrays that are longer by K on their last axis.

    Raises:
        RecipeError: the recipe has not one `PromptTuning`.
        UserError: mask or labels have another shape than ids.

    Example:
        >>> import adapters_jax as aj
        >>> made = with_prompt(aj.PromptTuning("embed", 2), np.array([[5, 6]]), np.ones((1, 2)))
        >>> made.ids.tolist(), made.mask.tolist()
        ([[-1, -1, 5, 6]], [[1.0, 1.0, 1.0, 1.0]])
    """
    method = _method(recipe)
    for name, x in (("mask", mask), ("labels", labels)):
        if x is not None and np.shape(x) != np.shape(ids):
            raise UserError(
                f"with_prompt: {name} is of {list(np.shape(x))}, expected the shape of the ids, "
                f"{list(np.shape(ids))}"
            )
    made: list[Any] = []
    for name, x, value in (
        ("ids", ids, method.placeholder),
        ("mask", mask, 1),
        ("labels", labels, ignore),
    ):
        if x is None:
            made.append(None)
            continue
        library: Any = jnp if isinstance(x, jax.Array) or isinstance(mask, jax.Array) else np
        x = library.asarray(x)
        if name != "mask" and jnp.issubdtype(x.dtype, jnp.unsignedinteger):
            x = x.astype(np.int32)  # unsigned numbers have no -1
        front = [(0, 0)] * (np.ndim(ids) - 1) + [(method.length, 0)]
        x = library.pad(x, front, constant_values=value)
        if mask is not None:
            x = library.take_along_axis(x, _behind_padding(mask, method.length), -1)
        made.append(x)
    return Prompted(*made)


def _behind_padding(mask: Any, length: int) -> Any:
    """For each place of a row, which one it takes of that row with `length` places in front.

    Example:
        >>> _behind_padding(np.array([[0, 1, 1], [1, 1, 0]]), 2).tolist()
        [[2, 0, 1, 3, 4], [0, 1, 2, 3, 4]]
    """
    library: Any = jnp if isinstance(mask, jax.Array) else np
    padding = (library.asarray(mask) != 0).argmax(-1)[..., None]
    at = library.arange(np.shape(mask)[-1] + length)
    behind = library.where(at < padding + length, at - padding, at)
    return library.where(at < padding, at + length, behind)


def start_prompt(params: Any, recipe: Recipe | Method, ids: Int[Array, " tokens"]) -> Any:
    """Parameters whose prompt starts as the embeddings of tokens, such as those of a task's text.

    Args:
        params: a linen model's parameters with adapters, which are not changed; an NNX model,
            which is.
        recipe: has a `PromptTuning`.
        ids: the tokens; K of them, repeated or cut. For random tokens draw them:
            `jax.random.randint(key, (K,), 0, vocabulary)`.

    Returns:
        The parameters, or the model.

    Raises:
        RecipeError: the recipe has not one `PromptTuning`, or its module has not one table that
            fits it.
        UserError: an id is outside of the table, or there is none.

    Example:
        >>> import adapters_jax as aj
        >>> node = {"embedding": jnp.arange(3.0)[:, None]}
        >>> node["prompt_tuning"] = {"embedding": jnp.zeros((2, 1))}
        >>> made = start_prompt({"embed": node}, aj.PromptTuning("embed", 2), [2])
        >>> made["embed"]["prompt_tuning"]["embedding"].tolist()
        [[2.0], [2.0]]
    """
    method, recipe = _method(recipe), Recipe(recipe)
    tree = nnx.state(params, nnx.Param) if isinstance(params, nnx.Module) else params
    leaves = {path: _floats(leaf) for path, leaf in flatten(tree).items()}
    made = {}
    for path, prompt in leaves.items():
        owner = recipe.owner(path)
        if owner is None or owner.method != method:
            continue
        tables = [
            leaf
            for own, leaf in leaves.items()
            if own.rpartition("/")[0] == owner.module
            and leaf.ndim == 2
            and leaf.shape[1] == prompt.shape[-1]
        ]
        if len(tables) != 1:
            raise RecipeError(
                f"start_prompt: {owner.module!r} has {len(tables)} tables of width "
                f"{prompt.shape[-1]}, expected one; set {path} to the embeddings yourself"
            )
        own = np.asarray(ids)
        if own.ndim != 1 or not own.size or own.min() < 0 or own.max() >= len(tables[0]):
            raise UserError(
                f"start_prompt: ids of shape {list(own.shape)}, expected numbers from 0 to "
                f"{len(tables[0]) - 1}, one or more"
            )
        made[path] = tables[0][np.resize(own, method.length)].astype(prompt.dtype)
    if not made:
        raise RecipeError(
            "start_prompt: the parameters have no prompt; pass what aj.init_adapters returned"
        )
    if isinstance(params, nnx.Module):
        nnx.update(params, with_leaves(tree, made))
        return params
    return with_leaves(params, made)


def _floats(leaf: Any) -> Any:
    """A parameter without boxes, a quantised one in floats."""
    return leaf.unbox() if is_quantized(leaf) else unboxed(leaf)


def prompt_of(methods: Iterable[Method]) -> PromptTuning | None:
    """The `PromptTuning` of a recipe, or None; raises RecipeError where it has several."""
    found = [method for method in methods if isinstance(method, PromptTuning)]
    return _method(Recipe(*found)) if found else None


def virtual_tokens(methods: Iterable[Method]) -> int:
    """The number of placeholders that a recipe's prompt has before each row; 0 without one."""
    prompt = prompt_of(methods)
    return prompt.length if prompt else 0


def _method(recipe: Recipe | Method) -> PromptTuning:
    """The PromptTuning of a recipe."""
    found = [method for method in Recipe(recipe) if isinstance(method, PromptTuning)]
    if len(found) != 1:
        raise RecipeError(
            f"the recipe has {len(found)} PromptTuning, expected one; write "
            "aj.PromptTuning('embeddings', length=20)"
        )
    return found[0]
