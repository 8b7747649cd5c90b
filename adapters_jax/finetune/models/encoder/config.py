"""What every encoder's configuration says about its model: sizes, and the parts it has."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

from adapters_jax.errors import UserError
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.counts import dense
from adapters_jax.finetune.models.parts.rotary import LayerKind


class Dropouts(NamedTuple):
    """Rates of dropout.

    Attributes:
        embedding: behind the embeddings.
        weights: of the attention weights.
        attention: behind the attention's output.
        inner: inside the feed-forward, behind its activation.
        mlp: behind the feed-forward's output.
    """

    embedding: float
    weights: float
    attention: float
    inner: float
    mlp: float


class EncoderConfig(huggingface.CheckpointConfig):
    """The base class of encoders' configurations, a frozen dataclass for each family.

    Their fields have the names that the family's `config.json` uses, and they alone tell a base
    from others in an adapter's manifest. What follows from the architecture is a property, or an
    attribute without annotation, which dataclasses take for no field. The model reads these, which
    are BERT's unless a family says otherwise:

    Attributes:
        base: the name of the module that holds the encoder in a model with a head.
        norm_first: whether sublayers normalise their inputs; otherwise the residual sums.
        first_norm: whether the first block normalises the input of its attention, too.
        final_norm: whether the last block's output is normalised.
        attention_bias, mlp_bias, norm_bias: whether these layers have biases.
        mlp_gate: whether the feed-forward has a gate.
        zero_padding: whether embeddings of padding are set to zero.
        disentangled: whether the attention reads relative positions; see `SelfAttention`.
        conv_kernel_size: the width of a convolution beside the first block; 0 has none.
        layer_scale: the first value of factors of each sublayer's output; None has no factors.
        uneven: why blocks cannot be scanned, as the end of a sentence; None if they can.
        first_position: the position of the first token.
        pooler_activation: the activation of the pooler.
        pooler_bias, pooler_norm: whether its layer has a bias, and a norm behind it.
        pooler_mean: whether it reads the mean over the tokens instead of the first one.
        pooler_dropout: the rate of dropout before it.
        embedding_size: the width of the embeddings; where it is not that of the blocks, they are
            projected.
        head_features: the number of features that a head reads.
    """

    # The fields that the properties here read; images have no vocabulary.
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    # Several are ClassVar[Any] since a family may have a property or a field in their place.
    base = "bert"
    norm_first = False
    first_norm = True
    final_norm = False
    attention_bias = True
    mlp_bias = True
    norm_bias = True
    mlp_gate = False
    zero_padding = False
    disentangled = False
    conv_kernel_size = 0
    layer_scale: ClassVar[Any] = None
    uneven: ClassVar[Any] = None
    first_position: ClassVar[Any] = 0
    pooler_activation: ClassVar[Any] = "tanh"
    pooler_bias = True
    pooler_norm = False
    pooler_mean: ClassVar[Any] = False
    pooler_dropout: Any = 0.0
    embedding_size: Any = property(attrgetter("hidden_size"))
    head_features: ClassVar[Any] = property(attrgetter("hidden_size"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"a width of {self.hidden_size} does not divide into {self.num_attention_heads} "
                "attention heads."
            )

    @classmethod
    def of_classifier(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `config.json` of transformers' classifier, by those of the encoder."""
        return dict(values)

    @property
    def longest(self) -> int:
        """The largest number of tokens of a row."""
        return self.max_position_embeddings - self.first_position

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def dropouts(self) -> Dropouts:
        """The rates of dropout in the encoder."""
        rate = self.hidden_dropout_prob
        return Dropouts(rate, self.attention_probs_dropout_prob, rate, 0.0, rate)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What tells the attention of each layer from that of others."""
        return (LayerKind(),) * self.num_hidden_layers

    @property
    def tables(self) -> dict[str, int]:
        """The rows of each table of embeddings of tokens, by name; 0 if it does not exist."""
        positions, types = self.max_position_embeddings, self.type_vocab_size
        return {"word": self.vocab_size, "position": positions, "token_type": types}

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the pooler."""
        width, inner, layers = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        attention = 4 * dense(width, width, self.attention_bias)
        mlp = (1 + self.mlp_gate) * dense(width, inner, self.mlp_bias)
        mlp += dense(inner, width, self.mlp_bias)
        scales = 0 if self.layer_scale is None else 2 * width
        norms = 2 * layers - (not self.first_norm) + self.final_norm
        blocks = layers * (attention + mlp + scales)
        return self._embedding_parameters() + blocks + norms * dense(1, width, self.norm_bias)

    def _embedding_parameters(self) -> int:
        """The number of parameters before the first block."""
        width, inner = self.embedding_size, self.hidden_size
        projected = dense(width, inner) if width != inner else 0
        return (sum(self.tables.values()) + 1 + self.norm_bias) * width + projected
