"""Loads an adapter file onto a model; everything is checked before any array is made."""

import contextlib
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from adapters_jax.errors import (
    AdapterMismatchError,
    AdapterRecipeError,
    MismatchError,
    OtherBaseError,
    RecipeError,
    compare_trees,
    first_few,
    shortened,
)
from adapters_jax.files.adapter import (
    STATE,
    check_directory,
    find_adapter,
    opened_adapter,
    read_arrays,
    read_state,
    state_by_path,
    with_state,
)
from adapters_jax.files.identity import BaseIdentity, tree_sha256, with_tree
from adapters_jax.files.manifest import CONFIG, Manifest
from adapters_jax.files.stored import Stored, Tensors, as_in_model, named, training
from adapters_jax.files.untrusted import TensorFile
from adapters_jax.linen import Adapted, init_adapters, shapes_of
from adapters_jax.linen import adapt as adapt_linen
from adapters_jax.linen.functions.function import function_of, is_function
from adapters_jax.linen.starting import grown
from adapters_jax.nnx import ADAPTERS
from adapters_jax.nnx import adapt as adapt_nnx
from adapters_jax.nnx.adapted import adapt_at, placements_of
from adapters_jax.placement import Placements, in_tree, taken
from adapters_jax.placement.patterns import checked_before
from adapters_jax.recipe import Recipe
from adapters_jax.trace.inputs import MISFITS, Inputs
from adapters_jax.training.state import checked_collections
from adapters_jax.transforms.stacking import Names, Stack, stack_layers, stack_of, unstack_layers
from adapters_jax.trees import (
    Tree,
    check_params,
    flatten,
    merge_trees,
    split_adapters,
    unflatten,
    with_leaves,
)
from adapters_jax.weights.fingerprints import remember
from adapters_jax.weights.quantized import unboxed

_LOG = logging.getLogger(__name__)


_NO_STATE = Tensors({}, dict)
_NO_INPUTS = ", and, if it was adapted with example_inputs=(...), with these"


