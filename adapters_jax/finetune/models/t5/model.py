"""The encoder-decoder (flax.nnx): an encoder reads the prompt, a decoder writes the completion.

Reference: Raffel et al., Exploring the limits of transfer learning with a unified text-to-text
transformer (2020), https://arxiv.org/abs/1910.10683
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from adapters_jax.finetune.models.decoder.layers import (
    Context,
    DecoderLayer,
    Hidden,
    Parts,
    Seen,
    empty_cache,
    extend_layers,
)
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import check_remat, extend_nnx, make_nnx, run_nnx
from adapters_jax.finetune.models.parts.cache import Cache
from adapters_jax.finetune.models.parts.relative import relative_buckets
from adapters_jax.finetune.models.parts.tokens import check_tokens
from adapters_jax.finetune.models.t5.config import T5Config
from adapters_jax.trace.masks import Mask

Ids = Int[Array, "batch length"]


class T5Cache(NamedTuple):
    """What the decoder has read.

    Attributes:
        own: what it keeps of its tokens.
        source: keys and values of the encoder's hidden states, in the form of `own.layers`.
        seen: the mask of these hidden states.
    """

    own: Cache
    source: Any
    seen: Bool[Array, "batch 1 1 source"]

    def row_axes(self) -> "T5Cache":
        """The axis of the rows of each array; see `Cache.row_axes`."""
        own = self.own.row_axes()
        axis = jax.tree.leaves(own.layers)[0]
        return T5Cache(own, jax.tree.map(lambda _: axis, self.source), 0)  # type: ignore[arg-type]


class T5Stack(nnx.Module):
    """Blocks that share the biases of positions, and the norm after the last one."""

    def __init__(
        self,
        length: int,
        causal: bool,
        parts: Callable[[nnx.Rngs], Parts],
        remat: bool | str,
        scan: bool,
        rngs: nnx.Rngs,
    ):
        own = parts(rngs)
        config = self.config = own.config
        self.causal, self.remat = causal, remat
        self.kinds = (0,) * length  # all blocks are of one kind
        init = nnx.initializers.normal(config.deviation(config.d_model))
        sizes = config.relative_attention_num_buckets, config.num_heads
        self.position_bias = nnx.Embed(*sizes, embedding_init=init, **own.rest)
        self.layers = make_nnx(lambda rngs: DecoderLayer(parts(rngs), causal), length, scan, rngs)
        self.norm = own.norm(config.d_model)

    def __call__(
        self, x: Hidden, mask: Seen | None, source: Hidden | None = None, seen: Seen | None = None
    ) -> Hidden:
        """Computes the hidden states after the last norm; see `Context`."""
        at = jnp.arange(x.shape[1])[None]
        context = Context(mask, bias=self.bias(at, at), source=source, seen=seen)
        return self.norm(run_nnx(self.layers, x, [context], self.kinds, remat=self.remat))

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

    def read(self, source: Hidden) -> Any:
        """The keys and values of every cross-attention, in the form of a cache's layers."""

        def step(x: Array, layer: Any, _: Any) -> tuple[Array, Any]:
            return x, layer.cross_attention.read(x)

        return extend_nnx(step, self.layers, source, [None], self.kinds)[1]

    def extend(
        self, x: Hidden, attention_mask: Num[Array, "batch length"], cache: T5Cache
    ) -> tuple[Hidden, T5Cache]:
        """Computes the hidden states of further tokens, and extends the cache by them."""
        own, positions, mask = cache.own.reserve(attention_mask)
        context = Context(mask, bias=self.bias(positions, own.positions), seen=cache.seen)
        x, own = extend_layers(self.layers, x, [context], self.kinds, own, cache.source)
        return self.norm(x), cache._replace(own=own)


class T5(nnx.Module):
    """The language model.

    It has no dropout: `dropout_rate` of a `config.json` has no effect.

    Args:
        config: the model's shape.
        dtype: the computation dtype; None means that of inputs and parameters together.
        param_dtype: the dtype of the parameters.
        attention: "auto" or "dense", or the attention function of every layer; see
            `attention_function` and `DecoderAttention`. Kernels have no biases of positions, so
            "auto" takes one in cross-attention alone.
        remat: True recomputes each block in the backward pass instead of storing its activations;
            the name of a policy in `blocks.POLICIES` stores some of them.
        scan: whether the `layers` of encoder and decoder are one block each, with leaves stacked on
            their first axis, instead of lists of blocks.
        rngs: the random numbers of the initial parameters.

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
        self.embeddings = nnx.Embed(*sizes, embedding_init=init, **rest)
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
        """Computes float32 logits of the decoder's next token; the arguments are those of `hidden`.

        Returns:
            The logits, of shape `(batch, written, vocab)`.
        """
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
        return self.encoder(self.embeddings(input_ids), Mask.of(attention_mask))

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
        return self.decoder(x, mask, encoded, Mask.of(attention_mask))

    def read_prompts(
        self, input_ids: Ids, attention_mask: Num[Array, "batch length"], slots: int
    ) -> tuple[Int[Array, "batch 1"], Bool[Array, "batch 1"], T5Cache]:
        """Reads prompts with the encoder, for a decoder that has written nothing yet.

        Args:
            input_ids: the prompts.
            attention_mask: 1 for tokens and 0 for padding.
            slots: the largest number of tokens that the decoder reads.

        Returns:
            The tokens with which the decoder begins, their mask, and the cache for `extend`.
        """
        batch, decoder = len(input_ids), self.decoder
        encoded = self.encode(input_ids, attention_mask)
        own = empty_cache(decoder.layers, len(decoder.kinds), batch, slots, encoded.dtype)
        seen = (attention_mask != 0)[:, None, None, :]
        first = jnp.full((batch, 1), self.config.decoder_start_token_id, jnp.int32)
        cache = T5Cache(own, decoder.read(encoded), seen)
        return first, jnp.ones((batch, 1), bool), cache

    def extend(
        self,
        input_ids: Int[Array, "batch written"],
        attention_mask: Num[Array, "batch written"],
        cache: T5Cache,
    ) -> tuple[Float[Array, "batch written d"], T5Cache]:
        """Computes the decoder's hidden states of further tokens, and extends the cache by them.

        Args:
            input_ids: token ids; the earlier ones are in the cache.
            attention_mask: 1 for tokens and 0 for padding.
            cache: from `read_prompts` or an earlier call. It must have room for the tokens; only
                the first call can check that.

        Returns:
            The hidden states after the last norm, and the extended cache.
        """
        check_tokens(input_ids, attention_mask)
        return self.decoder.extend(self.embeddings(input_ids), attention_mask, cache)


def abstract_t5(config: T5Config, **options: Any) -> T5:
    """Returns a model without arrays; the options are those of `T5`."""
    return nnx.eval_shape(lambda: T5(config, rngs=nnx.Rngs(0), **options))
