"""The configuration of a BERT-shaped encoder, and that of the published BERTs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.counts import block, dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import check_heads

ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class BertConfig(huggingface.CheckpointConfig):
    """The shape of a BERT or RoBERTa encoder, under the names that `config.json` uses.

    Example:
        >>> BertConfig.from_dict({"hidden_size": 384, "position_embedding_type": "relative_key"})
        Traceback (most recent call last):
        adapters_jax.errors.UserError: BertConfig does not implement \
position_embedding_type='relative_key' (supported: 'absolute').
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    model_type: str = "bert"

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("bert", *ROBERTA_TYPES),
        "hidden_act": tuple(ACTIVATIONS),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.hidden_size, self.num_attention_heads)

    pooler_activation: ClassVar[str] = "tanh"
    attention_output_drops: ClassVar[bool] = True  # dropout behind the attention's output

    @property
    def embedding_size(self) -> int:
        """The width of the embeddings; where it is not that of the blocks, they are projected."""
        return self.hidden_size

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the pooler."""
        width, inner = self.embedding_size, self.hidden_size
        tokens = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        projected = dense(width, inner) if width != inner else 0
        blocks = self.num_hidden_layers * block(inner, self.intermediate_size)
        return (tokens + 2) * width + projected + blocks

    @property
    def pooler_dropout(self) -> float:
        """The dropout rate before the pooler; in RoBERTa's classifier it is that of the head."""
        return self.head_dropout if self.model_type in (*ROBERTA_TYPES, "electra") else 0.0

    @property
    def head_dropout(self) -> float:
        """The dropout rate before a classifier's head."""
        own = self.classifier_dropout
        return self.hidden_dropout_prob if own is None else own

    @property
    def first_position(self) -> int:
        """The position of the first token; RoBERTa leaves positions up to `pad_token_id` unused."""
        return self.pad_token_id + 1 if self.model_type in ROBERTA_TYPES else 0


BERT_BASE = BertConfig()
BERT_LARGE = replace(
    BERT_BASE,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
