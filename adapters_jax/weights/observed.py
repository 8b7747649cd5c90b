"""Statistics of the inputs that a weight meets, as the gradient of an array beside the weight.

A gradient gets out of scans, remat, vmap and conditionals, with an axis for each layer, and adds up
over all uses of a weight. So a weight may have a tape, an array of the shape of LoRA's A, which
changes no output. Its gradient is the statistics of one batch, whatever is differentiated.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError
from adapters_jax.weights.factors import RANK, Factor, contracted

Axes = tuple[int, ...]
# Columns of a tape behind its probes: sums of the inputs, of their squares, and of ones.
SUMS = 3


@dataclass(frozen=True)
class Observed:
    """Leaves a weight as it is, and gives its tape the statistics of its inputs as a gradient.

    The gradient has for probes V, the first columns of the tape, the columns X^T X V, where X has a
    row for each input that counts; then the sums of `SUMS`.

    Attributes:
        by: the tape, whose axes are those of LoRA's A.
        counted: which inputs count, or how much, by their first axes; None for all of them.
        path: the weight.
    """

    by: Factor
    counted: Any
    path: str

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The tape."""
        return (self.by,)

    def with_factors(self, by: Factor) -> "Observed":
        """The same with another tape."""
        return Observed(by, self.counted, self.path)

    def renamed(self, new: Any) -> "Observed":
        """The same for a weight whose axes have new numbers."""
        return self.with_factors(self.by.renamed(new))

    def applied(self, weight: Array) -> Array:
        """Raises RecipeError: who reads the whole weight shows no input."""
        raise RecipeError(
            f"calibrate: the model reads {self.path} other than in a product with its input, and "
            f"so shows no activations for a_init='eva'; leave it out: '!{self.path}'"
        )

    def noted(self, x: Array, seen: Axes, inner: Axes, batch: Axes) -> Float[Array, ""]:
        """Zero, of which the tape's gradient is the statistics of an input.

        Args:
            x: the input.
            seen: its axes; those that the weight does not have come after the weight's own.
            inner: the weight's axes that are contracted with it.
            batch: those that are batched.
        """
        if {*inner, *batch} != {*self.by.axes} - {RANK}:
            raise RecipeError(
                f"calibrate: the model reads {self.path} with inputs along different axes of it, "
                f"and a_init='eva' has one kind of input; leave it out: '!{self.path}'"
            )
        rows = None if self.counted is None else self._rows(x.shape, seen)
        return _noted((seen, batch, self.by.axes), self.by.array, x, rows)

    def _rows(self, shape: Axes, seen: Axes) -> Array:
        """How much each row of an input counts, as an array that broadcasts against the input."""
        free = [i for i, axis in enumerate(seen) if axis not in self.by.axes]
        sizes, given = [shape[i] for i in free], self.counted.shape
        flat = sizes[:1] == [math.prod(given)]
        if tuple(sizes[: len(given)]) != given and not flat:
            raise RecipeError(
                f"calibrate: the input of {self.path} is {list(shape)}, and the mask is "
                f"{list(given)}, expected its first axes; leave the mask out, or the weight"
            )
        own = free[: 1 if flat else len(given)]
        rows = self.counted.reshape([shape[i] if i in own else 1 for i in range(len(shape))])
        return jnp.broadcast_to(rows, [n if i in free else 1 for i, n in enumerate(shape)])


jax.tree_util.register_dataclass(Observed, data_fields=["by", "counted"], meta_fields=["path"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _noted(axes: Any, tape: Array, x: Array, rows: Array | None) -> Float[Array, ""]:
    return jnp.zeros(())


def _forward(axes: Any, tape: Array, x: Array, rows: Array | None) -> tuple[Array, Any]:
    seen, batch, own = axes
    return jnp.zeros(()), _statistics(seen, batch, own, tape, x, rows)


def _backward(axes: Any, statistics: Array, gradient: Array) -> tuple[Array, None, None]:
    return statistics, None, None


_noted.defvjp(_forward, _backward)


def _statistics(
    seen: Axes, batch: Axes, own: Axes, tape: Array, x: Array, rows: Array | None
) -> Array:
    """What the gradient of a tape is."""
    at = own.index(RANK)
    probes = Factor(jax.lax.slice_in_dim(tape, 0, tape.shape[at] - SUMS, axis=at), own)
    whole = x.astype(jnp.float32)
    weighted = whole if rows is None else whole * rows
    free = tuple(i for i in seen if i not in own)
    # By default a TPU multiplies float32 in bfloat16.
    met = contracted(Factor(whole, seen), probes, (*free, *batch, RANK), "highest")
    found = [contracted(Factor(weighted, seen), met, own, "highest")]
    ones = jnp.broadcast_to(1.0 if rows is None else rows, x.shape)
    left = tuple(i for i in seen if i in own)
    for each in (weighted, weighted * whole, ones):
        total = each.sum([seen.index(i) for i in free])
        found.append(Factor(total[..., None], (*left, RANK)))
    return jnp.concatenate([each.array.transpose(each.at(own)) for each in found], axis=at)
