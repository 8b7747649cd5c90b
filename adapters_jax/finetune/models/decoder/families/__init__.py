"""The architectures of decoders: a file for each family, with its settings and published shapes."""

from adapters_jax.finetune.models.decoder.architecture import Architecture
from adapters_jax.finetune.models.decoder.families import (
    cohere,
    deepseek,
    experts,
    gemma,
    gemma4,
    glm,
    gpt2,
    gpt_oss,
    granite,
    llama,
    llama4,
    mistral,
    olmo,
    phi,
    qwen,
    qwen_next,
    smollm,
    starcoder,
)

ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each
    for each in (
        gpt2.GPT2,
        llama.LLAMA,
        mistral.MISTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi.PHI,
        gemma4.GEMMA4,
        phi.PHI3,
        olmo.OLMO2,
        smollm.SMOLLM3,
        granite.GRANITE,
        glm.GLM,
        glm.GLM4,
        cohere.COHERE,
        cohere.COHERE2,
        starcoder.STARCODER2,
        experts.MIXTRAL,
        experts.QWEN3_MOE,
        experts.OLMOE,
        gpt_oss.GPT_OSS,
        deepseek.DEEPSEEK_V3,
        llama4.LLAMA4,
        qwen_next.QWEN3_NEXT,
        qwen_next.QWEN3_5,
        qwen_next.QWEN3_5_MOE,
    )
}
