"""What methods that act inside an attention module have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods.base import Leaves, Site
from adapters_jax.weights import attention
from adapters_jax.weights.attention import Attention, AttentionFn


class Prompt(ABC):
    """A method that acts where an attention module calls its function."""

    slot: ClassVar[str]
    leaf_names: ClassVar[tuple[str, ...]]
    dropout: ClassVar[float] = 0.0
    from_weight: ClassVar[bool] = False

    @abstractmethod
    def attend(
        self,
        leaves: Leaves,
        site: Site,
        project: Callable[[str, Array], Array],
        attention_fn: AttentionFn,
        *args: Any,
        **kwargs: Any,
    ) -> Array:
        """What the attention function returns, with the prompt.

        Args:
            leaves: the method's arrays by name.
            site: the attention module they are attached to.
            project: `project("key", x)` is the module's own projection of x, (K, d).
            attention_fn: the module's attention function.
            *args: what it is called with: query, key and value first.
            **kwargs: likewise.
        """

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
