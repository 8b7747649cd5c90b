"""`LeafMethod`: the base class of methods that change weights, whatever reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxtyping import Array

from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Kind, Leaves, Method
from adapters_jax.weights.axes import Axes, fitting
from adapters_jax.weights.changes import Change, Changed


@dataclass(frozen=True)
class LeafMethod(Method):
    """A method that changes a weight: `W' = scale * (W + A B)` in all that reads W.

    Its targets are modules, whose weights it changes if they meet an input (float leaves with two
    or more axes), or leaves by their own path. `point.axes` says which axes of the weight meet the
    input, and which ones the output keeps. Its arrays have the layer axes of the weight, which are
    among `point.axes.shared`. Merging is the same change once and for all, so that the merged model
    computes what the adapted one computes.

    Required beside what `Method` requires:
        changes(leaves, point, weight, key): the changes of the module's leaves, each a tuple of
            `LowRank`, `Scale`, `Added` and `Rotation`.

    Optional:
        weight_axes(axes, path): which axes of the weight its arrays have. By these they are split
            over devices like the weight, and found in trees whose model is not there.
        infer, roles: how they are found, where that takes more than `weight_axes`.
        names(point), changes_biases(path): for changes of other leaves than the weight.

    Args:
        targets: patterns of modules, or of leaves.

    Example:
        >>> from dataclasses import dataclass
        >>> import jax, jax.numpy as jnp, adapters_jax as aj
        >>> from flax import linen as nn
        >>> from adapters_jax.methods import Factor, LeafMethod, LowRank, arrays
        >>> @aj.register_method
        ... @dataclass(frozen=True)
        ... class Outer(LeafMethod):
        ...     '''Adds an outer product to a weight.'''
        ...     kind, slot, leaf_names = "docs_outer", "docs_outer", ("a", "b")
        ...     def weight_axes(self, axes, path):
        ...         return {"a": axes.a, "b": axes.b}
        ...     def leaves(self, point):
        ...         axes, shape = point.axes, point.weight_shape
        ...         a, b = axes.a_shape(shape, rank=1), axes.b_shape(shape, rank=1)
        ...         return {"a": aj.Leaf(a, arrays.ones), "b": aj.Leaf(b, arrays.zeros)}
        ...     def count(self, path, shapes, weight):
        ...         return aj.Count(" + ".join(map(str, weight)), sum(weight))
        ...     def changes(self, leaves, point, weight, key=None):
        ...         a, b = (Factor(leaves["a"], point.axes.a), Factor(leaves["b"], point.axes.b))
        ...         return {point.weight: (LowRank(a, b),)}
        >>> model, x = aj.adapt(nn.Dense(3), Outer("**")), jnp.ones((1, 4))
        >>> params = nn.Dense(3).init(jax.random.key(0), x)["params"]
        >>> params = aj.init_adapters(model, params, jax.random.key(1), x)
        >>> params["docs_outer"]["b"] += 0.5
        >>> (aj.merge(model, params, x)["kernel"] - params["kernel"]).round(2)[0]
        Array([0.5, 0.5, 0.5], dtype=float32)
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
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The changes of the module's own leaves by name, applied in their order.

        Args:
            leaves: the method's arrays by name.
            point: the weight that they adapt, with the layer axes that the arrays have.
            weight: returns the weight in floats; changes that do not need it leave it packed where
                it is quantised.
            key: for dropout while training; None in evaluation.
        """
        return {}

    def infer(self, shapes: Shapes, weight: Shape, path: str) -> Axes | None:
        """The roles of a weight's axes that the shapes of the method's arrays tell.

        Args:
            shapes: the shapes of the arrays by name.
            weight: the shape of the weight.
            path: the target's path.

        Returns:
            The first roles for which the arrays have their `weight_axes`; None where none do.
        """
        return fitting(shapes, weight, partial(self.weight_axes, path=path))

    def roles(self, axes: Axes, path: str) -> Any:
        """What of the roles the method uses; arrays lie in the usual place if `infer` tells it."""
        return axes.a, axes.b

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """For each array the weight's axes that its own are; `RANK` for the rank's.

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
