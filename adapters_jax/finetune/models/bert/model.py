"""BERT-shaped encoders (flax.linen), exact to the published checkpoints.

Each block is post-norm: `norm(x + output(attention(x)))`, then the same around the feed-forward.
`output` is a projection with its dropout, so a Houlsby adapter on `**/attention/output` and
`**/mlp/output` sits between that dropout and the residual sum, as in its paper. The residual sums
are modules as well, `attention_sum` and `mlp_sum`.

Reference:
    Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
    Liu et al., RoBERTa (2019), https://arxiv.org/abs/1907.11692
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.finetune.models.bert.config import BertConfig
from adapters_jax.finetune.models.parts.encoder import PooledEncoder
from adapters_jax.finetune.models.parts.functions import dot_product_attention
from adapters_jax.finetune.models.parts.layers import (
    FeedForward,
    LayerNorm,
    SelfAttention,
    Sum,
    Typed,
    check_tokens,
)
from adapters_jax.trace.masks import Mask


class BertEmbeddings(Typed):
    """The sum of word, position and token type embeddings, normalised.

    There are no token types where `type_vocab_size` is 0. Embeddings that are narrower than the
    blocks are projected.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the first block."""
        config = self.config
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if position_ids is None:
            position_ids = self._positions(input_ids)
        init, width = nn.initializers.normal(config.initializer_range), config.embedding_size
        x: Any = sum(
            nn.Embed(size, width, embedding_init=init, name=name, **self.types)(ids)
            for name, size, ids in (
                ("word", config.vocab_size, input_ids),
                ("position", config.max_position_embeddings, position_ids),
                ("token_type", config.type_vocab_size, token_type_ids),
            )
            if size
        )
        x = LayerNorm(epsilon=config.layer_norm_eps, name="norm", **self.types)(x)
        x = nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)
        if width == config.hidden_size:
            return x
        return nn.Dense(config.hidden_size, kernel_init=init, name="project", **self.types)(x)

    def _positions(self, input_ids: Array) -> Array:
        """0, 1, 2, ...; RoBERTa counts only tokens, and padding has the position `pad_token_id`."""
        if not self.config.first_position:
            return jnp.arange(input_ids.shape[1])[None]
        token = (input_ids != self.config.pad_token_id).astype(jnp.int32)
        return jnp.cumsum(token, axis=1) * token + self.config.pad_token_id


class BertLayer(Typed):
    """One post-norm block."""

    config: BertConfig
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Mask | Bool[Array, "batch 1 1 length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block."""
        config = self.config
        inits = {"kernel_init": nn.initializers.normal(config.initializer_range), **self.types}
        norm = partial(LayerNorm, epsilon=config.layer_norm_eps, **self.types)
        attention = SelfAttention(
            config.num_attention_heads,
            config.attention_probs_dropout_prob,
            config.hidden_dropout_prob if config.attention_output_drops else 0.0,
            self.attention_fn,
            name="attention",
            **inits,
        )
        mlp = FeedForward(
            config.intermediate_size,
            config.hidden_act,
            config.hidden_dropout_prob,
            name="mlp",
            **inits,
        )
        x = Sum(name="attention_sum")(x, attention(x, mask, deterministic))
        x = norm(name="attention_norm")(x)
        return norm(name="mlp_norm")(Sum(name="mlp_sum")(x, mlp(x, deterministic)))


class Bert(PooledEncoder):
    """The encoder, without a head; its arguments are those of `TransformerEncoder`.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models.bert.config import BERT_BASE
        >>> bert = Bert(BERT_BASE)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(bert.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        108891648
    """

    config: BertConfig
    block = BertLayer

    def setup(self) -> None:
        """Creates the submodules; the pooler has parameters only if `pool` is called."""
        self.embeddings = BertEmbeddings(self.config, **self.types)
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
            token_type_ids: the segment of each token, 0 by default; DistilBERT reads none.
            position_ids: by default 0, 1, 2, ...; RoBERTa counts from `pad_token_id + 1` on.
            deterministic: True turns dropout off; False needs an rng named `dropout`.
        """
        longest = self.config.max_position_embeddings - self.config.first_position
        check_tokens(input_ids, attention_mask, longest)
        x = self.embeddings(input_ids, token_type_ids, position_ids, deterministic)
        return self.run(x, Mask.of(attention_mask), deterministic)
