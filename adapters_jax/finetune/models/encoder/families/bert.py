"""BERT, whose blocks normalise the residual sums, and the families that are a BERT.

RoBERTa, XLM-R and CamemBERT count positions from behind `pad_token_id`. ELECTRA's discriminator may
have embeddings that are narrower than its blocks. DistilBERT has no token types, and other names.

Reference:
    Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
    Liu et al., RoBERTa (2019), https://arxiv.org/abs/1907.11692
    Conneau et al., XLM-R (2019), https://arxiv.org/abs/1911.02116
    Clark et al., ELECTRA (2020), https://arxiv.org/abs/2003.10555
    Sanh et al., DistilBERT (2019), https://arxiv.org/abs/1910.01108
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from adapters_jax.files.names import HEADS, NameTable, Rule
from adapters_jax.finetune.models.encoder.checkpoint import Prediction, encoder_family
from adapters_jax.finetune.models.encoder.config import Dropouts, EncoderConfig
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

# The known shapes are those of `config.json` in the repositories of these names on huggingface.co.
BERT = encoder_family(
    "bert",
    BertConfig,
    NAMES,
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
    types=("bert",),
    one_layer=True,
    prediction=Prediction(
        dense="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
        decoder="cls.predictions.decoder.weight",
    ),
)

ROBERTA_BASE = BertConfig(
    model_type="roberta",
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    pad_token_id=1,
)
ROBERTA_LARGE = replace(ROBERTA_BASE, **LARGE)
XLM_ROBERTA_BASE = replace(ROBERTA_BASE, model_type="xlm-roberta", vocab_size=250002)
_OF_FACEBOOK = {
    "roberta-base": ROBERTA_BASE,
    "roberta-large": ROBERTA_LARGE,
    "xlm-roberta-base": XLM_ROBERTA_BASE,
    "xlm-roberta-large": replace(XLM_ROBERTA_BASE, **LARGE),
}

ROBERTA = encoder_family(
    "roberta",
    BertConfig,
    # Its classifier in transformers has the pooler's layer itself.
    like_bert("roberta.", Rule(r"pooler/dense", r"classifier.dense")),
    {
        **_OF_FACEBOOK,
        **{f"FacebookAI/{name}": shape for name, shape in _OF_FACEBOOK.items()},
        "distilbert/distilroberta-base": replace(ROBERTA_BASE, num_hidden_layers=6),
        "almanach/camembert-base": replace(ROBERTA_BASE, model_type="camembert", vocab_size=32005),
    },
    types=ROBERTA_TYPES,
    head="classifier.out_proj",
    prediction=Prediction(
        dense="lm_head.dense",
        norm="lm_head.layer_norm",
        bias="lm_head.bias",
        decoder="lm_head.decoder.weight",
    ),
)


@dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """The shape of an ELECTRA, under the names that `config.json` uses; by default the small one.

    Example:
        >>> ElectraConfig(hidden_size=512).embedding_size
        128
    """

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    model_type: str = "electra"
    embedding_size: int = 128

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **BertConfig.supported,
        "model_type": ("electra",),
    }
    pooler_activation = "gelu"


# Its classifier in transformers has the pooler's layer itself.
ELECTRA_NAMES = like_bert(
    "electra.",
    Rule(r"embeddings/project", r"embeddings_project"),
    Rule(r"pooler/dense", r"classifier.dense"),
    ignored=(r"(discriminator_predictions|generator_(predictions|lm_head))\..*",),
)

_ELECTRA = {
    "small": ElectraConfig(),
    "base": ElectraConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, embedding_size=768
    ),
    "large": ElectraConfig(**LARGE, embedding_size=1024),
}

ELECTRA = encoder_family(
    "electra",
    ElectraConfig,
    ELECTRA_NAMES,
    {
        **{f"electra-{size}": shape for size, shape in _ELECTRA.items()},
        **{f"google/electra-{size}-discriminator": shape for size, shape in _ELECTRA.items()},
    },
    head="classifier.out_proj",
)


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


DISTILBERT_NAMES = NameTable(
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

DISTILBERT = encoder_family(
    "distilbert",
    DistilBertConfig,
    DISTILBERT_NAMES,
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
