"""The layers of an encoder (flax.linen): embeddings, attention, feed-forward, the block, poolers.

Attention children are `query`, `key`, `value` and `output`, those of the feed-forward
`intermediate`, perhaps `gate`, and `output`. An `output` is a projection with its dropout, so a
Houlsby adapter on `**/attention/output` and `**/mlp/output` sits between that dropout and the
residual sum, as in its paper. The residual sums are modules as well.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.finetune.models.parts.functions import (
    ACTIVATIONS,
    dot_product_attention,
    gated,
    normalize,
    split_heads,
)
from adapters_jax.finetune.models.parts.rotary import Rotation, rotate
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention
from adapters_jax.weights.meshes import split_rows

Hidden = Float[Array, "batch length d"]


class Relative(NamedTuple):
    """The relative positions of a row's tokens; see `SelfAttention`.

    Attributes:
        embeddings: an embedding for each bucket of distances.
        buckets: the bucket of each query (first axis) and key.
    """

    embeddings: Float[Array, "number d"]
    buckets: Int[Array, "length length"]


class Context(NamedTuple):
    """What the attention of a block reads beside the hidden states.

    Attributes:
        mask: the keys that each query sees; None sees all.
        relative: relative positions, for disentangled attention.
        deterministic: whether dropout is off.
    """

    mask: Mask | Bool[Array, "#batch 1 #length length"] | None = None
    rotation: Rotation | None = None
    relative: Relative | None = None
    deterministic: bool = True


class Typed(nn.Module, kw_only=True):  # type: ignore[call-arg]
    """The base class of modules with a computation dtype and a parameter dtype.

    With `dtype=None` the computation dtype is that of the inputs and parameters together.
    """

    # By keyword alone, since a dataclass allows no field without a default behind these.
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @property
    def types(self) -> dict[str, Any]:
        """Both dtypes, as keyword arguments for submodules."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


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


class Sum(nn.Module):
    """The residual sum: the input of a sublayer plus its output.

    It is a module so that it can be an attachment point of adapters.
    """

    def __call__(self, x: Hidden, y: Hidden) -> Hidden:
        """Adds the input `x` and the output `y` of a sublayer."""
        return split_rows(x + y)


class Scale(Typed):
    """Factors of a sublayer's outputs."""

    value: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Scales each feature."""
        init = nn.initializers.constant(self.value)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        return x * scale.astype(x.dtype)


class Configured(Typed):
    """The base class of modules that an encoder's configuration describes."""

    config: Any  # an `EncoderConfig`

    @property
    def initial(self) -> Initializer:
        """The initialiser of weights."""
        return nn.initializers.normal(self.config.initializer_range)

    @nn.nowrap
    def dense(self, features: int, use_bias: bool, name: str) -> nn.Dense:
        """A dense layer with the model's settings."""
        inits = {"kernel_init": self.initial, **self.types}
        return nn.Dense(features, use_bias=use_bias, name=name, **inits)

    @nn.nowrap
    def norm(self, name: str | None = None) -> LayerNorm:
        """A layer norm with the model's settings."""
        c = self.config
        return LayerNorm(c.layer_norm_eps, use_bias=c.norm_bias, name=name, **self.types)


class Output(Configured):
    """The projection back to the width of the residual stream, with dropout after it."""

    dropout_rate: float
    use_bias: bool

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"], deterministic: bool = True) -> Array:
        """Projects `x`, and applies dropout unless deterministic."""
        x = self.dense(self.config.hidden_size, self.use_bias, "dense")(x)
        return nn.Dropout(self.dropout_rate)(x, deterministic=deterministic)


