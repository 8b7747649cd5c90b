"""Example inputs: stand-ins from which a model's shapes are found without computing anything."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from adapters_jax.errors import RecipeError


def is_array(x: Any) -> bool:
    """Whether x has a shape and a dtype: an array of jax or numpy, or an abstract one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_abstract(tree: Any) -> bool:
    """Whether a tree has a leaf that is only a shape and a dtype."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def filled(tree: Any) -> Any:
    """Zeros in the place of arrays, of which only shapes matter; keys and all else as they are."""

    def zeros(x: Any) -> Any:
        if not is_array(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.zeros(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(zeros, tree)


@contextlib.contextmanager
def explained(model: Any, args: Any) -> Iterator[None]:
    """Turns a failing abstract run into a ValueError that says what the model was given."""
    try:
        yield
    except RecipeError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError, FlaxError) as error:
        given = [f"{x.dtype}{list(x.shape)}" if is_array(x) else repr(x) for x in args]
        raise ValueError(
            f"{type(model).__name__} cannot be called with the example inputs "
            f"({', '.join(given)}); pass inputs as for the model itself. It said: {error}"
        ) from error
