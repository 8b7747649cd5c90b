"""The names that checkpoints of decoders have for our modules."""

from dataclasses import replace

from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.finetune.models.parts.names import NNX, of_layers

LAYERS = NNX, "layers"  # our names of layers, and theirs
HEADS = (Rule("head", "lm_head"), Rule("score", "score"))
MODEL = (Rule("embeddings", "embed_tokens"), Rule("norm", "norm"), *HEADS)
PROJECTIONS = of_layers(
    *LAYERS,
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
    *LAYERS, attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"
)
NORMS_AROUND = of_layers(
    *LAYERS,
    attention_norm="input_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

FUSED_QKV = of_layers(
    *LAYERS,
    attention__query=("self_attn.qkv_proj", 0, 3),
    attention__key=("self_attn.qkv_proj", 1, 3),
    attention__value=("self_attn.qkv_proj", 2, 3),
)
FUSED_MLP = of_layers(
    *LAYERS, mlp__gate=("mlp.gate_up_proj", 0, 2), mlp__up=("mlp.gate_up_proj", 1, 2)
)

NAMES = NameTable(
    rules=(*MODEL, *PROJECTIONS, *NORMS_BEFORE),
    prefixes=("model.",),
    # Rotary tables of older files; a head that is a copy of tied embeddings.
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
    stack=NNX,
    tied=("lm_head", "embed_tokens"),
)
NAMES_WITH_NORMS_AROUND = replace(NAMES, rules=(*MODEL, *PROJECTIONS, *NORMS_AROUND))
NAMES_FUSED = replace(NAMES, rules=(*MODEL, *FUSED_QKV, *FUSED_MLP, *PROJECTIONS, *NORMS_BEFORE))


def fused_by_head(block: str, attention: str) -> tuple[Rule, ...]:
    """Rules of GPT-NeoX's layers in `block`; `attention` fuses query, key and value by head."""
    query, key, value = ((f"{attention}.query_key_value", i, 3, True) for i in range(3))
    return of_layers(
        NNX,
        block,
        **{"attention__query": query, "attention__key": key, "attention__value": value},
        attention__output=f"{attention}.dense",
        attention_norm="input_layernorm",
        mlp__up="mlp.dense_h_to_4h",
        mlp__output="mlp.dense_4h_to_h",
        mlp_norm="post_attention_layernorm",
    )


def with_stacked_experts(names: NameTable, mlp: str, *parameters: str) -> NameTable:
    """The table of a model whose module of experts holds stacks like ours.

    Args:
        names: the table without experts.
        mlp: the module of router and experts.
        *parameters: their parameters, in the order that the module defines them.
    """
    router = Rule(r"layers/(\d+)/mlp/router", rf"layers.\1.{mlp}.router")
    kernel = ParameterRule(
        r"layers/(\d+)/mlp/router/kernel", rf"layers.\1.{mlp}.router.weight", swapped=True
    )
    stacks = [
        ParameterRule(rf"layers/(\d+)/mlp/experts/{ours}", rf"layers.\1.{mlp}.experts.{theirs}")
        for theirs in parameters
        for ours in [theirs.replace("gate_up_proj", "gate_up").replace("down_proj", "output")]
    ]
    plain = (each._replace(is_transposed=False) for each in stacks)  # as in transformers 4
    rules = (router, *names.rules)
    return replace(names, rules=rules, parameters=(kernel, *plain), stacked=tuple(stacks))


PER_LAYER = (
    *(Rule("per_layer/embeddings", "embed_tokens_per_layer"),),
    *(Rule("per_layer/projection", "per_layer_model_projection"),),
    *(Rule("per_layer/norm", "per_layer_projection_norm"),),
    *of_layers(
        *LAYERS,
        per_layer__gate="per_layer_input_gate",
        per_layer__output="per_layer_projection",
        per_layer__norm="post_per_layer_input_norm",
        mlp_own_norm="post_feedforward_layernorm_1",
        mixture_norm="pre_feedforward_layernorm_2",
        mixture_post_norm="post_feedforward_layernorm_2",
        mixture__router="router.proj",
    ),
)
NAMES_PER_LAYER = replace(
    NAMES_WITH_NORMS_AROUND,
    rules=(*NAMES_WITH_NORMS_AROUND.rules, *PER_LAYER),
    scales_embedding=True,
    parameters=(
        ParameterRule(r"layers/(\d+)/scalar", r"layers.\1.layer_scalar"),
        ParameterRule(r"layers/(\d+)/mixture/input_scale", r"layers.\1.router.scale"),
        ParameterRule(r"layers/(\d+)/mixture/expert_scale", r"layers.\1.router.per_expert_scale"),
        *(
            ParameterRule(
                rf"layers/(\d+)/mixture/experts/{ours}",
                rf"layers.\1.experts.{theirs}",
                swapped=True,
            )
            for ours, theirs in (("gate_up", "gate_up_proj"), ("output", "down_proj"))
        ),
    ),
    # Layers that borrow keys and values do not use their own, which some files have.
    ignored=(*NAMES.ignored, r"layers\.\d+\.self_attn\.[kv]_(proj|norm)\.weight"),
)


def with_delta(names: NameTable) -> NameTable:
    """The table of a model with the gated delta rule in some layers, and perhaps a shared expert.

    PyTorch's modules hold their parameters in the order of the rules.
    """
    modules = of_layers(
        *LAYERS,
        attention__query_key_value_gate="linear_attn.in_proj_qkvz",
        attention__beta_decay="linear_attn.in_proj_ba",
        attention__query_key_value="linear_attn.in_proj_qkv",
        attention__gate="linear_attn.in_proj_z",
        attention__beta="linear_attn.in_proj_b",
        attention__decay="linear_attn.in_proj_a",
        attention__convolution="linear_attn.conv1d",
        attention__output__norm="linear_attn.norm",
        attention__output__dense="linear_attn.out_proj",
        mlp__shared__gate="mlp.shared_expert.gate_proj",
        mlp__shared__up="mlp.shared_expert.up_proj",
        mlp__shared__output="mlp.shared_expert.down_proj",
        mlp__shared_gate="mlp.shared_expert_gate",
    )
    held = {"decay_bias": "dt_bias", "log_rate": "A_log"}
    parameters = tuple(
        ParameterRule(rf"layers/(\d+)/attention/{ours}", rf"layers.\1.linear_attn.{theirs}")
        for ours, theirs in held.items()
    )
    return replace(
        names,
        rules=(*modules, *names.rules),
        parameters=(*names.parameters, *parameters),
        ignored=(*names.ignored, r"mtp\..*"),  # heads that predict further tokens
    )


def with_experts(names: NameTable, mlp: str, gate: str, up: str, output: str) -> NameTable:
    """The table of a model with experts: `mlp` is their module, the others those of an expert.

    In transformers 5 the module is `mlp` in all models, and its experts are two stacks.
    """
    router = Rule(r"layers/(\d+)/mlp/router", rf"layers.\1.{mlp}.gate")
    ours = {"gate": gate, "up": up, "output": output}
    stack = r"layers/(\d+)/mlp/experts/{}", r"layers.\1.mlp.experts.{}"
    stacked = (
        ParameterRule(r"layers/(\d+)/mlp/router/kernel", r"layers.\1.mlp.gate.weight", True),
        *(
            ParameterRule(stack[0].format(own), stack[1].format(theirs), True, False, part)
            for own, theirs, part in (
                ("gate", "gate_up_proj", (0, 2)),
                ("up", "gate_up_proj", (1, 2)),
                ("output", "down_proj", None),
            )
        ),
    )
    parameters = tuple(
        ParameterRule(
            rf"layers/(\d+)/mlp/experts/{each}",
            rf"layers.\1.{mlp}.experts.{{}}.{theirs}.weight",
            swapped=True,
        )
        for each, theirs in ours.items()
    )
    rules = (router, *names.rules)
    return replace(names, rules=rules, parameters=parameters, stacked=stacked)
