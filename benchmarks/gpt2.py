"""GPT-2 in flax.linen: the model for the claims about GPT-2.

The package's own GPT-2 is `adapters_jax.finetune.models.decoder`, in NNX. Each block is pre-norm:
`x + output(attention(norm(x)))`, then the same around the feed-forward layer. Attention and
feed-forward layer are those of BERT. There is no dropout.
"""

from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adapters_jax.finetune.models.bert import BertConfig
from adapters_jax.finetune.models.encoder.layers import Block, Context, LayerNorm, Typed
from adapters_jax.finetune.models.parts.blocks import run_linen
from adapters_jax.trace.masks import Mask

Hidden = Float[Array, "batch length d"]
INIT = nn.initializers.normal(0.02)


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under the names of its `config.json`; by default the small one."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5


GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)


class GPT2Embeddings(Typed):
    """The sum of word and position embeddings; `attend` turns hidden states into logits."""

    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        self.word = nn.Embed(config.vocab_size, config.n_embd, embedding_init=INIT, **self.types)
        self.position = nn.Embed(
            config.n_positions, config.n_embd, embedding_init=INIT, **self.types
        )

    def __call__(self, input_ids: Int[Array, "batch length"]) -> Hidden:
        return self.word(input_ids) + self.position(jnp.arange(input_ids.shape[1])[None])

    def attend(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        return self.word.attend(hidden).astype(jnp.float32)


class GPT2Block(BertConfig):
    """The shape of a block, as an encoder's configuration."""

    norm_first = True

    @classmethod
    def of(cls, config: GPT2Config) -> "GPT2Block":
        return cls(
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=4 * config.n_embd,
            hidden_act="gelu_new",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            layer_norm_eps=config.layer_norm_epsilon,
        )


class GPT2(Typed):
    """The language model, its output tied to the word embeddings.

    Args:
        config: the model's shape.
        remat: whether blocks are recomputed in the backward pass instead of stored.
        scan: whether the blocks are one module, `layers`, with leaves stacked on their first axis.
    """

    config: GPT2Config
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        block = partial(Block, GPT2Block.of(self.config), **self.types)
        self.embeddings = GPT2Embeddings(self.config, **self.types)
        if self.scan:
            self.layers = block()
        else:
            self.layer = [block() for _ in range(self.config.n_layer)]
        self.norm = LayerNorm(epsilon=self.config.layer_norm_epsilon, **self.types)

    def __call__(self, input_ids: Int[Array, "batch length"]) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the next token."""
        return self.embeddings.attend(self.hidden(input_ids))

    def hidden(self, input_ids: Int[Array, "batch length"]) -> Hidden:
        """The hidden states after the last norm."""
        layers, length = self.layers if self.scan else self.layer, self.config.n_layer
        x, context = self.embeddings(input_ids), Context(Mask(causal=True))
        return self.norm(run_linen(layers, x, [context], (0,) * length, remat=self.remat))
