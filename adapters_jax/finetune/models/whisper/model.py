"""The model of Whisper (flax.nnx): an encoder reads log-mel features, a decoder writes the text.

Reference: Radford et al., Robust speech recognition via large-scale weak supervision (2022),
https://arxiv.org/abs/2212.04356
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.decoder.layers import Parts
from adapters_jax.finetune.models.decoder.stack import CrossCache, Stack
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import check_remat
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.tokens import Embed, check_tokens, token_positions
from adapters_jax.finetune.models.whisper.config import WhisperConfig
from adapters_jax.methods.places import known_tokens
from adapters_jax.trace.masks import Mask

Features = Float[Array, "batch mels frames"]
Heard = Float[Array, "batch source d"]


class WhisperEncoder(Stack):
    """Two convolutions, positions, and the blocks."""

    def __init__(self, mels: int, make: Callable[[nnx.Rngs], Parts], *rest: Any):
        *_, rngs = rest
        own = make(rngs)
        config = own.config
        width, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        conv: dict[str, Any] = {"kernel_size": 3, "padding": 1, "kernel_init": init, **own.rest}
        self.conv1 = nnx.Conv(mels, width, **conv)
        self.conv2 = nnx.Conv(width, width, strides=2, **conv)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, **own.rest)
        super().__init__(config.num_hidden_layers, False, make, *rest)

    def listen(self, features: Features) -> Heard:
        """Computes the hidden states of log-mel features."""
        x = features.swapaxes(1, 2)
        for conv in (self.conv1, self.conv2):
            x = ACTIVATIONS["gelu"](conv(x))
        return self(x + self.position_embeddings(jnp.arange(x.shape[1])), None)


class WhisperDecoder(Stack):
    """The embeddings of tokens and positions, and the blocks."""

    def __init__(self, make: Callable[[nnx.Rngs], Parts], *rest: Any):
        *_, rngs = rest
        own = make(rngs)
        config = own.config
        init: Any = nnx.initializers.normal(config.initializer_range)
        more = {"embedding_init": init, **own.rest}
        self.embeddings = Embed(config.vocab_size, config.hidden_size, **more)
        self.position_embeddings = nnx.Embed(
            config.max_position_embeddings, config.hidden_size, **more
        )
        super().__init__(config.num_hidden_layers, True, make, *rest)

    def embed(
        self, ids: Int[Array, "batch length"], positions: Int[Array, "#batch length"]
    ) -> Float[Array, "batch length d"]:
        """The embeddings of tokens at these positions; padding may be before 0."""
        return self.embeddings(ids) + self.position_embeddings(jnp.maximum(positions, 0))


class Whisper(nnx.Module):
    """The speech model.

    It has no dropout, and masks no frames: the settings of both in a `config.json` have no effect.

    Args:
        config: the model's shape.
        dtype, param_dtype, attention, remat, scan, rngs: as in `Decoder`.

    Raises:
        UserError: `attention` or `remat` is not one of the choices.

    Example:
        >>> config = WhisperConfig(vocab_size=16, num_mel_bins=4, d_model=8, encoder_layers=1,
        ...     decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        ...     encoder_ffn_dim=12, decoder_ffn_dim=12, max_source_positions=5,
        ...     max_target_positions=6, decoder_start_token_id=1, pad_token_id=0)
        >>> def logits(features, ids):
        ...     return Whisper(config, rngs=nnx.Rngs(0))(features, ids)
        >>> nnx.eval_shape(logits, jnp.ones((1, 4, 10)), jnp.array([[1, 5, 7]])).shape
        (1, 3, 16)
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        attention: Choice = "auto",
        remat: bool | str = False,
        scan: bool = False,
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        attention_fn = attention_function(attention)
        self.config, self.dtype, self.scan = config, dtype, scan

        def parts(stack: Any) -> Callable[[nnx.Rngs], Parts]:
            return lambda rngs: Parts(stack, attention_fn, dtype, param_dtype, rngs)

        rest = remat, scan, rngs
        self.encoder = WhisperEncoder(config.num_mel_bins, parts(config.encoder), *rest)
        self.decoder = WhisperDecoder(parts(config.decoder), *rest)

    def __call__(
        self,
        features: Features,
        decoder_input_ids: Int[Array, "batch written"] | None = None,
        decoder_attention_mask: Num[Array, "batch written"] | None = None,
    ) -> Float[Array, "batch written vocab"]:
        """Computes float32 logits of the decoder's next token; the arguments are those of `hidden`.

        Returns:
            The logits, of shape `(batch, written, vocab)`.
        """
        return self.logits(self.hidden(features, decoder_input_ids, decoder_attention_mask))

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits of the decoder's hidden states."""
        return self.decoder.embeddings.attend(hidden).astype(jnp.float32)

    def hidden(
        self,
        features: Features,
        decoder_input_ids: Int[Array, "batch written"] | None = None,
        decoder_attention_mask: Num[Array, "batch written"] | None = None,
    ) -> Float[Array, "batch written d"]:
        """Computes the decoder's hidden states after the last norm.

        Args:
            features: log-mel features `(batch, num_mel_bins, 2 * max_source_positions)`, as
                `log_mel` and transformers' feature extractor make them.
            decoder_input_ids: the token ids that the decoder reads, which begin with
                `decoder_start_token_id`; by default this token alone.
            decoder_attention_mask: 1 for tokens and 0 for padding, of any dtype.

        Raises:
            UserError: the features are of another shape, or there are more tokens than positions.
        """
        ids, mask = decoder_input_ids, decoder_attention_mask
        if ids is None:
            start = self.config.decoder_start_token_id
            ids = jnp.full((len(features), 1), start, jnp.int32)
        check_tokens(ids, mask, self.config.longest)
        x, heard = self.decoder.embed(ids, token_positions(ids, mask)), self.encode(features)
        with known_tokens(mask):
            return self.decoder(x, Mask.of(mask, causal=True), heard)

    def encode(self, features: Features) -> Heard:
        """Computes the encoder's hidden states after its last norm; see `hidden`."""
        expected = self.config.inputs(len(features), 0).shape
        if features.shape != expected:
            raise UserError(
                f"the features have the shape {features.shape}, expected {expected}: (batch, "
                "num_mel_bins, 2 * max_source_positions); make them with log_mel, which pads"
            )
        return self.encoder.listen(features)

    def listen(self, features: Features, slots: int) -> CrossCache:
        """The cache of a decoder that is to write the text of features, see `generate`.

        Args:
            features: see `hidden`.
            slots: the largest number of tokens, the prompt's included.
        """
        return self.decoder.empty_cache(self.encode(features), None, slots)

    def extend(
        self,
        input_ids: Int[Array, "batch written"],
        attention_mask: Num[Array, "batch written"],
        cache: CrossCache,
    ) -> tuple[Float[Array, "batch written d"], CrossCache]:
        """Continues what `listen` or an earlier call has begun, as `Decoder.extend` does."""
        check_tokens(input_ids, attention_mask)
        cache, positions, mask = cache.reserve(attention_mask)
        x = self.decoder.embed(input_ids, positions)
        with known_tokens(attention_mask, before=positions):
            return self.decoder.extend(x, cache, positions, mask)


def abstract_whisper(config: WhisperConfig, **options: Any) -> Whisper:
    """Returns a model without arrays; the options are those of `Whisper`."""
    return nnx.eval_shape(lambda: Whisper(config, rngs=nnx.Rngs(0), **options))
