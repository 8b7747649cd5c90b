"""OLMo 2: norms of the output of each sublayer, and of whole queries and keys.

Reference: OLMo 2 (2024), https://arxiv.org/abs/2501.00656
"""

from adapters_jax.models.decoder.architecture import Architecture
from adapters_jax.models.decoder.names import NAMES_WITH_NORMS_AROUND

OLMO2 = Architecture(
    "olmo2",
    "Olmo2ForCausalLM",
    fixed={"norm_placement": "post", "qk_norm": "projection"},
    defaults={"rms_norm_eps": 1e-5},
    settings=("attention_bias",),
    rope_key="type",
    names=NAMES_WITH_NORMS_AROUND,
)
