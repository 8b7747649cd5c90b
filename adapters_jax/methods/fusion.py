"""AdapterFusion: attention over what several adapters add to an output.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
arXiv:2005.00247.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Output, Shapes
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, zeros
from adapters_jax.methods.compositions import Composition, Runner
from adapters_jax.methods.outputs import State
from adapters_jax.methods.settings import flag, number
from adapters_jax.weights.changes import dropout


@dataclass(frozen=True)
class Fusion(Composition):
    """Attention over the branches of several adapters on one output.

    With the module's output y and the branches z_i of the members, the output becomes
    `y + sum_i p_i V z_i` with `p = softmax_i((Q y + b_q) . (K z_i + b_k))`. Where the members
    change the module's input, the sum is added to that. A member that is a stack counts by its last
    adapter. Leaves are float32, kernels (d, d); V starts as the identity plus 1e-6.

    Args:
        targets: all modules; it acts where its members do.
        members: the names of the adapters.
        value: whether there is V; without it branches are summed as they are.
        dropout: probability of zeroing a score before the softmax while training.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> Fusion(members=("a", "b")).count("x", {"query/kernel": (768, 768)}, ()).parameters
        1771008
    """

    kind: ClassVar[str] = "fuse"
    slot: ClassVar[str] = "fusion"
    paper: ClassVar[str] = "2005.00247"
    size_fields: ClassVar[tuple[str, ...]] = ("dropout",)

    value: bool = flag(True)
    dropout: float = number(0.0, high=1.0, closed=True)

    @property
    def leaf_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of its arrays."""
        names = ("query/kernel", "query/bias", "key/kernel", "key/bias")
        return (*names, "value/kernel") if self.value else names

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """Q, K and V, each (d, d), and the biases of Q and K."""
        d = point.width
        made = {}
        for name in ("query", "key"):
            made[f"{name}/kernel"] = Leaf((d, d), arrays.normal(0.02))
            made[f"{name}/bias"] = Leaf((d,), arrays.zeros)
        if self.value:
            made["value/kernel"] = Leaf((d, d), _identity)
        return made

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is 3d^2 + 2d, or 2d^2 + 2d without V."""
        return shapes["query/kernel"][-1]

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Zeros.

        Raises:
            RecipeError: there is no V, so that no arrays take the members out.
        """
        if not self.value:
            raise RecipeError("Bank: a fusion with value=False acts whatever its arrays are")
        return zeros(self, leaves)

    def compose(
        self, leaves: Leaves, point: AttachmentPoint, run: Runner, state: State, key: Key = None
    ) -> State:
        """The state with what the attention over the members' branches gives.

        Raises:
            RecipeError: a member is not at the module, or is no sum of the output and a branch.
        """
        states, of_input = self._each(point, run, state)
        lacking = [n for n, x in zip(self.members, states, strict=True) if x.added is None]
        if lacking:
            raise RecipeError(
                f"fuse: {', '.join(lacking)} at {point.path!r} adds no branch to the output; fuse "
                "bottleneck adapters, or stacks of them"
            )
        branches = jnp.stack([x.added for x in states if x.added is not None], -2)
        mixed = self._mixed(leaves, state.y, branches, point, key)
        stream = state.x if of_input else state.y
        return state.moved(stream + mixed.astype(stream.dtype), of_input, mixed)

    def _mixed(
        self,
        leaves: Leaves,
        y: Output,
        branches: Float[Array, "... members d"],
        point: AttachmentPoint,
        key: Key,
    ) -> Output:
        """The sum of the branches' values by their scores."""

        def projected(name: str, x: Array) -> Array:
            kernel, bias = leaves[f"{name}/kernel"], leaves.get(f"{name}/bias")
            return arrays.affine(x, kernel, bias, point.precision)

        query, keys = projected("query", y), projected("key", branches)
        values = projected("value", branches) if self.value else branches
        scores = jnp.einsum("...d,...nd->...n", query, keys, precision=point.precision)
        # A softmax over bfloat16 scores loses the differences between near ones.
        scores = dropout(scores.astype(jnp.float32), self.dropout, key)
        shares = jax.nn.softmax(scores).astype(y.dtype)
        return jnp.einsum("...n,...nd->...d", shares, values, precision=point.precision)


def _identity(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Ones on the diagonal and 1e-6 elsewhere, as the authors' code starts V."""
    return jnp.where(jnp.eye(shape[-1], dtype=bool), 1.0, jnp.full(shape, 1e-6))
