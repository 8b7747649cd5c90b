"""The linen API: adapters inside modules that nobody edits.

- `adapted`: `adapt` wraps a module; `init_adapters` adds the adapters' leaves to its parameters.
- `interceptor`: runs the adapters inside a running model; `attachment`: one method on one module.
- `quantized_layers`: the call of a layer whose weight is quantised.
- `modules`: adapters as modules, to write into a model by hand.
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
