"""GPT-2 (flax.linen), exact to the published checkpoints; GPT-3 is a larger GPT-2.

Each block is pre-norm: `x + output(attention(norm(x)))`, then the same around the feed-forward.
The attention and feed-forward modules are those of BERT. A checkpoint's fused `c_attn` is split
into query, key and value.

Reference:
    Radford et al., Language Models are Unsupervised Multitask Learners (2019)
    Brown et al., Language Models are Few-Shot Learners (2020), https://arxiv.org/abs/2005.14165
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.models.gpt2.config import GPT2Config
from adapters_jax.models.parts.blocks import run_linen
from adapters_jax.models.parts.functions import causal_mask, dot_product_attention
from adapters_jax.models.parts.layers import (
    FeedForward,
    LayerNorm,
    SelfAttention,
    Sum,
    Typed,
    check_tokens,
)


class GPT2Embeddings(Typed):
    """The sum of word and position embeddings; `attend` turns hidden states into logits."""

    config: GPT2Config

    def setup(self) -> None:
        """Creates the submodules; the model reads `word` at both ends."""
        config = self.config
        inits = {"embedding_init": nn.initializers.normal(config.initializer_range), **self.types}
        self.word = nn.Embed(config.vocab_size, config.n_embd, **inits)
        self.position = nn.Embed(config.n_positions, config.n_embd, **inits)
        self.dropout = nn.Dropout(config.embd_pdrop)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        position_ids: Int[Array, "#batch length"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the first block."""
        if position_ids is None:
            position_ids = jnp.arange(input_ids.shape[1])[None]
        x = self.word(input_ids) + self.position(position_ids)
        return self.dropout(x, deterministic=deterministic)

    def attend(self, hidden: Float[Array, "batch length d"]) -> Float[Array, "batch length vocab"]:
        """Computes float32 logits, the product of each hidden state with each word embedding."""
        return self.word.attend(hidden).astype(jnp.float32)


class GPT2Layer(Typed):
    """One pre-norm block."""

    config: GPT2Config
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length d"],
        mask: Bool[Array, "batch 1 length length"],
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block."""
        config = self.config
        inits = {"kernel_init": nn.initializers.normal(config.initializer_range), **self.types}
        norm = partial(LayerNorm, epsilon=config.layer_norm_epsilon, **self.types)
        attention = SelfAttention(
            config.n_head,
            config.attn_pdrop,
            config.resid_pdrop,
            self.attention_fn,
            name="attention",
            **inits,
        )
        mlp = FeedForward(
            config.n_inner or 4 * config.n_embd,
            config.activation_function,
            config.resid_pdrop,
            name="mlp",
            **inits,
        )
        y = attention(norm(name="attention_norm")(x), mask, deterministic)
        x = Sum(name="attention_sum")(x, y)
        return Sum(name="mlp_sum")(x, mlp(norm(name="mlp_norm")(x), deterministic))


class GPT2(Typed):
    """The language model, its output tied to the word embeddings.

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
        >>> from adapters_jax.models.gpt2.config import GPT2_SMALL
        >>> gpt2 = GPT2(GPT2_SMALL)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(gpt2.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        124439808
    """

    config: GPT2Config
    attention_fn: Callable[..., Array] = dot_product_attention
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        """Creates the submodules."""
        block = partial(GPT2Layer, self.config, attention_fn=self.attention_fn, **self.types)
        self.embeddings = GPT2Embeddings(self.config, **self.types)
        if self.scan:
            self.layers = block()
        else:
            self.layer = [block() for _ in range(self.config.n_layer)]
        self.norm = LayerNorm(epsilon=self.config.layer_norm_epsilon, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length vocab"]:
        """Computes float32 logits of the next token; the arguments are those of `hidden`."""
        hidden = self.hidden(input_ids, attention_mask, position_ids, deterministic)
        return self.embeddings.attend(hidden)

    def hidden(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the last norm.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            position_ids: by default 0, 1, 2, ...; needed if padding comes first.
            deterministic: True turns dropout off; False needs an rng named `dropout`.
        """
        check_tokens(input_ids, attention_mask, self.config.n_positions)
        x = self.embeddings(input_ids, position_ids, deterministic)
        mask = causal_mask(input_ids, attention_mask)
        layers, length = self.layers if self.scan else self.layer, self.config.n_layer
        x = run_linen(layers, x, mask, deterministic, length=length, remat=self.remat)
        return self.norm(x)
