"""The NNX front door: adapters inside modules that nobody edits.

- `door`: `adapt` copies a model's structure and attaches the adapters.
- `trace`: where they can attach, by an abstract run; `site`: what one module says of itself.
- `attach`: what an adapted module is made of.
- `frozen`: a quantised weight, and the class of the layer that reads it.
- `layers`: adapters as modules, to write by hand.
"""

from adapters_jax.nnx.attach import AdapterParam, copy, leaves_of, modules_of
from adapters_jax.nnx.door import adapt, adapted_sites, detach, recipe_of
from adapters_jax.nnx.frozen import QuantizedParam, float_again, quantized_in_place
from adapters_jax.nnx.layers import Bottleneck, LoRALinear

__all__ = [
    "AdapterParam",
    "Bottleneck",
    "LoRALinear",
    "QuantizedParam",
    "adapt",
    "adapted_sites",
    "copy",
    "detach",
    "float_again",
    "leaves_of",
    "modules_of",
    "quantized_in_place",
    "recipe_of",
]
