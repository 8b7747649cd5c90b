"""LoKr: a change of a weight that is a Kronecker product.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650;
with a low-rank right factor Yeh et al. 2024, "LyCORIS", arXiv:2309.14859.
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
from adapters_jax.methods.settings import flag, number, size
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change, Formed
from adapters_jax.weights.factors import RANK, Factor

LEFT, LEFT_A, LEFT_B = "w1", "w1_a", "w1_b"
RIGHT, RIGHT_A, RIGHT_B = "w2", "w2_a", "w2_b"


def divided(n: int, factor: int | None = None) -> tuple[int, int]:
    """Two numbers whose product is n, as LyCORIS and PEFT divide it.

    Args:
        n: the number.
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
    stated: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")
    pattern_fields: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}

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
        left = (LEFT_A, LEFT_B) if self.both else (LEFT,)
        return (*left, *((RIGHT,) if self.full else (RIGHT_A, RIGHT_B)))

    def shapes_at(self, fan_in: int, fan_out: int, path: str) -> dict[str, tuple[int, int]]:
        """The shapes of all leaves of a weight at a path, without the axes of layers."""
        (m, n), (k, o) = divided(fan_in, self.factor), divided(fan_out, self.factor)
        r = self.rank_at(path)
        every = {LEFT: (m, k), LEFT_A: (m, r), LEFT_B: (r, k)}
        every |= {RIGHT: (n, o), RIGHT_A: (n, r), RIGHT_B: (r, o)}
        return {name: every[name] for name in self.leaf_names}

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors of one weight."""
        axes, shape = point.axes, point.weight_shape
        front = tuple(shape[i] for i in axes.shared)
        found = {}
        for name, own in self.shapes_at(*axes.sizes(shape)[:2], point.path).items():
            # torch takes the last axis of its (out, in) for the input; one factor of W1 is enough.
            start = arrays.zeros if name in (LEFT, LEFT_B) else arrays.uniform(own[0] ** -0.5)
            found[name] = Leaf((*front, *own), start)
        return found

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form, m k or r (m + k), and n l or r (n + l)."""
        own = {name: shape[-2:] for name, shape in shapes.items()}
        (m, k) = own.get(LEFT) or (own[LEFT_A][0], own[LEFT_B][1])
        (n, o) = own.get(RIGHT) or (own[RIGHT_A][0], own[RIGHT_B][1])
        rank = self.rank_at(path)
        left = f"{rank}*({m} + {k})" if self.both else f"{m}*{k}"
        right = f"{n}*{o}" if self.full else f"{rank}*({n} + {o})"
        value = (rank * (m + k) if self.both else m * k) + (n * o if self.full else rank * (n + o))
        return Count(f"{left} + {right}", value, math.prod(weight) // (m * n * k * o))

    def infer(
        self, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...], path: str
    ) -> Axes | None:
        """The roles of the weight's axes by the sizes of the factors."""
        left = shapes[self.leaf_names[0]]
        n, every = len(left) - 2, tuple(range(len(weight)))
        own = {name: shape[-2:] for name, shape in shapes.items()}
        for end in every[n + 1 :]:
            fan_in, fan_out = math.prod(weight[n:end]), math.prod(weight[end:])
            if left[:n] == weight[:n] and self.shapes_at(fan_in, fan_out, path) == own:
                return Axes(every[n:end], every[end:], every[:n])
        return None

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        name = self.leaf_names[0]
        return {**leaves, name: -leaves[name]}

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
        """The Kronecker product."""
        axes, shape = point.axes, point.weight_shape
        own = tuple(Factor(leaves[name], (*axes.shared, RANK, RANK)) for name in self.leaf_names)
        sizes = tuple(shape[i] for i in (*axes.inputs, *axes.outputs))
        make = Kronecker(sizes, self.scale_at(point.path), self.both)
        return {point.weight: (Formed(own, make, (*axes.inputs, *axes.outputs)),)}


@dataclass(frozen=True)
class Kronecker:
    """Makes `scale kron(W1, W2)` in the shape of the inputs and outputs.

    Attributes:
        shape: this shape.
        scale: multiplies the product.
        both: whether W1 is two factors.
    """

    shape: tuple[int, ...]
    scale: float
    both: bool

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        """The change, from W1 and W2 or their factors."""
        left, right = (arrays[:2], arrays[2:]) if self.both else (arrays[:1], arrays[1:])
        one, two = (
            each[0] if len(each) == 1 else jnp.matmul(*each, precision="highest")
            for each in (left, right)
        )
        return (self.scale * jnp.kron(one, two)).reshape(self.shape)
