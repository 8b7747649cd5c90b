"""LoKr: a change of a weight that is a Kronecker product.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650;
with a low-rank right factor Yeh et al. 2024, "LyCORIS", arXiv:2309.14859.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.ranked import Ranked
from adapters_jax.methods.settings import flag, number, size
from adapters_jax.weights.axes import Axes, halves
from adapters_jax.weights.changes import Added, Change
from adapters_jax.weights.factors import RANK, Factor


def divided(n: int, factor: int | None = None) -> tuple[int, int]:
    """Two numbers whose product is n, as PEFT divides it.

    LyCORIS puts the smaller one first in every case, so that its files of sizes below the square of
    a factor have another order.

    Args:
        factor: the first one, if it divides n; else the first one is the largest divisor that is
            neither above it nor above the square root, which alone counts where it is None.

    Example:
        >>> divided(768), divided(768, 8), divided(128, 32), divided(7)
        ((24, 32), (8, 96), (32, 4), (1, 7))
    """
    if factor is not None and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor is None else min(factor, math.isqrt(n))
    small = next(i for i in range(most, 0, -1) if n % i == 0)
    return small, n // small


@dataclass(frozen=True)
class LoKr(Ranked):
    """Whatever reads W sees `W + scale kron(W1, W2)`, with a small W1 and a low-rank W2.

    The inputs are m n and the outputs k l (see `divided`). W1 is (m, k), W2 = A B with A (n, r) and
    B (r, l); all have the axes of stacked layers and experts in front. The sum is formed where the
    weight is read. W1 starts at zero, the others uniform, as in PEFT. Leaves are float32.

    Args:
        targets: patterns of modules, or of leaves.
        rank: r.
        alpha: None means r. The scale is alpha / r.
        factor: the wanted m and k; None is near the square roots.
        full: W2 is (n, l) itself, instead of two factors.
        both: W1 is a product of (m, r) and (r, k) as well.
        rank_pattern: other ranks for some targets, a mapping from patterns; the first match counts.
        alpha_pattern: likewise other alphas.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> point = AttachmentPoint("weight", "q", {"kernel": (8, 6)}, weight="kernel",
        ...                         axes=Axes((0,), (1,)))
        >>> {name: leaf.shape for name, leaf in LoKr("q", rank=2).leaves(point).items()}
        {'w1': (2, 2), 'w2_a': (4, 2), 'w2_b': (2, 3)}
    """

    kind: ClassVar[str] = "lokr"
    slot: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "2212.10650"

    targets: str | tuple[str, ...]
    rank: int = size(8)
    alpha: float | None = number(None)
    factor: int | None = size(None)
    full: bool = flag(False)
    both: bool = flag(False)
    rank_pattern: Any = ()
    alpha_pattern: Any = ()

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """W1 or its factors, then W2 or its factors."""
        left = ("w1_a", "w1_b") if self.both else ("w1",)
        return (*left, *(("w2",) if self.full else ("w2_a", "w2_b")))

    def shapes_at(self, fan_in: int, fan_out: int, path: str) -> dict[str, tuple[int, int]]:
        """The shapes of all leaves of a weight at a path, without the axes of layers."""
        pairs = zip(divided(fan_in, self.factor), divided(fan_out, self.factor), strict=True)
        found, r = dict[str, tuple[int, int]](), self.rank_at(path)
        for name, (m, k) in zip(("w1", "w2"), pairs, strict=True):
            found |= {name: (m, k), f"{name}_a": (m, r), f"{name}_b": (r, k)}
        return {name: found[name] for name in self.leaf_names}

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors of one weight."""
        axes, shape = point.axes, point.weight_shape
        front = tuple(shape[i] for i in axes.shared)
        own = self.shapes_at(*axes.sizes(shape)[:2], point.path)
        # One factor of W1 is enough for a start at the base.
        inits = {n: arrays.uniform(m**-0.5) for n, (m, _) in own.items()}
        inits |= dict.fromkeys(("w1", "w1_b"), arrays.zeros)
        return {name: Leaf((*front, *size), inits[name]) for name, size in own.items()}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form, the entries of W1 and W2, or of their factors."""
        left, right = (shapes[self.leaf_names[i]] for i in (0, 1 + self.both))
        fan_in = left[-2] * right[-2]
        fan_out = math.prod(weight) // (math.prod(left[:-2]) * fan_in)
        return Count.of(self.shapes_at(fan_in, fan_out, path).values(), left[:-2])

    def infer(self, shapes: Shapes, weight: Shape, path: str) -> Axes | None:
        """The roles of the weight's axes by the sizes of the factors."""
        own = {name: shape[-2:] for name, shape in shapes.items()}
        fits = lambda fan_in, fan_out: self.shapes_at(fan_in, fan_out, path) == own  # noqa: E731
        return halves(weight, shapes[self.leaf_names[0]][:-2], fits)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        name = self.leaf_names[0]
        return {**leaves, name: -leaves[name]}

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The Kronecker product."""
        sides, axes = dict(leaves), point.axes
        for name in {"w1", "w2"} - leaves.keys():
            a, b = leaves[f"{name}_a"], leaves[f"{name}_b"]
            sides[name] = jnp.matmul(a, b, precision="highest")
        both = (self.scale_at(point.path) * sides["w1"], sides["w2"])
        arrays = tuple(Factor(each, (*axes.shared, RANK, RANK)) for each in both)
        return {point.weight: (Added(arrays, jnp.kron, (*axes.inputs, *axes.outputs)),)}
