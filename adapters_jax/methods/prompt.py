"""`Prompt`: the base class of methods that act inside an attention module."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import AttachmentPoint, Method
from adapters_jax.weights import attention
from adapters_jax.weights.attention import Attention


@dataclass(frozen=True)
class Prompt(Method):
    """A method that changes the call of a module's attention function."""

    acts_on: ClassVar[Literal["output", "attention"]] = "attention"

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the module is a known attention module."""
        return point.attention is not None

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return attention.why_not(module)


def grouped(point: AttachmentPoint, owner: str) -> Attention:
    """The sizes at a point; raises RecipeError unless heads are a multiple of key heads."""
    sizes = point.attention
    if sizes is None:
        raise RecipeError(f"{owner} at {point.path!r}: the module is no known attention module")
    if sizes.heads % sizes.kv_heads:
        raise RecipeError(
            f"{owner} at {point.path!r}: {sizes.heads} query heads, expected a multiple of the "
            f"{sizes.kv_heads} key heads; target other attention modules"
        )
    return sizes
