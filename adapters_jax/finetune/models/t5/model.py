"""The encoder-decoder (flax.nnx): an encoder reads the prompt, a decoder writes the completion.

Reference: Raffel et al., Exploring the limits of transfer learning with a unified text-to-text
transformer (2020), https://arxiv.org/abs/1910.10683
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.finetune.models.decoder.layers import Parts
from adapters_jax.finetune.models.decoder.stack import CrossCache, Stack
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import check_remat
from adapters_jax.finetune.models.parts.relative import relative_buckets
from adapters_jax.finetune.models.parts.tokens import Embed, check_tokens
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.methods.places import known_tokens
from adapters_jax.trace.masks import Mask

Ids = Int[Array, "batch length"]


class T5Stack(Stack):
    """Blocks that share the biases of positions, and the norm after the last one; see `Stack`."""

    def __init__(self, length: int, crosses: bool, *rest: Any):
        super().__init__(length, crosses, *rest)
        make, *_, rngs = rest
        self.causal = crosses
        config = self.config
        init = nnx.initializers.normal(config.deviation(config.d_model))
        sizes = config.relative_attention_num_buckets, config.num_heads
        self.position_bias = nnx.Embed(*sizes, embedding_init=init, **make(rngs).rest)

    def bias(
        self, at: Int[Array, "#batch length"], keys_at: Int[Array, "#batch keys"]
    ) -> Float[Array, "#batch heads length keys"]:
        """The biases of the scores of queries and keys at these positions."""
        distance = keys_at[:, None, :] - at[:, :, None]
        config = self.config
        buckets = relative_buckets(
            distance,
            self.causal,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        return jnp.moveaxis(self.position_bias(buckets), -1, 1)


class T5(nnx.Module):
    """The language model.

    It has no dropout: `dropout_rate` of a `config.json` has no effect.

    Args:
        dtype, remat, scan: as in `Decoder`, of the `layers` of encoder and decoder.
        attention: "auto" or "dense", or the attention function of every layer; see
            `attention_function` and `DecoderAttention`. Kernels have no biases of positions, so
            "auto" takes one in cross-attention alone.

    Raises:
        UserError: `attention` or `remat` is not one of the choices.

    Example:
        >>> config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
        >>> def logits(prompt, completion):
        ...     return T5(config, rngs=nnx.Rngs(0))(prompt, decoder_input_ids=completion)
        >>> nnx.eval_shape(logits, jnp.array([[1, 2, 3]]), jnp.array([[0, 5]])).shape
        (1, 2, 16)
    """

    def __init__(
        self,
        config: T5Config,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        attention: Choice = "auto",
        remat: bool | str = False,
        scan: bool = False,
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        init = nnx.initializers.normal(config.initializer_factor)
        attention_fn = attention_function(attention)
        self.config = config
        self.dtype = dtype
        self.scan = scan

        def parts(rngs: nnx.Rngs) -> Parts:
            return Parts(config, attention_fn, dtype, param_dtype, rngs)

        sizes, rest = (config.vocab_size, config.d_model), parts(rngs).rest
        self.embeddings = Embed(*sizes, embedding_init=init, **rest)
        self.encoder = T5Stack(config.num_layers, False, parts, remat, scan, rngs)
        self.decoder = T5Stack(config.decoder_layers, True, parts, remat, scan, rngs)
        if not config.tie_word_embeddings:
            self.head = nnx.Linear(*sizes[::-1], use_bias=False, kernel_init=init, **rest)

    def __call__(
        self,
        input_ids: Ids,
        attention_mask: Num[Array, "batch length"] | None = None,
        decoder_input_ids: Int[Array, "batch written"] | None = None,
        decoder_attention_mask: Num[Array, "batch written"] | None = None,
    ) -> Float[Array, "batch written vocab"]:
        """Float32 logits of the decoder's next token; the arguments are those of `hidden`."""
        return self.logits(
            self.hidden(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask)
        )

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits of the decoder's hidden states."""
        if self.config.tie_word_embeddings:
            logits = self.embeddings.attend(hidden * self.config.d_model**-0.5)
        else:
            logits = self.head(hidden)
        return logits.astype(jnp.float32)

    def hidden(
        self,
        input_ids: Ids,
        attention_mask: Num[Array, "batch length"] | None = None,
        decoder_input_ids: Int[Array, "batch written"] | None = None,
        decoder_attention_mask: Num[Array, "batch written"] | None = None,
    ) -> Float[Array, "batch written d"]:
        """Computes the decoder's hidden states after the last norm.

        Args:
            input_ids: the token ids that the encoder reads.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            decoder_input_ids: the token ids that the decoder reads, see `shifted`; by default
                `input_ids` shifted, so that it learns to repeat them.
            decoder_attention_mask: the mask of these.
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.shifted(input_ids)
        encoded = self.encode(input_ids, attention_mask)
        return self.decode(decoder_input_ids, encoded, attention_mask, decoder_attention_mask)

    def shifted(self, labels: Ids) -> Ids:
        """What the decoder reads to predict labels: the start token, and all but the last one.

        Labels below 0, which have no loss, become the start token.
        """
        start = self.config.decoder_start_token_id
        first = jnp.full_like(labels[:, :1], start)
        return jnp.concatenate([first, jnp.where(labels < 0, start, labels)[:, :-1]], axis=1)

    def encode(
        self, input_ids: Ids, attention_mask: Num[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length d"]:
        """Computes the encoder's hidden states after its last norm; see `hidden`."""
        check_tokens(input_ids, attention_mask)
        x = self.embeddings(input_ids)
        with known_tokens(attention_mask):
            return self.encoder(x, Mask.of(attention_mask))

    def decode(
        self,
        decoder_input_ids: Int[Array, "batch written"],
        encoded: Float[Array, "batch length d"],
        attention_mask: Num[Array, "batch length"] | None = None,
        decoder_attention_mask: Num[Array, "batch written"] | None = None,
    ) -> Float[Array, "batch written d"]:
        """Computes the decoder's hidden states; `encoded` is from `encode`, see `hidden`."""
        check_tokens(decoder_input_ids, decoder_attention_mask)
        mask = Mask.of(decoder_attention_mask, causal=True)
        x = self.embeddings(decoder_input_ids)
        with known_tokens(decoder_attention_mask):
            return self.decoder(x, mask, encoded, Mask.of(attention_mask))

    def read_prompts(
        self, input_ids: Ids, attention_mask: Num[Array, "batch length"], slots: int
    ) -> tuple[Int[Array, "batch 1"], Bool[Array, "batch 1"], CrossCache]:
        """Reads prompts with the encoder, for a decoder that has written nothing yet.

        Args:
            input_ids: the prompts.
            attention_mask: 1 for tokens and 0 for padding.
            slots: the largest number of tokens that the decoder reads.

        Returns:
            The tokens with which the decoder begins, their mask, and the cache for `extend`.
        """
        encoded = self.encode(input_ids, attention_mask)
        seen = (attention_mask != 0)[:, None, None, :]
        start = self.config.decoder_start_token_id
        first = jnp.full((len(input_ids), 1), start, jnp.int32)
        return first, first == start, self.decoder.empty_cache(encoded, seen, slots)

    def extend(
        self,
        input_ids: Int[Array, "batch written"],
        attention_mask: Num[Array, "batch written"],
        cache: CrossCache,
    ) -> tuple[Float[Array, "batch written d"], CrossCache]:
        """Continues what `read_prompts` or an earlier call has begun, as `Decoder.extend` does."""
        check_tokens(input_ids, attention_mask)
        x, (cache, positions, mask) = self.embeddings(input_ids), cache.reserve(attention_mask)
        with known_tokens(attention_mask, before=positions):
            return self.decoder.extend(x, cache, positions, mask)


def abstract_t5(config: T5Config, **options: Any) -> T5:
    """Returns a model without arrays; the options are those of `T5`."""
    return nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0), **options))
