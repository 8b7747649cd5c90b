"""Command R and Aya: attention and feed-forward read one norm, a layer norm without bias.

Rotated pairs are neighbours. From Command R7B on, three layers of four slide and rotate, and the
fourth does neither.

Reference: Cohere, Command A (2025), https://arxiv.org/abs/2504.00698; Aya 23 (2024),
https://arxiv.org/abs/2405.15032
"""

from dataclasses import replace
from typing import Any

from adapters_jax.files.layouts import rounded
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import alternating, types_of


def _scaled(values: Values) -> dict[str, Any]:
    return {"logits_scaling": 1 / values.get("logit_scale", 0.0625)}


def _read(values: Values) -> dict[str, Any]:
    types = alternating(values, values.get("sliding_window_pattern", 4))
    ropes = tuple(int(each == "sliding_attention") for each in types["layer_types"])
    return {**_scaled(values), **types, "no_rope_layers": ropes}


def _write(config: Any) -> dict[str, Any]:
    return {"logit_scale": rounded(1 / config.logits_scaling)}


EIGHT = (4096, 14336, 32, 32, 8)
VOCAB: dict[str, Any] = {"vocab_size": 256000}
LATER: dict[str, Any] = {**VOCAB, "rope_theta": 50_000.0, "logit_scale": 0.25}

COHERE = Architecture(
    "cohere",
    "CohereForCausalLM",
    fixed={
        **{"parallel": "shared", "norm_type": "layer", "norm_bias": False},
        "rotary_interleaved": True,
    },
    defaults={
        **{"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625},
        "max_position_embeddings": 8192,
    },
    settings=("attention_bias",),
    renamed={"layer_norm_eps": "rms_norm_eps"},
    read=_scaled,
    write=_write,
    supported={"use_qk_norm": (False, None)},
    known={
        "CohereLabs/c4ai-command-r-v01": shape(8192, 22528, 40, 64, 64, **VOCAB, rope_theta=8e6),
        "CohereLabs/c4ai-command-r-08-2024": shape(
            8192, 24576, 40, 64, 8, **VOCAB, rope_theta=4e6, max_position_embeddings=131072
        ),
        "CohereLabs/aya-23-8B": shape(*EIGHT, **VOCAB),
    },
)
COHERE2 = replace(
    COHERE,
    model_type="cohere2",
    class_name="Cohere2ForCausalLM",
    defaults={**COHERE.defaults, "sliding_window": 4096},
    settings=("attention_bias", "sliding_window"),
    read=_read,
    write=lambda config: {**_write(config), "layer_types": types_of(config)},
    supported={},
    known={
        "CohereLabs/c4ai-command-r7b-12-2024": shape(*EIGHT, **LATER),
        "CohereLabs/c4ai-command-a-03-2025": shape(
            12288, 36864, 64, 96, 8, **LATER, max_position_embeddings=131072
        ),
    },
)
