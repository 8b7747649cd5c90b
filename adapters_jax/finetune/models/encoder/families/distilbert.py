"""DistilBERT: a BERT without token types, under names of its own.

Reference: Sanh et al., DistilBERT (2019), https://arxiv.org/abs/1910.01108
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adapters_jax.files.names import HEADS, NameTable, Rule
from adapters_jax.finetune.models.encoder.checkpoint import Prediction, encoder_family
from adapters_jax.finetune.models.encoder.config import Dropouts
from adapters_jax.finetune.models.encoder.families.bert import BertConfig
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.names import LINEN, of_layers


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
    renamed: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "seq_classif_dropout": "classifier_dropout",
    }
    pooler_activation = "relu"

    @property
    def dropouts(self) -> Dropouts:
        """Those of BERT, but for one behind the attention's output."""
        return super().dropouts._replace(attention=0.0)


NAMES = NameTable(
    rules=(
        Rule(r"embeddings/(word|position)", r"embeddings.\1_embeddings"),
        Rule("embeddings/norm", "embeddings.LayerNorm"),
        Rule("pooler/dense", "pre_classifier"),
        *of_layers(
            LINEN,
            "transformer.layer",
            attention__query="attention.q_lin",
            attention__key="attention.k_lin",
            attention__value="attention.v_lin",
            attention__output__dense="attention.out_lin",
            attention_norm="sa_layer_norm",
            mlp__intermediate="ffn.lin1",
            mlp__output__dense="ffn.lin2",
            mlp_norm="output_layer_norm",
        ),
    ),
    prefixes=("distilbert.",),
    ignored=(
        r"embeddings\.position_ids",
        r"(vocab_(transform|layer_norm|projector)|(pre_)?classifier|qa_outputs)\..*",
    ),
    stack=LINEN,
    heads=(*HEADS, "pre_classifier"),
)

DISTILBERT_BASE = DistilBertConfig()

FAMILY = encoder_family(
    "distilbert",
    DistilBertConfig,
    NAMES,
    {"distilbert": "distilbert."},
    # The shapes of `config.json` in the repositories of these names on huggingface.co.
    {
        "distilbert-base": DISTILBERT_BASE,
        "distilbert/distilbert-base-uncased": DISTILBERT_BASE,
        "distilbert/distilbert-base-cased": replace(DISTILBERT_BASE, vocab_size=28996),
        "distilbert/distilbert-base-multilingual-cased": replace(
            DISTILBERT_BASE, vocab_size=119547
        ),
    },
    prediction=Prediction(
        dense="vocab_transform",
        norm="vocab_layer_norm",
        bias="vocab_projector.bias",
        decoder="vocab_projector.weight",
    ),
)
