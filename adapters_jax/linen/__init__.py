"""The linen front door: adapters inside modules that nobody edits.

- `door`: `adapt` wraps a module; `init_adapters` grows the leaves.
- `intercept`: what happens inside the running model; `site`: and at one module of it.
- `layers`: adapters as modules, to write by hand.
"""

from adapters_jax.linen.adapted import Adapted, adapt, init_adapters, seen, shapes_of, sites
from adapters_jax.linen.modules import Bottleneck, LoRADense

__all__ = [
    "Adapted",
    "Bottleneck",
    "LoRADense",
    "adapt",
    "init_adapters",
    "seen",
    "shapes_of",
    "sites",
]
