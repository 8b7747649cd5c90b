"""`Ranked`: the rank and the scale of methods whose targets may differ in them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapters_jax.methods.arrays import Shape
from adapters_jax.methods.base import zeros
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.targets import matches


@dataclass(frozen=True)
class Ranked(LeafMethod):
    """A method on weights with the fields rank, alpha, rank_pattern and alpha_pattern.

    Subclasses define them, in an order and with defaults of their own.
    """

    stated: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")
    pattern_fields: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    neutral = zeros

    if TYPE_CHECKING:
        rank: int
        alpha: float | None
        rank_pattern: Any
        alpha_pattern: Any

    def rank_at(self, path: str) -> int:
        """The rank at one target."""
        return next((r for p, r in self.rank_pattern if matches(p, path)), self.rank)

    def scale_at(self, path: str) -> float:
        """The factor on the change at one target, alpha / r."""
        rank = self.rank_at(path)
        alpha = next((a for p, a in self.alpha_pattern if matches(p, path)), self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / self.divisor(rank)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by."""
        return rank


def exceeds(a: Shape, b: Shape, weight: Shape) -> bool:
    """Whether factors have a higher rank than their product can.

    Example:
        >>> exceeds((8, 4), (4, 1), (8, 1)), exceeds((8, 1), (1, 1), (8, 1))
        (True, False)
    """
    fan_in, fan_out, _ = sizes_of(a, b, weight)
    return a[-1] > min(fan_in, fan_out)


def sizes_of(a: Shape, b: Shape, weight: Shape) -> tuple[int, int, int]:
    """The fan-in, the fan-out and the number of pairs of factors with these shapes.

    Example:
        >>> sizes_of((5, 8, 2), (5, 2, 6), (5, 8, 6))
        (8, 6, 5)
    """
    # Together A and B have the axes of the weight and the rank twice; axes of layers and experts
    # are in both, and so once more.
    n = len(a) + len(b) - 2 - len(weight)
    # Factors that disagree are wrong: the weight then says how many pairs are expected, and the
    # audit reports the difference.
    copies = a[:n] if a[:n] == b[:n] else weight[:n]
    fan_in = math.prod(a[len(copies) : -1])
    return fan_in, math.prod(weight) // (math.prod(copies) * fan_in), math.prod(copies)
