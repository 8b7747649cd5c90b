"""The encoder (flax.linen): one model for all families; their configurations tell them apart.

Texts or images, norms before or behind sublayers, learned, rotary or relative positions, windows, a
feed-forward with or without a gate. References are in `families`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.encoder.layers import (
    Block,
    Context,
    Convolution,
    Hidden,
    ImageEmbeddings,
    LayerNorm,
    Pooler,
    Relative,
    TextEmbeddings,
    Typed,
)
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import distinct, run_linen
from adapters_jax.finetune.models.parts.relative import relative_positions
from adapters_jax.finetune.models.parts.rotary import LayerKind, Rotation, rotation
from adapters_jax.finetune.models.parts.tokens import check_tokens
from adapters_jax.methods.places import known_tokens
from adapters_jax.trace.masks import Mask


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


class Encoder(Typed):
    """An encoder of texts, without a head.

    Args:
        config: the model's shape, of the class of its family.
        dtype, remat: as in `models.decoder.Decoder`.
        attention: "auto", "dense" or "flash", or a function that is called as flax's attention
            modules call theirs, with query, key and value of shape
            `(batch, length, heads, head_dim)`; see `attention_function`. Disentangled attention has
            a bias of the scores, so it is always dense.
        scan: whether the blocks are one module, `layers`, with leaves stacked on their first axis,
            instead of `layer_0`, `layer_1`, ...

    Raises:
        UserError: at the first call, if `attention` or `remat` is not one of the choices, or `scan`
            is True and the blocks differ.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models import FAMILIES
        >>> config = FAMILIES["modernbert"].known["modernbert-base"]
        >>> model, ids = Encoder(config), jnp.zeros((1, 8), jnp.int32)
        >>> params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        149014272
    """

    config: Any
    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False

    embed: ClassVar[Callable[..., Any]] = TextEmbeddings

    def setup(self) -> None:
        """Creates the submodules; the pooler has parameters only if `pool` is called."""
        c = self.config
        if self.scan and c.uneven:
            raise UserError(
                f"scan=True needs blocks that are alike, but {c.uneven}; use scan=False, and "
                "remat=True to save memory"
            )
        self.embeddings = type(self).embed(c, **self.types)
        if c.disentangled:
            init = nn.initializers.normal(c.initializer_range)
            self.relative = nn.Embed(2 * c.span, c.hidden_size, embedding_init=init, **self.types)
            self.relative_norm = LayerNorm(c.layer_norm_eps, **self.types)
        self.conv = Convolution(c, **self.types)
        block = partial(Block, c, attention_function(self.attention), **self.types)
        if self.scan:
            self.layers = block()
        else:
            each = range(c.num_hidden_layers)
            self.layer = [block(normed=i > 0 or c.first_norm) for i in each]
        self.final_norm = LayerNorm(c.layer_norm_eps, use_bias=c.norm_bias, **self.types)
        self.pooler_dropout = nn.Dropout(c.pooler_dropout)
        self.pooler = Pooler(c, **self.types)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the last block.

        Args:
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            token_type_ids: the segment of each token, 0 by default; read if the family has any.
            position_ids: those of learned and rotary positions, by default 0, 1, 2, ...; RoBERTa
                counts from `pad_token_id + 1` on. Relative positions are those in the row.
            deterministic: True turns dropout off; False needs an rng named `dropout`.
        """
        c = self.config
        check_tokens(input_ids, attention_mask, c.longest)
        x = self.embeddings(input_ids, attention_mask, token_type_ids, position_ids, deterministic)
        length = input_ids.shape[1]
        relative = self._relative(length)
        kinds, numbers = distinct(c.layer_kinds)
        contexts = [
            Context(
                Mask.of(attention_mask, window=kind.window),
                self._turned(kind, length, position_ids),
                relative,
                deterministic,
            )
            for kind in kinds
        ]
        with known_tokens(attention_mask):
            return self._run(x, contexts, numbers)

    def pool(
        self,
        hidden: Float[Array, "batch length d"],
        attention_mask: Num[Array, "batch length"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "batch d"]:
        """Applies the pooler to the first token, or to the mean where the family does so.

        Its parameters exist if `init` calls this.
        """
        mean = self.config.pooler_mean
        pooled = mean_pool(hidden, attention_mask).astype(hidden.dtype) if mean else hidden[:, 0]
        return self.pooler(self.pooler_dropout(pooled, deterministic=deterministic))

    def _run(self, x: Hidden, contexts: Sequence[Context], numbers: Sequence[int]) -> Hidden:
        """Runs the blocks, each with the context of its kind."""
        c = self.config
        layers: Any = self.layers if self.scan else self.layer
        run = partial(run_linen, contexts=contexts, remat=self.remat)
        if c.conv_kernel_size:
            first = run(layers[:1], x, kinds=numbers[:1])
            x = self.conv(x, first, contexts[0].deterministic)
            layers, numbers = layers[1:], numbers[1:]
        x = run(layers, x, kinds=numbers)
        return self.final_norm(x) if c.final_norm else x

    def _turned(
        self, kind: LayerKind, length: int, position_ids: Int[Array, "#batch length"] | None
    ) -> Rotation | None:
        if kind.rope_theta is None:
            return None
        positions = jnp.arange(length)[None] if position_ids is None else position_ids
        return rotation(positions, self.config.head_width, kind.rope_theta)

    def _relative(self, length: int) -> Relative | None:
        c = self.config
        if not c.disentangled:
            return None
        embeddings = self.relative(jnp.arange(2 * c.span))
        if c.norm_rel_ebd == "layer_norm":
            embeddings = self.relative_norm(embeddings)
        buckets = relative_positions(length, c.position_buckets, c.farthest)
        return Relative(embeddings, jnp.asarray(buckets))


class ImageEncoder(Encoder):
    """An encoder of images, without a head; its arguments are those of `Encoder`.

    An image is cut into patches; each becomes a token behind a first one that is trained.

    Example:
        >>> import jax
        >>> from adapters_jax.finetune.models import FAMILIES
        >>> config = FAMILIES["vit"].known["google/vit-base-patch16-224"]
        >>> model, pixels = ImageEncoder(config), jnp.zeros((1, 224, 224, 3))
        >>> params = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        85798656
    """

    embed = ImageEmbeddings

    def __call__(  # type: ignore[override]
        self, pixels: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states of the first token and the patches, row by row.

        Args:
            pixels: images, normalised as the model was trained; the channels are the last axis.
            deterministic: True turns dropout off; False needs an rng named `dropout`.

        Raises:
            UserError: the images have another shape than the model's.
        """
        c = self.config
        expected = (c.image_size, c.image_size, c.num_channels)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise UserError(
                f"pixels have the shape {pixels.shape}, expected (batch, {expected[0]}, "
                f"{expected[1]}, {expected[2]}); resize the images, and put the channels last"
            )
        x = self.embeddings(pixels, deterministic)
        context = Context(deterministic=deterministic)
        return self._run(x, [context], (0,) * c.num_hidden_layers)

    def pool(self, hidden: Float[Array, "batch length d"]) -> Float[Array, "batch d"]:  # type: ignore[override]
        """The first token; CLIP normalises it, by parameters that exist if `init` calls this."""
        first = hidden[:, 0]
        return first if self.config.final_norm else self.final_norm(first)
