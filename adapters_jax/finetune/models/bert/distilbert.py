"""DistilBERT: a BERT without token types, under names of its own.

Reference: Sanh et al., DistilBERT (2019), https://arxiv.org/abs/1910.01108
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.bert.checkpoint import NAMES as BERT_NAMES
from adapters_jax.finetune.models.bert.classifier import BertClassifier, BertMaskedLM
from adapters_jax.finetune.models.bert.config import BertConfig
from adapters_jax.finetune.models.parts.encoder import encoder_family
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.masked_lm import masked_lm

_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "seq_classif_dropout": "classifier_dropout",
}


@dataclass(frozen=True)
class DistilBertConfig(BertConfig):
    """The shape of a DistilBERT, under BERT's names.

    Example:
        >>> DistilBertConfig.from_dict({"dim": 384, "n_layers": 3, "n_heads": 6}).hidden_size
        384
    """

    num_hidden_layers: int = 6
    classifier_dropout: float | None = 0.2
    type_vocab_size: int = 0
    model_type: str = "distilbert"

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("distilbert",),
        "activation": tuple(ACTIVATIONS),
        "hidden_act": tuple(ACTIVATIONS),
    }
    pooler_activation: ClassVar[str] = "relu"
    attention_output_drops: ClassVar[bool] = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, which has other names for some."""
        cls._check(values)
        return super().from_dict({_NAMES.get(name, name): value for name, value in values.items()})


DISTILBERT_BASE = DistilBertConfig()

NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position)", r"embeddings.\1_embeddings"),
        Rule(r"embeddings/norm", r"embeddings.LayerNorm"),
        Rule(r"layer_(\d+)/attention/query", r"transformer.layer.\1.attention.q_lin"),
        Rule(r"layer_(\d+)/attention/key", r"transformer.layer.\1.attention.k_lin"),
        Rule(r"layer_(\d+)/attention/value", r"transformer.layer.\1.attention.v_lin"),
        Rule(r"layer_(\d+)/attention/output/dense", r"transformer.layer.\1.attention.out_lin"),
        Rule(r"layer_(\d+)/attention_norm", r"transformer.layer.\1.sa_layer_norm"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"transformer.layer.\1.ffn.lin1"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"transformer.layer.\1.ffn.lin2"),
        Rule(r"layer_(\d+)/mlp_norm", r"transformer.layer.\1.output_layer_norm"),
        Rule(r"pooler/dense", r"pre_classifier"),
    ),
    prefixes=("distilbert.",),
    ignored=(
        r"embeddings\.position_ids",
        r"(vocab_(transform|layer_norm|projector)|(pre_)?classifier|qa_outputs)\..*",
    ),
    stack=BERT_NAMES.stack,
    heads=(*BERT_NAMES.heads, "pre_classifier"),
)

# The shapes of `config.json` in the repositories of these names on huggingface.co.
KNOWN = {
    "distilbert-base": DISTILBERT_BASE,
    "distilbert/distilbert-base-uncased": DISTILBERT_BASE,
    "distilbert/distilbert-base-cased": replace(DISTILBERT_BASE, vocab_size=28996),
    "distilbert/distilbert-base-multilingual-cased": replace(DISTILBERT_BASE, vocab_size=119547),
}

FAMILY = encoder_family(
    "distilbert",
    BertClassifier,
    DistilBertConfig,
    NAMES,
    {"distilbert": "distilbert."},
    KNOWN,
)
FAMILY = masked_lm(
    FAMILY,
    BertMaskedLM,
    {"dense": "vocab_transform", "norm": "vocab_layer_norm", "bias": "vocab_projector.bias"},
    "vocab_projector.weight",
)
