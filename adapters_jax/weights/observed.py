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
from adapters_jax.weights.factors import RANK, ByFactor, Factor, contracted

Axes = tuple[int, ...]
SUMS = 3  # columns of a tape: those of the inputs, of their squares, and of ones


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["by", "counted"], meta_fields=["path"]
)
@dataclass(frozen=True)
class Observed(ByFactor):
    """Leaves a weight as it is, and gives its tape the statistics of its inputs as a gradient.

    For probes V, the first columns of the tape, these are X^T X V, and then the sums of `SUMS`; X
    has a row for each input.

    Attributes:
        by: the tape, whose axes are those of LoRA's A.
        counted: how much each input counts, by its first axes; None where all count.
        path: the weight.
    """

    counted: Any
    path: str

    def applied(self, weight: Array) -> Array:
        """Raises RecipeError: who reads the whole weight shows no input."""
        raise self._refused("other than in a product with its input")

    def noted(self, x: Array, seen: Axes, inner: Axes, batch: Axes) -> Float[Array, ""]:
        """Zero, whose gradient for the tape is the statistics of an input.

        Args:
            seen: its axes; those that the weight does not have come after the weight's own.
            inner: the weight's axes that are contracted with it.
            batch: those that are batched.
        """
        if {*inner, *batch} != {*self.by.axes} - {RANK}:
            raise self._refused("with inputs along different axes of it")
        free = [i for i, axis in enumerate(seen) if axis not in self.by.axes]
        sizes, rows = [x.shape[i] for i in free], self.counted
        if rows is not None:
            flat = sizes[:1] == [math.prod(rows.shape)]  # the tokens of a batch in one axis
            if not flat and tuple(sizes[: rows.ndim]) != rows.shape:
                raise self._refused(f"with {list(x.shape)}, whose first axes are not {rows.shape},")
            own = free[: 1 if flat else rows.ndim]
            rows = rows.reshape([n if i in own else 1 for i, n in enumerate(x.shape)])
        return _noted((seen, batch, self.by.axes), self.by.array, x, rows)

    def _refused(self, how: str) -> RecipeError:
        return RecipeError(
            f"calibrate: the model reads {self.path} {how}, and so shows no activations for "
            f"a_init='eva'; leave it out: '!{self.path}'"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _noted(axes: Any, tape: Array, x: Array, rows: Array | None) -> Float[Array, ""]:
    return jnp.zeros(())


def _statistics(axes: Any, tape: Array, x: Array, rows: Array | None) -> tuple[Array, Array]:
    """Zero, and what the gradient of a tape is."""
    seen, batch, own = axes
    at, free = own.index(RANK), tuple(i for i in seen if i not in own)
    probes = Factor(jax.lax.slice_in_dim(tape, 0, tape.shape[at] - SUMS, axis=at), own)
    x = x.astype(jnp.float32)
    ones = jnp.broadcast_to(1.0 if rows is None else rows, x.shape)
    # By default a TPU multiplies float32 in bfloat16.
    met = contracted(Factor(x, seen), probes, (*free, *batch, RANK), "highest")
    found = [contracted(Factor(x * ones, seen), met, own, "highest")]
    for each in (x * ones, x * x * ones, ones):
        total = each.sum([seen.index(i) for i in free])
        found.append(Factor(total[..., None], (*(i for i in seen if i in own), RANK)))
    parts = [each.array.transpose(each.at(own)) for each in found]
    return jnp.zeros(()), jnp.concatenate(parts, axis=at)


_noted.defvjp(_statistics, lambda axes, statistics, gradient: (statistics, None, None))
