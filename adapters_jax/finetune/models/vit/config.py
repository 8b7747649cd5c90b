"""The configurations of ViT, DINOv2 and CLIP's image tower, and the published ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from adapters_jax.errors import UserError
from adapters_jax.finetune.base_files import huggingface
from adapters_jax.finetune.models.parts.counts import block, dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.layers import check_heads


@dataclass(frozen=True)
class VitConfig(huggingface.CheckpointConfig):
    """The shape of a ViT, under the names that `config.json` uses; by default the base.

    Example:
        >>> VitConfig().patches
        196
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("vit",),
        "hidden_act": tuple(ACTIVATIONS),
        "qkv_bias": (True,),
    }
    # What a classifier reads: the first token, the mean of the patches, or both.
    features: ClassVar[tuple[str, ...]] = ("first",)
    embedding_norm: ClassVar[bool] = False
    final_norm: ClassVar[bool] = True  # otherwise the norm is in the pooler
    layer_scale: ClassVar[bool] = False
    patch_bias: ClassVar[bool] = True
    lead: ClassVar[tuple[int, ...]] = (1,)  # axes before those of the embeddings, as in the files

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size={self.image_size} does not divide into patches of {self.patch_size}"
            )

    @property
    def pooling(self) -> str:
        """What a classifier's head reads, in the words for encoders of texts: cls is the first."""
        names = {"first": "cls", "mean": "mean"}
        return " and ".join(names[each] for each in self.features)

    @property
    def patches(self) -> int:
        """The number of an image's patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_parameters(self) -> int:
        """The number of parameters without the pooler."""
        width = self.hidden_size
        patch = dense(self.num_channels * self.patch_size**2, width, self.patch_bias)
        rows = self.patches + 2 + 2 * self.embedding_norm + 2 * self.final_norm
        each = block(width, self.intermediate_size) + 2 * width * self.layer_scale
        return patch + rows * width + self.num_hidden_layers * each

    def images(self, batch: int) -> jax.ShapeDtypeStruct:
        """The shape of a batch of images."""
        size = self.image_size
        return jax.ShapeDtypeStruct((batch, size, size, self.num_channels), jnp.float32)


@dataclass(frozen=True)
class DinoConfig(VitConfig):
    """The shape of a DINOv2, under the names that `config.json` uses; by default the base.

    Example:
        >>> DinoConfig.from_dict({"hidden_size": 384, "num_attention_heads": 6}).intermediate_size
        1536
    """

    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    layerscale_value: float = 1.0

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **VitConfig.supported,
        "model_type": ("dinov2",),
        "use_swiglu_ffn": (False,),
        "drop_path_rate": (0.0,),
    }
    features: ClassVar[tuple[str, ...]] = ("first", "mean")
    layer_scale: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from a parsed `config.json`, which has a ratio for the inner width."""
        config, ratio = super().from_dict(values), values.get("mlp_ratio", 4)
        if not isinstance(ratio, int) or ratio < 1:
            raise UserError(f"mlp_ratio={ratio!r}, expected a whole number such as 4")
        inner = values.get("intermediate_size", config.hidden_size * ratio)
        return super().from_dict({**values, "intermediate_size": inner})


@dataclass(frozen=True)
class ClipConfig(VitConfig):
    """The shape of CLIP's image tower, under the names that `config.json` uses.

    Example:
        >>> ClipConfig.from_dict({"vision_config": {"patch_size": 16}}).patches
        196
    """

    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    patch_size: int = 32

    supported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "model_type": ("clip", "clip_vision_model"),
        "hidden_act": tuple(ACTIVATIONS),
    }
    features: ClassVar[tuple[str, ...]] = ("mean",)
    embedding_norm: ClassVar[bool] = True
    final_norm: ClassVar[bool] = False
    patch_bias: ClassVar[bool] = False
    lead: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Takes the fields from the `config.json` of a CLIP or of its image tower."""
        cls._check(values)
        inner = values.get("vision_config", values)
        if not isinstance(inner, Mapping):
            raise UserError(f"vision_config={inner!r}, expected an object with the settings")
        rate = inner.get("attention_dropout", cls.attention_probs_dropout_prob)
        return super().from_dict({**inner, "attention_probs_dropout_prob": rate})
