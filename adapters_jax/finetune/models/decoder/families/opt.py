"""OPT: learned positions from the third on, layer norms, relu.

The model of 350m has its norms after the sums, and embeddings of half the width.
The published models were trained with a dropout of 0.1; there is none here.

Reference: Zhang et al., OPT: open pre-trained transformer language models (2022),
https://arxiv.org/abs/2205.01068
"""

from typing import Any

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, square
from adapters_jax.finetune.models.decoder.names import LAYERS, MODEL, PROJECTIONS
from adapters_jax.finetune.models.parts.names import NNX, of_layers

OUTER = {
    **{"position_embeddings": "embed_positions", "norm": "final_layer_norm"},
    **{"embedding_projection": "project_in", "head_projection": "project_out"},
}
OWN = of_layers(
    *LAYERS,
    **{"attention__output": "self_attn.out_proj", "attention_norm": "self_attn_layer_norm"},
    **{"mlp__up": "fc1", "mlp__output": "fc2", "mlp_norm": "final_layer_norm"},
)
NAMES = NameTable(
    rules=(*(Rule(*pair) for pair in OUTER.items()), *MODEL, *OWN, *PROJECTIONS),
    prefixes=("model.decoder.", "decoder."),
    ignored=(r"lm_head\.weight",),
    stack=NNX,
    tied=("lm_head", "embed_tokens"),
)
SIZES = {
    **{"125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32)},
    **{"2.7b": (2560, 32, 32), "6.7b": (4096, 32, 32), "13b": (5120, 40, 40)},
    **{"30b": (7168, 48, 56), "66b": (9216, 64, 72)},
}
MORE = {"350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 512}}


def _read(values: Values) -> dict[str, Any]:
    biased, inner = values.get("enable_bias", True), values.get("word_embed_proj_dim")
    return {
        **{"attention_bias": biased, "mlp_bias": biased},
        "norm_placement": "pre" if values.get("do_layer_norm_before", True) else "sum",
        "embedding_size": None if inner == values.get("hidden_size") else inner,
    }


OPT = Architecture(
    "opt",
    "OPTForCausalLM",
    fixed={
        **{"learned_positions": True, "position_offset": 2, "norm_type": "layer"},
        **{"mlp_gate": False, "rms_norm_eps": 1e-5},
    },
    defaults={
        **{"vocab_size": 50272, "hidden_act": "relu", "tie_word_embeddings": True},
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "intermediate_size": 3072,
    },
    absent=("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps"),
    renamed={
        **{"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        "init_std": "initializer_range",
    },
    read=_read,
    write=lambda config: {
        "enable_bias": config.attention_bias,
        "do_layer_norm_before": config.norm_placement == "pre",
        "word_embed_proj_dim": config.embedding_size or config.hidden_size,
    },
    supported={"layer_norm_elementwise_affine": (True,), "_remove_final_layer_norm": (False,)},
    names=NAMES,
    known={
        f"facebook/opt-{name}": square(*sizes, **MORE.get(name, {}))
        for name, sizes in SIZES.items()
    },
)
