"""BERT-shaped encoders by the names of BERT: also RoBERTa, DistilBERT and ELECTRA.

They are the model of `encoder`, and their facts are in `encoder.families`.
"""

from pathlib import Path
from typing import Any

from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.encoder.families.bert import (
    BERT,
    BERT_BASE,
    BERT_LARGE,
    DISTILBERT,
    ELECTRA,
    NAMES,
    ROBERTA,
    BertConfig,
)
from adapters_jax.finetune.models.encoder.heads import EncoderClassifier
from adapters_jax.finetune.models.encoder.model import Encoder, mean_pool

FAMILY = BERT
FAMILIES = (BERT, ROBERTA, DISTILBERT, ELECTRA)


class Bert(Encoder):
    """The encoder, without a head; its arguments are those of `Encoder`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> bert, ids = Bert(BERT_BASE), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(bert.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        108891648
    """


class BertClassifier(EncoderClassifier):
    """A BERT, RoBERTa, DistilBERT or ELECTRA under `bert`, with a pooled head.

    Its arguments are those of `EncoderClassifier`. With `pooling="pooler"` the model is Hugging
    Face's BertForSequenceClassification.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model, ids = BertClassifier(BERT_BASE, num_labels=2), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params), params["head"]["kernel"].shape
        (['bert', 'head'], (768, 2))
    """


def load_bert(
    name_or_path: str | Path, *, revision: str | None = None, **options: Any
) -> tuple[BertConfig, dict[str, Any]]:
    """Loads a BERT, RoBERTa, DistilBERT or ELECTRA from a directory or the Hugging Face Hub.

    Args:
        name_or_path: a directory with `config.json` and safetensors, or an id on the Hub.
        revision: a branch, tag or commit on the Hub.
        **options: `mesh`, `rules`, `pooler`, `param_dtype` and `scan`; see
            `models.encoder.checkpoint.load_encoder`.

    Returns:
        The configuration, and the parameters of `Bert(config, scan=scan)`, which a
        `BertClassifier` has under `bert`.

    Raises:
        UserError: files are absent, or a setting is unsupported.
        MismatchError: the tensors do not fit; the message lists every difference.
    """
    directory = huggingface.resolve(name_or_path, revision)
    found = huggingface.read_json(directory / "config.json").get("model_type", "bert")
    family = next((each for each in FAMILIES if found in list(each.prefixes)), FAMILY)
    return family.load(directory, **options)


__all__ = [
    "BERT_BASE",
    "BERT_LARGE",
    "FAMILIES",
    "FAMILY",
    "NAMES",
    "Bert",
    "BertClassifier",
    "BertConfig",
    "load_bert",
    "mean_pool",
]
