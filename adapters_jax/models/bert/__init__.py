"""BERT and RoBERTa (linen): the encoder and a classifier on it."""

from adapters_jax.models.bert import classifier
from adapters_jax.models.bert.checkpoint import NAMES, load_bert
from adapters_jax.models.bert.classifier import BertClassifier, load_pooled, mean_pool
from adapters_jax.models.bert.config import (
    BERT_BASE,
    BERT_LARGE,
    KNOWN,
    ROBERTA_BASE,
    ROBERTA_LARGE,
    ROBERTA_TYPES,
    BertConfig,
)
from adapters_jax.models.bert.model import Bert
from adapters_jax.models.family import Classifier, Family

FAMILY = Family(
    name="bert",
    kind="encoder",
    config=BertConfig,
    build=Bert,
    load=load_bert,
    names=NAMES,
    prefixes={"bert": "bert.", **dict.fromkeys(ROBERTA_TYPES, "roberta.")},
    known=KNOWN,
    classifier=Classifier(
        base="bert",
        names=classifier.NAMES,
        build=BertClassifier,
        load=load_pooled,
        one_layer=("bert",),
    ),
)

__all__ = [
    "BERT_BASE",
    "BERT_LARGE",
    "FAMILY",
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
