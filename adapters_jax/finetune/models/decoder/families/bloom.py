"""BLOOM: ALiBi instead of positions, a norm after the embeddings, layer norms, a tied head.

Reference: BigScience, BLOOM (2022), https://arxiv.org/abs/2211.05100; ALiBi: Press et al. (2021),
https://arxiv.org/abs/2108.12409
"""

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture
from adapters_jax.finetune.models.decoder.names import fused_by_head
from adapters_jax.finetune.models.parts.names import NNX

NAMES = NameTable(
    rules=(
        Rule("embeddings", "word_embeddings"),
        Rule("embedding_norm", "word_embeddings_layernorm"),
        Rule("norm", "ln_f"),
        *fused_by_head("h", "self_attention"),
    ),
    prefixes=("transformer.",),
    ignored=(r"lm_head\.weight",),
    stack=NNX,
    tied=("lm_head", "word_embeddings"),
)
SIZES = {
    **{"bloom-560m": (1024, 24, 16), "bloom-1b1": (1536, 24, 16), "bloom-1b7": (2048, 24, 16)},
    **{"bloom-3b": (2560, 30, 32), "bloom-7b1": (4096, 30, 32), "bloom": (14336, 70, 112)},
}
OWN = ("hidden_size", "num_hidden_layers", "num_attention_heads")

BLOOM = Architecture(
    "bloom",
    "BloomForCausalLM",
    fixed={
        **{"alibi": True, "embedding_norm": True, "norm_type": "layer", "head_axis": True},
        **{"attention_bias": True, "mlp_bias": True, "mlp_gate": False},
        "hidden_act": "gelu_pytorch_tanh",
    },
    defaults={
        **dict(zip(OWN, (64, 2, 8), strict=True)),
        **{"vocab_size": 250880, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
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
    read=lambda values: {"intermediate_size": 4 * values.get("hidden_size", 64)},
    write=lambda config: {"hidden_size": config.hidden_size},
    supported={
        "apply_residual_connection_post_layernorm": (False,),
        "tie_word_embeddings": (True,),
    },
    names=NAMES,
    known={f"bigscience/{name}": dict(zip(OWN, x, strict=True)) for name, x in SIZES.items()},
)
