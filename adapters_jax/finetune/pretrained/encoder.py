"""A pretrained encoder with its tokenizer, ready to adapt."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from adapters_jax.errors import BaseFileError, UserError, check_choice
from adapters_jax.files.identity import BaseIdentity
from adapters_jax.finetune.base_files.huggingface import read_json
from adapters_jax.finetune.data.batches import Row, encode
from adapters_jax.finetune.data.pixels import Preprocessing
from adapters_jax.finetune.data.tables import Texts
from adapters_jax.finetune.formats.base import MASKED, Kind
from adapters_jax.finetune.models.family import Classifier, quantized_targets
from adapters_jax.finetune.pretrained.locate import (
    DTYPES,
    check_vocabulary,
    find_able,
    identity_of,
    locate,
    read_tokenizer,
)
from adapters_jax.methods import PromptTuning
from adapters_jax.presets import HEAD
from adapters_jax.recipe import Recipe
from adapters_jax.transforms.prompting import prompt_of
from adapters_jax.transforms.quantize import quantize as quantize_params
from adapters_jax.trees import merge_trees, partition
from adapters_jax.weights.quantized import is_quantized

PREPROCESSING = "preprocessor_config.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # in the order of the model's arguments


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder.

    Attributes:
        architecture: the record of its family's classification model.
        params: its parameters without a head, float32 or quantised.
        tokenizer: its tokenizer; None if it reads images.
        pooling: what the head reads; see `load_encoder`.
        identity: its identity, as an adapter's manifest stores it.
        attention: "auto", "dense" or "flash".
        head: the head that the checkpoint has itself; None if a new one is made.
        prompt: the virtual tokens that come before those of each row.
    """

    architecture: Classifier
    config: Any
    params: Any
    tokenizer: Any
    pooling: str
    dtype: str
    identity: BaseIdentity
    attention: str = "auto"
    head: Any = None
    prompt: PromptTuning | None = None

    @property
    def layers(self) -> dict[str, int]:
        """How many layers it has, as `MethodOptions.build` takes them."""
        return {"**/layer_{}": self.config.num_layers}

    @property
    def example(self) -> Any:
        """The least input of the model."""
        shape = self.config.inputs(1, 1)
        return jnp.zeros(shape.shape, shape.dtype)

    def classifier(self, width: int, dropout: float | None = None) -> nn.Module:
        """The model with a head of `width` outputs; dropout None means the checkpoint's rates."""
        config = self.config
        if dropout is not None:
            names = [field.name for field in dataclasses.fields(config) if "dropout" in field.name]
            config = dataclasses.replace(config, **dict.fromkeys(names, dropout))
        options = {"dtype": jnp.dtype(self.dtype), "attention": self.attention}
        options |= {"prompt": self.prompt} if self.prompt else {}
        return self.architecture.build(config, width, self.pooling, **options)

    def init(self, width: int, key: Any) -> Any:
        """Parameters of `classifier(width)`: the encoder's, and the head's, random if it is new."""
        if self.head is not None:
            return self.under(self.head)
        model, ids = self.classifier(width), self.example
        # Under jit, XLA drops the encoder's random initial values, which nothing reads.
        head = jax.jit(lambda key: model.init(key, ids)["params"][HEAD])(key)
        return self.under(head)

    def prompted(self, recipe: Recipe) -> Self:
        """The same encoder with the prompt of a recipe, if it has one, before the tokens of rows.

        Raises:
            UserError: the model has no positions for it.
        """
        encoder = dataclasses.replace(self, prompt=prompt_of(recipe))
        if encoder.longest < 1:
            raise UserError(f"the prompt leaves none of the {self.longest} positions of the model")
        return encoder

    @property
    def base(self) -> Self:
        """The encoder without a prompt."""
        return dataclasses.replace(self, prompt=None)

    @property
    def bare(self) -> tuple[nn.Module, Any]:
        """The classifier and its parameters, with its own head or the identity, without a prompt.

        With the identity, its outputs are what a head reads.
        """
        if self.head is not None:
            return self.base.classifier(1), self.under(self.head)
        width = self.config.head_features
        identity = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}
        return self.base.classifier(width), self.under(identity)

    def under(self, head: Any) -> Any:
        """The parameters of the classifier: the encoder's and the head's."""
        return {self.architecture.base: self.params, HEAD: head}

    def quantized(self, dtype: str, kind: Kind) -> Self:
        """The same encoder, of a kind, with quantised weights; see `quantized_targets`."""
        params, ids = self.init(1, jax.random.key(0)), self.example
        targets = (*quantized_targets(kind, dtype), f"!{HEAD}")
        params = quantize_params(self.classifier(1), params, ids, dtype=dtype, targets=targets)
        return dataclasses.replace(self, params=params[self.architecture.base])

    @property
    def longest(self) -> int:
        """The largest number of tokens of a row, without a prompt's; every image has as many."""
        return self.config.longest - (self.prompt.length if self.prompt else 0)

    def check_length(self, max_length: int) -> None:
        """Raises UserError if the model has no positions for rows of this length."""
        if max_length > self.longest:
            raise UserError(
                f"--max-length {max_length}: expected at most {self.longest}, the positions of the "
                f"model{' without those of the prompt' if self.prompt else ''}"
            )

    def encode(self, texts: Texts, max_length: int) -> tuple[list[Row], int]:
        """Encodes texts to rows of token ids, and counts those truncated; see `batches.encode`."""
        self.check_length(max_length)
        return encode(self.tokenizer, texts, max_length)


