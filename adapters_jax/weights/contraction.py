"""How a weight meets its input, for every kind of layer that low-rank factors attach to.

A linear layer computes `y = einsum(equation, x, weight)`. The equation alone determines the
factors: A has the weight's letters that the input shares, then the rank; B has the rank, then the
weight's other letters. `btd,dnh->btnh` becomes `btd,dr->btr` and `btr,rnh->btnh`: two contractions
through the rank, and no product of the weight's size. Convolutions and embeddings compute the
hidden state differently, but their factors have the same form.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError

_RANK = "Z"


@dataclass(frozen=True)
class Contraction:
    """A linear layer as low-rank adaptation uses it.

    Attributes:
        weight: name of the layer's weight.
        ndim: number of axes of the weight, without the layer axes of stacked modules.
        inputs: the axes of the weight that A has, in order; B has the others.
        project: `(x, a) -> hidden`, which `expand` takes.
        expand: `(hidden, b) -> y`.
        lookup: the layer reads rows (an embedding), so A starts at zero and B random.
        trailing: whether the axes that B has are the last ones of the layer's output, in order.
        features: the axes of the weight that are the last ones of the layer's input and are summed
            over, in order; empty where they are elsewhere in the input.
    """

    weight: str
    ndim: int
    inputs: tuple[int, ...]
    project: Callable[[Array, Array], Array]
    expand: Callable[[Array, Array], Array]
    lookup: bool = False
    trailing: bool = True
    features: tuple[int, ...] = ()

    def split_shape(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The parts of a weight's shape that A and B have.

        Raises:
            RecipeError: the weight has not as many axes as the equation.
        """
        if len(shape) != self.ndim:
            raise RecipeError(
                f"{self.weight} has the shape {shape}, expected {self.ndim} axes as in its layer's "
                "equation; correct the equation in aj.register_contraction"
            )
        outputs = (axis for axis in range(self.ndim) if axis not in self.inputs)
        return tuple(shape[i] for i in self.inputs), tuple(shape[i] for i in outputs)

    def as_matrix(self, weight: Float[Array, "..."]) -> Float[Array, "in out"]:
        """The weight as a matrix, with A's axes as rows and B's as columns."""
        rows, columns = self.split_shape(weight.shape)
        order = (*self.inputs, *(i for i in range(self.ndim) if i not in self.inputs))
        return weight.transpose(order).reshape(math.prod(rows), math.prod(columns))

    def product(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
        """A times B in the weight's own layout; leading layer axes are batched."""
        letters = "abcdefghijklmnopqrstuvwxy"[: self.ndim]
        left = "".join(letters[i] for i in self.inputs)
        right = "".join(c for i, c in enumerate(letters) if i not in self.inputs)
        form = f"...{left}{_RANK},...{_RANK}{right}->...{letters}"
        return jnp.einsum(form, a, b, precision="highest")


def from_equation(weight: str, equation: str, precision: Any = None) -> Contraction:
    """The contraction of `einsum(equation, x, weight)`.

    Args:
        weight: the weight's name in the layer.
        equation: an explicit einsum of two operands, the input first; `...` is allowed in the
            input and output.
        precision: as in `jnp.einsum`.

    Raises:
        RecipeError: `equation` is not such an einsum.

    Example:
        >>> c = from_equation("kernel", "btd,dnh->btnh")
        >>> c.split_shape((768, 12, 64))
        ((768,), (12, 64))
    """
    left, arrow, output = equation.replace(" ", "").partition("->")
    x, comma, w = left.partition(",")
    if not arrow or not comma or "," in w or "." in w or _RANK in equation or len(set(w)) != len(w):
        raise RecipeError(
            f"equation {equation!r} is not an explicit einsum of an input and a weight; "
            f"write for example '...d,df->...f' (the letter {_RANK} is taken)"
        )
    inputs = tuple(i for i, letter in enumerate(w) if letter in x)
    a = "".join(w[i] for i in inputs)
    b = "".join(letter for letter in w if letter not in x)
    contracted = {letter for letter in a if letter not in output}
    hidden = "".join(letter for letter in x if letter not in contracted) + _RANK

    def einsum(form: str) -> Callable[[Array, Array], Array]:
        return lambda left, right: jnp.einsum(form, left, right, precision=precision)

    return Contraction(
        weight,
        len(w),
        inputs,
        einsum(f"{x},{a}{_RANK}->{hidden}"),
        einsum(f"{hidden},{_RANK}{b}->{output}"),
        trailing=output.endswith(b),
        features=inputs if x.endswith(a) and contracted == set(a) else (),
    )
