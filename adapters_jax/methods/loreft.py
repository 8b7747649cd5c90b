"""LoReFT: edits of hidden states in a low-rank subspace, at the first and last tokens.

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv:2404.03592.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shapes
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, Method, zeros
from adapters_jax.methods.bottleneck import ACTIVATIONS
from adapters_jax.methods.places import ends
from adapters_jax.methods.settings import choice, flag, number, size
from adapters_jax.weights.changes import dropout

PARTS = ("kernel", "bias", "projection")


@dataclass(frozen=True)
class LoReFT(Method):
    """At some positions, `y + (f(y W + b) - y R) R^T` of a module's output y, (..., length, d).

    The positions are the first and last tokens of each text. W is (d, r), b (r,), and R (d, r) has
    orthonormal columns. Without `orthogonal` it is NoReFT, and without `subtract` also DiReFT.

    Which positions are tokens is known in the models of this library, and of others in the body of
    `methods.known_tokens(mask)`; else all of the array are. A generation with a cache takes no last
    tokens, since they change with each new one.

    Args:
        targets: patterns of module paths, such as whole layers.
        rank: r.
        prefix_positions: how many of the first tokens.
        suffix_positions: how many of the last ones, which count as such where both meet.
        tied: whether first and last tokens have the same W, b and R.
        orthogonal: whether the columns of R are made orthonormal, from any that are independent.
        subtract: whether `y R` is subtracted.
        activation: f, "identity" or another name in `ACTIVATIONS`.
        dropout: probability of zeroing an entry of the new y while training.
        output: as in `Bottleneck`.

    Raises:
        UserError: a field is out of its range, or there are no positions.

    Example:
        >>> leaves = LoReFT("layers/*", rank=2).leaves(AttachmentPoint("output", "x", width=8))
        >>> {name: leaf.shape for name, leaf in leaves.items()}
        {'prefix/kernel': (8, 2), 'prefix/bias': (2,), 'prefix/projection': (8, 2)}
    """

    kind: ClassVar[str] = "loreft"
    slot: ClassVar[str] = "loreft"
    paper: ClassVar[str] = "2404.03592"
    unmergeable: ClassVar[str] = "it acts on some positions of a text and not on others"
    size_fields: ClassVar[tuple[str, ...]] = ("rank", "dropout")
    neutral = zeros

    targets: str | tuple[str, ...]
    rank: int = size(1)
    prefix_positions: int = size(3, low=0)
    suffix_positions: int = size(0, low=0)
    tied: bool = flag(False)
    orthogonal: bool = flag(True)
    subtract: bool = flag(True)
    activation: str = choice("identity", ACTIVATIONS)
    dropout: float = number(0.0, high=1.0, closed=True)
    output: str | int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.units:
            raise UserError("LoReFT: prefix_positions=0 and suffix_positions=0; give one of them")

    @property
    def units(self) -> tuple[str, ...]:
        """What has its own arrays: the first tokens, the last ones, or both together."""
        counts = {"prefix": self.prefix_positions, "suffix": self.suffix_positions}
        own = tuple(name for name, n in counts.items() if n)
        return ("both",) if self.tied and len(own) == 2 else own

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of its arrays."""
        return tuple(f"{unit}/{part}" for unit in self.units for part in PARTS)

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The arrays of one module.

        Raises:
            RecipeError: its output is narrower than the rank.
        """
        d, r = point.width, self.rank
        if r > d:
            raise RecipeError(f"LoReFT: rank={r} at {point.path!r}, whose output is {d} wide")
        # As torch's linear layers start, and its orthogonal ones.
        usual = arrays.uniform(1 / math.sqrt(d))
        turned = jax.nn.initializers.orthogonal() if self.orthogonal else usual
        own = {"kernel": Leaf((d, r), usual), "bias": Leaf((r,), usual)}
        own["projection"] = Leaf((d, r), turned)
        return {f"{unit}/{part}": own[part] for unit in self.units for part in PARTS}

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is 2dr + r, twice for first and last tokens that are not tied."""
        return shapes[f"{self.units[0]}/kernel"][-2]

    def forward(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        x: Any,
        y: Float[Array, "... length d"],
        key: Key = None,
    ) -> Float[Array, "... length d"]:
        """The output with the edited positions; `x` is not used.

        Raises:
            RecipeError: the output is not of the call's tokens, or nobody knows which are the last.
        """
        counts, edited = (self.prefix_positions, self.suffix_positions), y
        first, last = ends(y, *counts, f"LoReFT at {point.path!r}")
        chosen = {"prefix": first, "suffix": last, "both": first | last}
        keys = [None] * 2 if key is None else jax.random.split(key)
        for unit, own in zip(self.units, keys, strict=False):  # the last tokens after the first
            new = dropout(self._edit(leaves, unit, y, point.precision), self.dropout, own)
            edited = jnp.where(arrays.beside(chosen[unit][..., None], y), new, edited)
        return edited

    def _edit(self, leaves: Leaves, unit: str, y: Array, precision: Any) -> Array:
        """y with the edit at all positions."""
        kernel, bias, turned = (leaves[f"{unit}/{part}"] for part in PARTS)
        turned = (arrays.orthonormal(turned) if self.orthogonal else turned).astype(y.dtype)
        source = ACTIVATIONS[self.activation](arrays.affine(y, kernel, bias, precision))
        if self.subtract:
            source = source - jnp.matmul(y, turned, precision=precision)
        return y + jnp.matmul(source, turned.T, precision=precision)

    def size(self, leaves: Leaves) -> int:
        """The rank."""
        return leaves[f"{self.units[0]}/bias"].shape[-1]
