"""The configuration of T5 1.0, T5 1.1, Flan-T5 and mT5."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar, Self

from adapters_jax.errors import UserError, check_number, check_size
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS

MOST_BUCKETS = 1024
CLASSES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
GATED = "gated-"
# What an absent setting means for an mT5.
_MT5: dict[str, Any] = {
    **{"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class T5Config(huggingface.CheckpointConfig):
    """The shape of a T5, under the names that `config.json` uses; T5-small by default.

    Attributes:
        d_model: the width of the hidden states.
        d_kv: the width of a head; heads together may be wider or narrower than the hidden states.
        d_ff: the width inside the feed-forward.
        num_layers: the number of layers of the encoder.
        num_decoder_layers: that of the decoder; None has as many as the encoder.
        relative_attention_num_buckets: the number of groups of distances, each with a bias of the
            attention scores for every head.
        relative_attention_max_distance: the distance from which on all are of one group.
        initializer_factor: the factor of the standard deviations of new weights.
        feed_forward_proj: the activation of the feed-forward, with `gated-` before it if there is
            a gate; `gated-gelu` has the approximation of GELU by tanh.
        tie_word_embeddings: whether the embedding is the head, too. The decoder's hidden states are
            then scaled by `d_model ** -0.5`.
        decoder_start_token_id: the token with which the decoder begins, which is the padding.
        model_type: "t5" or "mt5".

    Raises:
        UserError: a setting is of a wrong type, out of range or not supported.

    Example:
        >>> T5Config(feed_forward_proj="gated-gelo")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        adapters_jax.errors.UserError: T5Config does not implement feed_forward_proj='gated-gelo' \
(nearest: 'gated-gelu'; ...

    Reference: Raffel et al., Exploring the limits of transfer learning with a unified text-to-text
    transformer (2020), https://arxiv.org/abs/1910.10683; Xue et al., mT5 (2021),
    https://arxiv.org/abs/2010.11934
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = 0
    model_type: str = "t5"

    # What the layers of `decoder` read.
    hidden_size = property(attrgetter("d_model"))
    intermediate_size = property(attrgetter("d_ff"))
    num_attention_heads = kv_heads = property(attrgetter("num_heads"))
    head_width = property(attrgetter("d_kv"))
    attention_bias = has_key_bias = has_output_bias = mlp_bias = False
    attention_multiplier = residual_multiplier = 1.0
    attn_logit_softcapping = qk_norm = None
    norm_placement, norm_type, norm_offset = "pre", "rms", 0.0
    parallel, rotary_interleaved, head_axis = None, False, False
    rms_norm_eps = property(attrgetter("layer_norm_epsilon"))
    num_experts, latent, attention_gate, attention_sinks = 0, None, False, False
    value_norm, layer_scalar, hidden_size_per_layer_input = False, False, 0
    experts_beside = False
    mlp_first = "intermediate"
    longest = 2**31 - 1  # a text may have any number of tokens, since positions are relative

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": tuple(CLASSES),
        "feed_forward_proj": (*ACTIVATIONS, *(f"{GATED}{name}" for name in ACTIVATIONS)),
        "is_encoder_decoder": (True,),
        "is_decoder": (False,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size("T5Config", "num_decoder_layers", self.decoder_layers)
        huggingface.check_layers("T5Config", self.decoder_layers, "num_decoder_layers")
        check_number("T5Config", "layer_norm_epsilon", self.layer_norm_epsilon, closed=True)
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        wrong = []
        if not 4 <= buckets <= MOST_BUCKETS:
            wrong.append(f"relative_attention_num_buckets={buckets}, expected 4 to {MOST_BUCKETS}")
        elif distance <= buckets // 2:
            wrong.append(
                f"relative_attention_max_distance={distance}, expected more than half of "
                f"relative_attention_num_buckets={buckets}"
            )
        if self.decoder_start_token_id >= self.vocab_size:
            wrong.append(
                f"decoder_start_token_id={self.decoder_start_token_id}, expected a token below "
                f"vocab_size={self.vocab_size}"
            )
        if self.model_type == "mt5" and self.tie_word_embeddings:
            wrong.append("the head of model_type='mt5' is not tied: tie_word_embeddings=False")
        if wrong:
            raise UserError(f"T5Config: {'; '.join(wrong)}.")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of fields, from a `config.json` of transformers 4 or 5.

        transformers 5 writes `tie_word_embeddings=True` for every model. Its T5 says by
        `scale_decoder_outputs` what the setting meant before; an mT5 always has its own head.

        Example:
            >>> T5Config.from_dict({"model_type": "mt5"}).tie_word_embeddings
            False
        """
        mt5 = values.get("model_type") == "mt5"
        given = {name: value for name, value in values.items() if value is not None}
        tied = given.get("scale_decoder_outputs", given.get("tie_word_embeddings", True))
        return {**(_MT5 if mt5 else {}), **given, "tie_word_embeddings": not mt5 and tied}

    def to_dict(self) -> dict[str, Any]:
        """The values of a `config.json` that transformers reads as the same model.

        Example:
            >>> T5Config(num_layers=2).to_dict()["num_decoder_layers"]
            2
        """
        return {
            **asdict(self),
            "num_decoder_layers": self.decoder_layers,
            "architectures": [CLASSES[self.model_type]],
            "is_encoder_decoder": True,
        }

    def with_layers(self, number: int) -> Self:
        """The configuration of a model of the first layers of each stack alone."""
        return replace(self, num_layers=number, num_decoder_layers=number)

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        d, tables = self.d_model, 1 if self.tie_word_embeddings else 2
        attention = 4 * d * self.num_heads * self.d_kv + d  # each sublayer with its norm
        mlp = (2 + self.mlp_gate) * d * self.d_ff + d
        ends = self.relative_attention_num_buckets * self.num_heads + d  # of each stack
        layers = self.num_layers * (attention + mlp) + self.decoder_layers * (2 * attention + mlp)
        return tables * self.vocab_size * d + 2 * ends + layers

    @property
    def decoder_layers(self) -> int:
        """The number of layers of the decoder."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def mlp_gate(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward_proj.startswith(GATED)

    @property
    def hidden_act(self) -> str:
        """The name of the feed-forward's activation, a key of `ACTIVATIONS`."""
        name = self.feed_forward_proj.removeprefix(GATED)
        return "gelu_new" if self.mlp_gate and name == "gelu" else name

    def deviation(self, inputs: int) -> float:
        """The standard deviation of new weights of a layer with that number of inputs."""
        return self.initializer_factor * inputs**-0.5

    @property
    def query_init(self) -> float:
        """The factor of a query's new weights, since the scores are not divided by a root."""
        return self.d_kv**-0.5
