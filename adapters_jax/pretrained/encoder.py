"""A pretrained encoder with its tokenizer, ready to adapt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import tokenizers

from adapters_jax.checks import check_choice
from adapters_jax.data.batches import Batches, Row, encode
from adapters_jax.data.tables import Texts
from adapters_jax.errors import UserError
from adapters_jax.io.identity import BaseIdentity
from adapters_jax.models import FAMILIES
from adapters_jax.models.family import Classifier
from adapters_jax.presets import HEAD
from adapters_jax.pretrained.locate import (
    DTYPES,
    find_family,
    identity_of,
    locate,
    read_tokenizer,
    sha256_of,
)
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.quantize import quantize as quantize_params
from adapters_jax.trees import merge_trees, partition
from adapters_jax.weights.quantized import is_quantized

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # in the order of the model's arguments


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder.

    Attributes:
        architecture: the record of its family's classification model.
        config: its configuration.
        params: its parameters without a head, float32 or quantised.
        tokenizer: its tokenizer.
        pooling: what the head reads: mean, cls, pooler, or tokens.
        dtype: the computation dtype.
        sha256: the checksum of the weights' files; it shows an adapter loaded onto another base.
        identity: its identity, as an adapter's manifest stores it.
        attention: "auto", "dense" or "flash".
    """

    architecture: Classifier
    config: Any
    params: Any
    tokenizer: tokenizers.Tokenizer
    pooling: str
    dtype: str
    sha256: str
    identity: BaseIdentity
    attention: str = "auto"

    def classifier(self, width: int, dropout: float | None = None) -> nn.Module:
        """The model with a head of `width` outputs; dropout None means the checkpoint's rates."""
        config = self.config
        if dropout is not None:
            names = [field.name for field in dataclasses.fields(config) if "dropout" in field.name]
            config = dataclasses.replace(config, **dict.fromkeys(names, dropout))
        options = {"dtype": jnp.dtype(self.dtype), "attention": self.attention}
        return self.architecture.build(config, width, self.pooling, **options)

    def init(self, width: int, key: Any) -> Any:
        """Parameters of `classifier(width)`: the encoder's and a randomly initialised head's."""
        model, ids = self.classifier(width), jnp.zeros((1, 1), jnp.int32)
        # Under jit, XLA drops the encoder's random initial values, which nothing reads.
        head = jax.jit(lambda key: model.init(key, ids)["params"][HEAD])(key)
        return self.under(head)

    def under(self, head: Any) -> Any:
        """The parameters of the classifier: the encoder's and the head's."""
        return {self.architecture.base: self.params, HEAD: head}

    def quantized(self, dtype: str) -> Encoder:
        """The same encoder with quantised weights; see `adapters_jax.transforms.quantize`."""
        params, ids = self.init(1, jax.random.key(0)), jnp.zeros((1, 1), jnp.int32)
        targets = ("**", f"!{HEAD}")
        params = quantize_params(self.classifier(1), params, ids, dtype=dtype, targets=targets)
        return dataclasses.replace(self, params=params[self.architecture.base])

    def in_order(self, rows: Sequence[Row], labels: Any, size: int, buckets: Any) -> Batches:
        """Batches in order, padded with the model's padding id; see `Batches.in_order`."""
        return Batches.in_order(rows, labels, size, buckets, self.config.pad_token_id)

    @property
    def longest(self) -> int:
        """The number of tokens that the model has positions for."""
        return self.config.max_position_embeddings - self.config.first_position

    def check_length(self, max_length: int) -> None:
        """Raises UserError if the model has no positions for rows of this length."""
        if max_length > self.longest:
            raise UserError(
                f"--max-length {max_length}: expected at most {self.longest}, the positions of the "
                "model"
            )

    def encode(self, texts: Texts, max_length: int) -> tuple[list[Row], int]:
        """Encodes texts to rows of token ids, and counts those truncated; see `batches.encode`."""
        self.check_length(max_length)
        return encode(self.tokenizer, texts, max_length)


def load_encoder(
    name: str,
    pooling: str = "mean",
    dtype: str = "float32",
    quantize: str | None = None,
    attention: str = "auto",
) -> Encoder:
    """Loads an encoder.

    Args:
        name: "minilm" for the pinned asset, a directory, or an id on the Hugging Face Hub.
        pooling: mean, cls, pooler, or tokens, whose head reads the state of each token.
        dtype: the computation dtype, float32, bfloat16 or float16.
        quantize: the quantised dtype of the weights, int8, int4 or nf4; None does not quantise.
        attention: "auto", "dense" or "flash".

    Raises:
        UserError: files are absent, the checkpoint's family has no classifier, or the blocks of
            the quantisation do not divide a weight.
        MissingPackageError: quantising needs qwix, which is not installed.
        AssetError: the pinned asset could not be fetched.
    """
    check_choice(f"the base {name}", "dtype", dtype, DTYPES)
    family = find_family(name)
    if family.classifier is None:
        able = ", ".join(each.name for each in FAMILIES.values() if each.classifier)
        raise UserError(
            f"{name!r} is of the family {family.name}, which has no classifier; expected one of "
            f"{able}"
        )
    directory = locate(name)
    config, params = family.classifier.load(directory, pooling)
    tokenizer, sha256 = read_tokenizer(directory), sha256_of(directory)
    identity = identity_of(name, config)
    encoder = Encoder(
        family.classifier, config, params, tokenizer, pooling, dtype, sha256, identity, attention
    )
    return encoder.quantized(quantize) if quantize else encoder


def store_frozen(params: Any, recipe: Recipe, dtype: str) -> Any:
    """Casts the frozen leaves of a tree to a dtype; the trained ones stay float32."""
    trained, frozen = partition(params, recipe)
    cast = jax.tree.map(lambda x: x.astype(dtype), frozen, is_leaf=is_quantized)
    return merge_trees(trained, cast)