def load_adapter(
    directory: str | Path,
    model: Any,
    params: Tree = None,
    *args: Any,
    base: BaseIdentity | None = None,
    any_base: bool = False,
    revision: str | None = None,
    names: Names | Stack | None = None,
    collections: Mapping[str, Tree] | None = None,
    example_inputs: Iterable[Any] | Inputs | None = None,
    train: bool | None = None,
    only: str | None = None,
    **kwargs: Any,
) -> Any:
    """Loads a saved adapter onto a base; its file has the recipe, with every rank and alpha.

    Everything is checked on shapes alone, before an array is read or made.

    Args:
        directory: as written by `save_adapter`, or an id on the Hugging Face Hub, or an address in
            an object store, `"gs://bucket/mine"` or `"s3://bucket/mine"`.
        model: the base, a linen, NNX or Equinox module, or a function of parameters, without
            adapters.
        params: linen and functions only: the base's parameters.
        *args: example inputs; only their shapes matter. For NNX models use `example_inputs`.
            They are needed only where the file does not say where in the model the adapter is, or
            is of another base: then the model is run on them.
        base: the base's identity, from `base_identity`; the hash of its tree is added.
        any_base: accept a base other than the one in the file, if the tensors fit it.
        revision: a branch, tag or commit on the Hub.
        names: the `NAMES` of the model's module, or a `Stack`; with it, an adapter of scanned
            layers loads onto unrolled ones, and the other way round.
        collections: linen only: the base's collections beside its parameters, such as
            `{"batch_stats": variables["batch_stats"]}`.
        example_inputs: NNX and Equinox only: the inputs that `adapt` got, if it got any.
        train: whether the adapter's leaves train; False freezes them, under another adapter that
            the model then gets from `adapt`. None is as it was saved.
        only: the name of the entries to load, where the recipe has others as well.
        **kwargs: linen only: further arguments of the model's call.

    Returns:
        linen and functions: `(adapted model, params)`; `(adapted model, params, collections)` if
        collections are given. NNX: the adapted model, with the adapters' dropout on until
        `model.eval()`. Its statistics, and linen's collections, are those of the file. If the file
        has none, they are the base's, with a warning.

    Raises:
        OtherBaseError: the adapter was trained on another base: one whose parameters have other
            paths or shapes, or another id or configuration. Values are not compared.
        AdapterMismatchError: its tensors or its statistics do not fit this base; the message names
            every difference.
        AdapterRecipeError: its recipe does not fit this base, or has no entry of the name `only`.
        AdapterFileError: neither the disk nor the Hub has the directory, it does not hold an
            adapter, or it is damaged. The three errors above are subclasses of this one.
        MismatchError, ValueError, TypeError: params or example inputs do not fit the model itself.

    Example:
        >>> import tempfile, adapters_jax as aj
        >>> base = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> model = aj.adapt(base, aj.LoRA("**", rank=1), rngs=nnx.Rngs(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     adapters = nnx.state(model, aj.nnx.AdapterParam)
        ...     saved = aj.save_adapter(f"{folder}/a", adapters, aj.LoRA("**", rank=1))
        ...     aj.load_adapter(saved, base).lora["a"].shape
        (3, 1)
    """
    if is_function(model):
        given = Inputs.of(example_inputs) or Inputs.of_call(args, kwargs)
        model, params = function_of(model, params, given)
        args, kwargs, example_inputs = (given,) if given.args or given.kwargs else (), {}, None
    call = "load_adapter(directory, model, params, *inputs), in NNX load_adapter(directory, model)"
    check_directory("load_adapter", directory, call)
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(
            f"load_adapter: the model is a {type(model).__name__}, expected a linen or NNX module; "
            f"write {call}"
        )
    in_nnx = isinstance(model, nnx.Module)
    if in_nnx and (params is not None or collections is not None or kwargs):
        raise TypeError(
            "load_adapter: an NNX model holds its parameters and statistics; write "
            "aj.load_adapter(directory, model, example_inputs=(...))"
            + (f", without {', '.join(kwargs)}" if kwargs else "")
        )
    if not in_nnx and (params is None or example_inputs is not None):
        raise TypeError(
            "load_adapter: a linen model or a function needs its parameters; write "
            "aj.load_adapter(directory, model, params, *example_inputs)"
        )
    if not in_nnx:
        write = "aj.load_adapter(directory, model, params, *example_inputs)"
        check_params("load_adapter", params, write)
    stack = None if names is None else stack_of(names)
    other = checked_collections("load_adapter", collections)
    with opened_adapter(find_adapter(directory, revision)) as (manifest, file, state):
        tree = nnx.state(model, nnx.Param) if in_nnx else params
        name = "recipe" if isinstance(model, Adapted) else "adapter_recipe"
        own = getattr(model, name, Recipe())  # of the adapters that it has already
        sha256 = tree_sha256([tree], own)
        if not any_base:
            _check_base(file, manifest, tree, own, sha256, base, stack)
        same = manifest.base is not None and manifest.base.tree_sha256 == sha256
        adapter = Stored(
            file.path.parent,
            manifest.recipe,
            Tensors(file.shapes, functools.partial(read_arrays, file, manifest)),
            Tensors(state.shapes, functools.partial(read_state, state)) if state else _NO_STATE,
            manifest.placements,
            same and not own.methods,
        )
        adapter = training(named(adapter, only), train)
        if stack:
            adapter = as_in_model(adapter, tree, stack)
        with checked_before():
            if isinstance(model, nnx.Module):
                return _load_nnx(adapter, model, args or example_inputs)
            return _load_linen(adapter, model, params, other, args, kwargs)


def _other_form(tree: Tree, recipe: Recipe, stack: Stack) -> Tree:
    """The shapes of a base, unrolled if its layers are scanned, and stacked otherwise."""
    leaves = {path: unboxed(leaf) for path, leaf in flatten(tree).items()}
    added = recipe.owners(leaves)
    shapes = {
        path: jax.ShapeDtypeStruct(np.shape(leaf), np.float32)
        for path, leaf in leaves.items()
        if path not in added
    }
    scanned = any(map(stack.holds, shapes))
    return (unstack_layers if scanned else stack_layers)(unflatten(shapes), stack)


