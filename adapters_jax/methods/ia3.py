"""(IA)^3: a learned scale for each activation.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", arXiv:2205.05638.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, Method
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.targets import selects
from adapters_jax.weights.axes import Axes, last_axes
from adapters_jax.weights.changes import Change, Scale
from adapters_jax.weights.factors import Factor


@dataclass(frozen=True)
class IA3(LeafMethod):
    """Learned scales of the outputs of linear layers, or of their inputs.

    The outputs of a target's weight are multiplied by l, and so is its bias; the inputs are, where
    `feed_forward` matches the target as well, since the paper scales the inner feed-forward
    activation before the projection that reads it. l starts at ones, so that the output starts as
    the base's. Leaves are float32, (out,) or (in,), and are cast to the dtype of what they scale.

    Args:
        targets: patterns of modules with weights, or of weights.
        feed_forward: patterns of those among them whose input is scaled.

    Raises:
        TargetError: `targets` or `feed_forward` are no patterns.

    Example:
        >>> IA3(("**/{key,value}", "**/mlp/output"), feed_forward="**/mlp/output").leaf_names
        ('scale',)
    """

    kind: ClassVar[str] = "ia3"
    slot: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "2205.05638"
    subset_fields: ClassVar[tuple[str, ...]] = ("feed_forward",)
    size_fields: ClassVar[tuple[str, ...]] = ("feed_forward",)
    leaf_names: ClassVar[tuple[str, ...]] = ("scale",)  # type: ignore[misc]

    feed_forward: Any = ()

    def scales_input(self, path: str) -> bool:
        """Whether a target's input is scaled, not its output."""
        return bool(self.feed_forward) and selects(self.feed_forward, path)

    def changes_biases(self, path: str) -> bool:
        """Whether outputs are scaled, and a bias with them."""
        return not self.scales_input(path)

    def roles(self, axes: Axes, path: str) -> Any:
        """The axes of the weight that l has."""
        return (*axes.shared, *(axes.features if self.scales_input(path) else axes.outputs))

    def names(self, point: AttachmentPoint) -> tuple[str, ...]:
        """The weight; where outputs are scaled, also its biases.

        Raises:
            RecipeError: which leaves are biases is not known.
        """
        if self.scales_input(point.path):
            return (point.weight,)
        if point.biases is None:
            others = [name for name in point.own if name != point.weight]
            raise RecipeError(
                f"IA3 at {point.path!r} scales the weight and its biases, and which of "
                f"{', '.join(others)} are biases is not known before the model has run; call "
                "aj.linen.points(model, *example_inputs) first"
            )
        return (point.weight, *point.biases)

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of l."""
        return {"scale": self.roles(axes, path)}

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The scale of the weight's output axes, or of its input axes."""
        scaled = self.roles(point.axes, point.path)
        return {"scale": Leaf(tuple(point.weight_shape[i] for i in scaled), arrays.ones)}

    def infer(self, shapes: Shapes, weight: Shape, path: str) -> Axes | None:
        """The roles of the weight's axes by the shape of l."""
        scaled = last_axes(shapes["scale"], weight, before=self.scales_input(path))
        if scaled is None:
            return None
        rest = tuple(i for i in range(len(weight)) if i not in scaled)
        return Axes(scaled, rest) if self.scales_input(path) else Axes(rest, scaled)

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form d: the size of the scaled axes, which the base weight must have too."""
        shape = shapes["scale"]
        # The leaves do not say how many of their axes are layers, so the most that fit are taken.
        for n in reversed(range(len(shape))):
            layers, own, rest = shape[:n], shape[n:], weight[n:]
            ends = range(len(own), len(rest) + 1)
            if layers == weight[:n] and any(rest[e - len(own) : e] == own for e in ends):
                return Count("*".join(map(str, own)), math.prod(own), math.prod(layers))
        return Count(f"an axis of {list(weight)}", 0)

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The weight times l; where outputs are scaled, the module's biases as well."""
        scale = leaves["scale"]
        found: dict[str, tuple[Change, ...]] = {}
        for name in self.names(point):
            if name == point.weight:
                axes = self.roles(point.axes, point.path)
            else:
                axes = _axes_of_bias(point, name, scale.shape)
            found[name] = (Scale(Factor(scale, axes)),)
        return found

    def neutral(self, leaves: Leaves) -> dict[str, Array]:
        """Scales of one."""
        return {"scale": jnp.ones(leaves["scale"].shape, leaves["scale"].dtype)}

    def fitted(self, leaves: Leaves, path: str, whole: Method) -> dict[str, Array]:
        """The same scales; raises RecipeError where `whole` scales the other side."""
        if self.scales_input(path) != whole.scales_input(path):  # type: ignore[attr-defined]
            side = "inputs" if self.scales_input(path) else "outputs"
            raise RecipeError(
                f"Bank: IA3 at {path!r} scales the weight's {side}, and the bank's the other side; "
                "give both the same feed_forward="
            )
        return dict(leaves)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """The leaves 1 / l.

        Raises:
            RecipeError: some l are zero or too near to it, so that what they scaled is lost.
        """
        # In float32: XLA takes subnormal numbers for 0, whose reciprocal is not finite.
        reciprocal = 1 / leaves["scale"].astype(jnp.float32)
        # A number for the message; `unmerge` is not meant to be traced.
        lost = int((~jnp.isfinite(reciprocal)).sum())
        if lost:
            raise RecipeError(
                f"unmerge: IA3 at {point.path!r} has {lost} scales of zero, and what they scaled "
                "is lost; start from the base that you kept"
            )
        return {"scale": reciprocal}


def _axes_of_bias(point: AttachmentPoint, name: str, scale: Shape) -> tuple[int, ...]:
    """The axes of a bias that l has, by their sizes; each other axis has one entry.

    Raises:
        RecipeError: the bias has not a number for each of l, or layers as many as outputs on an
            axis that is not plain.
    """
    bias, shared = point.own.get(name, scale), point.axes.shared
    fits = [
        axes
        for axes in itertools.permutations(range(len(bias)), len(scale))
        if tuple(bias[i] for i in axes) == scale and math.prod(bias) == math.prod(scale)
    ]
    orders = {tuple(i for i in axes if bias[i] > 1) for axes in fits}
    # Where layers are stacked in front of weights, they are in front of biases.
    if not fits or (len(orders) > 1 and shared != tuple(range(len(shared)))):
        raise RecipeError(
            f"IA3 at {point.path!r} scales the bias {name!r} with the weight, and the axes of its "
            f"shape {list(bias)} are not plainly those of the scales, {list(scale)}; name the "
            "target in feed_forward= as well, which scales inputs alone, or leave it out"
        )
    return fits[0]
