"""Gemma 1, 2 and 3 (text): scaled embeddings, norms with `1 + w`, tied heads.

Gemma 2 has norms around each sublayer, bounds of scores and logits, and local attention in every
other layer; Gemma 3 has norms of query and key instead of the bounds, and another rotary base in
local layers.

Reference: Gemma (2024), https://arxiv.org/abs/2403.08295; Gemma 2 (2024),
https://arxiv.org/abs/2408.00118; Gemma 3 (2025), https://arxiv.org/abs/2503.19786
"""

from dataclasses import replace
from typing import Any

from adapters_jax.files.layouts import rounded
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import alternating, types_of
from adapters_jax.finetune.models.decoder.names import NAMES, NAMES_WITH_NORMS_AROUND

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
LATER: dict[str, Any] = {"sliding_window": 4096, "num_key_value_heads": 4}


def _scaled(values: Values) -> dict[str, Any]:
    return {"embedding_multiplier": values["hidden_size"] ** 0.5} if "hidden_size" in values else {}


def _first(values: Values) -> dict[str, Any]:
    own = values.get("hidden_activation")  # where both are there, the one that was trained with
    return {**_scaled(values), **({"hidden_act": own} if own else {})}


def _later(values: Values, every: int) -> dict[str, Any]:
    scores = {"attention_multiplier": values.get("query_pre_attn_scalar", 256) ** -0.5}
    return {**_scaled(values), **scores, **alternating(values, every)}


def _write(config: Any) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": rounded((config.attention_multiplier or 1.0) ** -2),
        "layer_types": types_of(config),
    }


def _gemma3(*sizes: int, **more: Any) -> Values:
    """The text model of a Gemma 3; those from 4b on also have an image tower, which is not here."""
    images = {
        "vocab_size": 262208,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    return shape(*sizes, **{**images, **more})


TEXT: dict[str, Any] = {
    "vocab_size": 262144,
    "sliding_window": 512,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
}
KNOWN = {
    "google/gemma-2b": shape(2048, 16384, 18, 8, 1, vocab_size=256000),
    "google/gemma-7b": shape(3072, 24576, 28, 16, 16, vocab_size=256000),
}
KNOWN2 = {
    "google/gemma-2-2b": shape(2304, 9216, 26, 8, 4, vocab_size=256000),
    "google/gemma-2-9b": shape(3584, 14336, 42, 16, 8, vocab_size=256000),
    "google/gemma-2-27b": shape(
        *(4608, 36864, 46, 32, 16),
        **{"vocab_size": 256000, "head_dim": 128, "query_pre_attn_scalar": 144},
    ),
}
KNOWN3 = {
    "google/gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, **TEXT),
    "google/gemma-3-1b-pt": _gemma3(1152, 6912, 26, 4, 1, **TEXT),
    "google/gemma-3-4b-pt": _gemma3(2560, 10240, 34, 8, 4),
    "google/gemma-3-12b-pt": _gemma3(3840, 15360, 48, 16, 8),
    "google/gemma-3-27b-pt": _gemma3(
        5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168
    ),
}

GEMMA = Architecture(
    "gemma",
    "GemmaForCausalLM",
    fixed={"norm_offset": 1.0},
    defaults={**DEFAULTS, "num_key_value_heads": 16},
    settings=("attention_bias",),
    read=_first,
    names=replace(NAMES, scales_embedding=True),
    known=KNOWN,
)
GEMMA2 = Architecture(
    "gemma2",
    "Gemma2ForCausalLM",
    fixed={"norm_offset": 1.0, "norm_placement": "both"},
    defaults={**DEFAULTS, **LATER, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    settings=(
        *("attention_bias", "sliding_window"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    renamed={"hidden_activation": "hidden_act"},
    read=lambda values: _later(values, every=2),
    write=_write,
    names=replace(NAMES_WITH_NORMS_AROUND, scales_embedding=True),
    known=KNOWN2,
)
GEMMA3 = Architecture(
    "gemma3_text",
    "Gemma3ForCausalLM",
    fixed={"norm_offset": 1.0, "norm_placement": "both", "qk_norm": "head"},
    defaults={
        **DEFAULTS,
        **LATER,
        # Those of published multimodal ones leave out what they share.
        **{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216},
        **{"num_hidden_layers": 26, "num_attention_heads": 8},
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    settings=(*GEMMA2.settings, "rope_local_base_freq"),
    renamed={"hidden_activation": "hidden_act"},
    read=lambda values: _later(values, values.get("sliding_window_pattern", 6)),
    write=_write,
    supported={"use_bidirectional_attention": (False, None)},
    names=replace(NAMES_WITH_NORMS_AROUND, scales_embedding=True),
    known=KNOWN3,
)
