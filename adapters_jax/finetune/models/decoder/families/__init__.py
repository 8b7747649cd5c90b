"""The architectures of decoders: a file for each family, with its settings and published shapes."""

from adapters_jax.finetune.models.decoder.architecture import Architecture
from adapters_jax.finetune.models.decoder.families import (
    cohere,
    experts,
    gemma,
    glm,
    gpt2,
    granite,
    llama,
    mistral,
    olmo,
    phi,
    qwen,
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
    )
}
