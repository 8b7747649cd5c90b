"""AdaLoRA: a low-rank change in the form of a singular value decomposition, of a trained rank.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
arXiv:2303.10512.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves
from adapters_jax.methods.lora import LoRA
from adapters_jax.methods.settings import choice, size
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Change
from adapters_jax.weights.factors import RANK

_STD = 0.02  # of the authors' code, and PEFT's


@dataclass(frozen=True)
class AdaLoRA(LoRA):
    """LoRA with a trained number for each rank: whatever reads W sees `W + scale A diag(l) B`.

    A and B stand for singular vectors, l for singular values; they are the paper's Q, P and Lambda,
    and lie like LoRA's factors. l, (r,) with the axes of stacked layers and experts in front,
    starts at zero, A and B from N(0, 0.02). Trained with `aj.adalora_budget`, the least important
    entries of l become zero, over all modules together, so that modules end with different ranks;
    `aj.orthogonality` is the penalty that keeps A and B near to orthogonal.

    Args:
        targets, alpha, dropout, rank_stabilized, rank_pattern, alpha_pattern, slices: as in `LoRA`.
        rank: r at the start. The scale stays alpha / r.
        a_init: not supported; leave it out.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> AdaLoRA("**/query", rank=12).leaf_names
        ('a', 'lambda', 'b')
    """

    kind: ClassVar[str] = "adalora"
    slot: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "2303.10512"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "lambda", "b")  # type: ignore[misc]

    rank: int = size(12)
    a_init: str = choice("gaussian", ("gaussian",))

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors, and the numbers between them."""
        axes, pair = point.axes, super().leaves(point)
        shared = tuple(point.weight_shape[i] for i in axes.shared)
        return {
            "a": Leaf(pair["a"].shape, arrays.normal(_STD)),
            "lambda": Leaf((*shared, self.rank_at(point.path)), arrays.zeros),
            "b": Leaf(pair["b"].shape, arrays.normal(_STD)),
        }

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of the factors, and of the numbers between them."""
        return {**super().weight_axes(axes, path), "lambda": (*axes.shared, RANK)}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form r(in + out) + r."""
        pair, rank = super().count(path, shapes, weight), self.rank_at(path)
        return Count(f"{pair.formula} + {rank}", pair.parameters + rank, pair.copies)

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """A and scale * diag(l) B."""
        return super().factors(folded(leaves), path)

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """LoRA's change by A and diag(l) B."""
        return super().changes(folded(leaves), point, weight, key)


def folded(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA's leaves with the same change: A and diag(l) B.

    Example:
        >>> import numpy as np
        >>> folded({"a": np.ones((3, 1)), "lambda": np.full(1, 2.0), "b": np.ones((1, 2))})["b"]
        array([[2., 2.]])
    """
    numbers, b = leaves["lambda"], leaves["b"]
    return {
        "a": leaves["a"],
        "b": numbers.reshape(numbers.shape + (1,) * (b.ndim - numbers.ndim)) * b,
    }


def as_lora(method: AdaLoRA) -> LoRA:
    """The LoRA that has the `folded` leaves."""
    names = [each.name for each in dataclasses.fields(LoRA) if each.name != "a_init"]
    return LoRA(**{name: getattr(method, name) for name in names})
