"""ModernBERT (flax.linen), exact to the published checkpoints.

Blocks are pre-norm, with rotary positions and a gated feed-forward. Every third sees all tokens;
the others see a window around each, and rotate by another base. Padding is masked, which computes
what transformers computes on rows without their padding. The first block has no norm before its
attention.

Reference: Warner et al., ModernBERT (2024), https://arxiv.org/abs/2412.13663
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.modernbert.config import ModernBertConfig
from adapters_jax.finetune.models.parts.attention import attention_function
from adapters_jax.finetune.models.parts.encoder import (
    EncoderClassifier,
    TransformerEncoder,
    mean_pool,
)
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, dot_product_attention, gated
from adapters_jax.finetune.models.parts.layers import (
    LayerNorm,
    Output,
    SelfAttention,
    Sum,
    Typed,
    check_tokens,
)
from adapters_jax.finetune.models.parts.masked_lm import MaskedLanguageModel
from adapters_jax.finetune.models.parts.rotary import rotation
from adapters_jax.trace.masks import Mask


class _Configured(Typed):
    """A module that knows the model's configuration."""

    config: ModernBertConfig

    def norm(self, name: str) -> LayerNorm:
        """A layer norm with the model's settings."""
        c = self.config
        return LayerNorm(epsilon=c.norm_eps, use_bias=c.norm_bias, name=name, **self.types)

    @property
    def inits(self) -> dict[str, Any]:
        """The keyword arguments of linear layers."""
        return {"kernel_init": nn.initializers.normal(self.config.initializer_range), **self.types}


class ModernBertEmbeddings(_Configured):
    """The word embeddings, normalised."""

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "batch length"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the first block."""
        c = self.config
        init = self.inits["kernel_init"]
        word = nn.Embed(c.vocab_size, c.hidden_size, embedding_init=init, name="word", **self.types)
        x = self.norm("norm")(word(input_ids))
        return nn.Dropout(c.embedding_dropout)(x, deterministic=deterministic)


class GatedFeedForward(_Configured):
    """Two dense layers in parallel, `intermediate` and `gate`, whose product `output` projects."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Transforms each position by itself."""
        c, inits = self.config, {"use_bias": self.config.mlp_bias, **self.inits}
        opened, factor = (
            nn.Dense(c.intermediate_size, name=name, **inits)(x)
            for name in ("intermediate", "gate")
        )
        inner = gated(ACTIVATIONS[c.hidden_activation], opened, factor)
        inner = nn.Dropout(c.mlp_dropout)(inner, deterministic=deterministic)
        return Output(c.hidden_size, name="output", **inits)(inner, deterministic)


class ModernBertLayer(_Configured):
    """One pre-norm block; the one with number 0 has no norm before its attention."""

    number: int
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        masks: tuple[Mask, Mask],
        positions: Int[Array, "#batch length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block; `masks` are the global and the local one."""
        c = self.config
        attention = SelfAttention(
            c.num_attention_heads,
            c.attention_dropout,
            c.attention_dropout,
            self.attention_fn,
            use_bias=c.attention_bias,
            name="attention",
            **self.inits,
        )
        turned = rotation(positions, c.hidden_size // c.num_attention_heads, c.theta(self.number))
        mask = masks[0 if c.is_global(self.number) else 1]
        y = self.norm("attention_norm")(x) if self.number else x
        x = Sum(name="attention_sum")(x, attention(y, mask, deterministic, turned))
        mlp = GatedFeedForward(config=c, name="mlp", **self.types)
        return Sum(name="mlp_sum")(x, mlp(self.norm("mlp_norm")(x), deterministic))


class Pooler(_Configured):
    """The layers of the classifier in transformers before its last one."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch d"]) -> Float[Array, "batch d"]:
        """Transforms pooled hidden states."""
        c = self.config
        dense = nn.Dense(c.hidden_size, use_bias=c.classifier_bias, name="dense", **self.inits)
        return self.norm("norm")(ACTIVATIONS[c.classifier_activation](dense(x)))


class ModernBert(TransformerEncoder):
    """The encoder, without a head; its arguments are those of `TransformerEncoder`.

    Its blocks differ, so `scan` is only False.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models.modernbert.config import MODERNBERT_BASE
        >>> model = ModernBert(MODERNBERT_BASE)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        149014272
    """

    config: ModernBertConfig

    def setup(self) -> None:
        """Creates the submodules; the pooler has parameters only if `pool` is called."""
        if self.scan:
            raise UserError(
                "scan=True needs blocks that are alike, but ModernBERT's first has no norm and "
                "they alternate between local and global attention; use scan=False, and "
                "remat=True to save memory"
            )
        rest = {"config": self.config, **self.types}
        self.embeddings = ModernBertEmbeddings(**rest)
        attend = attention_function(self.attention)
        self.layer = [
            ModernBertLayer(number=i, attention_fn=attend, **rest)
            for i in range(self.config.num_hidden_layers)
        ]
        c = self.config
        self.final_norm = LayerNorm(epsilon=c.norm_eps, use_bias=c.norm_bias, **self.types)
        self.pooler = Pooler(**rest)

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
            token_type_ids: not read; every encoder takes them.
            position_ids: by default 0, 1, 2, ...
            deterministic: True turns dropout off; False needs an rng named `dropout`.
        """
        check_tokens(input_ids, attention_mask, self.config.max_position_embeddings)
        window = self.config.local_attention // 2 + 1
        masks = Mask.of(attention_mask), Mask.of(attention_mask, window=window)
        each = jnp.arange(input_ids.shape[1])[None]
        positions = each if position_ids is None else position_ids
        x = self.embeddings(input_ids, deterministic)
        return self.final_norm(self.run(x, masks, positions, deterministic))

    def pool(
        self,
        hidden: Float[Array, "batch length d"],
        attention_mask: Num[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch d"]:
        """Applies the classifier's first layers to the first token or the mean, as configured.

        Their parameters exist if `init` calls it. They have no dropout.
        """
        if self.config.classifier_pooling == "mean":
            return self.pooler(mean_pool(hidden, attention_mask).astype(hidden.dtype))
        return self.pooler(hidden[:, 0])


class ModernBertMaskedLM(MaskedLanguageModel):
    """A ModernBERT under `modernbert`, with a head that predicts tokens.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models.modernbert.config import MODERNBERT_BASE
        >>> model, ids = ModernBertMaskedLM(MODERNBERT_BASE), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> {name: sorted(params["head"][name]) for name in ("dense", "norm")}
        {'dense': ['kernel'], 'norm': ['scale']}
    """

    base = "modernbert"
    encoder = ModernBert

    def of_head(self) -> dict[str, Any]:
        """The head's layers are those of the classifier."""
        c = self.config
        biases = {"use_bias": c.classifier_bias, "norm_bias": c.norm_bias}
        return {"activation": c.classifier_activation, "epsilon": c.norm_eps, **biases}


class ModernBertClassifier(EncoderClassifier):
    """A ModernBERT under `modernbert`, with a pooled head; see `EncoderClassifier`."""

    base = "modernbert"
    encoder = ModernBert