@dataclass(frozen=True)
class ImageEncoder(Encoder):
    """A pretrained encoder of images."""

    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def check_length(self, max_length: int) -> None:
        """Raises UserError unless this is the length of an image."""
        if max_length != self.longest:
            raise UserError(
                f"--max-length {max_length}: every image has {self.longest} tokens here; leave it "
                "out"
            )


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
        pooling: mean, cls, pooler; tokens, whose head reads the state of each token; or
            `base_model.MASKED`, whose head predicts tokens. An encoder of images has its own.
        dtype: the computation dtype, float32, bfloat16 or float16.
        quantize, attention: as in `load_pretrained_decoder`.

    Raises:
        UserError, MissingPackageError, AssetError: as in `load_pretrained_decoder`, or the
            checkpoint's family has no classifier.
    """
    check_choice(f"the base {name}", "dtype", dtype, DTYPES)
    what = "masked language model" if pooling == MASKED else "classifier"
    family = find_able(name, lambda family: family.headed(pooling), what)
    architecture: Any = family.headed(pooling)
    directory = locate(name)
    config, params = architecture.load(directory, pooling)
    read = architecture.read_head
    head = read(directory, config, params["embeddings"]["word"]["embedding"]) if read else None
    reads_images = family.kind == "vision"
    pooling = config.pooling if reads_images else pooling
    tokenizer = None if reads_images else read_tokenizer(directory)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, directory)
    identity = identity_of(name, config)
    if reads_images:
        preprocessing = _preprocessing(directory)
        config, params = config.of_images(preprocessing.sides, params)
        preprocessing.check(config.image_size, config.image_size)
    parts = (architecture, config, params, tokenizer, pooling, dtype, identity, attention)
    encoder = Encoder(*parts, head=head)
    if reads_images:
        encoder = ImageEncoder(*parts, preprocessing=preprocessing)
    return encoder.quantized(quantize, family.kind) if quantize else encoder


def _preprocessing(directory: Path) -> Preprocessing:
    """The preprocessing of a checkpoint of images; raises UserError without a usable one."""
    path = directory / PREPROCESSING
    if not path.is_file():
        raise BaseFileError(
            f"{str(directory)!r} lacks {PREPROCESSING}; write it with transformers' "
            "AutoImageProcessor.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return Preprocessing.from_dict(read_json(path))


def store_frozen(params: Any, recipe: Recipe, dtype: str) -> Any:
    """Casts the frozen leaves of a tree to a dtype; the trained ones stay float32."""
    trained, frozen = partition(params, recipe)
    cast = jax.tree.map(lambda x: x.astype(dtype), frozen, is_leaf=is_quantized)
    return merge_trees(trained, cast)
