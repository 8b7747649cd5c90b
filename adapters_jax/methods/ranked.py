"""`Ranked`: the rank and the scale of methods whose targets may differ in them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.targets import matches


@dataclass(frozen=True)
class Ranked(LeafMethod):
    """A method on weights with the fields rank, alpha, rank_pattern and alpha_pattern.

    Subclasses define them, in an order and with defaults of their own.
    """

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
