"""The names that checkpoints of decoders have for our modules."""

from dataclasses import replace

from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.transforms.stacking import Stack


def of_layers(block: str = "layers", /, **names: str) -> tuple[Rule, ...]:
    """Rules for modules of a layer: ours, with `__` for `/`, and the name of theirs."""
    return tuple(
        Rule(rf"layers/(\d+)/{ours.replace('__', '/')}", rf"{block}.\1.{theirs}")
        for ours, theirs in names.items()
    )


def parts(theirs: str, *ours: str) -> tuple[Rule, ...]:
    """Rules for modules of a layer that one of theirs fuses, in this order."""
    return tuple(
        Rule(rf"layers/(\d+)/{each}", theirs, part=(i, len(ours))) for i, each in enumerate(ours)
    )


MODEL = (Rule("embeddings", "embed_tokens"), Rule("norm", "norm"), Rule("head", "lm_head"))
PROJECTIONS = of_layers(
    attention__query="self_attn.q_proj",
    attention__key="self_attn.k_proj",
    attention__value="self_attn.v_proj",
    attention__output="self_attn.o_proj",
    attention__query_norm="self_attn.q_norm",
    attention__key_norm="self_attn.k_norm",
    mlp__gate="mlp.gate_proj",
    mlp__up="mlp.up_proj",
    mlp__output="mlp.down_proj",
)
NORMS_BEFORE = of_layers(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
NORMS_AROUND = of_layers(
    attention_norm="input_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

FUSED = (
    *parts(r"layers.\1.self_attn.qkv_proj", "attention/query", "attention/key", "attention/value"),
    *parts(r"layers.\1.mlp.gate_up_proj", "mlp/gate", "mlp/up"),
)

NAMES = NameTable(
    rules=(*MODEL, *PROJECTIONS, *NORMS_BEFORE),
    prefixes=("model.",),
    # Rotary tables of older files; a head that is a copy of tied embeddings.
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    stack=Stack("layers/{}", "layers"),
    tied=("lm_head", "embed_tokens"),
)
NAMES_WITH_NORMS_AROUND = replace(NAMES, rules=(*MODEL, *PROJECTIONS, *NORMS_AROUND))
NAMES_FUSED = replace(NAMES, rules=(*MODEL, *FUSED, *PROJECTIONS, *NORMS_BEFORE))


def with_experts(names: NameTable, mlp: str, gate: str, up: str, output: str) -> NameTable:
    """The table of a model with experts: `mlp` is their module, the others those of an expert."""
    router = Rule(r"layers/(\d+)/mlp/router", rf"layers.\1.{mlp}.gate")
    ours = {"gate": gate, "up": up, "output": output}
    parameters = tuple(
        ParameterRule(
            rf"layers/(\d+)/mlp/experts/{each}",
            rf"layers.\1.{mlp}.experts.{{}}.{theirs}.weight",
            swapped=True,
        )
        for each, theirs in ours.items()
    )
    return replace(names, rules=(router, *names.rules), parameters=parameters)
