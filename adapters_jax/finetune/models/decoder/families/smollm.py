"""SmolLM3: Llama without rotary positions in some layers. SmolLM2 is a Llama.

Reference: Bakouch et al., SmolLM3 (2025), https://huggingface.co/blog/smollm3; Yang et al., RoPE to
NoPE and back again (2025), https://arxiv.org/abs/2501.18795
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape
from adapters_jax.finetune.models.decoder.families.windows import as_switched, switched


def _read(values: Values) -> dict[str, Any]:
    every = values.get("no_rope_layer_interval", 4)
    layers = range(values.get("num_hidden_layers", 0))
    ropes = values.get("no_rope_layers") or [int((i + 1) % every != 0) for i in layers]
    windows = switched(values, lambda layer: not ropes[layer])
    return {"no_rope_layers": tuple(ropes), **windows}


def _write(config: Any) -> dict[str, Any]:
    return {
        "no_rope_layers": [int(kind.rope_theta is not None) for kind in config.layer_kinds],
        **as_switched(config),
    }


SMOLLM3 = Architecture(
    "smollm3",
    "SmolLM3ForCausalLM",
    defaults={
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768},
        **{"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    },
    settings=("attention_bias", "mlp_bias"),
    known={
        "HuggingFaceTB/SmolLM3-3B": shape(
            2048, 11008, 36, 16, 4, vocab_size=128256, rope_theta=5e6, max_position_embeddings=65536
        )
    },
    read=_read,
    write=_write,
)
