"""GPT-2: learned positions, layer norms with biases, a feed-forward without a gate, a tied head.

Its checkpoints fuse query, key and value in `c_attn`, and store kernels as `(in, out)`. GPT-3 is a
larger GPT-2. There is no dropout here, at which the published models were trained.

Reference: Radford et al., Language models are unsupervised multitask learners (2019); Brown et al.,
Language models are few-shot learners (2020), https://arxiv.org/abs/2005.14165
"""

from typing import Any

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, square
from adapters_jax.finetune.models.parts.names import NNX, of_layers

NAMES = NameTable(
    rules=(
        Rule("embeddings", "wte"),
        Rule("position_embeddings", "wpe"),
        Rule("norm", "ln_f"),
        Rule("score", "score"),
        *of_layers(
            NNX,
            "h",
            attention__query=("attn.c_attn", 0, 3),
            attention__key=("attn.c_attn", 1, 3),
            attention__value=("attn.c_attn", 2, 3),
            attention__output="attn.c_proj",
            attention_norm="ln_1",
            mlp__up="mlp.c_fc",
            mlp__output="mlp.c_proj",
            mlp_norm="ln_2",
        ),
    ),
    prefixes=("transformer.",),
    # The causal mask's buffers, and the head that repeats the embeddings.
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight"),
    fan_in_fan_out=True,
    stack=NNX,
    tied=("lm_head", "wte"),
)


def _inner(values: Values) -> dict[str, Any]:
    if "intermediate_size" in values or "hidden_size" not in values:
        return {}
    return {"intermediate_size": 4 * values["hidden_size"]}


GPT2 = Architecture(
    "gpt2",
    "GPT2LMHeadModel",
    fixed={
        **{"learned_positions": True, "norm_type": "layer", "mlp_gate": False},
        **{"attention_bias": True, "mlp_bias": True},
    },
    defaults={
        **{"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "hidden_act": "gelu_new", "rms_norm_eps": 1e-5},
        **{"max_position_embeddings": 1024, "tie_word_embeddings": True},
    },
    absent=("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"),
    renamed={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
        "layer_norm_epsilon": "rms_norm_eps",
    },
    read=_inner,
    supported={
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    names=NAMES,
    known={
        "openai-community/gpt2": square(768, 12, 12),
        "openai-community/gpt2-medium": square(1024, 24, 16),
        "openai-community/gpt2-large": square(1280, 36, 20),
        "openai-community/gpt2-xl": square(1600, 48, 25),
        "distilbert/distilgpt2": square(768, 6, 12),
        "gpt3-175b": square(12288, 96, 96, max_position_embeddings=2048),
    },
)
