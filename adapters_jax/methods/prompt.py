"""What methods that act inside an attention module have in common."""

from typing import Any, ClassVar

from adapters_jax import attention
from adapters_jax.attention import Attention
from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import Site


class Prompt:
    """A method that acts where an attention module calls its function, by `attend`."""

    dropout: ClassVar[float] = 0.0
    from_weight: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        """Whether the method can attach there: to every attention module that is known."""
        return site.attention is not None

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return attention.why_not(module)


def grouped(site: Site, owner: str) -> Attention:
    """The sizes of a site; raises RecipeError where heads do not divide among the key heads."""
    sizes = site.attention
    if sizes is None:
        raise RecipeError(f"{owner} cannot attach to {site.path!r}: no known attention module")
    if sizes.heads % sizes.kv_heads:
        raise RecipeError(
            f"{owner} at {site.path!r}: {sizes.heads} query heads do not divide into groups for "
            f"{sizes.kv_heads} key heads; target attention modules whose heads do"
        )
    return sizes