def _check_base(
    file: TensorFile,
    manifest: Manifest,
    model: Tree,
    recipe: Recipe,
    tree: str,
    base: BaseIdentity | None,
    stack: Stack | None,
) -> None:
    """Raises OtherBaseError if the bases are known to differ, other than by layer stacking."""
    if manifest.base is None:
        return
    expected = manifest.base
    if stack and expected.tree_sha256 != tree:
        other = tree_sha256([_other_form(model, recipe, stack)], Recipe())
        own = tree if expected.tree_sha256 == other else expected.tree_sha256
        expected = replace(expected, tree_sha256=own)
    differences = expected.differences(with_tree(base, tree, "load_adapter"))
    if differences:
        raise OtherBaseError(
            f"the adapter in {file.path.parent} was trained on another base: {differences}; load "
            "it onto that base, or, where you know that it fits this one, with any_base=True"
            + _advice(file.shapes, flatten(model))
        )


def _load_linen(
    adapter: Stored, model: nn.Module, params: Tree, other: Tree | None, args: Any, kwargs: Any
) -> tuple[Any, ...]:
    recipe, shapes, key = adapter.recipe, shapes_of(params), jax.random.key(0)

    def run(recipe: Recipe) -> Placements:
        found = adapt_linen(model, recipe)
        init_adapters(found, shapes, key, *args, **kwargs)
        return found.adapter_placements.placements or Placements()

    placements = _placed(adapter, flatten(shapes), run)
    adapted = adapt_linen(model, recipe)
    _check_state(adapter, jax.eval_shape(lambda other: other, other))
    tensors, state = adapter.trained.read(), adapter.state.read()
    if any(method.from_weight for method in recipe.attached):  # PiSSA changes the base, too
        own = Placements(each for each in placements if each.method in recipe.attached)
        params = grown(recipe, own, params, key)
    params = merge_trees(split_adapters(params, recipe)[1], unflatten(tensors))
    remember(flatten(split_adapters(params, adapted.recipe)[1]))
    adapted.adapter_placements.placements = placements
    if other is None:
        return adapted, params
    return adapted, params, with_state(other, state)


def _load_nnx(adapter: Stored, model: nnx.Module, inputs: Any) -> nnx.Module:
    graphdef, whole = nnx.split(model)
    shapes = nnx.merge(graphdef, jax.eval_shape(lambda whole: whole, whole))

    def run(recipe: Recipe) -> Placements:
        found = placements_of(adapt_nnx(shapes, recipe, nnx.Rngs(0), inputs))
        return Placements(each for each in found if each.method in recipe.attached)

    advice = "" if inputs else _NO_INPUTS
    placements = _placed(adapter, flatten(nnx.state(shapes, nnx.Param)), run, advice)
    _check_state(adapter, nnx.state(shapes))
    tensors, state = adapter.trained.read(), adapter.state.read()
    adapted = adapt_at(model, adapter.recipe, placements)
    nnx.update(adapted, with_leaves(nnx.state(adapted, ADAPTERS), tensors))
    nnx.update(adapted, with_state(nnx.state(adapted), state))
    return adapted


