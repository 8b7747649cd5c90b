"""NNX models of tunix: einsums, tied embeddings with `encode` and `decode`, and experts."""

import functools
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from .models import FEED_FORWARD, HEADS, LENGTH, VOCAB, D, Model
from .subjects import Tunix

HEAD_DIM = 6
IDS = np.random.default_rng(0).integers(2, VOCAB, (2, LENGTH), np.int32)


class Numbers:
    """A tokenizer of texts that are token ids; its own tokens are outside of the vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return VOCAB

    pad_id = eos_id


def built(package: str, name: str, **config: Any) -> Tunix:
    """The subject of a class of `tunix.models`, with a configuration."""
    from tunix.generate.sampler import CacheConfig, Sampler

    module = importlib.import_module(f"tunix.models.{package}.model")
    sizes = {"num_layers": 2, "embed_dim": D, "hidden_dim": FEED_FORWARD, "num_heads": HEADS}
    configuration = module.ModelConfig(**{**sizes, "head_dim": HEAD_DIM, **config})
    heads = configuration.num_kv_heads
    cache = CacheConfig(LENGTH, num_layers=2, num_kv_heads=heads, head_dim=HEAD_DIM)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    mask = np.tile(np.tril(np.ones((LENGTH, LENGTH), bool)), (2, 1, 1))
    return Tunix(
        lambda: getattr(module, name)(configuration, rngs=nnx.Rngs(0)),
        (IDS, positions, None, mask),
        lambda model: Sampler(model, Numbers(), cache),
        IDS[:, :4],
    )


ROPE = {"rope_theta": 10_000, "norm_eps": 1e-6, "vocab_size": VOCAB}


def llama3(remat: str = "NONE"):
    from tunix.models.llama3.model import RematConfig

    how = RematConfig[remat]
    return built("llama3", "Llama3", num_kv_heads=2, weight_tying=True, remat_config=how, **ROPE)


def rematerialized():
    """The sampler of tunix cannot run a model with remat, whichever parameters it has."""
    subject = llama3("DECODER")
    subject.prompt = None
    return subject


def qwen2():
    return built("qwen2", "Qwen2", num_kv_heads=2, use_tied_embedding=True, **ROPE)


def qwen3():
    return built("qwen3", "Qwen3", num_kv_heads=2, num_experts=4, num_experts_per_tok=2, **ROPE)


def gemma():
    from tunix.models.gemma.model import AttentionType

    return built(
        "gemma",
        "Gemma",
        num_kv_heads=HEADS,
        num_embed=VOCAB,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        sliding_window_size=LENGTH,
    )


def gemma3():
    return built(
        "gemma3",
        "Gemma3",
        num_kv_heads=2,
        num_embed=VOCAB,
        sliding_window_size=LENGTH,
        param_dtype=jnp.float32,
    )


def gemma4():
    from tunix.models.gemma4.model import AttentionType, RematConfig

    return built(
        "gemma4",
        "Gemma4",
        num_kv_heads=2,
        num_embed=VOCAB,
        sliding_window_size=LENGTH,
        global_key_size=HEAD_DIM,
        attention_pattern=(AttentionType.LOCAL_SLIDING, AttentionType.GLOBAL),
        k_eq_v_global=True,
        per_layer_input_dim=3,
        enable_moe=True,
        num_experts=4,
        num_experts_per_tok=2,
        expert_dim=5,
        remat_config=RematConfig.BLOCK,
    )


model = functools.partial(Model, library="tunix")
LIKE_LLAMA = {
    "query_value": ("**/{q_proj,v_proj}",),
    "key_value": ("**/{k_proj,v_proj}",),
    "inner": ("**/down_proj",),
    "outputs": ("**/o_proj", "**/down_proj"),
    "attention": ("**/attn",),
    "embedding": ("embedder",),
    "norms": ("**/*norm/w",),
}
LIKE_GEMMA = {
    "inner": ("**/down_proj",),
    "outputs": ("**/attn_vec_einsum", "**/down_proj"),
    "attention": ("**/attn",),
    "embedding": ("embedder",),
    "norms": ("**/*norm/scale",),
}
LLAMA_AXES = {"**/{q_proj,k_proj,v_proj}/w": "ioo"}
GEMMA_AXES = {
    "**/qkv_einsum/w": "ooio",
    "**/q_einsum/w": "oio",
    "**/kv_einsum/w": "ooio",
}
TUNIX = (
    model("llama3", build=llama3, axes=LLAMA_AXES, **LIKE_LLAMA),
    model("llama3 (remat)", build=rematerialized, axes=LLAMA_AXES, **LIKE_LLAMA),
    model("qwen2", build=qwen2, axes=LLAMA_AXES, **LIKE_LLAMA),
    model(
        "qwen3 (experts)",
        build=qwen3,
        axes={**LLAMA_AXES, "**/mlp/{gate_proj,up_proj,down_proj}": "eio"},
        **{**LIKE_LLAMA, "outputs": ("**/o_proj", "**/mlp")},
    ),
    model(
        "gemma",
        build=gemma,
        query_value=("**/qkv_einsum",),
        key_value=("**/qkv_einsum",),
        axes=GEMMA_AXES,
        **LIKE_GEMMA,
    ),
    model(
        "gemma3",
        build=gemma3,
        query_value=("**/{q_einsum,kv_einsum}",),
        key_value=("**/kv_einsum",),
        axes=GEMMA_AXES,
        **LIKE_GEMMA,
    ),
    model(
        "gemma4 (experts)",
        build=gemma4,
        query_value=("**/{q_einsum,kv_einsum,k_einsum}",),
        key_value=("**/{kv_einsum,k_einsum}",),
        axes={
            **GEMMA_AXES,
            "**/k_einsum/w": "oio",
            "**/per_layer_model_projection/w": "ioo",
            "**/per_layer_input_embedding": "ioo",
            "**/moe/gating_einsum": "eooi",
            "**/moe/linear": "eio",
        },
        **LIKE_GEMMA,
    ),
)
