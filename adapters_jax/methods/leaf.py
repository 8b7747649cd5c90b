"""`LeafMethod`: the base class of methods that change weights, whatever reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, PRNGKeyArray

from adapters_jax.methods.base import AttachmentPoint, Kind, Leaves, Method
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change, Changed

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LeafMethod(Method):
    """A method that changes a weight: `W' = scale * (W + A B)` in all that reads W.

    Its targets are modules, whose weights it changes if they meet an input (float leaves with two
    or more axes), or leaves by their own path. Its arrays have the layer axes of the weight.
    Merging is the same change once and for all, so that the merged model computes what the adapted
    one computes.

    Required beside `Method`'s name, slot, leaf_names, leaves and count:
        changes(leaves, point, weight, key): the changes of the module's leaves.
        infer(shapes, weight, path): the roles of the weight's axes by the shapes of its arrays.
    """

    acts_on: ClassVar[Kind] = "weight"

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return f"{type(module).__name__} has no weight that meets an input"

    def changes_biases(self, path: str) -> bool:
        """Whether it changes the biases of a target's weight with the weight."""
        return False

    def names(self, point: AttachmentPoint) -> tuple[str, ...]:
        """The names of the module's own leaves that it changes."""
        return (point.weight,)

    def changes(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        weight: Callable[[], Array],
        key: PRNGKeyArray | None = None,
    ) -> dict[str, tuple[Change, ...]]:
        """The changes of the module's own leaves by name.

        Args:
            leaves: the method's arrays by name.
            point: the weight that they adapt.
            weight: returns the weight in floats.
            key: for dropout while training; None in evaluation.
        """
        return {}

    def infer(self, shapes: Shapes, weight: tuple[int, ...], path: str) -> Axes | None:
        """The roles of a weight's axes that the shapes of the method's arrays tell.

        Args:
            shapes: the shapes of the arrays by name.
            weight: the shape of the weight.
            path: the target's path.

        Returns:
            The first roles that fit; None where none do.
        """
        return None

    def roles(self, axes: Axes, path: str) -> Any:
        """What of the roles the method uses; arrays lie in the usual place if `infer` tells it."""
        return axes.a, axes.b

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """For each array the weight's axes that its own are, by which it is sharded.

        Args:
            axes: the roles of the weight's axes.
            path: the target's path.
        """
        return {}

    def merged(
        self, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The changed leaves: sums and products in float32, cast once to the leaf's dtype."""
        # Without a key, and so without dropout: what is merged is what evaluation computes.
        changes = self.changes(leaves, point, lambda: own[point.weight])
        return {
            name: Changed.of(own[name], change).formed()
            for name, change in changes.items()
            # A method may also name leaves, such as biases, that this module does not have.
            if name in own
        }
