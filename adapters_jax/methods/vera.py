"""VeRA: trained scales of random factors that all modules have in common.

Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, zeros
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.methods.settings import number, size
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change, LowRank
from adapters_jax.weights.factors import RANK, Factor


def _he(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """He's uniform start of a matrix (in, out), as in the authors' code and PEFT."""
    return arrays.uniform(math.sqrt(6 / shape[0]))(key, shape)


@dataclass(frozen=True)
class VeRA(LeafMethod):
    """Whatever reads W sees `W + A diag(d) B diag(b)`: d and b train, A and B are random.

    A is (in, r) and B (r, out), of all modules of the entry: they are stored once, at the top of
    the tree, as large as the largest module needs, and do not train. Other modules use the first
    rows of A and the first columns of B. d is (r,) and b (out,), with the axes of stacked layers
    and experts in front; d starts at `d_initial`, b at zero. A product with an input is
    `x W + ((x A) * d) B * b`. Leaves are float32.

    Args:
        targets: patterns of modules, or of leaves.
        rank: r.
        d_initial: where d starts.
        dropout: probability of zeroing an entry of the product's input while training.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> point = AttachmentPoint("weight", "q", {"kernel": (8, 6)}, weight="kernel",
        ...                         axes=Axes((0,), (1,)))
        >>> {name: leaf.shape for name, leaf in VeRA("q", rank=4).leaves(point).items()}
        {'d': (4,), 'b': (6,), 'left': (8, 4), 'right': (4, 6)}
    """

    kind: ClassVar[str] = "vera"
    slot: ClassVar[str] = "vera"
    paper: ClassVar[str] = "2310.11454"
    size_fields: ClassVar[tuple[str, ...]] = ("d_initial", "dropout")
    leaf_names: ClassVar[tuple[str, ...]] = ("d", "b", "left", "right")  # type: ignore[misc]
    shared_leaves: ClassVar[tuple[str, ...]] = ("left", "right")
    frozen_leaves: ClassVar[tuple[str, ...]] = shared_leaves
    cut_leaves: ClassVar[tuple[str, ...]] = shared_leaves
    stated: ClassVar[tuple[str, ...]] = ("targets", "rank")
    neutral = zeros

    targets: str | tuple[str, ...]
    rank: int = size(256)
    d_initial: float = number(0.1, low=-math.inf)
    dropout: float = number(0.0, high=1.0, closed=True)

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of d and b."""
        return {"d": (*axes.shared, RANK), "b": (*axes.shared, *axes.outputs)}

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The scales of one weight, and the factors that it shares with others."""
        axes, shape, rank = point.axes, point.weight_shape, self.rank
        fan_in, fan_out, _ = axes.sizes(shape)
        stacked = tuple(shape[i] for i in axes.shared)
        return {
            "d": Leaf((*stacked, rank), lambda key, shape: jnp.full(shape, self.d_initial)),
            "b": Leaf((*stacked, *(shape[i] for i in axes.outputs)), arrays.zeros),
            "left": Leaf((fan_in, rank), _he),
            "right": Leaf((rank, fan_out), _he),
        }

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form r + out."""
        layers = math.prod(shapes["d"][:-1])
        outputs = math.prod(shapes["b"]) // layers
        return Count(f"{self.rank} + {outputs}", self.rank + outputs, layers)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        return {**leaves, "b": -leaves["b"]}

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The low-rank change of the weight."""
        axes, shape = point.axes, point.weight_shape
        fan_in, fan_out, _ = axes.sizes(shape)
        inputs, outputs = (tuple(shape[i] for i in x) for x in (axes.inputs, axes.outputs))
        left = leaves["left"][:fan_in].reshape(*inputs, self.rank)
        right = leaves["right"][:, :fan_out].reshape(self.rank, *outputs)
        own = self.weight_axes(axes, point.path)
        d, b = (Factor(leaves[name], own[name]) for name in ("d", "b"))
        scaled = Factor(right, (RANK, *axes.outputs)) * d * b
        a = Factor(left, (*axes.inputs, RANK))
        return {point.weight: (LowRank(a, scaled, None, self.dropout, key),)}
