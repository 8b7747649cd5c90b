"""Models with an encoder and a `head`: classifiers of texts and of images, and masked LMs.

Reference:
    Devlin et al., BERT (2018), https://arxiv.org/abs/1810.04805
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.encoder.layers import Configured, Typed
from adapters_jax.finetune.models.encoder.model import Encoder, ImageEncoder, mean_pool
from adapters_jax.finetune.models.parts.attention import Choice
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.methods import PromptTuning
from adapters_jax.transforms.prompting import with_prompt

TOKENS = "tokens"  # the pooling of a head that reads the state of each token
Prompted = tuple[Array, Array | None, Array | None, int]


class Headed(Typed, kw_only=True):  # type: ignore[call-arg]
    """The base class of models with a head, whose options are those of `Encoder`.

    A subclass has the encoder's configuration as its first field. With a `prompt`, which the
    adapted model then has as well, its placeholders are put in front of the tokens of each row.
    """

    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False
    prompt: PromptTuning | None = None

    encoder: ClassVar[Callable[..., Any]] = Encoder

    @nn.nowrap
    def make_encoder(self) -> None:
        """Makes the encoder, under the name that the configuration has for it."""
        c: Any = self.config  # type: ignore[attr-defined]
        options = {"attention": self.attention, "remat": self.remat, "scan": self.scan}
        setattr(self, c.base, type(self).encoder(c, **options, **self.types))

    @nn.nowrap
    def prompted(self, ids: Array, mask: Array | None, types: Array | None) -> Prompted:
        """The inputs with placeholders in front, and the number of these."""
        if self.prompt is None:
            return ids, mask, types, 0
        return *with_prompt(self.prompt, ids, mask, types, ignore=0), self.prompt.length

    @nn.nowrap
    def make_head(self, features: int) -> None:
        """Makes a dense layer with the encoder's settings."""
        c: Any = self.config  # type: ignore[attr-defined]
        init = nn.initializers.normal(c.initializer_range)
        self.head = nn.Dense(features, kernel_init=init, **self.types)


class EncoderClassifier(Headed):
    """An encoder whose pooled output, or each token's state, goes through dropout and a `head`.

    Args:
        num_labels: the width of the head; 1 for regression.
        pooling: "mean" over the tokens, "cls" for the first token, "pooler" for the layers that
            the architecture's classifier in transformers has before its last one, or "tokens" for
            no pooling: the head then reads the state of each token.
        dtype, param_dtype, attention, remat, scan: as in `Encoder`.
    """

    config: Any
    num_labels: int
    pooling: str = "mean"

    def setup(self) -> None:
        """Checks the settings and creates the submodules."""
        if self.pooling not in ("mean", "cls", "pooler", TOKENS):
            raise UserError(
                f"pooling must be 'mean', 'cls', 'pooler' or 'tokens', got {self.pooling!r}."
            )
        if self.num_labels < 1:
            raise UserError(f"num_labels must be at least 1, got {self.num_labels}.")
        self.make_encoder()
        self.dropout = nn.Dropout(self.config.head_dropout)
        self.make_head(self.num_labels)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch labels"] | Float[Array, "batch length labels"]:
        """Computes float32 logits; the arguments are those of the encoder."""
        encoder = getattr(self, self.config.base)
        inputs = self.prompted(input_ids, attention_mask, token_type_ids)
        ids, attention_mask, types, front = inputs
        hidden = encoder(ids, attention_mask, types, position_ids, deterministic)
        if self.pooling == TOKENS:
            pooled = hidden[:, front:]
        elif self.pooling == "mean":
            pooled = mean_pool(hidden, attention_mask)
        elif self.pooling == "pooler":
            pooled = encoder.pool(hidden, attention_mask, deterministic)
        else:
            pooled = hidden[:, 0]
        return self.head(self.dropout(pooled, deterministic=deterministic)).astype(jnp.float32)


class ImageClassifier(Headed):
    """An encoder of images whose `head` reads what the classifier in transformers reads.

    That is ViT's first token, the mean of CLIP's patches, and both of DINOv2.

    Args:
        num_labels: the width of the head.
        dtype, param_dtype, attention, remat, scan: as in `Encoder`.
    """

    config: Any
    num_labels: int

    encoder = ImageEncoder

    def setup(self) -> None:
        """Creates the submodules."""
        self.make_encoder()
        self.make_head(self.num_labels)

    def __call__(
        self, pixels: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch labels"]:
        """Computes float32 logits; the arguments are those of `ImageEncoder`."""
        hidden = getattr(self, self.config.base)(pixels, deterministic)
        both = {"first": hidden[:, 0], "mean": hidden[:, 1:].mean(axis=1)}
        pooled = jnp.concatenate([both[name] for name in self.config.features], axis=-1)
        return self.head(pooled).astype(jnp.float32)


class PredictionHead(Configured):
    """The head of a masked language model, without its output layer, the word embeddings."""

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*batch d"], words: Float[Array, "vocab d"]
    ) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits over the vocabulary."""
        c = self.config
        x = self.dense(c.hidden_size, c.pooler_bias, "dense")(hidden)
        x = self.norm("norm")(ACTIVATIONS[c.prediction_activation](x))
        bias = self.param("bias", nn.initializers.zeros, words.shape[:1], self.param_dtype)
        return (x @ words.astype(x.dtype).T).astype(jnp.float32) + bias.astype(jnp.float32)


class MaskedLanguageModel(Headed):
    """An encoder of texts whose head predicts tokens of the vocabulary.

    The head is the checkpoint's own: a dense layer, an activation and a norm, then the word
    embeddings as the output layer, with a bias. Only the tokens that are asked for get logits.

    Args:
        dtype, param_dtype, attention, remat, scan: as in `Encoder`.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models import FAMILIES
        >>> config = FAMILIES["bert"].known["bert-base"]
        >>> model, ids = MaskedLanguageModel(config), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sorted(params["head"]), params["head"]["bias"].shape
        (['bias', 'dense', 'norm'], (30522,))
    """

    config: Any

    def setup(self) -> None:
        """Creates the submodules."""
        self.make_encoder()
        self.head: Any = PredictionHead(self.config, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch tokens"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch tokens vocab"]:
        """Computes float32 logits of the tokens at `positions`, of all tokens by default."""
        encoder = getattr(self, self.config.base)
        *inputs, front = self.prompted(input_ids, attention_mask, token_type_ids)
        hidden = encoder(*inputs, deterministic=deterministic)[:, front:]
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[:, :, None], axis=1)
        words = encoder.variables["params"]["embeddings"]["word"]["embedding"]
        return self.head(hidden, words)
