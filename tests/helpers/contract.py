"""The built-in methods to run the contract on, with counts worked out by hand."""

import adapters_jax as aj
from adapters_jax.testing.contract import VARIANTS
from adapters_jax.testing.linen_model import HEADS, HIDDEN, VOCAB, D
from adapters_jax.testing.subjects import (
    APIS,
    Case,
    Linen,
    Nnx,
    bits,
    classes_of,
    drawn,
    ids,
    shaken,
)

__all__ = [
    "APIS",
    "HEADS",
    "HIDDEN",
    "VOCAB",
    "Case",
    "D",
    "Linen",
    "Nnx",
    "bits",
    "classes_of",
    "drawn",
    "ids",
    "shaken",
]

R, M = 3, 4
ADAPTER = 2 * M * D + D + M
NEAR = {"away": 1e-3}
K = 3
CASES = {
    "bottleneck": Case(
        "mlp",
        aj.Recipe(aj.Bottleneck("**/mlp/output", M, init_std=1e-3)),
        ADAPTER,
        **NEAR,
    ),
    "parallel": Case(
        "mlp",
        aj.Recipe(aj.Bottleneck("**/mlp", M, placement="parallel", scale=4.0, init_std=1e-3)),
        ADAPTER,
        **NEAR,
    ),
    "compacter": Case(
        "mlp",
        aj.Recipe(aj.Compacter("**/mlp/output", M, phm_dim=2)),
        2 * (D + M) + D + M,
        once=2**3,
        **NEAR,
    ),
    "loreft": Case(
        "mlp",
        aj.Recipe(aj.LoReFT("**/mlp/output", R, suffix_positions=1)),
        2 * (2 * D * R + R),
        away=100.0,
    ),
    "lora_dense": Case(
        "mlp", aj.Recipe(aj.LoRA("**/mlp/{up,output}", R, 6.0)), 2 * R * (D + HIDDEN)
    ),
    "activated_lora": Case(
        "mlp",
        aj.Recipe(aj.ActivatedLoRA("**/mlp/{up,output}", R, 6.0, invocation=(1, 2))),
        2 * R * (D + HIDDEN),
    ),
    "dora": Case(
        "mlp",
        aj.Recipe(aj.DoRA("**/mlp/{up,output}", R, 6.0)),
        2 * R * (D + HIDDEN) + D + HIDDEN,
        away=1e-5,
    ),
    "adalora": Case(
        "mlp",
        aj.Recipe(aj.AdaLoRA("**/mlp/{up,output}", R, 60.0)),
        2 * R * (D + HIDDEN) + 2 * R,
    ),
    "pissa": Case(
        "attention",
        aj.Recipe(aj.LoRA("**/attention/{query,out}", R, 6.0, a_init="pissa")),
        2 * R * 2 * D,
        away=1e-5,
    ),
    "olora": Case(
        "attention",
        aj.Recipe(aj.LoRA("**/attention/{query,out}", R, 6.0, a_init="olora")),
        2 * R * 2 * D,
        away=1e-5,
    ),
    "lora_slices": Case(
        "mlp",
        aj.Recipe(aj.LoRA("**/mlp/up", R, 6.0, slices=((1, 4), (8, 16)))),
        R * (D + 11),
    ),
    "lora_dense_general": Case(
        "attention", aj.Recipe(aj.LoRA("**/attention/{query,value,out}", R, 6.0)), 3 * R * 2 * D
    ),
    "lora_einsum": Case("mix", aj.Recipe(aj.LoRA("**/mix", R, 6.0)), R * 2 * D),
    "lora_conv": Case("conv", aj.Recipe(aj.LoRA("**/conv", R, 6.0)), R * (3 * D + D)),
    "loha": Case("mlp", aj.Recipe(aj.LoHa("**/mlp/{up,output}", R, 6.0)), 4 * R * (D + HIDDEN)),
    "lokr": Case(  # 8 = 2 * 4 and 16 = 4 * 4
        "attention", aj.Recipe(aj.LoKr("**/attention/*", 1, 6.0)), 4 * (2 * 2 + 1 * (4 + 4))
    ),
    "oft": Case("mlp", aj.Recipe(aj.OFT("**/mlp/*", 4)), (D + HIDDEN) // 4 * 6),
    "vera": Case("mlp", aj.Recipe(aj.VeRA("**/mlp/*", R))),
    "ia3": Case(
        "mlp", aj.Recipe(aj.IA3("**/mlp/{up,output}", feed_forward="**/mlp/output")), 2 * HIDDEN
    ),
    "ia3_attention": Case(
        "attention",
        aj.Recipe(aj.IA3("**/attention/{key,value,out}", feed_forward="**/attention/out")),
        3 * D,
    ),
    "ia3_conv": Case("conv", aj.Recipe(aj.IA3("**/conv")), D),
    "ia3_embed": Case("mix", aj.Recipe(aj.IA3(("embed", "**/mix"))), D, once=D),
    "lora_embed": Case("mix", aj.Recipe(aj.LoRA("embed", R, 6.0)), 0, once=R * (VOCAB + D)),
    "llama_adapter": Case(
        "attention",
        aj.Recipe(aj.LlamaAdapter("**/attention", K)),
        K * D + HEADS,
    ),
    "prefix": Case(
        "attention",
        aj.Recipe(aj.PrefixTuning("**/attention", K)),
        2 * K * D,
        away=1.0,
    ),
    "prompt_tuning": Case(  # of a token that the batch has
        "mlp", aj.Recipe(aj.PromptTuning("embed", K, placeholder=1)), 0, once=K * D, away=10.0
    ),
    "unfreeze": Case("mlp", aj.Recipe(aj.Unfreeze("**/bias")), 0, unfrozen=HIDDEN + D),
    "together": Case(
        "mlp",
        aj.Recipe(
            aj.LoRA("**/mlp/output", R, 6.0),
            aj.Bottleneck("**/mlp/output", M, init_std=1e-3),
            aj.Bottleneck("**/norm", M, placement="norm", init_std=1e-3, norm_before=True),
            aj.Unfreeze("**/norm/scale"),
        ),
        R * (D + HIDDEN) + ADAPTER + ADAPTER + 2 * D,
        unfrozen=D,
        **NEAR,
    ),
}
SUBJECTS = [
    (api, case, variant)
    for api in APIS
    for case in CASES
    for variant in VARIANTS
    if variant != "scan_remat" or case == "together"
]
