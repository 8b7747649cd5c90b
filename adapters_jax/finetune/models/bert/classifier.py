"""A BERT encoder with a head: a pooled one for labels, or that of a masked language model."""

from adapters_jax.finetune.models.bert import checkpoint
from adapters_jax.finetune.models.bert.model import Bert
from adapters_jax.finetune.models.parts.encoder import (
    EncoderClassifier,
    classifier_names,
    mean_pool,
)
from adapters_jax.finetune.models.parts.masked_lm import MaskedLanguageModel

__all__ = ["NAMES", "BertClassifier", "BertMaskedLM", "mean_pool"]

# With pooling="pooler" the model is Hugging Face's BertForSequenceClassification.
NAMES = classifier_names("bert", checkpoint.NAMES)


class BertClassifier(EncoderClassifier):
    """A BERT, RoBERTa, DistilBERT or ELECTRA under `bert`, with a pooled head.

    Args:
        config: the encoder's shape.
        num_labels: the width of the head; 1 for regression.
        pooling: "mean" over the tokens, "cls" for the first token, or "pooler" for the layer that
            the architecture's classifier in transformers has before its last one.
        dtype, param_dtype, attention, remat, scan: as in `Bert`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adapters_jax.finetune.models.bert.config import BERT_BASE
        >>> model = BertClassifier(BERT_BASE, num_labels=2)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params), params["head"]["kernel"].shape
        (['bert', 'head'], (768, 2))
    """

    base = "bert"
    encoder = Bert


class BertMaskedLM(MaskedLanguageModel):
    """A BERT, RoBERTa or DistilBERT under `bert`, with a head that predicts tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from adapters_jax.finetune.models.bert.config import BERT_BASE
        >>> model, ids = BertMaskedLM(BERT_BASE), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params["head"]), params["head"]["bias"].shape
        (['bias', 'dense', 'norm'], (30522,))
    """

    base = "bert"
    encoder = Bert
