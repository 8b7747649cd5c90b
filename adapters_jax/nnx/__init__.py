"""The NNX front door: adapters inside modules that nobody edits.

- `door`: `adapt` copies a model's structure and attaches the adapters.
- `trace`: where they can attach, by an abstract run; `site`: what one module says of itself.
- `attach`: what an adapted module is made of.
- `frozen`: a quantised weight, and the class of the layer that reads it.
- `layers`: adapters as modules, to write by hand.
"""

from adapters_jax.nnx.adapted import adapt, adapted_sites, detach, recipe_of
from adapters_jax.nnx.attachment import AdapterParam, leaves_of
from adapters_jax.nnx.graph import copy, modules_of
from adapters_jax.nnx.modules import Bottleneck, LoRALinear
from adapters_jax.nnx.quantized_layers import QuantizedParam, float_again, quantized_in_place

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
