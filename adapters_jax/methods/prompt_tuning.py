"""Prompt tuning: trained embeddings of virtual tokens, in front of those of the input.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from adapters_jax.errors import LARGEST, RecipeError, UserError, shown
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Output, Shapes
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, Method, zeros
from adapters_jax.methods.settings import number, size

PLACEHOLDER = -1


@dataclass(frozen=True)
class PromptTuning(Method):
    """Trained embeddings in the places of placeholders among the ids that an embedding looks up.

    The model sees K further tokens, whose ids are `placeholder`; `aj.with_prompt` puts them in
    front of ids, masks and labels. Wherever the embedding meets that id, its output is the trained
    embedding: the first one of a row gets the first, and so on, from the first again after K of
    them, as where a row packs several texts with a prompt each. All else is the model's: padding on
    either side, positions, which the placeholders count for, and cached decoding, where the prompt
    is in the tokens that fill the cache. A row without placeholders is the base's. The embedding is
    float32, (K, d), and is cast to the dtype of the module's output.

    Args:
        targets: the pattern of the embedding of tokens, which takes ids of shape (..., length).
        length: K, tokens of the prompt.
        placeholder: their id. -1 is of no token, and looks up a row that is then replaced; for a
            model that checks its ids give one that texts do not have.
        init_std: standard deviation at the start; `aj.start_prompt` starts from tokens instead.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> prompt, point = PromptTuning("embed", length=2), AttachmentPoint("output", "embed")
        >>> leaves = {"embedding": jnp.asarray([[1.0], [2.0]])}
        >>> prompt.forward(leaves, point, jnp.asarray([-1, -1, 7]), jnp.zeros((3, 1)))[:, 0]
        Array([1., 2., 0.], dtype=float32)
    """

    kind: ClassVar[str] = "prompt_tuning"
    slot: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "2104.08691"
    leaf_names: ClassVar[tuple[str, ...]] = ("embedding",)  # type: ignore[misc]
    size_fields: ClassVar[tuple[str, ...]] = ("init_std",)
    unmergeable: ClassVar[str] = "its tokens are an input, not a change of a weight"
    neutral = zeros

    targets: str | tuple[str, ...]
    length: int = size(20)
    placeholder: int = PLACEHOLDER
    init_std: float = number(0.02, closed=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.placeholder) is not int or not -LARGEST < self.placeholder < LARGEST:
            raise UserError(
                f"PromptTuning: placeholder={shown(self.placeholder)}, expected an id, such as -1"
            )

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The embeddings, (K, d)."""
        shape = (self.length, point.width)
        return {"embedding": Leaf(shape, arrays.normal(self.init_std))}

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is Kd."""
        return shapes["embedding"][-1]

    def forward(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """The module's output, with the trained embeddings in place of those of placeholders.

        Raises:
            RecipeError: the module's input is not ids with an axis for their places.
        """
        shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", jnp.float32)
        if not jnp.issubdtype(dtype, jnp.integer) or not shape or shape != y.shape[:-1]:
            raise RecipeError(
                f"PromptTuning at {point.path!r}: the module's input is {dtype}{list(shape or ())} "
                f"and its output {list(y.shape)}, expected ids [..., length] and their embeddings "
                "[..., length, d]; target the embedding of tokens"
            )
        ours = x == self.placeholder
        place = (jnp.cumsum(ours, axis=-1) - 1) % self.length
        prompt = leaves["embedding"].astype(y.dtype)[place]
        return jnp.where(ours[..., None], prompt, y)
