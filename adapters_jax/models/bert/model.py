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

from adapters_jax.models.bert.config import BertConfig
from adapters_jax.models.parts.blocks import run_linen
from adapters_jax.models.parts.functions import ACTIVATIONS, dot_product_attention
from adapters_jax.models.parts.layers import (
    FeedForward,
    LayerNorm,
    Output,
    SelfAttention,
    Sum,
    Typed,
    check_tokens,
)


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
        mask: Bool[Array, "batch 1 1 length"] | None = None,
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


class Bert(Typed):
    """The encoder, without a head.

    Args:
        config: the model's shape.
        dtype: the computation dtype; None means that of inputs and parameters together.
        param_dtype: the dtype of the parameters.
        attention_fn: called as flax's attention modules call theirs, with query, key and value of
            shape `(batch, length, heads, head_dim)`.
        remat: True recomputes each block in the backward pass instead of storing its activations;
            the name of a policy in `blocks.POLICIES` stores some of them.
        scan: whether the blocks are one module, `layers`, with leaves stacked on their first axis,
            instead of `layer_0`, `layer_1`, ...

    Raises:
        UserError: `remat` is not a policy. It is raised at the first call.

    Example:
        >>> import jax
        >>> from adapters_jax.models.bert.config import BERT_BASE
        >>> bert = Bert(BERT_BASE)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(bert.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        108891648
    """

    config: BertConfig
    attention_fn: Callable[..., Array] = dot_product_attention
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        """Creates the submodules; the pooler has parameters only if `pool` is called."""
        block = partial(BertLayer, self.config, attention_fn=self.attention_fn, **self.types)
        self.embeddings = BertEmbeddings(self.config, **self.types)
        if self.scan:
            self.layers = block()
        else:
            self.layer = [block() for _ in range(self.config.num_hidden_layers)]
        init = nn.initializers.normal(self.config.initializer_range)
        self.pooler_dropout = nn.Dropout(self.config.pooler_dropout)
        self.pooler = Output(self.config.hidden_size, kernel_init=init, **self.types)

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
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        layers, length = self.layers if self.scan else self.layer, self.config.num_hidden_layers
        x = run_linen(layers, x, mask, deterministic, length=length, remat=self.remat)
        return x

    def pool(
        self,
        hidden: Float[Array, "batch length d"],
        attention_mask: Num[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch d"]:
        """Applies the pooler to the first token; its parameters exist if `init` calls it.

        It is BERT's pre-trained one, or the layer that the classifiers of the others in
        transformers have before their last one.
        """
        first = self.pooler_dropout(hidden[:, 0], deterministic=deterministic)
        return ACTIVATIONS[self.config.pooler_activation](self.pooler(first))
