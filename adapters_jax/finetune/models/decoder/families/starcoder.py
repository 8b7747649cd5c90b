"""StarCoder 2: layer norms and biases everywhere, a feed-forward without a gate, a window.

The published models were trained with a dropout of 0.1; there is none here.

Reference: Lozhkov et al., StarCoder 2 and The Stack v2 (2024), https://arxiv.org/abs/2402.19173
"""

from dataclasses import replace

from adapters_jax.finetune.models.decoder.architecture import Architecture, shape
from adapters_jax.finetune.models.decoder.names import (
    LAYERS,
    MODEL,
    NAMES,
    NORMS_BEFORE,
    PROJECTIONS,
)
from adapters_jax.finetune.models.parts.names import of_layers

OWN = of_layers(*LAYERS, mlp__up="mlp.c_fc", mlp__output="mlp.c_proj")


STARCODER2 = Architecture(
    "starcoder2",
    "Starcoder2ForCausalLM",
    fixed={"norm_type": "layer", "mlp_gate": False},
    defaults={
        **{"num_key_value_heads": 2, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
        **{"attention_bias": True, "tie_word_embeddings": True, "max_position_embeddings": 4096},
    },
    settings=("attention_bias", "sliding_window"),
    renamed={"norm_epsilon": "rms_norm_eps", "use_bias": "attention_bias"},
    read=lambda values: {"mlp_bias": values.get("attention_bias", False)},
    supported={"attention_dropout": (0.0, 0.1)},
    names=replace(NAMES, rules=(*OWN, *MODEL, *PROJECTIONS, *NORMS_BEFORE)),
    known={
        f"bigcode/starcoder2-{name}": shape(
            *sizes, **more, vocab_size=49152, sliding_window=4096, max_position_embeddings=16384
        )
        for name, sizes, more in (
            ("3b", (3072, 12288, 30, 24, 2), {"rope_theta": 999999.4420358813}),
            ("7b", (4608, 18432, 32, 36, 4), {"rope_theta": 1e6}),
            ("15b", (6144, 24576, 40, 48, 4), {"rope_theta": 1e5, "tie_word_embeddings": False}),
        )
    },
)
