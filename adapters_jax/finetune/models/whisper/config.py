"""The configuration of Whisper."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from adapters_jax.errors import UserError, check_size
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS

_SIZES = (
    *("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "num_mel_bins"),
    *("max_source_positions", "max_target_positions"),
)


class _StackConfig(DecoderConfig):
    has_key_bias = False  # type: ignore[assignment]


@dataclass(frozen=True)
class WhisperConfig(huggingface.CheckpointConfig):
    """The shape of a Whisper, under the names that `config.json` uses; Whisper tiny by default.

    Attributes:
        vocab_size: the number of tokens.
        num_mel_bins: the number of frequencies of the log-mel features.
        d_model: the width of the hidden states.
        encoder_layers, decoder_layers: the number of layers of each stack.
        encoder_attention_heads, decoder_attention_heads: the number of attention heads.
        encoder_ffn_dim, decoder_ffn_dim: the width inside the feed-forward.
        max_source_positions: the number of hidden states of the encoder, one for two frames.
        max_target_positions: the largest number of tokens of a text.
        activation_function: the activation of the feed-forward.
        init_std: the standard deviation of new weights.
        decoder_start_token_id: the token with which the decoder begins.
        pad_token_id: the token of padding.

    Raises:
        UserError: a setting is of a wrong type, out of range or not supported.

    Example:
        >>> WhisperConfig().inputs(2, 8).shape
        (2, 80, 3000)

    Reference: Radford et al., Robust speech recognition via large-scale weak supervision (2022),
    https://arxiv.org/abs/2212.04356
    """

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    decoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    max_source_positions: int = 1500
    max_target_positions: int = 448
    activation_function: str = "gelu"
    init_std: float = 0.02
    decoder_start_token_id: int = 50257
    pad_token_id: int = 50256

    num_hidden_layers = property(attrgetter("encoder_layers"))  # type: ignore[assignment]
    hidden_size = property(attrgetter("d_model"))
    longest = property(attrgetter("max_target_positions"))

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "activation_function": tuple(ACTIVATIONS),
        "scale_embedding": (False,),
        "tie_word_embeddings": (True,),
        "is_encoder_decoder": (True,),
        "model_type": ("whisper",),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SIZES:
            check_size("WhisperConfig", name, getattr(self, name))
        huggingface.check_layers("WhisperConfig", self.decoder_layers, "decoder_layers")
        if self.decoder_start_token_id >= self.vocab_size:
            raise UserError(
                f"WhisperConfig: decoder_start_token_id={self.decoder_start_token_id}, expected a "
                f"token below vocab_size={self.vocab_size}."
            )
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise UserError(
                    f"WhisperConfig: d_model={self.d_model} does not divide into "
                    f"{name}={getattr(self, name)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """The values of a `config.json` that transformers reads as the same model."""
        return {
            **asdict(self),
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "is_encoder_decoder": True,
        }

    def with_layers(self, number: int) -> Self:
        """The configuration of a model of the first layers of each stack alone."""
        return replace(self, encoder_layers=number, decoder_layers=number)

    def inputs(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """The shape of a batch of log-mel features, whose length is always the same."""
        shape = (batch, self.num_mel_bins, 2 * self.max_source_positions)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        d, norm = self.d_model, 2 * self.d_model
        attention = 4 * d * d + 3 * d + norm  # each sublayer with its norm
        encoder, decoder = (
            2 * d * inner + inner + d + norm
            for inner in (self.encoder_ffn_dim, self.decoder_ffn_dim)
        )
        convolutions = 3 * (self.num_mel_bins + d) * d + 2 * d
        positions = (self.max_source_positions + self.max_target_positions) * d
        layers = self.encoder_layers * (attention + encoder)
        layers += self.decoder_layers * (2 * attention + decoder)
        return self.vocab_size * d + positions + convolutions + 2 * norm + layers

    @property
    def encoder(self) -> DecoderConfig:
        """What the blocks of the encoder read."""
        return self._stack("encoder", self.max_source_positions)

    @property
    def decoder(self) -> DecoderConfig:
        """What the blocks of the decoder read."""
        return self._stack("decoder", self.max_target_positions)

    def _stack(self, name: str, positions: int) -> DecoderConfig:
        return _StackConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=getattr(self, f"{name}_ffn_dim"),
            num_hidden_layers=getattr(self, f"{name}_layers"),
            num_attention_heads=getattr(self, f"{name}_attention_heads"),
            hidden_act=self.activation_function,
            rms_norm_eps=1e-5,
            initializer_range=self.init_std,
            max_position_embeddings=positions,
            learned_positions=True,
            norm_type="layer",
            attention_bias=True,
            mlp_bias=True,
            mlp_gate=False,
        )
