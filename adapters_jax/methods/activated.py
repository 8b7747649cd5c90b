"""Activated LoRA: a LoRA that acts from the last invocation in a text on.

Greenewald et al. 2025, "Activated LoRA: Fine-tuned LLMs for Intrinsics", arXiv:2504.12397.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods.arrays import Key
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, Method
from adapters_jax.methods.invocation import checked_tokens
from adapters_jax.methods.lora import CHANGING, LoRA
from adapters_jax.targets import join
from adapters_jax.weights.changes import Change, LowRank
from adapters_jax.weights.gates import Gate


@dataclass(frozen=True)
class ActivatedLoRA(LoRA):
    """LoRA for the tokens from the last invocation on; earlier ones are computed by the base alone.

    An invocation is a sequence of tokens, such as those of `<|start_of_role|>check`, and belongs to
    the tokens that the adapter acts on. Keys and values of earlier tokens are the base's, so that
    they can be kept, and shared by any number of such adapters.

    Which tokens these are is an input of each call of the model: `invoked=aj.invoked(ids, tokens)`.
    It has the first axes of the weights' inputs, (batch, length); (batch,) for the rows of one
    token each, as in the steps of a generation; or True for all tokens. A row without an
    invocation is the base's.

    Args:
        targets, rank, alpha, dropout, rank_stabilized: as in `LoRA`.
        a_init: as in `LoRA`, but for starts that change the base.
        rank_pattern, alpha_pattern, slices: as in `LoRA`.
        invocation: the ids of its tokens.

    Raises:
        UserError: a field is out of its range, or there are no tokens.

    Example:
        >>> import jax.numpy as jnp, adapters_jax as aj
        >>> from flax import linen as nn
        >>> model = aj.adapt(nn.Dense(1), aj.ActivatedLoRA("**", 1, invocation=(7, 8)))
        >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
        >>> params["lora"] = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1))}
        >>> ids, x = jnp.asarray([[7, 1, 7, 8, 2]]), jnp.ones((1, 5, 2))
        >>> y = model.apply({"params": params}, x, invoked=aj.invoked(ids, (7, 8)))
        >>> y[0, :, 0].tolist()
        [0.0, 0.0, 2.0, 2.0, 2.0]
    """

    kind: ClassVar[str] = "activated_lora"
    paper: ClassVar[str] = "2504.12397"
    stated: ClassVar[tuple[str, ...]] = (*LoRA.stated, "invocation")
    size_fields: ClassVar[tuple[str, ...]] = (*LoRA.size_fields, "invocation")
    also: ClassVar[tuple[type[Method], ...]] = (LoRA,)
    gated: ClassVar[bool] = True
    unmergeable: ClassVar[str] = "it acts on some tokens of a text and not on others"

    invocation: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "invocation", checked_tokens("ActivatedLoRA", self.invocation))
        if self.a_init in CHANGING:
            raise UserError(
                f"ActivatedLoRA: a_init={self.a_init!r} changes the base's weights, and tokens "
                f"before the invocation are the base's; write {self.other_starts}"
            )

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors of one weight; raises RecipeError for tables and convolutions."""
        if point.axes.lookup or point.axes.window:
            how = "looks up rows of" if point.axes.lookup else "convolves with"
            raise RecipeError(
                f"ActivatedLoRA: the model {how} {point.path!r}, and only a weight that each token "
                f"meets by itself, in a product, can be activated; exclude it: '!{point.path}'"
            )
        return super().leaves(point)

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The low-rank change of the weight where the call says that it is invoked."""
        if leaves.get("invoked") is None:
            raise UserError(
                f"ActivatedLoRA at {point.path!r} acts from its invocation on, and the call does "
                "not say where that is; write invoked=aj.invoked(ids, "
                f"{self.invocation}) beside the inputs of the whole model"
            )
        gate = Gate(leaves["invoked"], join(point.path, point.weight))
        return {
            name: tuple(replace(x, gate=gate) for x in several if isinstance(x, LowRank))
            for name, several in super().changes(leaves, point, weight, key).items()
        }

    # Folded into the weight, or as a product of factors, it would act on every token.
    merged, inverse, factors = Method.merged, Method.inverse, Method.factors
