"""Vision transformers (flax.linen): ViT, DINOv2 and CLIP's image tower, as flags of one model.

An image is cut into patches; each becomes a token behind a first one that is trained. Blocks are
pre-norm. DINOv2 scales the outputs of its sublayers; CLIP normalises before the blocks and has its
last norm in the pooler.

Reference:
    Dosovitskiy et al., ViT (2020), https://arxiv.org/abs/2010.11929
    Oquab et al., DINOv2 (2023), https://arxiv.org/abs/2304.07193
    Radford et al., CLIP (2021), https://arxiv.org/abs/2103.00020
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.parts.attention import Choice
from adapters_jax.finetune.models.parts.encoder import TransformerEncoder
from adapters_jax.finetune.models.parts.functions import dot_product_attention
from adapters_jax.finetune.models.parts.layers import (
    FeedForward,
    LayerNorm,
    SelfAttention,
    Sum,
    Typed,
)
from adapters_jax.finetune.models.vit.config import VitConfig


class VitEmbeddings(Typed):
    """The first token and the patches, with their positions."""

    config: VitConfig

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states before the first block."""
        c, init = self.config, nn.initializers.normal(self.config.initializer_range)
        side = (c.patch_size, c.patch_size)
        patch = nn.Conv(
            c.hidden_size,
            side,
            side,
            padding="VALID",
            use_bias=c.patch_bias,
            kernel_init=init,
            name="patch",
            **self.types,
        )
        x = patch(pixels).reshape(len(pixels), c.patches, c.hidden_size)
        first = self.param("first", init, (*c.lead, *c.lead, c.hidden_size), self.param_dtype)
        position = self.param(
            "position", init, (*c.lead, c.patches + 1, c.hidden_size), self.param_dtype
        )
        first = jnp.broadcast_to(first, (len(x), 1, c.hidden_size)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1) + position.astype(x.dtype)
        x = nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)
        if not c.embedding_norm:
            return x
        return LayerNorm(epsilon=c.layer_norm_eps, name="norm", **self.types)(x)


class Scale(Typed):
    """Factors of a sublayer's outputs."""

    value: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Scales each feature."""
        init = nn.initializers.constant(self.value)
        scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
        return x * scale.astype(x.dtype)


class VitLayer(Typed):
    """One pre-norm block."""

    config: VitConfig
    attention_fn: Callable[..., Array] = dot_product_attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length d"], deterministic: bool = True
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the block."""
        c = self.config
        inits = {"kernel_init": nn.initializers.normal(c.initializer_range), **self.types}
        attention = SelfAttention(
            c.num_attention_heads,
            c.attention_probs_dropout_prob,
            c.hidden_dropout_prob,
            self.attention_fn,
            name="attention",
            **inits,
        )
        mlp = FeedForward(
            c.intermediate_size, c.hidden_act, c.hidden_dropout_prob, name="mlp", **inits
        )
        norm = partial(LayerNorm, epsilon=c.layer_norm_eps, **self.types)
        y = attention(norm(name="attention_norm")(x), deterministic=deterministic)
        x = Sum(name="attention_sum")(x, self._scaled("attention_scale", y))
        y = mlp(norm(name="mlp_norm")(x), deterministic)
        return Sum(name="mlp_sum")(x, self._scaled("mlp_scale", y))

    def _scaled(self, name: str, y: Array) -> Array:
        if not self.config.layer_scale:
            return y
        value = getattr(self.config, "layerscale_value", 1.0)
        return Scale(value, name=name, **self.types)(y)


class Vit(TransformerEncoder):
    """The image encoder, without a head; its arguments are those of `TransformerEncoder`.

    Example:
        >>> import jax
        >>> model, pixels = Vit(VitConfig()), jnp.zeros((1, 224, 224, 3))
        >>> params = jax.eval_shape(model.init, jax.random.key(0), pixels)["params"]
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        85798656
    """

    config: VitConfig
    block = VitLayer

    def setup(self) -> None:
        """Creates the submodules."""
        c = self.config
        self.embeddings = VitEmbeddings(c, **self.types)
        self.make_layers()
        self.final_norm = LayerNorm(epsilon=c.layer_norm_eps, **self.types)

    def __call__(
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
        x = self.run(self.embeddings(pixels, deterministic), deterministic)
        return self.final_norm(x) if c.final_norm else x

    def pool(self, hidden: Float[Array, "batch length d"]) -> Float[Array, "batch d"]:
        """The first token; CLIP normalises it, by parameters that exist if `init` calls this."""
        first = hidden[:, 0]
        return first if self.config.final_norm else self.final_norm(first)


class VitClassifier(Typed):
    """A `Vit` under `vit`; a dense `head` reads what the classifier in transformers reads.

    That is ViT's first token, the mean of CLIP's patches, and both of DINOv2.

    Args:
        config: the encoder's shape.
        num_labels: the width of the head.
        dtype, param_dtype, attention, remat, scan: as in `TransformerEncoder`.
    """

    config: VitConfig
    num_labels: int
    attention: Choice = "auto"
    remat: bool | str = False
    scan: bool = False

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channels"], deterministic: bool = True
    ) -> Float[Array, "batch labels"]:
        """Computes float32 logits; the arguments are those of `Vit`."""
        vit = Vit(
            self.config,
            attention=self.attention,
            remat=self.remat,
            scan=self.scan,
            name="vit",
            **self.types,
        )
        hidden = vit(pixels, deterministic)
        both = {"first": hidden[:, 0], "mean": hidden[:, 1:].mean(axis=1)}
        pooled = jnp.concatenate([both[name] for name in self.config.features], axis=-1)
        init = nn.initializers.normal(self.config.initializer_range)
        head = nn.Dense(self.num_labels, kernel_init=init, name="head", **self.types)
        return head(pooled).astype(jnp.float32)
