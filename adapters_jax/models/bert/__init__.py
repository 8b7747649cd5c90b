"""BERT and RoBERTa (linen): the encoder and a classifier on it."""

from adapters_jax.models.bert import classifier
from adapters_jax.models.bert.classifier import BertClassifier, mean_pool
from adapters_jax.models.bert.model import (
    BERT_BASE,
    BERT_LARGE,
    NAMES,
    ROBERTA_BASE,
    ROBERTA_LARGE,
    ROBERTA_TYPES,
    Bert,
    BertConfig,
    load_bert,
)

__all__ = [
    "BERT_BASE",
    "BERT_LARGE",
    "NAMES",
    "ROBERTA_BASE",
    "ROBERTA_LARGE",
    "ROBERTA_TYPES",
    "Bert",
    "BertClassifier",
    "BertConfig",
    "classifier",
    "load_bert",
    "mean_pool",
]