class TextEmbeddings(Configured):
    """The sum of the embeddings of tokens, positions and token types, as far as there are any.

    It is normalised, and projected where it is narrower than the blocks.
    """

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool = True,
    ) -> Hidden:
        """Computes the hidden states before the first block."""
        c = self.config
        ids = {
            "word": input_ids,
            "position": self._positions(input_ids) if position_ids is None else position_ids,
            "token_type": jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        inits = {"embedding_init": self.initial, **self.types}
        x: Any = sum(
            nn.Embed(rows, c.embedding_size, name=name, **inits)(ids[name])
            for name, rows in c.tables.items()
            if rows
        )
        x = self.norm("norm")(x)
        if c.zero_padding and attention_mask is not None:
            x = jnp.where((attention_mask != 0)[:, :, None], x, 0)
        x = nn.Dropout(c.dropouts.embedding)(x, deterministic=deterministic)
        narrower = c.embedding_size != c.hidden_size
        return self.dense(c.hidden_size, True, "project")(x) if narrower else x

    def _positions(self, input_ids: Array) -> Array:
        """0, 1, 2, ...; RoBERTa counts only tokens, and padding has the position `pad_token_id`."""
        if not self.config.first_position:
            return jnp.arange(input_ids.shape[1])[None]
        token = (input_ids != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(token, axis=1) * token + self.config.pad_token_id


class ImageEmbeddings(Configured):
    """A first token that is trained, and an image's patches, with their positions."""

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Hidden:
        """Computes the hidden states before the first block."""
        c, init = self.config, self.initial
        side = (c.patch_size, c.patch_size)
        inits = {"use_bias": c.patch_bias, "kernel_init": init, **self.types}
        patch = nn.Conv(c.hidden_size, side, side, padding="VALID", name="patch", **inits)
        x = patch(pixels).reshape(len(pixels), c.patches, c.hidden_size)
        # The first axes of length 1 are those of the files, whose names have a parameter for these.
        first = self.param("first", init, (*c.lead, *c.lead, c.hidden_size), self.param_dtype)
        position = self.param(
            "position", init, (*c.lead, c.patches + 1, c.hidden_size), self.param_dtype
        )
        first = jnp.broadcast_to(first, (len(x), 1, c.hidden_size)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1) + position.astype(x.dtype)
        x = nn.Dropout(c.dropouts.embedding)(x, deterministic=deterministic)
        return self.norm("norm")(x) if c.embedding_norm else x


class SelfAttention(Configured):
    """Multi-head self-attention.

    `attention_fn` is called as flax's attention modules call theirs, except that the mask may be a
    `Mask`, and with `bias` where positions are relative.

    With relative positions the attention is disentangled: a score is the sum of up to three
    products, divided by the root of as many times the width of a head: of query and key; of the
    query with the key of their relative position ("c2p"); and of the key with the query of that
    position ("p2c"). The layers `position_query` and `position_key` project the relative positions,
    unless `query` and `key` do that as well.

    Reference: He et al., DeBERTa (2020), https://arxiv.org/abs/2006.03654
    """

    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(self, x: Hidden, context: Context) -> Hidden:
        """Mixes, for each position, the values of the positions that the mask lets it see."""
        c, deterministic = self.config, context.deterministic
        layers = {
            name: self.dense(c.hidden_size, c.attention_bias, name)
            for name in ("query", "key", "value")
        }
        query, key, value = (split_heads(layer(x), c.head_width) for layer in layers.values())
        if context.rotation is not None:
            query, key = rotate(query, context.rotation), rotate(key, context.rotation)
        biased: dict[str, Any] = {}
        if context.relative is not None:
            embeddings, buckets = context.relative
            embeddings = nn.Dropout(c.dropouts.embedding)(embeddings, deterministic=deterministic)
            terms = self._terms(layers, query, key, Relative(embeddings, buckets))
            # The function itself divides by the root of a head's width, and adds the bias to that.
            scale = 1 / math.sqrt(1 + len(terms))
            biased["bias"] = sum(terms) * (scale / math.sqrt(c.head_width)) if terms else None
            query = query * scale
        drops = c.dropouts.weights > 0 and not deterministic
        mixed = self.attention_fn(
            query,
            key,
            value,
            mask=context.mask,
            dropout_rng=self.make_rng("dropout") if drops else None,
            dropout_rate=c.dropouts.weights if drops else 0.0,
            broadcast_dropout=False,
            deterministic=deterministic,
            dtype=self.dtype,
            **biased,
        )
        output = Output(c, c.dropouts.attention, c.attention_bias, name="output", **self.types)
        return output(mixed.reshape(x.shape), deterministic)

    def _terms(
        self, layers: dict[str, nn.Dense], query: Array, key: Array, relative: Relative
    ) -> list[Float[Array, "batch heads length length"]]:
        """The products with relative positions, one for each of the configuration's terms."""
        c, (embeddings, buckets) = self.config, relative
        found = []
        for term, content, other in (("c2p", query, "key"), ("p2c", key, "query")):
            if term not in c.pos_att_type:
                continue
            layer = layers[other]
            if not c.share_att_key:
                layer = self.dense(c.hidden_size, c.attention_bias, f"position_{other}")
            positions = split_heads(layer(embeddings), c.head_width)
            scores = jnp.einsum("bqhd,phd->bhqp", content, positions)
            each = buckets if term == "c2p" else buckets.T
            scores = jnp.take_along_axis(scores, each[None, None], axis=-1)
            found.append(scores if term == "c2p" else scores.swapaxes(-1, -2))
        return found


register_attention(SelfAttention)


class FeedForward(Configured):
    """Dense layers with an activation between: `intermediate`, perhaps times a `gate`, `output`."""

    @nn.compact
    def __call__(self, x: Hidden, deterministic: bool = True) -> Hidden:
        """Transforms each position by itself."""
        c = self.config
        activation = ACTIVATIONS[c.hidden_act]
        inner = self.dense(c.intermediate_size, c.mlp_bias, "intermediate")(x)
        if c.mlp_gate:
            gate = self.dense(c.intermediate_size, c.mlp_bias, "gate")(x)
            inner = gated(activation, inner, gate)
        else:
            inner = activation(inner)
        if c.dropouts.inner:  # a module with a rate of 0 would show among captured outputs
            inner = nn.Dropout(c.dropouts.inner)(inner, deterministic=deterministic)
        output = Output(c, c.dropouts.mlp, c.mlp_bias, name="output", **self.types)
        return output(inner, deterministic)


class Block(Configured):
    """Attention and feed-forward, each with its residual sum, and a norm before or behind it.

    Args:
        normed: whether the attention's input or sum is normalised.
    """

    attention_fn: Callable[..., Array] = dot_product_attention
    normed: bool = True

    @nn.compact
    def __call__(self, x: Hidden, context: Context) -> Hidden:
        """Computes the hidden states after the block."""
        c = self.config
        attention = SelfAttention(c, self.attention_fn, name="attention", **self.types)
        mlp = FeedForward(c, name="mlp", **self.types)

        def add(name: str, x: Hidden, sublayer: Callable[[Hidden], Hidden], normed: bool) -> Hidden:
            norm = self.norm(f"{name}_norm") if normed else lambda x: x
            y = sublayer(norm(x) if c.norm_first else x)
            if c.layer_scale is not None:
                y = Scale(c.layer_scale, name=f"{name}_scale", **self.types)(y)
            y = Sum(name=f"{name}_sum")(x, y)
            return y if c.norm_first else norm(y)

        x = add("attention", x, lambda x: attention(x, context), self.normed)
        return add("mlp", x, lambda x: mlp(x, context.deterministic), True)


class Convolution(Configured):
    """A convolution of the embeddings, added to the output of the first block and normalised."""

    @nn.compact
    def __call__(self, embedded: Hidden, x: Hidden, deterministic: bool = True) -> Hidden:
        """Computes the hidden states before the second block; `embedded` is zero at padding."""
        c = self.config
        inits = {"kernel_init": self.initial, **self.types}
        conv = nn.Conv(c.hidden_size, (c.conv_kernel_size,), name="conv", **inits)
        y = nn.Dropout(c.dropouts.mlp)(conv(embedded), deterministic=deterministic)
        return self.norm("norm")(x + ACTIVATIONS[c.conv_act](y))


class Pooler(Configured):
    """A dense layer on the pooled hidden states, an activation, and perhaps a norm.

    It is BERT's pre-trained one, or the layers that the classifiers of the others in transformers
    have before their last one.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch d"]) -> Float[Array, "batch d"]:
        """Transforms pooled hidden states."""
        c = self.config
        x = self.dense(c.hidden_size, c.pooler_bias, "dense")(x)
        x = ACTIVATIONS[c.pooler_activation](x)
        return self.norm("norm")(x) if c.pooler_norm else x
