"""DeBERTa v2 and v3 encoders (flax.linen), exact to the published checkpoints.

Blocks are BERT's, with disentangled attention; see `attention`. The large models of v2 add a
convolution of the embeddings to the output of the first block.

Reference:
    He et al., DeBERTa (2020), https://arxiv.org/abs/2006.03654
    He et al., DeBERTaV3 (2021), https://arxiv.org/abs/2111.09543
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.deberta.attention import DisentangledAttention, relative_positions
from adapters_jax.finetune.models.deberta.config import DebertaConfig
from adapters_jax.finetune.models.parts.encoder import EncoderClassifier, PooledEncoder
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, dot_product_attention
from adapters_jax.finetune.models.parts.layers import (
    FeedForward,
    LayerNorm,
    Sum,
    Typed,
    check_tokens,
)
from adapters_jax.trace.masks import Mask


class DebertaEmbeddings(Typed):
    """The word embeddings, with those of positions and token types if there are any, normalised."""

    config: DebertaConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        seen: Bool[Array, "batch length 1"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the first block; those of padding are zero."""
        c = self.config
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        init = nn.initializers.normal(c.initializer_range)
        x: Any = sum(
            nn.Embed(size, c.hidden_size, embedding_init=init, name=name, **self.types)(ids)
            for name, size, ids in (
                ("word", c.vocab_size, input_ids),
                ("position", c.max_position_embeddings * c.position_biased_input, position_ids),
                ("token_type", c.type_vocab_size, token_type_ids),
            )
            if size
        )
        x = LayerNorm(epsilon=c.layer_norm_eps, name="norm", **self.types)(x)
        x = x if seen is None else jnp.where(seen, x, 0)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class DebertaLayer(Typed):
    """One post-norm block."""

    config: DebertaConfig
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        relative: Float[Array, "positions d"],
        index: Int[Array, "length length"],
        mask: Mask | Bool[Array, "batch 1 1 length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block; see `DisentangledAttention`."""
        c = self.config
        attention = DisentangledAttention(c, self.attention_fn, name="attention", **self.types)
        inits = {"kernel_init": nn.initializers.normal(c.initializer_range), **self.types}
        mlp = FeedForward(
            c.intermediate_size, c.hidden_act, c.hidden_dropout_prob, name="mlp", **inits
        )
        norm = partial(LayerNorm, epsilon=c.layer_norm_eps, **self.types)
        y = attention(x, relative, index, mask, deterministic)
        x = norm(name="attention_norm")(Sum(name="attention_sum")(x, y))
        return norm(name="mlp_norm")(Sum(name="mlp_sum")(x, mlp(x, deterministic)))


class Convolution(Typed):
    """A convolution of the embeddings, added to the output of the first block and normalised."""

    config: DebertaConfig

    @nn.compact
    def __call__(
        self,
        embedded: Float[Array, "batch length d"],
        x: Float[Array, "batch length d"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the second block; `embedded` is zero at padding."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        conv = nn.Conv(
            c.hidden_size, (c.conv_kernel_size,), kernel_init=init, name="conv", **self.types
        )
        y = nn.Dropout(c.hidden_dropout_prob)(conv(embedded), deterministic=deterministic)
        norm = LayerNorm(epsilon=c.layer_norm_eps, name="norm", **self.types)
        return norm(x + ACTIVATIONS[c.conv_act](y))


class Deberta(PooledEncoder):
    """The encoder, without a head; its arguments are those of `TransformerEncoder`.

    Its attention has the scores of the relative positions as a bias, so it is dense always. A model
    with a convolution after its first block cannot scan its blocks.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models.deberta.config import DEBERTA_V3_BASE
        >>> model, ids = Deberta(DEBERTA_V3_BASE), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        183831552
    """

    config: DebertaConfig
    block = DebertaLayer

    def setup(self) -> None:
        """Creates the submodules; the pooler has parameters only if `pool` is called."""
        c = self.config
        if self.scan and c.conv_kernel_size:
            raise UserError(
                "scan=True needs blocks that are alike, but this DeBERTa has a convolution after "
                f"its first (conv_kernel_size={c.conv_kernel_size}); use scan=False, and "
                "remat=True to save memory"
            )
        init = nn.initializers.normal(c.initializer_range)
        self.embeddings = DebertaEmbeddings(c, **self.types)
        self.relative = nn.Embed(2 * c.span, c.hidden_size, embedding_init=init, **self.types)
        if c.norm_rel_ebd == "layer_norm":
            self.relative_norm = LayerNorm(epsilon=c.layer_norm_eps, **self.types)
        if c.conv_kernel_size:
            self.conv = Convolution(c, **self.types)
        self.make_layers()
        self.make_pooler()

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the last block.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            token_type_ids: the segment of each token, 0 by default; read if there are any.
            position_ids: by default 0, 1, 2, ...; read if the embeddings have positions. Relative
                positions are those in the row.
            deterministic: True turns dropout off; False needs an rng named `dropout`.
        """
        c = self.config
        check_tokens(input_ids, attention_mask, c.max_position_embeddings)
        seen = None if attention_mask is None else (attention_mask != 0)[:, :, None]
        embedded = self.embeddings(input_ids, token_type_ids, position_ids, seen, deterministic)
        relative = self.relative(jnp.arange(2 * c.span))
        if c.norm_rel_ebd == "layer_norm":
            relative = self.relative_norm(relative)
        index = jnp.asarray(relative_positions(input_ids.shape[1], c))
        rest = relative, index, Mask.of(attention_mask), deterministic
        if not c.conv_kernel_size:
            return self.run(embedded, *rest)
        first = self.run(embedded, *rest, some=slice(1))
        x = self.conv(embedded, first, deterministic)
        return self.run(x, *rest, some=slice(1, None))


class DebertaClassifier(EncoderClassifier):
    """A DeBERTa under `deberta`, with a pooled head; see `EncoderClassifier`."""

    base = "deberta"
    encoder = Deberta
