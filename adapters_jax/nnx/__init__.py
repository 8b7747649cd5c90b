"""The NNX API: adapters inside modules that nobody edits.

- `adapted`: `adapt` copies a model's structure and attaches the adapters; `detach` removes them.
- `points`: the attachment points of a model, read off its modules and an abstract run.
- `classes`: the class of an adapted module, whose calls run its adapters.
- `containers`: plain containers of weights; `linen_inside`: linen modules in NNX models.
- `quantized_weights`: the Variable of a quantised weight.
- `known`: the axes of the weights of flax's own layers.
- `graph`: modules, parameters and adapters by path.
- `modules`: adapters as modules, to write into a model by hand.
"""

from adapters_jax.nnx.adapted import adapt, adapted_points, detach, recipe_of
from adapters_jax.nnx.graph import (
    ADAPTERS,
    AdapterParam,
    FrozenAdapterParam,
    copy,
    leaves_of,
    modules_of,
    own_params,
    params_of,
)
from adapters_jax.nnx.modules import Bottleneck, LoRALinear
from adapters_jax.nnx.points import weights_of
from adapters_jax.nnx.quantized_weights import QuantizedParam, float_again, quantized_in_place

__all__ = [
    "ADAPTERS",
    "AdapterParam",
    "Bottleneck",
    "FrozenAdapterParam",
    "LoRALinear",
    "QuantizedParam",
    "adapt",
    "adapted_points",
    "copy",
    "detach",
    "float_again",
    "leaves_of",
    "modules_of",
    "own_params",
    "params_of",
    "quantized_in_place",
    "recipe_of",
    "weights_of",
]
