"""Adapters for plain functions of parameters, and for Equinox and Haiku, which are built on such.

- `function`: a function as a model whose parameters are given by path.
- `modules`: where it calls modules; `equinox` and `haiku` mark these calls.
"""

from adapters_jax.linen.functions.function import AdaptedFunction, Function, adapt

__all__ = ["AdaptedFunction", "Function", "adapt"]
