"""BERT, whose blocks normalise the residual sums; RoBERTa's are the same but for positions.

Reference: Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.encoder.checkpoint import Prediction, encoder_family
from adapters_jax.finetune.models.encoder.config import EncoderConfig
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.names import LINEN, of_layers

ROBERTA_TYPES = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
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
    def prediction_activation(self) -> str:
        """The activation of the head that predicts tokens."""
        return "gelu" if self.model_type in ROBERTA_TYPES else self.hidden_act

    @property
    def first_position(self) -> int:
        """The position of the first token; RoBERTa leaves positions up to `pad_token_id` unused."""
        return self.pad_token_id + 1 if self.model_type in ROBERTA_TYPES else 0


NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position|token_type)", r"embeddings.\1_embeddings"),
        Rule("embeddings/norm", "embeddings.LayerNorm"),
        Rule("pooler/dense", "pooler.dense"),
        *of_layers(
            LINEN,
            "encoder.layer",
            attention__query="attention.self.query",
            attention__key="attention.self.key",
            attention__value="attention.self.value",
            attention__output__dense="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            mlp__intermediate="intermediate.dense",
            mlp__output__dense="output.dense",
            mlp_norm="output.LayerNorm",
        ),
    ),
    prefixes=("bert.", "roberta."),
    # Buffers, the pooler if it is not loaded, and the heads of pre-training and of tasks.
    ignored=(
        r"embeddings\.(position_ids|token_type_ids)",
        r"(pooler|cls|lm_head|classifier|qa_outputs)\..*",
    ),
    stack=LINEN,
)


def like_bert(prefix: str, *rules: Rule, ignored: tuple[str, ...] = (), **fields: Any) -> NameTable:
    """BERT's table with another prefix, other rules before its own, and more tensors unused."""
    return replace(
        NAMES,
        rules=(*rules, *NAMES.rules),
        prefixes=(prefix,),
        ignored=(*NAMES.ignored, *ignored),
        **fields,
    )


# The settings that differ between published sizes, of BERT and of those that are like it.
LARGE: dict[str, Any] = {
    **{"hidden_size": 1024, "num_hidden_layers": 24},
    **{"num_attention_heads": 16, "intermediate_size": 4096},
}
BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(**LARGE)

FAMILY = encoder_family(
    "bert",
    BertConfig,
    NAMES,
    {"bert": "bert."},
    # The shapes of `config.json` in the repositories of these names on huggingface.co.
    {
        "bert-base": BERT_BASE,
        "bert-large": BERT_LARGE,
        "google-bert/bert-base-uncased": BERT_BASE,
        "google-bert/bert-large-uncased": BERT_LARGE,
        "google-bert/bert-base-cased": replace(BERT_BASE, vocab_size=28996),
        "google-bert/bert-large-cased": replace(BERT_LARGE, vocab_size=28996),
        "google-bert/bert-base-multilingual-cased": replace(BERT_BASE, vocab_size=119547),
        "sentence-transformers/all-MiniLM-L6-v2": replace(
            BERT_BASE, hidden_size=384, num_hidden_layers=6, intermediate_size=1536
        ),
    },
    one_layer=("bert",),
    prediction=Prediction(
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
        decoder="cls.predictions.decoder.weight",
    ),
)
