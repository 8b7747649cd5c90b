"""RoBERTa, XLM-R and CamemBERT: positions start behind `pad_token_id`.

Reference:
    Liu et al., RoBERTa (2019), https://arxiv.org/abs/1907.11692
    Conneau et al., XLM-R (2019), https://arxiv.org/abs/1911.02116
"""

from dataclasses import replace
from typing import Any

from adapters_jax.files.names import Rule
from adapters_jax.finetune.models.bert.checkpoint import like_bert
from adapters_jax.finetune.models.bert.classifier import BertClassifier, BertMaskedLM
from adapters_jax.finetune.models.bert.config import (
    BERT_BASE,
    BERT_LARGE,
    ROBERTA_TYPES,
    BertConfig,
)
from adapters_jax.finetune.models.parts.encoder import encoder_family
from adapters_jax.finetune.models.parts.masked_lm import masked_lm

_ROBERTA: dict[str, Any] = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
ROBERTA_BASE = replace(BERT_BASE, **_ROBERTA)
ROBERTA_LARGE = replace(BERT_LARGE, **_ROBERTA)

# Its classifier in transformers has the pooler's layer itself.
NAMES = like_bert("roberta.", Rule(r"pooler/dense", r"classifier.dense"))

_XLM_R: dict[str, Any] = {"model_type": "xlm-roberta", "vocab_size": 250002}
XLM_ROBERTA_BASE = replace(ROBERTA_BASE, **_XLM_R)
XLM_ROBERTA_LARGE = replace(ROBERTA_LARGE, **_XLM_R)

# The shapes of `config.json` in the repositories of these names on huggingface.co.
KNOWN = {
    "roberta-base": ROBERTA_BASE,
    "roberta-large": ROBERTA_LARGE,
    "xlm-roberta-base": XLM_ROBERTA_BASE,
    "xlm-roberta-large": XLM_ROBERTA_LARGE,
    "FacebookAI/roberta-base": ROBERTA_BASE,
    "FacebookAI/roberta-large": ROBERTA_LARGE,
    "FacebookAI/xlm-roberta-base": XLM_ROBERTA_BASE,
    "FacebookAI/xlm-roberta-large": XLM_ROBERTA_LARGE,
    "distilbert/distilroberta-base": replace(ROBERTA_BASE, num_hidden_layers=6),
    "almanach/camembert-base": replace(ROBERTA_BASE, model_type="camembert", vocab_size=32005),
}

FAMILY = encoder_family(
    "roberta",
    BertClassifier,
    BertConfig,
    NAMES,
    dict.fromkeys(ROBERTA_TYPES, "roberta."),
    KNOWN,
    head="classifier.out_proj",
)
FAMILY = masked_lm(
    FAMILY,
    BertMaskedLM,
    {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    "lm_head.decoder.weight",
    activation="gelu",
)
