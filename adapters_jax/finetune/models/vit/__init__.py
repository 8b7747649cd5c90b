"""Vision transformers (linen): ViT, DINOv2 and CLIP's image tower, and a classifier on them."""

from dataclasses import replace
from functools import partial
from typing import Any

from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.finetune.models.family import Classifier, Family
from adapters_jax.finetune.models.parts.encoder import classifier_names, load_encoder
from adapters_jax.finetune.models.vit.config import ClipConfig, DinoConfig, VitConfig
from adapters_jax.finetune.models.vit.model import Vit, VitClassifier
from adapters_jax.transforms.stacking import Stack

_STACK = Stack("layer_{}", "layers")
_ATTENTION = (
    Rule(r"layer_(\d+)/attention/(query|key|value)", r"encoder.layer.\1.attention.attention.\2"),
    Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layer.\1.attention.output.dense"),
    Rule(r"embeddings/patch", r"embeddings.patch_embeddings.projection"),
    Rule(r"final_norm", r"layernorm"),
)
_EMBEDDINGS = (
    ParameterRule(r"embeddings/first", r"embeddings.cls_token"),
    ParameterRule(r"embeddings/position", r"embeddings.position_embeddings"),
)
VIT_NAMES = NameTable(
    rules=(
        *_ATTENTION,
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.layernorm_before"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.layernorm_after"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.intermediate.dense"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.output.dense"),
    ),
    prefixes=("vit.",),
    ignored=(r"(pooler|classifier|decoder)\..*", r"embeddings\.mask_token"),
    stack=_STACK,
    parameters=_EMBEDDINGS,
)
DINO_NAMES = NameTable(
    rules=(
        *_ATTENTION,
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layer.\1.norm1"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layer.\1.norm2"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layer.\1.mlp.fc1"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layer.\1.mlp.fc2"),
    ),
    prefixes=("dinov2.",),
    ignored=(r"classifier\..*", r"embeddings\.mask_token"),
    stack=_STACK,
    parameters=(
        *_EMBEDDINGS,
        ParameterRule(
            r"layer_(\d+)/attention_scale/scale", r"encoder.layer.\1.layer_scale1.lambda1"
        ),
        ParameterRule(r"layer_(\d+)/mlp_scale/scale", r"encoder.layer.\1.layer_scale2.lambda1"),
    ),
)
CLIP_NAMES = NameTable(
    rules=(
        Rule(r"embeddings/patch", r"embeddings.patch_embedding"),
        Rule(r"embeddings/norm", r"pre_layrnorm"),
        Rule(r"final_norm", r"post_layernorm"),
        Rule(r"layer_(\d+)/attention/query", r"encoder.layers.\1.self_attn.q_proj"),
        Rule(r"layer_(\d+)/attention/key", r"encoder.layers.\1.self_attn.k_proj"),
        Rule(r"layer_(\d+)/attention/value", r"encoder.layers.\1.self_attn.v_proj"),
        Rule(r"layer_(\d+)/attention/output/dense", r"encoder.layers.\1.self_attn.out_proj"),
        Rule(r"layer_(\d+)/attention_norm", r"encoder.layers.\1.layer_norm1"),
        Rule(r"layer_(\d+)/mlp_norm", r"encoder.layers.\1.layer_norm2"),
        Rule(r"layer_(\d+)/mlp/intermediate", r"encoder.layers.\1.mlp.fc1"),
        Rule(r"layer_(\d+)/mlp/output/dense", r"encoder.layers.\1.mlp.fc2"),
    ),
    prefixes=("vision_model.",),
    ignored=(
        r"(text_model|post_layernorm|classifier)\..*",
        r"(visual|text)_projection\.weight",
        r"logit_scale",
        r"embeddings\.position_ids",
    ),
    stack=_STACK,
    parameters=(
        ParameterRule(r"embeddings/first", r"embeddings.class_embedding"),
        ParameterRule(r"embeddings/position", r"embeddings.position_embedding.weight"),
    ),
)

_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
_VIT_BASE, _DINO_BASE, _CLIP_32 = VitConfig(), DinoConfig(), ClipConfig()

# The shapes of `config.json` in the repositories of these names on huggingface.co.
_VITS = {
    "google/vit-base-patch16-224": _VIT_BASE,
    "google/vit-base-patch16-384": replace(_VIT_BASE, image_size=384),
    "google/vit-large-patch16-224": replace(_VIT_BASE, **_LARGE),
}
_DINOS = {
    "facebook/dinov2-small": replace(_DINO_BASE, **_SMALL),
    "facebook/dinov2-base": _DINO_BASE,
    "facebook/dinov2-large": replace(_DINO_BASE, **_LARGE),
}
_CLIPS = {
    "openai/clip-vit-base-patch32": _CLIP_32,
    "openai/clip-vit-base-patch16": replace(_CLIP_32, patch_size=16),
    "openai/clip-vit-large-patch14": replace(_CLIP_32, patch_size=14, **_LARGE),
}


def _family(
    name: str, config: type[VitConfig], names: NameTable, prefixes: Any, known: Any
) -> Family:
    """The record of a family of image encoders."""
    load = partial(load_encoder, Vit, config, names, inputs=lambda config: config.images(1))
    whole = Classifier(
        base="vit",
        names=classifier_names("vit", names),
        build=_classifier,
        load=lambda directory, pooling, absent=False: load(directory),
        one_layer=tuple(prefixes),
    )
    return Family(name, "vision", config, Vit, load, names, prefixes, known, classifier=whole)


def _classifier(config: VitConfig, width: int, pooling: str, **options: Any) -> VitClassifier:
    return VitClassifier(config, width, **options)  # the configuration says what its head reads


FAMILIES = (
    _family("vit", VitConfig, VIT_NAMES, {"vit": "vit."}, _VITS),
    _family("dinov2", DinoConfig, DINO_NAMES, {"dinov2": "dinov2."}, _DINOS),
    _family(
        "clip",
        ClipConfig,
        CLIP_NAMES,
        dict.fromkeys(("clip", "clip_vision_model"), "vision_model."),
        _CLIPS,
    ),
)

__all__ = [
    "CLIP_NAMES",
    "DINO_NAMES",
    "FAMILIES",
    "VIT_NAMES",
    "ClipConfig",
    "DinoConfig",
    "Vit",
    "VitClassifier",
    "VitConfig",
]
