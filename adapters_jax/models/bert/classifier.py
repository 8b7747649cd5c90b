"""A BERT encoder with a pooled head, for the classification of texts and for regression."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.interop import huggingface
from adapters_jax.interop.names import NameTable, Rule
from adapters_jax.models.bert import checkpoint
from adapters_jax.models.bert.config import BertConfig
from adapters_jax.models.bert.model import Bert
from adapters_jax.models.parts.functions import dot_product_attention
from adapters_jax.models.parts.layers import Typed

# With pooling="pooler" the model is Hugging Face's BertForSequenceClassification.
NAMES = NameTable(
    rules=(
        *(rule._replace(ours=f"bert/{rule.ours}") for rule in checkpoint.NAMES.rules),
        Rule(r"head", r"classifier"),
    ),
    prefixes=checkpoint.NAMES.prefixes,
    stack=checkpoint.NAMES.stack,
)


def mean_pool(
    hidden: Float[Array, "batch length d"], attention_mask: Num[Array, "batch length"] | None = None
) -> Float[Array, "batch d"]:
    """The mean over the tokens without the padding, in float32.

    Example:
        >>> hidden = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> mean_pool(hidden, jnp.array([[1, 1, 0]])).tolist()
        [[2.0]]
    """
    hidden = hidden.astype(jnp.float32)
    if attention_mask is None:
        return hidden.mean(axis=1)
    weights = (attention_mask != 0).astype(jnp.float32)[:, :, None]
    return (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)


class BertClassifier(Typed):
    """A BERT under `bert`; its pooled output goes through dropout and a dense `head`.

    Args:
        config: the encoder's shape.
        num_labels: the width of the head; 1 for regression.
        pooling: "mean" over the tokens, "cls" for the first token, or "pooler" for the pre-trained
            pooler.
        dtype, param_dtype, attention_fn, remat, scan: as in `Bert`.

    Example:
        >>> import jax
        >>> from adapters_jax.models.bert.config import BERT_BASE
        >>> model = BertClassifier(BERT_BASE, num_labels=2)
        >>> ids = jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params), params["head"]["kernel"].shape
        (['bert', 'head'], (768, 2))
    """

    config: BertConfig
    num_labels: int
    pooling: str = "mean"
    attention_fn: Callable[..., Array] = dot_product_attention
    remat: bool | str = False
    scan: bool = False

    def setup(self) -> None:
        """Checks the settings and creates the submodules."""
        if self.pooling not in ("mean", "cls", "pooler"):
            raise UserError(f"pooling must be 'mean', 'cls' or 'pooler', got {self.pooling!r}.")
        if self.num_labels < 1:
            raise UserError(f"num_labels must be at least 1, got {self.num_labels}.")
        self.bert = Bert(
            self.config,
            attention_fn=self.attention_fn,
            remat=self.remat,
            scan=self.scan,
            **self.types,
        )
        rate = self.config.classifier_dropout
        self.dropout = nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)
        init = nn.initializers.normal(self.config.initializer_range)
        self.head = nn.Dense(self.num_labels, kernel_init=init, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"]:
        """Computes float32 logits; the arguments are those of `Bert`."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        if self.pooling == "mean":
            pooled = mean_pool(hidden, attention_mask)
        else:
            pooled = self.bert.pool(hidden) if self.pooling == "pooler" else hidden[:, 0]
        return self.head(self.dropout(pooled, deterministic=deterministic)).astype(jnp.float32)


def load_pooled(
    directory: Path, pooling: str | None, *, absent: bool = False
) -> tuple[BertConfig, dict[str, Any]]:
    """Loads the parameters that a classifier has under `bert`.

    Args:
        directory: the checkpoint's directory.
        pooling: the classifier's; with "pooler" the pooler is loaded too.
        absent: whether the files may lack the pooler. It is filled with zeros then, for an adapter
            that trains it.

    Returns:
        The configuration and the parameters.

    Raises:
        UserError: as for `load_bert`.
    """
    pooler = pooling == "pooler"
    stored = not absent or any("pooler." in name for name in huggingface.read_tensors(directory))
    config, params = checkpoint.load_bert(directory, pooler=pooler and stored)
    if pooler and not stored:
        d = config.hidden_size
        params["pooler"] = {"dense": {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros(d)}}
    return config, params
