"""BERT-shaped encoders (linen): one model for BERT, RoBERTa, DistilBERT and ELECTRA.

- `model`: the encoder. `classifier`: the encoder with a pooled head.
- `config`, `checkpoint`: BERT's configuration and the names of its tensors. `roberta`,
  `distilbert` and `electra` say in what their files differ.
- `families`: the records of all of them, and `load_bert`.
"""

from adapters_jax.finetune.models.bert import classifier
from adapters_jax.finetune.models.bert.checkpoint import NAMES
from adapters_jax.finetune.models.bert.classifier import BertClassifier, mean_pool
from adapters_jax.finetune.models.bert.config import (
    BERT_BASE,
    BERT_LARGE,
    ROBERTA_TYPES,
    BertConfig,
)
from adapters_jax.finetune.models.bert.distilbert import DistilBertConfig
from adapters_jax.finetune.models.bert.electra import ElectraConfig
from adapters_jax.finetune.models.bert.families import FAMILIES, FAMILY, load_bert
from adapters_jax.finetune.models.bert.model import Bert
from adapters_jax.finetune.models.bert.roberta import ROBERTA_BASE, ROBERTA_LARGE

__all__ = [
    "BERT_BASE",
    "BERT_LARGE",
    "FAMILIES",
    "FAMILY",
    "NAMES",
    "ROBERTA_BASE",
    "ROBERTA_LARGE",
    "ROBERTA_TYPES",
    "Bert",
    "BertClassifier",
    "BertConfig",
    "DistilBertConfig",
    "ElectraConfig",
    "classifier",
    "load_bert",
    "mean_pool",
]
