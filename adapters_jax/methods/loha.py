"""LoHa: a change of a weight that is the entrywise product of two low-rank products.

Hyeon-Woo et al. 2022, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", arXiv:2108.06098; for fine-tuning Yeh et al. 2024, "LyCORIS", arXiv:2309.14859.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.methods import arrays
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, zeros_like
from adapters_jax.methods.ranked import Ranked
from adapters_jax.methods.settings import number, size
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change, Formed
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
    stated: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")
    pattern_fields: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}

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

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form 2 r (in + out)."""
        rank, a, b = self.rank_at(path), shapes["a1"], shapes["b1"]
        n = len(a) + len(b) - 2 - len(weight)
        fan_in = math.prod(a[n:-1])
        fan_out = math.prod(weight) // (math.prod(a[:n]) * fan_in)
        value = 2 * rank * (fan_in + fan_out)
        return Count(f"2*{rank}*({fan_in} + {fan_out})", value, math.prod(a[:n]))

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        return {**leaves, "b2": -leaves["b2"]}

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Factors of zeros."""
        return zeros_like(leaves)

    def changes(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        weight: Callable[[], Array],
        key: PRNGKeyArray | None = None,
    ) -> dict[str, tuple[Change, ...]]:
        """The entrywise product of both products."""
        axes, shape = point.axes, point.weight_shape
        sizes = tuple(shape[i] for i in (*axes.inputs, *axes.outputs))
        own = self.weight_axes(axes, point.path)
        factors = tuple(
            Factor(leaves[name], tuple(i if i in axes.shared else RANK for i in own[name]))
            for name in self.leaf_names
        )
        make = Hadamard(sizes, self.scale_at(point.path))
        return {point.weight: (Formed(factors, make, (*axes.inputs, *axes.outputs)),)}


@dataclass(frozen=True)
class Hadamard:
    """Makes `scale (A1 B1) * (A2 B2)` in the shape of the inputs and outputs.

    Attributes:
        shape: this shape.
        scale: multiplies the product.
    """

    shape: tuple[int, ...]
    scale: float

    def __call__(self, *factors: Float[Array, "..."]) -> Float[Array, "..."]:
        """The change, from A1, B1, A2 and B2."""
        a1, b1, a2, b2 = factors
        rank = a1.shape[-1]
        products = (
            jnp.matmul(a.reshape(-1, rank), b.reshape(rank, -1), precision="highest")
            for a, b in ((a1, b1), (a2, b2))
        )
        one, two = products
        return (self.scale * one * two).reshape(self.shape)
