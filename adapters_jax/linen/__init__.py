"""The linen API: adapters inside modules that nobody edits.

- `adapted`: `adapt` wraps a module; `init_adapters` grows the leaves.
- `interceptor`: what happens inside the running model; `attachment`: and at one module of it.
- `modules`: adapters as modules, to write by hand.
"""

from adapters_jax.linen.adapted import Adapted, adapt, init_adapters, points, seen, shapes_of
from adapters_jax.linen.modules import Bottleneck, LoRADense

__all__ = [
    "Adapted",
    "Bottleneck",
    "LoRADense",
    "adapt",
    "init_adapters",
    "points",
    "seen",
    "shapes_of",
]
