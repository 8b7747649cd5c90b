"""ViT, DINOv2 and CLIP's image tower: encoders of images with norms before sublayers.

DINOv2 scales the outputs of its sublayers; CLIP normalises before the blocks and has its last norm
in the pooler.

Reference:
    Dosovitskiy et al., ViT (2020), https://arxiv.org/abs/2010.11929
    Oquab et al., DINOv2 (2023), https://arxiv.org/abs/2304.07193
    Radford et al., CLIP (2021), https://arxiv.org/abs/2103.00020
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from adapters_jax.errors import UserError
from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.finetune.models.encoder.checkpoint import encoder_family
from adapters_jax.finetune.models.encoder.config import EncoderConfig
from adapters_jax.finetune.models.encoder.families.bert import LARGE
from adapters_jax.finetune.models.parts.counts import dense
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.finetune.models.parts.names import LINEN, of_layers


@dataclass(frozen=True)
class VitConfig(EncoderConfig):
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
    base = "vit"
    norm_first = True
    final_norm = True  # otherwise the norm is in the pooler
    # What a classifier reads: the first token, the mean of the patches, or both.
    features: ClassVar[tuple[str, ...]] = ("first",)
    embedding_norm = False
    patch_bias = True
    lead: ClassVar[tuple[int, ...]] = (1,)  # axes before those of the embeddings, as in the files

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
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
    def longest(self) -> int:
        """The number of tokens of every image."""
        return self.patches + 1

    @property
    def head_features(self) -> int:
        """The number of features that a head reads: of the first token, the patches, or both."""
        return self.hidden_size * len(self.features)

    def inputs(self, batch: int, length: int) -> jax.ShapeDtypeStruct:
        """The shape of a batch of images."""
        size = self.image_size
        return jax.ShapeDtypeStruct((batch, size, size, self.num_channels), jnp.float32)

    def of_images(self, sides: tuple[int, int] | None, params: Any) -> tuple[Self, Any]:
        """The model for images of other sides, if it has a way to read them; else as it is.

        Args:
            sides: the height and width of the images; None if they have several.
            params: the encoder's parameters.
        """
        return self, params

    def _embedding_parameters(self) -> int:
        width = self.hidden_size
        patch = dense(self.num_channels * self.patch_size**2, width, self.patch_bias)
        return patch + (self.patches + 2 + 2 * self.embedding_norm) * width


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
    layer_scale = property(attrgetter("layerscale_value"))

    def of_images(self, sides: tuple[int, int] | None, params: Any) -> tuple[Self, Any]:
        """The model for images of other sides: positions are interpolated, as in its training.

        The published models have positions for 518 pixels, and their preprocessing gives 224.
        """
        side = sides[0] if sides else self.image_size
        if sides != (side, side) or side == self.image_size or side % self.patch_size:
            return self, params
        new, old = replace(self, image_size=side), params["embeddings"]["position"]
        first, patches = np.split(np.asarray(old, np.float64), [1], axis=1)
        count = self.image_size // self.patch_size
        between = _bicubic(side // self.patch_size, count)
        grid = patches.reshape(count, count, self.hidden_size)
        grid = np.einsum("ih,jw,hwd->ijd", between, between, grid, optimize=True)
        position = np.concatenate([first, grid.reshape(1, -1, self.hidden_size)], axis=1)
        embeddings = {**params["embeddings"], "position": jnp.asarray(position, old.dtype)}
        return new, {**params, "embeddings": embeddings}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with the inner width, for which `config.json` has a ratio."""
        width, ratio = values.get("hidden_size", cls.hidden_size), values.get("mlp_ratio", 4)
        if not isinstance(ratio, int) or ratio < 1:
            raise UserError(f"mlp_ratio={ratio!r}, expected a whole number such as 4")
        inner = width * ratio if isinstance(width, int) else cls.intermediate_size
        return {"intermediate_size": inner, **values}


def _bicubic(new: int, old: int) -> Float[np.ndarray, "new old"]:
    """The matrix that interpolates `old` points at `new` ones, as torch does without antialiasing.

    Reference: Keys 1981, with a = -0.75, and the outermost points repeated.
    """
    a, matrix = -0.75, np.zeros((new, old))
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at)
    for tap in (-1, 0, 1, 2):
        far = np.abs(at - first - tap)
        inner = ((a + 2) * far - (a + 3)) * far**2 + 1
        outer = (((far - 5) * far + 8) * far - 4) * a
        points = np.clip(first + tap, 0, old - 1).astype(int)
        matrix[np.arange(new), points] += np.where(far <= 1, inner, outer)
    return matrix


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
    embedding_norm = True
    final_norm = False
    patch_bias = False
    lead: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of the image tower, also from those of a whole CLIP."""
        inner = values.get("vision_config", values)
        if not isinstance(inner, Mapping):
            raise UserError(f"vision_config={inner!r}, expected an object with the settings")
        rate = inner.get("attention_dropout", cls.attention_probs_dropout_prob)
        return {**inner, "attention_probs_dropout_prob": rate}

    @classmethod
    def of_classifier(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a whole CLIP: transformers has no classifier of an image tower alone."""
        if "vision_config" in values:
            return dict(values)
        return {"model_type": "clip", "architectures": ["CLIPModel"], "vision_config": dict(values)}


