"""A BERT encoder with a pooled head, for the classification of texts and for regression."""

from adapters_jax.models.bert import checkpoint
from adapters_jax.models.bert.model import Bert
from adapters_jax.models.parts.encoder import EncoderClassifier, classifier_names, mean_pool

__all__ = ["NAMES", "BertClassifier", "mean_pool"]

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
        >>> from adapters_jax.models.bert.config import BERT_BASE
        >>> model = BertClassifier(BERT_BASE, num_labels=2)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params), params["head"]["kernel"].shape
        (['bert', 'head'], (768, 2))
    """

    base = "bert"
    encoder = Bert
