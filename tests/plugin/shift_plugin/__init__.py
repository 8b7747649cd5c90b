"""A method of another package: a trained number is added to each channel of an output."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

import adapters_jax as aj


@aj.register_method
@dataclass(frozen=True)
class Shift(aj.Method):
    """`y + strength * b` on the outputs of modules, b starting at zero."""

    kind: ClassVar[str] = "shift"
    slot: ClassVar[str] = "shift"
    leaf_names: ClassVar[tuple[str, ...]] = ("bias",)

    strength: float = 1.0

    def leaves(self, point):
        return {"bias": aj.Leaf((point.width,), lambda key, shape: jnp.zeros(shape))}

    def count(self, path, shapes, weight):
        *layers, d = shapes["bias"]
        return aj.Count(f"{d}", d, math.prod(layers))

    def forward(self, leaves, point, x, y, key=None):
        bias = (self.strength * leaves["bias"]).astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    def merged(self, leaves, point, own):
        if "bias" not in own:
            raise aj.RecipeError(f"merge: {point.path!r} has no bias that could take Shift's")
        shift = (self.strength * leaves["bias"]).reshape(own["bias"].shape)
        return {"bias": (own["bias"].astype(jnp.float32) + shift).astype(own["bias"].dtype)}

    def inverse(self, leaves, point):
        return {"bias": -leaves["bias"]}
