"""(IA)^3: a learned scale for each activation.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv:2205.05638.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
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
from adapters_jax.targets import as_patterns, selects
from adapters_jax.weights import linear


@dataclass(frozen=True)
class IA3(Method):
    """Learned scales of the outputs of linear layers, or of their inputs.

    A target returns `y * l`; one that `feed_forward` matches as well returns `layer(x * l)`, since
    the paper scales the inner feed-forward activation before the projection that reads it. l starts
    at ones, so that the output starts as the base's. The bias is part of y and is scaled too.
    Leaves are float32 and are cast to the dtype of the array that they scale.

    Args:
        targets: patterns of linear layers.
        feed_forward: patterns of those among them whose input is scaled.

    Example:
        >>> IA3(("**/{key,value}", "**/mlp/output"), feed_forward="**/mlp/output").leaf_names
        ('scale',)
    """

    name: ClassVar[str] = "ia3"
    slot: ClassVar[str] = "ia3"
    subset_fields: ClassVar[tuple[str, ...]] = ("feed_forward",)
    leaf_names: ClassVar[tuple[str, ...]] = ("scale",)  # type: ignore[misc]

    feed_forward: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feed_forward != ():
            patterns = as_patterns(self.feed_forward, "IA3 feed_forward")
            object.__setattr__(self, "feed_forward", patterns)

    def scales_input(self, path: str) -> bool:
        """Whether a target's input is scaled, not its output."""
        return bool(self.feed_forward) and selects(self.feed_forward, path)

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the module is linear, and scaled axes are the last of its input or output."""
        return point.contraction is not None and bool(self._axes(point))

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        name = type(module).__name__
        return f"{linear.why_not(module)}; or the axes to scale are not the last axes of {name}"

    def _axes(self, point: AttachmentPoint) -> tuple[int, ...]:
        """The axes of the weight that l has; none where the module cannot be scaled."""
        layer = contraction_of(point)
        if self.scales_input(point.path):
            return layer.features
        outputs = tuple(axis for axis in range(layer.ndim) if axis not in layer.inputs)
        return outputs if layer.trailing else ()

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The scale of the weight's output axes, or of its input axes."""
        shape = tuple(point.weight_shape[axis] for axis in self._axes(point))
        return {"scale": Leaf(shape, arrays.ones)}

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form d: the size of the scaled axes, which the base weight must have too."""
        shape = shapes["scale"]
        for n in reversed(range(len(shape))):
            layers, own, rest = shape[:n], shape[n:], weight[n:]
            ends = [len(rest)] if not self.scales_input(path) else range(len(own), len(rest))
            if layers == weight[:n] and any(rest[e - len(own) : e] == own for e in ends):
                return Count("*".join(map(str, own)), math.prod(own), math.prod(layers))
        return Count(f"an axis of {list(weight)}", 0)

    def forward(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        x: Any,
        y: Float[Array, "..."],
        key: PRNGKeyArray | None = None,
        frozen: Frozen = nothing,
    ) -> Float[Array, "..."]:
        """The scaled output, or the output of the scaled input; see `Method.forward`."""
        # An embedding used as the output layer (`attend`) has its d features on its input.
        if not self.scales_input(point.path) and point.call == "__call__":
            return y * arrays.beside(leaves["scale"].astype(y.dtype), y)
        if point.again is None:
            raise RecipeError(
                f"IA3 at {point.path!r} runs the layer again on a scaled input; attach it with "
                "aj.adapt"
            )
        return point.again(x * arrays.beside(leaves["scale"].astype(x.dtype), x))

    def merged(
        self, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The weight, and the bias where the output is scaled, times l."""
        layer, scale = contraction_of(point), leaves["scale"].astype(jnp.float32)
        rest = [axis for axis in range(layer.ndim) if axis not in self._axes(point)]
        factors = {layer.weight: jnp.expand_dims(scale, rest)}
        if not self.scales_input(point.path):
            others = sorted(own.keys() - {layer.weight, "bias"})
            if others:
                raise RecipeError(
                    f"merge: IA3 at {point.path!r} scales the output, which may depend on "
                    f"{', '.join(others)} of the module as well; keep the adapted model"
                )
            factors |= {"bias": scale} if "bias" in own else {}
        return {
            name: (own[name].astype(jnp.float32) * factor).astype(own[name].dtype)
            for name, factor in factors.items()
        }

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """The leaves 1 / l.

        Raises:
            RecipeError: some l are zero or too near to it, so that what they scaled is lost.
        """
        reciprocal = 1 / leaves["scale"].astype(jnp.float32)
        lost = int((~jnp.isfinite(reciprocal)).sum())
        if lost:
            raise RecipeError(
                f"unmerge: IA3 at {point.path!r} has {lost} scales of zero, and what they scaled "
                "is lost; start from the base that you kept"
            )
        return {"scale": reciprocal}
