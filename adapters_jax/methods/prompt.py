"""What methods that act inside an attention module have in common."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import AttachmentPoint, Method
from adapters_jax.weights import attention
from adapters_jax.weights.attention import Attention


@dataclass(frozen=True)
class Prompt(Method):
    """A method that acts where an attention module calls its function."""

    acts_on: ClassVar[Literal["output", "attention"]] = "attention"

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the method can attach there: to every attention module that is known."""
        return point.attention is not None

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return attention.why_not(module)


def grouped(point: AttachmentPoint, owner: str) -> Attention:
    """The sizes at a point; raises RecipeError where heads do not divide among the key heads."""
    sizes = point.attention
    if sizes is None:
        raise RecipeError(f"{owner} cannot attach to {point.path!r}: no known attention module")
    if sizes.heads % sizes.kv_heads:
        raise RecipeError(
            f"{owner} at {point.path!r}: {sizes.heads} query heads do not divide into groups for "
            f"{sizes.kv_heads} key heads; target attention modules whose heads do"
        )
    return sizes