def _placed(
    adapter: Stored, base: Mapping[str, Any], run: Callable[[Recipe], Placements], advice: str = ""
) -> Placements:
    """The placements of an adapter in a model, which its tensors fit.

    Args:
        base: the shapes and dtypes of the model's parameters by path.
        run: finds the placements of a recipe by an abstract run of the model.
        advice: for the message about tensors that do not fit.

    Raises:
        AdapterRecipeError: the recipe does not fit the model.
        AdapterMismatchError: the placements in the file are others than those of the model, or
            tensors are missing, unexpected or different.
    """
    recipe = adapter.recipe
    if adapter.placements is not None and adapter.same_base:
        placements = _compared(adapter, base)
    else:
        with _blaming(adapter, lambda: run(Recipe())):
            placements = run(recipe)
        _check_placements(adapter, placements)
    expected = {path: base[path] for path in recipe.trained(base)}
    attached = recipe.attached
    for placed in placements:
        shapes = placed.array_shapes if placed.method in attached else {}
        for path, shape in shapes.items():
            expected[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    _check_fit(adapter, expected, advice)
    return placements


def _compared(adapter: Stored, base: Mapping[str, Any]) -> Placements:
    """The placements in a file, which are for this very base, compared with what the shapes say.

    Raises:
        AdapterMismatchError: names the first differences.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in base.items()}
    if owners := adapter.recipe.owners(shapes):
        taken_here = next(iter(owners.values()))
        raise AdapterRecipeError(
            f"the adapter in {adapter.directory}: {taken(taken_here.module, taken_here.method)}"
        )
    arrays = {path: tuple(leaf.shape) for path, leaf in adapter.trained.shapes.items()}
    try:
        found = in_tree(adapter.recipe, {**shapes, **arrays})
    except MismatchError as error:
        raise AdapterMismatchError(
            f"the adapter in {adapter.directory} does not fit: {error}"
        ) from error
    _check_placements(adapter, found)
    return Placements(each.with_arrays() for each in adapter.placements or ())


def _check_placements(adapter: Stored, found: Placements) -> None:
    """Raises AdapterMismatchError where the placements in a file are others than those here."""
    attached = adapter.recipe.attached
    own = Placements(each for each in found if each.method in attached)
    wrong = [] if adapter.placements is None else adapter.placements.differences(own)
    if wrong:
        raise AdapterMismatchError(
            f"the placements in {adapter.directory / CONFIG} are not those of this model: "
            f"{first_few(wrong, joint='; ')}. Load it onto the base it was trained on; if the "
            "file was edited, save the adapter again"
        )


@contextlib.contextmanager
def _blaming(adapter: Stored, base_alone: Callable[[], Any]) -> Iterator[None]:
    """Blames the recipe for a failing abstract run, unless the base alone fails as well."""
    try:
        yield
    except MISFITS as error:
        if not isinstance(error, RecipeError):
            base_alone()
        raise AdapterRecipeError(
            f"the recipe of the adapter in {adapter.directory} does not fit this model: {error}"
        ) from error


def _check_fit(adapter: Stored, expected: Mapping[str, Any], advice: str = "") -> None:
    """Raises AdapterMismatchError unless the tensors are exactly those that the recipe trains."""
    advice += _advice(adapter.trained.shapes, expected)
    compare_trees(
        f"the adapter in {adapter.directory}",
        adapter.trained.shapes,
        expected,
        f"Load it onto the base it was trained on{advice}.",
        dtypes=True,
        error=AdapterMismatchError,
    )


def _check_state(adapter: Stored, other: Tree | None) -> None:
    """Raises AdapterMismatchError unless the state in the file, if it has any, is that of the base.

    A file without state, such as one of an earlier version, fits every base.
    """
    expected, found = state_by_path(other), adapter.state.shapes
    if found:
        compare_trees(
            f"the state in {adapter.directory / STATE}",
            found,
            expected,
            "Load it onto the base it was trained on; in linen give the base's own: "
            'collections={"batch_stats": variables["batch_stats"]}.',
            dtypes=True,
            error=AdapterMismatchError,
        )
    elif expected:
        _LOG.warning(
            "the adapter in %s holds no state, so the model has the base's in %s; to keep what "
            "training changed there, save a TrainState, or an NNX model itself",
            adapter.directory,
            shortened(", ".join(expected)),
        )


def _advice(adapter: Iterable[str], base: Iterable[str]) -> str:
    """A hint for a message, if only one of the two has scanned layers."""
    scanned = re.compile(r"(.*/)?layers/(?!\d)")
    if any(map(scanned.match, adapter)) == any(map(scanned.match, base)):
        return ""
    return "; if only their layers differ, scanned and unrolled, give names=NAMES of the model"
