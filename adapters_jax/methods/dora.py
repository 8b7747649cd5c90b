"""DoRA: low-rank factors that change the directions of a weight, and trained magnitudes.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError
from adapters_jax.methods.arrays import beside
from adapters_jax.methods.base import (
    AttachmentPoint,
    Count,
    Frozen,
    Leaf,
    Leaves,
    Method,
    contraction_of,
    nothing,
)
from adapters_jax.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA whose adapted weight has a trained norm for each output.

    `m * (W + scale A B) / |W + scale A B|`, where the norm runs over the inputs of each output. m
    starts at the norm of W, so that the output starts as the base's, up to rounding. The norm is
    not differentiated (section 4.3 of the paper), and the layer's bias is not scaled. Norms are
    computed in float32. DoRA attaches to layers whose outputs are their last axes, such as dense
    layers and convolutions.

    Args: as in `LoRA`, without `slices`.

    Example:
        >>> DoRA("**/query", rank=4).leaf_names
        ('a', 'b', 'magnitude')
    """

    name: ClassVar[str] = "dora"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")  # type: ignore[misc]

    @property
    def from_weight(self) -> Literal["", "reads", "changes"]:
        """The magnitude starts at the weight's norm."""
        return super().from_weight or "reads"

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the module is a linear layer whose outputs are its last axes."""
        found = point.contraction
        return found is not None and not found.lookup and found.trailing

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        name = type(module).__name__
        return f"{super().why_not(module)}; or the outputs of {name} are not its last axes"

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors, and the magnitude of the weight's output axes."""
        _, outputs = contraction_of(point).split_shape(point.weight_shape)
        return {**super().leaves(point), "magnitude": Leaf(outputs, lambda key, s: jnp.ones(s))}

    def start(
        self, leaves: Leaves, point: AttachmentPoint, weight: Float[Array, "..."]
    ) -> tuple[dict[str, Array], Array]:
        """The initial leaves given the weight, and the weight to keep in the base."""
        magnitude = _norm(weight, point)
        factors, rest = super().start(leaves, point, weight)
        return {**factors, "magnitude": magnitude}, rest

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form r(in + out) + out."""
        pair = super().count(path, shapes, weight)
        copies = len(shapes["a"]) + len(shapes["b"]) - 2 - len(weight)
        out = math.prod(weight[copies:]) // math.prod(shapes["a"][copies:-1])
        return Count(f"{pair.formula} + {out}", pair.parameters + out, pair.copies)

    def merged(
        self, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The adapted weight, computed in float32 and cast once to the weight's dtype."""
        layer = contraction_of(point)
        weight = own[layer.weight]
        changed = weight.astype(jnp.float32) + self.delta(leaves, point, weight)
        ratio = leaves["magnitude"].astype(jnp.float32) / _norm(changed, point)
        changed = changed * jnp.expand_dims(ratio, layer.inputs)
        return {layer.weight: changed.astype(weight.dtype)}

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Raises RecipeError: the weight is rescaled, which DoRA leaves cannot undo."""
        return Method.inverse(self, leaves, point)

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """Raises RecipeError: the change is not a product of two factors."""
        return Method.factors(self, leaves, path)

    def forward(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        x: Any,
        y: Float[Array, "..."],
        key: PRNGKeyArray | None = None,
        frozen: Frozen = nothing,
    ) -> Float[Array, "..."]:
        """The adapted output; the arguments are those of `LoRA.forward`."""
        weight, bias = frozen(contraction_of(point).weight), frozen("bias")
        if weight is None:
            raise RecipeError(
                f"DoRA at {point.path!r} needs the layer's weight; attach it with aj.adapt"
            )
        detached = jax.lax.stop_gradient(self.delta(leaves, point, weight))
        norm = _norm(weight.astype(jnp.float32) + detached, point)
        ratio = (leaves["magnitude"] / norm).astype(y.dtype)
        shift = jnp.zeros((), y.dtype) if bias is None else beside(bias.astype(y.dtype), y)
        changed = (y - shift) + self.branch(leaves, point, x, y, key)
        return beside(ratio, y) * changed + shift


def _norm(weight: Float[Array, "..."], point: AttachmentPoint) -> Float[Array, "..."]:
    """The norm of the weight over the inputs of each output, in float32."""
    return jnp.sqrt(jnp.square(weight.astype(jnp.float32)).sum(axis=contraction_of(point).inputs))
