"""DoRA: low-rank factors that change the directions of a weight, and trained magnitudes.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes, Weight
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, Method
from adapters_jax.methods.calibration import Inputs
from adapters_jax.methods.lora import LoRA
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change, Changed, Scale
from adapters_jax.weights.factors import Factor


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA whose adapted weight has a trained norm for each output.

    `m * (W + scale A B) / |W + scale A B|`, where the norm runs over the inputs of each output. m,
    float32 (out,), starts at the norm of W, so that the output starts as the base's, up to
    rounding. The norm is not differentiated (section 4.3 of the paper), and the layer's bias is not
    scaled. Norms are computed in float32.

    Args:
        targets, rank, alpha, dropout, a_init, rank_stabilized: as in `LoRA`.
        rank_pattern, alpha_pattern: as in `LoRA`.
        slices: not supported; leave it empty.

    Raises:
        UserError: a field is out of its range, or `slices` are given.

    Example:
        >>> DoRA("**/query", rank=4).leaf_names
        ('a', 'b', 'magnitude')
    """

    kind: ClassVar[str] = "dora"
    paper: ClassVar[str] = "2402.09353"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")  # type: ignore[misc]

    @property
    def from_weight(self) -> Literal["", "reads", "changes"]:
        """The magnitude starts at the weight's norm."""
        return super().from_weight or "reads"

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors, and the magnitude of the weight's output axes."""
        axes, shape = point.axes, point.weight_shape
        # Each layer and each expert has a magnitude for each of its outputs.
        own = tuple(shape[i] for i in (*axes.shared, *axes.outputs))
        return {**super().leaves(point), "magnitude": Leaf(own, arrays.ones)}

    def start(
        self, leaves: Leaves, point: AttachmentPoint, weight: Weight, inputs: Inputs | None = None
    ) -> tuple[dict[str, Array], Array]:
        """The initial leaves given the weight, and the weight to keep in the base."""
        magnitude = point.axes.norm(weight)
        factors, rest = super().start(leaves, point, weight, inputs)
        return {**factors, "magnitude": magnitude}, rest

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of the factors and of the magnitude."""
        return {**super().weight_axes(axes, path), "magnitude": (*axes.shared, *axes.outputs)}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form r(in + out) + out."""
        pair = super().count(path, shapes, weight)
        out = math.prod(weight) // math.prod(shapes["a"][:-1])
        return Count(f"{pair.formula} + {out}", pair.parameters + out, pair.copies)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Raises RecipeError: the weight is rescaled, which DoRA leaves cannot undo."""
        return Method.inverse(self, leaves, point)

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """Raises RecipeError: the change is not a product of two factors."""
        return Method.factors(self, leaves, path)

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The low-rank change, then the ratio of the magnitude to the norm."""
        axes, (change,) = point.axes, super().changes(leaves, point, weight, key)[point.weight]
        # Section 4.3: the norm is a constant for the gradient, which saves a backward pass through
        # a formed weight. The weight itself is frozen.
        fixed = jax.tree.map(jax.lax.stop_gradient, (change,))
        # In float32, since a bfloat16 sum of squares over thousands of inputs stops growing when a
        # term is below 1/256 of it.
        norm = axes.norm(Changed.of(weight().astype(jnp.float32), fixed).formed())
        # An output whose weights are all zero, as of tokens that only fill a table, stays zero.
        ratio = leaves["magnitude"].astype(jnp.float32) / jnp.where(norm == 0.0, 1.0, norm)
        return {point.weight: (change, Scale(Factor(ratio, (*axes.shared, *axes.outputs))))}