_FIRST = (
    ParameterRule("embeddings/first", "embeddings.cls_token"),
    ParameterRule("embeddings/position", "embeddings.position_embeddings"),
)


def _like_vit(prefix: str, *unused: str, **names: str) -> NameTable:
    """A table with ViT's names of attention; `names` are those of the rest of a block."""
    return NameTable(
        rules=(
            Rule("embeddings/patch", "embeddings.patch_embeddings.projection"),
            Rule("final_norm", "layernorm"),
            *of_layers(
                LINEN,
                "encoder.layer",
                attention__query="attention.attention.query",
                attention__key="attention.attention.key",
                attention__value="attention.attention.value",
                attention__output__dense="attention.output.dense",
                **names,
            ),
        ),
        prefixes=(prefix,),
        ignored=(rf"({'|'.join(unused)})\..*", r"embeddings\.mask_token"),
        stack=LINEN,
        parameters=_FIRST,
    )


def _since_5(layers: str) -> tuple[tuple[str, str], ...]:
    """The names of attention's modules in transformers 4 and 5; `layers` is 5's list of layers."""
    return tuple(
        (f"encoder.layer.{{}}.attention.{four}", f"{layers}.{{}}.attention.{five}")
        for four, five in (
            ("attention.query", "q_proj"),
            ("attention.key", "k_proj"),
            ("attention.value", "v_proj"),
            ("output.dense", "o_proj"),
        )
    )


VIT_NAMES = replace(
    _like_vit(
        "vit.",
        *("pooler", "classifier", "decoder"),
        attention_norm="layernorm_before",
        mlp_norm="layernorm_after",
        mlp__intermediate="intermediate.dense",
        mlp__output__dense="output.dense",
    ),
    since_5=(
        *_since_5("layers"),
        ("encoder.layer.{}.intermediate.dense", "layers.{}.mlp.fc1"),
        ("encoder.layer.{}.output.dense", "layers.{}.mlp.fc2"),
        ("encoder.layer.{}", "layers.{}"),
    ),
)
DINO_NAMES = replace(
    _like_vit(
        "dinov2.",
        "classifier",
        attention_norm="norm1",
        mlp_norm="norm2",
        mlp__intermediate="mlp.fc1",
        mlp__output__dense="mlp.fc2",
    ),
    since_5=_since_5("encoder.layer"),
    parameters=(
        *_FIRST,
        ParameterRule(
            r"layer_(\d+)/attention_scale/scale", r"encoder.layer.\1.layer_scale1.lambda1"
        ),
        ParameterRule(r"layer_(\d+)/mlp_scale/scale", r"encoder.layer.\1.layer_scale2.lambda1"),
    ),
)
CLIP_NAMES = NameTable(
    rules=(
        Rule("embeddings/patch", "embeddings.patch_embedding"),
        Rule("embeddings/norm", "pre_layrnorm"),
        Rule("final_norm", "post_layernorm"),
        *of_layers(
            LINEN,
            "encoder.layers",
            attention__query="self_attn.q_proj",
            attention__key="self_attn.k_proj",
            attention__value="self_attn.v_proj",
            attention__output__dense="self_attn.out_proj",
            attention_norm="layer_norm1",
            mlp_norm="layer_norm2",
            mlp__intermediate="mlp.fc1",
            mlp__output__dense="mlp.fc2",
        ),
    ),
    prefixes=("vision_model.",),
    ignored=(
        r"(text_model|post_layernorm|classifier)\..*",
        r"(visual|text)_projection\.weight",
        r"logit_scale",
        r"embeddings\.position_ids",
    ),
    stack=LINEN,
    parameters=(
        ParameterRule("embeddings/first", "embeddings.class_embedding"),
        ParameterRule("embeddings/position", "embeddings.position_embedding.weight"),
    ),
)

_VIT_BASE, _DINO_BASE, _CLIP_32 = VitConfig(), DinoConfig(), ClipConfig()
_DINO_SMALL = DinoConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
_family = partial(encoder_family, kind="vision", one_layer=True)

# The shapes of `config.json` in the repositories of these names on huggingface.co.
FAMILIES = (
    _family(
        "vit",
        VitConfig,
        VIT_NAMES,
        {
            "google/vit-base-patch16-224": _VIT_BASE,
            "google/vit-base-patch16-384": replace(_VIT_BASE, image_size=384),
            "google/vit-large-patch16-224": replace(_VIT_BASE, **LARGE),
        },
    ),
    _family(
        "dinov2",
        DinoConfig,
        DINO_NAMES,
        {
            "facebook/dinov2-small": _DINO_SMALL,
            "facebook/dinov2-base": _DINO_BASE,
            "facebook/dinov2-large": replace(_DINO_BASE, **LARGE),
        },
    ),
    _family(
        "clip",
        ClipConfig,
        CLIP_NAMES,
        {
            "openai/clip-vit-base-patch32": _CLIP_32,
            "openai/clip-vit-base-patch16": replace(_CLIP_32, patch_size=16),
            "openai/clip-vit-large-patch14": replace(_CLIP_32, patch_size=14, **LARGE),
        },
        bare="vision_model.",
    ),
)
