"""BLOOM: ALiBi instead of positions, a norm after the embeddings, layer norms, a tied head.

Checkpoints fuse query, key and value head by head. The feed-forward is four times as wide.

Reference: BigScience, BLOOM (2022), https://arxiv.org/abs/2211.05100; ALiBi: Press et al. (2021),
https://arxiv.org/abs/2108.12409
"""

from typing import Any

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values
from adapters_jax.finetune.models.decoder.names import MLP_NEOX, fused_by_head
from adapters_jax.finetune.models.parts.names import NNX, of_layers

NAMES = NameTable(
    rules=(
        Rule("embeddings", "word_embeddings"),
        Rule("embedding_norm", "word_embeddings_layernorm"),
        Rule("norm", "ln_f"),
        *of_layers(
            NNX,
            "h",
            **fused_by_head("self_attention.query_key_value"),
            attention__output="self_attention.dense",
            attention_norm="input_layernorm",
            mlp_norm="post_attention_layernorm",
            **MLP_NEOX,
        ),
    ),
    prefixes=("transformer.",),
    ignored=(r"lm_head\.weight",),
    stack=NNX,
    tied=("lm_head", "word_embeddings"),
)
SIZES = {
    "bloom-560m": (1024, 24, 16),
    "bloom-1b1": (1536, 24, 16),
    "bloom-1b7": (2048, 24, 16),
    "bloom-3b": (2560, 30, 32),
    "bloom-7b1": (4096, 30, 32),
    "bloom": (14336, 70, 112),
}


def _inner(values: Values) -> dict[str, Any]:
    return {"intermediate_size": 4 * values["hidden_size"]} if "hidden_size" in values else {}


BLOOM = Architecture(
    "bloom",
    "BloomForCausalLM",
    fixed={
        **{"alibi": True, "embedding_norm": True, "norm_type": "layer", "head_axis": True},
        **{"attention_bias": True, "mlp_bias": True, "mlp_gate": False},
        "hidden_act": "gelu_pytorch_tanh",
    },
    defaults={
        **{"vocab_size": 250880, "hidden_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    },
    absent=(
        *("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"),
        *("intermediate_size", "hidden_act"),
    ),
    renamed={
        **{"n_embed": "hidden_size", "n_layer": "num_hidden_layers"},
        **{"n_head": "num_attention_heads", "layer_norm_epsilon": "rms_norm_eps"},
        "seq_length": "max_position_embeddings",
    },
    read=_inner,
    write=lambda config: {"hidden_size": config.hidden_size},
    supported={
        "apply_residual_connection_post_layernorm": (False,),
        "tie_word_embeddings": (True,),
    },
    names=NAMES,
    known={
        f"bigscience/{name}": {"hidden_size": width, "n_layer": layers, "n_head": heads}
        for name, (width, layers, heads) in SIZES.items()
    },
)
