"""LoHa: a change of a weight that is the entrywise product of two low-rank products.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", arXiv:2108.06098; for fine-tuning Yeh et al. 2024, "LyCORIS", arXiv:2309.14859.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.ranked import Ranked, sizes_of
from adapters_jax.methods.settings import number, size
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Added, Change
from adapters_jax.weights.factors import RANK, Factor


@dataclass(frozen=True)
class LoHa(Ranked):
    """Whatever reads W sees `W + scale (A1 B1) * (A2 B2)`, with an entrywise product.

    Its rank can be r^2, with twice the parameters of LoRA at r. A1 and A2 have the weight's input
    axes and the rank, B1 and B2 the rank and its output axes, as in LoRA; all have the axes of
    stacked layers and experts. The sum is formed where the weight is read. A2 starts at zero, A1
    uniform within 1/sqrt(in), B1 and B2 within 1/sqrt(r), as in PEFT. Leaves are float32.

    Args:
        targets: patterns of modules, or of leaves.
        rank: r.
        alpha: None means r. The scale is alpha / r.
        rank_pattern: other ranks for some targets, a mapping from patterns; the first match counts.
        alpha_pattern: likewise other alphas.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> point = AttachmentPoint("weight", "q", {"kernel": (8, 6)}, weight="kernel",
        ...                         axes=Axes((0,), (1,)))
        >>> {name: leaf.shape for name, leaf in LoHa("q", rank=2).leaves(point).items()}
        {'a1': (8, 2), 'b1': (2, 6), 'a2': (8, 2), 'b2': (2, 6)}
    """

    kind: ClassVar[str] = "loha"
    slot: ClassVar[str] = "loha"
    paper: ClassVar[str] = "2108.06098"
    leaf_names: ClassVar[tuple[str, ...]] = ("a1", "b1", "a2", "b2")  # type: ignore[misc]

    targets: str | tuple[str, ...]
    rank: int = size(8)
    alpha: float | None = number(None)
    rank_pattern: Any = ()
    alpha_pattern: Any = ()

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of the factors."""
        return {"a1": axes.a, "b1": axes.b, "a2": axes.a, "b2": axes.b}

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The four factors of one weight."""
        axes, shape, rank = point.axes, point.weight_shape, self.rank_at(point.path)
        a, b = arrays.uniform(1 / math.sqrt(axes.sizes(shape)[0])), arrays.uniform(rank**-0.5)
        a_shape, b_shape = axes.a_shape(shape, rank), axes.b_shape(shape, rank)
        return {
            "a1": Leaf(a_shape, a),
            "b1": Leaf(b_shape, b),
            "a2": Leaf(a_shape, arrays.zeros),
            "b2": Leaf(b_shape, b),
        }

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form 2 r (in + out)."""
        rank = self.rank_at(path)
        fan_in, fan_out, copies = sizes_of(shapes["a1"], shapes["b1"], weight)
        return Count(f"2*{rank}*({fan_in} + {fan_out})", 2 * rank * (fan_in + fan_out), copies)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        return {**leaves, "b2": -leaves["b2"]}

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The entrywise product of both products."""
        axes, own = point.axes, self.weight_axes(point.axes, point.path)
        scaled = {**leaves, "b1": self.scale_at(point.path) * leaves["b1"]}
        arrays = tuple(
            Factor(scaled[name], tuple(i if i in axes.shared else RANK for i in own[name]))
            for name in self.leaf_names
        )
        return {point.weight: (Added(arrays, hadamard, (*axes.inputs, *axes.outputs)),)}


def hadamard(
    a1: Float[Array, "..."],
    b1: Float[Array, "..."],
    a2: Float[Array, "..."],
    b2: Float[Array, "..."],
) -> Float[Array, "in out"]:
    """`(A1 B1) * (A2 B2)` of factors with the rank as last axis of A, and as first one of B.

    Example:
        >>> hadamard(*(n * jnp.ones((2, 2)) for n in (1, 2, 3, 4)))[0]
        Array([96., 96.], dtype=float32)
    """
    r = a1.shape[-1]
    one, two = (
        jnp.matmul(a.reshape(-1, r), b.reshape(r, -1), precision="highest")
        for a, b in ((a1, b1), (a2, b2))
    )
    return one * two
