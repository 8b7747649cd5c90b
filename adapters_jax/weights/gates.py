"""A change of a weight that acts for some of its inputs alone, as from a token of a text on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from adapters_jax.errors import RecipeError
from adapters_jax.weights.factors import Factor, beside


@partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["path"])
@dataclass(frozen=True)
class Gate:
    """The inputs that a change acts for.

    Attributes:
        array: not zero where it acts; its axes are the first ones of the weight's inputs, such as
            (batch, length), in any number.
        path: the weight.

    Example:
        >>> last = Gate(jnp.asarray([False, False, True]), "up/kernel")
        >>> last.on(Factor(jnp.ones((3, 2)), (5, -1)), [5]).array.tolist()
        [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """

    array: Shaped[Array, "..."]
    path: str

    def on(self, x: Factor, free: Sequence[int]) -> Factor:
        """What inputs give, with zeros for those that the change does not act for.

        Args:
            x: what they give.
            free: the axes of the inputs that the weight does not have, in their order.

        Raises:
            RecipeError: the inputs have other first axes than the gate.
        """
        sizes, acts = [x.array.shape[x.axes.index(i)] for i in free], self.array != 0
        if acts.ndim > 1 and sizes[:1] == [math.prod(acts.shape)]:
            acts = acts.reshape(-1)  # the tokens of a batch in one axis
        if sizes[: acts.ndim] != [*acts.shape]:
            raise RecipeError(
                f"the inputs of {self.path} are {sizes} without its features, and invoked= is "
                f"{[*acts.shape]}; give it the axes of the tokens, (batch, length), or, where the "
                f"model has moved these axes, leave the weight out: '!{self.path}'"
            )
        where = beside(Factor(acts, tuple(free[: acts.ndim])), x.axes, bool)
        return Factor(jnp.where(where, x.array, jnp.zeros((), x.array.dtype)), x.axes)

    def refused(self, how: str) -> RecipeError:
        """The error for a weight that is read in a way without a place for each token."""
        return RecipeError(
            f"the model reads {self.path} {how}, where an adapter of some tokens alone cannot act; "
            f"leave it out: '!{self.path}'"
        )
