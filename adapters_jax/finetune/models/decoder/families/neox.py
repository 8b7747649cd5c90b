"""GPT-NeoX and Pythia: attention and feed-forward side by side, each behind its own layer norm.

Reference: Black et al., GPT-NeoX-20B (2022), https://arxiv.org/abs/2204.06745; Biderman et al.,
Pythia (2023), https://arxiv.org/abs/2304.01373
"""

from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.models.decoder.architecture import Architecture, square
from adapters_jax.finetune.models.decoder.names import fused_by_head
from adapters_jax.finetune.models.parts.names import NNX

OUTER = {"embeddings": "embed_in", "norm": "final_layer_norm", "head": "embed_out"}
NAMES = NameTable(
    rules=(*(Rule(*pair) for pair in OUTER.items()), *fused_by_head("layers", "attention")),
    prefixes=("gpt_neox.",),
    # Buffers of older files, the causal mask and rotary tables; a head that repeats the embeddings.
    ignored=(
        r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",
    ),
    stack=NNX,
    tied=("embed_out", "embed_in"),
    heads=("embed_out", "lm_head"),
    since_5=(("embed_out", "lm_head"),),
)
SIZES = {
    **{"70m": (512, 6, 8), "160m": (768, 12, 12), "410m": (1024, 24, 16), "1b": (2048, 16, 8)},
    **{"1.4b": (2048, 24, 16), "2.8b": (2560, 32, 32)},
    **{"6.9b": (4096, 32, 32), "12b": (5120, 36, 40)},
}
PADDED = {"6.9b": 50432, "12b": 50688}  # the others' vocabulary has 50,304

GPT_NEOX = Architecture(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    fixed={"norm_type": "layer", "mlp_gate": False, "mlp_bias": True, "head_axis": True},
    defaults={
        **{"rms_norm_eps": 1e-5, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
        "attention_bias": True,
    },
    absent=("num_key_value_heads", "head_dim"),
    settings=("attention_bias", "partial_rotary_factor"),
    renamed={
        **{"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta"},
        "rotary_pct": "partial_rotary_factor",
    },
    read=lambda values: {"parallel": "own" if values.get("use_parallel_residual", True) else None},
    write=lambda config: {"use_parallel_residual": config.parallel == "own"},
    names=NAMES,
    known={
        "EleutherAI/gpt-neox-20b": square(6144, 44, 64, vocab_size=50432, hidden_act="gelu_fast"),
        **{
            f"EleutherAI/pythia-{name}": square(*sizes, vocab_size=PADDED.get(name, 50304))
            for name, sizes in SIZES.items()
        },
    },
)
