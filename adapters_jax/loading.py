"""An adapter file put onto a model: everything is checked before anything is made."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from adapters_jax.adapt import adapt
from adapters_jax.errors import (
    AdapterMismatchError,
    AdapterRecipeError,
    OtherBaseError,
    RecipeError,
    compare_trees,
)
from adapters_jax.files import find_adapter, opened_adapter, read_arrays
from adapters_jax.identity import BaseIdentity, base_identity, with_tree
from adapters_jax.linen import Adapted, init_adapters
from adapters_jax.linen.door import shapes_of
from adapters_jax.manifest import Manifest
from adapters_jax.nnx import AdapterParam
from adapters_jax.partition import Tree, flatten, merge_trees, partition, path_of, unflatten
from adapters_jax.recipe import Recipe
from adapters_jax.tensors import TensorFile


def load_adapter(
    directory: str | Path,
    model: Any,
    params: Tree = None,
    *args: Any,
    base: BaseIdentity | None = None,
    any_base: bool = False,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """Puts a saved adapter onto a base; the recipe comes from the file, with every rank and alpha.

    Everything is checked on shapes alone, before an array is read or made.

    Args:
        directory: as written by `save_adapter`, or an id on the Hugging Face Hub, of which the two
            files of an adapter are fetched.
        model: the base, a linen or NNX module without adapters.
        params: linen only: the base's parameter tree.
        *args: example inputs, of which only shapes matter; NNX needs them where `adapt` does.
        base: what is known of the base, as `base_identity` says; its tree is known without.
        any_base: whether a base other than the one in the file will do, if the tensors fit it.
        revision: a branch, tag or commit on the Hub.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen: `(adapted model, params)`. NNX: the adapted model.

    Raises:
        OtherBaseError: the adapter was trained on another base.
        AdapterMismatchError: its tensors do not fit this base; every difference is named.
        AdapterRecipeError: its recipe does not fit this base.
        AdapterFileError: the directory is no adapter, or is damaged; or there is none, here or on
            the Hub. The other three are of its
            kind; the second is a `MismatchError` too, the third a `TargetError`.
        MismatchError, ValueError, TypeError: params or example inputs are not this model's.

    Example:
        >>> import tempfile, adapters_jax as aj
        >>> base = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.LoRA("**", rank=1), rngs=nnx.Rngs(1))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     adapters = nnx.state(model, aj.nnx.AdapterParam)
        ...     saved = aj.save_adapter(f"{place}/a", adapters, aj.LoRA("**", rank=1))
        ...     aj.load_adapter(saved, base).lora["a"].shape
        (3, 1)
    """
    in_nnx = isinstance(model, nnx.Module)
    if in_nnx and (params is not None or kwargs):
        raise TypeError(
            "load_adapter: an NNX model holds its parameters; write "
            "aj.load_adapter(directory, model, None, *example_inputs)"
        )
    if not in_nnx and params is None:
        raise TypeError(
            "load_adapter: a linen model needs its parameters; write "
            "aj.load_adapter(directory, model, params, *example_inputs)"
        )
    with opened_adapter(find_adapter(directory, revision)) as (manifest, file):
        if not any_base:
            _check_base(file, manifest, model if in_nnx else params, _recipe_of(model), base)
        if in_nnx:
            return _load_nnx(file, manifest, model, args)
        return _load_linen(file, manifest, model, params, args, kwargs)


def _recipe_of(model: Any) -> Recipe:
    """The recipe by which a model has adapters already."""
    name = "recipe" if isinstance(model, Adapted) else "adapter_recipe"
    return getattr(model, name, Recipe())


def _check_base(
    file: TensorFile, manifest: Manifest, model: Any, recipe: Recipe, base: BaseIdentity | None
) -> None:
    """Raises OtherBaseError where what is known of both bases differs."""
    if manifest.base is None:
        return
    tree = base_identity(model, recipe).tree_sha256 or ""
    differences = manifest.base.differences(with_tree(base, tree, "load_adapter"))
    if differences:
        raise OtherBaseError(
            f"the adapter in {file.path.parent} was trained on another base: {differences}; load "
            "it onto that base, or, where you know that it fits this one, with any_base=True"
        )


def _load_linen(
    file: TensorFile, manifest: Manifest, model: nn.Module, params: Tree, args: Any, kwargs: Any
) -> tuple[Adapted, Tree]:
    def grown(recipe: Recipe, params: Tree) -> Tree:
        key = jax.random.key(0)
        return init_adapters(adapt(model, recipe), params, key, *args, **kwargs)

    recipe, shapes = manifest.recipe, shapes_of(params)
    with _blaming(file, lambda: grown(Recipe(), shapes)):
        whole = grown(recipe, shapes)
    _check_fit(file, flatten(partition(whole, recipe)[0]))
    tensors = read_arrays(file, manifest)
    if any(method.from_weight for method in recipe.attached):  # PiSSA changes the weights too
        params = grown(recipe, params)
    return adapt(model, recipe), merge_trees(partition(params, recipe)[1], unflatten(tensors))


def _load_nnx(
    file: TensorFile, manifest: Manifest, model: nnx.Module, args: tuple[Any, ...]
) -> nnx.Module:
    def grown(recipe: Recipe, model: nnx.Module) -> nnx.Module:
        return adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=args or None)

    recipe = manifest.recipe
    graphdef, state = nnx.split(model)
    shapes = nnx.merge(graphdef, jax.eval_shape(lambda state: state, state))
    with _blaming(file, lambda: grown(Recipe(), shapes)):
        whole = flatten(nnx.state(grown(recipe, shapes), AdapterParam))
    _check_fit(file, {path: leaf for path, leaf in whole.items() if recipe.trains(path)})
    tensors = read_arrays(file, manifest)
    adapted = grown(recipe, model)
    state = nnx.state(adapted, AdapterParam)
    with_tensors = lambda path, leaf: tensors.get(path_of(path), leaf)  # noqa: E731
    nnx.update(adapted, jax.tree_util.tree_map_with_path(with_tensors, state))
    return adapted


@contextlib.contextmanager
def _blaming(file: TensorFile, base_alone: Callable[[], Any]) -> Iterator[None]:
    """Says of a failing abstract run that the recipe is at fault, unless the base fails alone."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, AssertionError) as error:
        if not isinstance(error, RecipeError):
            base_alone()
        raise AdapterRecipeError(
            f"the recipe of the adapter in {file.path.parent} does not fit this model: {error}"
        ) from error


def _check_fit(file: TensorFile, wanted: Mapping[str, Any]) -> None:
    """Raises AdapterMismatchError unless the tensors are just those that the recipe trains."""
    compare_trees(
        f"the adapter in {file.path.parent}",
        file.shapes,
        wanted,
        "Load it onto the base it was trained on.",
        dtypes=True,
        error=AdapterMismatchError,
    )
