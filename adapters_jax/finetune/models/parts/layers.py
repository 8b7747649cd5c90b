"""Layers that the linen transformers share, and checks of a transformer's inputs."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.parts.functions import (
    ACTIVATIONS,
    dot_product_attention,
    normalize,
    split_heads,
)
from adapters_jax.finetune.models.parts.rotary import Rotation, rotate
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention
from adapters_jax.weights.meshes import split_rows


def check_heads(width: int, heads: int) -> None:
    """Raises `UserError` unless the width divides into the heads."""
    if heads < 1 or width % heads:
        raise UserError(f"a width of {width} does not divide into {heads} attention heads.")


def check_tokens(
    input_ids: Int[Array, "batch length"],
    attention_mask: Num[Array, "batch length"] | None = None,
    longest: int | None = None,
) -> None:
    """Raises `UserError` unless these are at most `longest` token ids and a mask of their shape."""
    wrong = []
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        wrong.append(
            f"input_ids must be integers of shape (batch, length), got {input_ids.dtype} of shape "
            f"{input_ids.shape}"
        )
    elif longest is not None and input_ids.shape[1] > longest:
        wrong.append(
            f"input_ids have length {input_ids.shape[1]}, but the model has {longest} positions; "
            "truncate them"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        wrong.append(
            f"attention_mask must have the shape of input_ids, {input_ids.shape}, got "
            f"{attention_mask.shape}"
        )
    if wrong:
        raise UserError("; ".join(wrong) + ".")


class Typed(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """The base class of modules with a computation dtype and a parameter dtype.

    With `dtype=None` the computation dtype is that of the inputs and parameters together.
    """

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def types(self) -> dict[str, Any]:
        """Both dtypes, as keyword arguments for submodules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Output(Typed):
    """The projection back to the width of the residual stream, with dropout after it."""

    features: int
    dropout_rate: float = 0.0
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"], deterministic: bool = True) -> Array:
        """Projects `x`, and applies dropout unless deterministic."""
        inits = {"kernel_init": self.kernel_init, "use_bias": self.use_bias, **self.types}
        dense = nn.Dense(self.features, name="dense", **inits)
        return nn.Dropout(self.dropout_rate)(dense(x), deterministic=deterministic)


class Sum(nn.Module):
    """The residual sum: the input of a sublayer plus its output.

    It is a module so that it can be an attachment point of adapters.
    """

    def __call__(
        self, x: Float[Array, "batch length d"], y: Float[Array, "batch length d"]
    ) -> Float[Array, "batch length d"]:
        """Adds the input `x` and the output `y` of a sublayer."""
        return split_rows(x + y)


class LayerNorm(Typed):
    """Layer normalisation over the last axis, as in flax, with the derivative of `normalize`."""

    epsilon: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Normalises, scales and, with a bias, shifts each row of `x`."""
        width, kind = x.shape[-1:], self.param_dtype
        scale = self.param("scale", nn.initializers.ones, width, kind)
        dtype = canonicalize_dtype(x, scale, dtype=self.dtype)
        y = normalize(x, scale, self.epsilon, True)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, width, kind)
        return y.astype(dtype)


class SelfAttention(Typed):
    """Multi-head self-attention with separate projections `query`, `key`, `value` and `output`.

    With a `rotation`, queries and keys are rotated by their positions. `attention_fn` is called as
    flax's attention modules call theirs, except that the mask may be a `Mask`.
    """

    num_heads: int
    dropout_rate: float = 0.0
    output_dropout_rate: float = 0.0
    attention_fn: Callable[..., Array] = dot_product_attention
    kernel_init: Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Mask | Bool[Array, "#batch 1 #length length"] | None = None,
        deterministic: bool = True,
        rotation: Rotation | None = None,
    ) -> Float[Array, "batch length d"]:
        """Mixes, for each position, the values of the positions that `mask` lets it see."""
        inits = {"kernel_init": self.kernel_init, "use_bias": self.use_bias, **self.types}
        width = x.shape[-1]
        query, key, value = (
            split_heads(nn.Dense(width, name=name, **inits)(x), width // self.num_heads)
            for name in ("query", "key", "value")
        )
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        drops = self.dropout_rate > 0 and not deterministic
        mixed = self.attention_fn(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=self.make_rng("dropout") if drops else None,
            dropout_rate=self.dropout_rate if drops else 0.0,
            broadcast_dropout=False,
            deterministic=deterministic,
            dtype=self.dtype,
        )
        output = Output(width, self.output_dropout_rate, name="output", **inits)
        return output(mixed.reshape(x.shape), deterministic)


register_attention(SelfAttention)


class FeedForward(Typed):
    """Two dense layers, `intermediate` and `output`, with an activation between them."""

    width: int
    activation: str
    dropout_rate: float = 0.0
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Transforms each position by itself."""
        inits = {"kernel_init": self.kernel_init, **self.types}
        inner = nn.Dense(self.width, name="intermediate", **inits)(x)
        output = Output(x.shape[-1], self.dropout_rate, name="output", **inits)
        return output(ACTIVATIONS[self.activation](inner), deterministic)
