"""OLMo 2: norms of the output of each sublayer, and of whole queries and keys.

Reference: OLMo 2 (2024), https://arxiv.org/abs/2501.00656
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.names import NAMES_WITH_NORMS_AROUND

SETTINGS: dict[str, Any] = {
    **{"vocab_size": 100352, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0},
    "max_position_embeddings": 4096,
}
KNOWN = {
    "allenai/OLMo-2-0425-1B": shape(2048, 8192, 16, 16, 16, **SETTINGS),
    "allenai/OLMo-2-1124-7B": shape(4096, 11008, 32, 32, 32, **SETTINGS),
    "allenai/OLMo-2-1124-13B": shape(5120, 13824, 40, 40, 40, **SETTINGS),
    "allenai/OLMo-2-0325-32B": shape(5120, 27648, 64, 40, 8, **SETTINGS),
}

OLMO2 = Architecture(
    "olmo2",
    "Olmo2ForCausalLM",
    fixed={"norm_placement": "post", "qk_norm": "projection"},
    defaults={"rms_norm_eps": 1e-5},
    settings=("attention_bias",),
    rope_key="type",
    known=KNOWN,
    names=NAMES_WITH_NORMS_AROUND,
)
