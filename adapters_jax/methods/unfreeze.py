"""Unfreezing: training parameters of the base, such as heads, layer norms and biases."""

from dataclasses import dataclass
from typing import ClassVar

from adapters_jax.methods.base import Method


@dataclass(frozen=True)
class Unfreeze(Method):
    """Trains parameters that the base already has.

    Args:
        targets: patterns of parameter paths, not of modules: `head/**`, `**/bias`.

    Raises:
        TargetError: `targets` are no patterns.

    Example:
        >>> Unfreeze("head/**")
        Unfreeze(targets=('head/**',))
    """

    kind: ClassVar[str] = "unfreeze"
    slot: ClassVar[None] = None
