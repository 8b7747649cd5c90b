"""Llama 1 to 3.3, SmolLM2 and Falcon 3: the architecture that the others vary.

Reference: Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971; Dubey et al., The Llama 3
herd of models (2024), https://arxiv.org/abs/2407.21783
"""

from typing import Any

from adapters_jax.finetune.models.decoder.architecture import Architecture, Values, shape

TIED: dict[str, Any] = {"tie_word_embeddings": True}


def _llama3(*sizes: int, factor: float | None = None, **more: Any) -> Values:
    """A Llama 3; `factor` is that of the rotary scaling from 3.1 on."""
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {"max_position_embeddings": 131072, "rope_scaling": scaling} if factor else {}
    long = {"max_position_embeddings": 8192, "rope_theta": 500_000.0, **rope}
    return shape(*sizes, vocab_size=128256, rms_norm_eps=1e-5, **long, **more)


def _smollm(*sizes: int, **more: Any) -> Values:
    return shape(*sizes, vocab_size=49152, rms_norm_eps=1e-5, **TIED, **more)


def _falcon3(*sizes: int, **more: Any) -> Values:
    usual = {"vocab_size": 131072, "head_dim": 256, "rope_theta": 1000042.0}
    return shape(*sizes, **{**usual, "max_position_embeddings": 32768, **more})


LLAMA2 = {
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
LATER: dict[str, Any] = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
SMOLLM2: dict[str, Any] = {"rope_theta": 100_000.0, "max_position_embeddings": 8192}
KNOWN = {
    "huggyllama/llama-7b": shape(4096, 11008, 32, 32, 32),
    "huggyllama/llama-13b": shape(5120, 13824, 40, 40, 40),
    "huggyllama/llama-30b": shape(6656, 17920, 60, 52, 52),
    "huggyllama/llama-65b": shape(8192, 22016, 80, 64, 64, rms_norm_eps=1e-5),
    **{f"meta-llama/Llama-2-{size}-hf": shape(*x, **LATER) for size, x in LLAMA2.items()},
    "meta-llama/Meta-Llama-3-8B": _llama3(4096, 14336, 32, 32, 8),
    "meta-llama/Meta-Llama-3-70B": _llama3(8192, 28672, 80, 64, 8),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8, factor=8.0),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28672, 80, 64, 8, factor=8.0),
    "meta-llama/Llama-3.1-405B": _llama3(16384, 53248, 126, 128, 8, factor=8.0),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 8, factor=32.0, **TIED),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 8, factor=32.0, **TIED),
    "meta-llama/Llama-3.3-70B-Instruct": _llama3(8192, 28672, 80, 64, 8, factor=8.0),
    "TinyLlama/TinyLlama_v1.1": shape(2048, 5632, 22, 32, 4, rms_norm_eps=1e-5),
    # The text models of those that read images.
    "llava-hf/llava-1.5-7b-hf": shape(*LLAMA2["7b"], **LATER, vocab_size=32064),
    "llava-hf/llava-1.5-13b-hf": shape(*LLAMA2["13b"], **LATER, vocab_size=32064),
    "HuggingFaceTB/SmolLM-135M": _smollm(576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM-360M": _smollm(960, 2560, 32, 15, 5),
    "HuggingFaceTB/SmolLM-1.7B": _smollm(2048, 8192, 24, 32, 32),
    "HuggingFaceTB/SmolLM2-135M": _smollm(576, 1536, 30, 9, 3, **SMOLLM2),
    "HuggingFaceTB/SmolLM2-360M": _smollm(960, 2560, 32, 15, 5, **SMOLLM2),
    "HuggingFaceTB/SmolLM2-1.7B": _smollm(
        2048, 8192, 24, 32, 32, rope_theta=130_000.0, max_position_embeddings=8192
    ),
    "tiiuae/Falcon3-1B-Base": _falcon3(2048, 8192, 18, 8, 4, max_position_embeddings=4096),
    "tiiuae/Falcon3-3B-Base": _falcon3(3072, 9216, 22, 12, 4),
    "tiiuae/Falcon3-7B-Base": _falcon3(3072, 23040, 28, 12, 4),
    "tiiuae/Falcon3-10B-Base": _falcon3(3072, 23040, 40, 12, 4),
}

LLAMA = Architecture(
    "llama", "LlamaForCausalLM", settings=("attention_bias", "mlp_bias"), known=KNOWN
)
