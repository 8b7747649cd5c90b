"""Example inputs: stand-ins from which a model's shapes are found without computing anything."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adapters_jax.errors import UserError


def is_array(x: Any) -> bool:
    """Whether x has a shape and a dtype: an array of jax or numpy, or an abstract one."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_abstract(tree: Any) -> bool:
    """Whether a tree has a leaf that is only a shape and a dtype."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def filled(tree: Any) -> Any:
    """The tree with zeros for its arrays, for runs where only shapes matter; keys are kept."""

    def zeros(x: Any) -> Any:
        if not is_array(x) or jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.zeros(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(zeros, tree)


@contextlib.contextmanager
def explained(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Runs its body; an error that the body raises names the model and its example inputs.

    Args:
        model: the body calls it on shapes; errors of its own keep their type and get a note.
        args: its example inputs.
        kwargs: its example inputs by name.

    Raises:
        UserError: `model.__call__` does not take these inputs.
    """
    name, given = type(model).__name__, inputs_text(args, kwargs)
    try:
        inspect.signature(type(model).__call__).bind(model, *args, **kwargs)
    except TypeError as error:
        raise UserError(
            f"{name} cannot be called with the example inputs ({given}): {error}; pass inputs as "
            "for the model itself"
        ) from error
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(
                f"adapters_jax ran {name} on the example inputs ({given}), abstractly, to find its "
                "modules and shapes."
            )
        raise


def inputs_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Inputs as a message prints them: arrays by dtype and shape.

    Example:
        >>> inputs_text([jnp.zeros((2, 3))], {"train": False})
        'float32[2, 3], train=False'
    """

    def text(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}" if is_array(x) else repr(x)

    return ", ".join([*map(text, args), *(f"{key}={text(x)}" for key, x in kwargs.items())])
