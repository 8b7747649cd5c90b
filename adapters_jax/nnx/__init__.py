"""The NNX API: adapters inside modules that nobody edits.

- `adapted`: `adapt` copies a model's structure and attaches the adapters.
- `points`: where they can attach, by an abstract run, and what one module says of itself.
- `attachment`: what an adapted module is made of.
- `quantized_layers`: a quantised weight, and the class of the layer that reads it.
- `modules`: adapters as modules, to write by hand.
"""

from adapters_jax.nnx.adapted import adapt, adapted_points, detach, recipe_of
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
    "adapted_points",
    "copy",
    "detach",
    "float_again",
    "leaves_of",
    "modules_of",
    "quantized_in_place",
    "recipe_of",
]
