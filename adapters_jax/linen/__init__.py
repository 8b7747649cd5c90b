"""The linen API: adapters inside modules that nobody edits.

- `adapted`: `adapt` wraps a module.
- `starting`: `init_adapters` adds the adapters' leaves to its parameters.
- `interceptor`: runs the adapters inside a running model.
- `weights`: how a model reads its weights, and its parameters with the changed ones.
- `modules`: adapters as modules, to write into a model by hand.
- `functions`: adapters for plain functions of parameters, and for Equinox and Haiku.
"""

from adapters_jax.linen.adapted import Adapted, adapt
from adapters_jax.linen.interceptor import Interceptor
from adapters_jax.linen.modules import Bottleneck, LoRADense
from adapters_jax.linen.points import seen, shapes_of
from adapters_jax.linen.starting import init_adapters, points
from adapters_jax.linen.weights import reads_of, run_abstractly

__all__ = [
    "Adapted",
    "Bottleneck",
    "Interceptor",
    "LoRADense",
    "adapt",
    "init_adapters",
    "points",
    "reads_of",
    "run_abstractly",
    "seen",
    "shapes_of",
]
