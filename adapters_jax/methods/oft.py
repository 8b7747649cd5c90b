"""OFT: a trained rotation of the inputs of a weight, in blocks.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280;
applied to inputs in place of weights by Qiu et al. 2025, "Orthogonal Finetuning Made Scalable",
arXiv:2506.19847.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, zeros
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.methods.settings import flag, size
from adapters_jax.weights.axes import Axes, halves
from adapters_jax.weights.changes import Change, Rotation
from adapters_jax.weights.factors import RANK, Factor


@dataclass(frozen=True)
class OFT(LeafMethod):
    """Whatever reads W sees `R W`: a product with an input is `(x R) W`.

    R has a block for each `block` inputs, `(I + S) (I - S)^-1` with S skew-symmetric (Cayley), so
    that it is orthogonal. Trained are the entries of S above the diagonal, (inputs / block,
    block (block - 1) / 2), with the axes of stacked layers and experts in front. They start at
    zero, and so R at I. Leaves are float32.

    Args:
        targets: patterns of modules, or of leaves.
        block: k, which has to divide the inputs.
        terms: None inverts I - S; a number, 2 or more, takes as many terms of the Neumann series,
            as the authors' newer code and PEFT do (5), which costs products alone, and is
            orthogonal up to the terms left out.
        share: all blocks are one.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> point = AttachmentPoint("weight", "q", {"kernel": (8, 6)}, weight="kernel",
        ...                         axes=Axes((0,), (1,)))
        >>> OFT("q", block=4).leaves(point)["skew"].shape
        (2, 6)
    """

    kind: ClassVar[str] = "oft"
    slot: ClassVar[str] = "oft"
    paper: ClassVar[str] = "2306.07280"
    leaf_names: ClassVar[tuple[str, ...]] = ("skew",)  # type: ignore[misc]
    stated: ClassVar[tuple[str, ...]] = ("targets", "block")
    neutral = zeros

    targets: str | tuple[str, ...]
    block: int = size(32)
    terms: int | None = size(None)
    share: bool = flag(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms == 1 or self.block < 2:
            raise UserError(
                f"OFT: block={self.block} and terms={self.terms}, expected 2 or more of each; one "
                "turns nothing"
            )

    @property
    def entries(self) -> int:
        """The entries of one S above its diagonal."""
        return self.block * (self.block - 1) // 2

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The blocks of one weight; raises RecipeError where they do not divide its inputs."""
        fan_in = point.axes.sizes(point.weight_shape)[0]
        if fan_in % self.block:
            raise RecipeError(
                f"OFT: block={self.block} does not divide the {fan_in} inputs of {point.path!r}; "
                "give another block, or other targets"
            )
        stacked = tuple(point.weight_shape[i] for i in point.axes.shared)
        blocks = 1 if self.share else fan_in // self.block
        return {"skew": Leaf((*stacked, blocks, self.entries), arrays.zeros)}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form, blocks k (k - 1) / 2."""
        *stacked, blocks, _ = shapes["skew"]
        formula = f"{blocks}*{self.block}*{self.block - 1}/2"
        return Count(formula, blocks * self.entries, math.prod(stacked))

    def infer(self, shapes: Shapes, weight: Shape, path: str) -> Axes | None:
        """The roles of the weight's axes by the number of blocks."""
        *stacked, blocks, entries = shapes["skew"]

        def fits(fan_in: int, fan_out: int) -> bool:
            """Whether the weight's inputs have as many blocks."""
            whole = fan_in % self.block == 0 if self.share else fan_in == blocks * self.block
            return whole and entries == self.entries

        return halves(weight, tuple(stacked), fits)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves of the inverse rotation; raises RecipeError for a series, which has none."""
        if self.terms is not None:
            return super().inverse(leaves, point)
        return {"skew": -leaves["skew"]}

    def rotation(self, skew: Float[Array, "*stacked entries"]) -> Float[Array, "*stacked k k"]:
        """R of the entries of S above its diagonal, in their dtype."""
        upper = jnp.zeros((*skew.shape[:-1], self.block, self.block), skew.dtype)
        upper = upper.at[..., *jnp.triu_indices(self.block, 1)].set(skew)
        s = upper - upper.mT
        eye = jnp.broadcast_to(jnp.eye(self.block, dtype=skew.dtype), s.shape)
        if self.terms is None:
            # (I + S) (I - S)^-1 is I + 2 S (I - S)^-1, which is exactly I where S is zero.
            return eye + 2 * jnp.linalg.solve(eye - s, s)
        # I + 2 S + 2 S^2 + ..., whose last power counts once, as in the authors' code and PEFT.
        made, power = eye + 2 * s, s
        for i in range(2, self.terms):
            power = jnp.matmul(power, s, precision="highest")
            made = made + (power if i == self.terms - 1 else 2 * power)
        return made

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The rotation of the inputs."""
        by = Factor(self.rotation(leaves["skew"]), (*point.axes.shared, RANK, RANK, RANK))
        return {point.weight: (Rotation(by, point.axes.inputs),)}
