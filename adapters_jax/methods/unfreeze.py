"""Training some of the base's own parameters: heads, layer norms, biases, whole layers."""

from dataclasses import dataclass
from typing import ClassVar

from adapters_jax.targets import as_patterns


@dataclass(frozen=True)
class Unfreeze:
    """Trains parameters that the base already has.

    Args:
        targets: patterns of parameter paths, not of modules: `head/**`, `**/bias`.

    Example:
        >>> Unfreeze("head/**")
        Unfreeze(targets=('head/**',))
    """

    name: ClassVar[str] = "unfreeze"
    stated: ClassVar[tuple[str, ...]] = ("targets",)

    targets: str | tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_patterns(self.targets, "Unfreeze"))
