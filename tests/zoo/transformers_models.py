"""Flax models of transformers 4: linen modules, with heads tied by `embedding.T`."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from .models import FEED_FORWARD, HEADS, LENGTH, VOCAB, D, Model
from .subjects import Transformers

QUIET = {"eos_token_id": VOCAB, "pad_token_id": 0, "bos_token_id": 1}  # no token ends a text


def ids(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Token ids, (2, length)."""
    return np.random.default_rng(seed).integers(2, VOCAB, (2, length), np.int32)


def noise(*shape: int) -> np.ndarray:
    """Pictures or sounds."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def built(
    name: str,
    inputs: dict[str, Any],
    *,
    head: str,
    read: tuple[str, ...] = ("logits",),
    prompt: Any = None,
    remat: bool = False,
    **config: Any,
) -> Transformers:
    """The subject of a class of transformers, `Flax{name}{head}`, with a configuration."""
    import transformers

    model = getattr(transformers, f"Flax{name}{head}")
    configuration = getattr(transformers, f"{name}Config")(**config)
    options = {"gradient_checkpointing": True} if remat else {}
    return Transformers(
        model(configuration, _do_init=False, **options),
        inputs,
        lambda y: jnp.concatenate([y[part] for part in read]),
        prompt,
    )


def bert(name: str, remat: bool = False):
    return built(
        name,
        {"input_ids": ids()},
        head="ForMaskedLM",
        remat=remat,
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=LENGTH + 4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def gpt2():
    return built(
        "GPT2",
        {"input_ids": ids()},
        head="LMHeadModel",
        prompt=(ids()[:, :4], "input_ids"),
        vocab_size=VOCAB,
        n_embd=D,
        n_layer=2,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        n_positions=LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **QUIET,
    )


def llama(name: str, **more: Any):
    return built(
        name,
        {"input_ids": ids()},
        head="ForCausalLM",
        prompt=(ids()[:, :4], "input_ids"),
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        **more,
        **QUIET,
    )


class OldNumpy:
    """`jax.numpy` with the argument `a_max` of `clip`, which jax has no longer and T5 uses."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    def clip(self, x: Any, a_max: Any) -> Any:
        return jnp.clip(x, max=a_max)


def t5():
    from transformers.models.t5 import modeling_flax_t5

    modeling_flax_t5.jnp = OldNumpy()
    return built(
        "T5",
        {"input_ids": ids(), "decoder_input_ids": ids(6, seed=1)},
        head="ForConditionalGeneration",
        prompt=(ids(), "decoder_input_ids"),
        remat=True,
        vocab_size=VOCAB,
        d_model=D,
        d_kv=3,
        d_ff=FEED_FORWARD,
        num_layers=2,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        **QUIET,
    )


def bart():
    return built(
        "Bart",
        {"input_ids": ids(), "decoder_input_ids": ids(6, seed=1)},
        head="ForConditionalGeneration",
        prompt=(ids(), "decoder_input_ids"),
        vocab_size=VOCAB,
        d_model=D,
        max_position_embeddings=LENGTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEED_FORWARD,
        decoder_ffn_dim=FEED_FORWARD,
        dropout=0.0,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **QUIET,
    )


def whisper():
    sound = noise(2, 6, 2 * LENGTH)
    return built(
        "Whisper",
        {"input_features": sound, "decoder_input_ids": ids(6, seed=1)},
        head="ForConditionalGeneration",
        prompt=(sound, "decoder_input_ids"),
        vocab_size=VOCAB,
        d_model=D,
        num_mel_bins=6,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEED_FORWARD,
        decoder_ffn_dim=FEED_FORWARD,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **QUIET,
    )


SIZES = {
    "hidden_size": D,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
PICTURE = {"image_size": 8, "patch_size": 4}


def vit():
    return built(
        "ViT",
        {"pixel_values": noise(2, 3, 8, 8)},
        head="ForImageClassification",
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
        **PICTURE,
    )


def clip():
    text = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": LENGTH, "eos_token_id": 2}
    return built(
        "CLIP",  # which reads the text at its highest id
        {"input_ids": np.sort(ids()), "pixel_values": noise(2, 3, 8, 8)},
        head="Model",
        read=("text_embeds", "image_embeds"),
        text_config=text,
        vision_config={**SIZES, **PICTURE},
        projection_dim=12,
    )


model = functools.partial(Model, library="transformers")
LAYER_NORM = "**/LayerNorm/{scale,bias}"
LIKE_BERT = {
    "query_value": ("**/self/{query,value}",),
    "key_value": ("**/self/{key,value}",),
    "inner": ("**/layer/*/output/dense",),
    "outputs": ("**/attention/output/dense", "**/layer/*/output/dense"),
    "attention": ("**/attention/self",),
    "embedding": ("**/word_embeddings",),
}
PROJECTIONS = {
    "query_value": ("**/{q_proj,v_proj}",),
    "key_value": ("**/{k_proj,v_proj}",),
}
LIKE_BART = {
    **PROJECTIONS,
    "inner": ("**/fc2",),
    "outputs": ("**/out_proj", "**/fc2"),
}
LIKE_LLAMA = {
    **PROJECTIONS,
    "inner": ("**/down_proj",),
    "outputs": ("**/o_proj", "**/down_proj"),
    "attention": ("**/self_attn",),
    "embedding": ("**/embed_tokens",),
    "norms": ("**/*norm/weight",),
}
CROSS = ("**/self_attn", "**/encoder_attn")
TRANSFORMERS = (
    model("BERT", build=lambda: bert("Bert"), norms=(LAYER_NORM,), **LIKE_BERT),
    model(
        "RoBERTa",
        build=lambda: bert("Roberta", remat=True),
        norms=(LAYER_NORM, "**/layer_norm/{scale,bias}"),
        **LIKE_BERT,
    ),
    model(
        "GPT-2",
        build=gpt2,
        query_value=("**/c_attn",),
        slices=((0, D), (2 * D, 3 * D)),
        key_value=("**/c_attn",),
        inner=("**/mlp/c_proj",),
        outputs=("**/c_proj",),
        attention=("**/attn",),
        embedding=("**/wte",),
        norms=("**/ln_*/{scale,bias}",),
        axes={"**/{c_attn,c_proj,c_fc}/kernel": "oi"},
    ),
    model(
        "T5",
        build=t5,
        query_value=("**/{q,v}",),
        key_value=("**/{k,v}",),
        inner=("**/wo",),
        outputs=("**/o", "**/wo"),
        attention=("**/{SelfAttention,EncDecAttention}",),
        embedding=("shared",),
        norms=("**/*layer_norm/weight",),
    ),
    model(
        "Bart",
        build=bart,
        attention=CROSS,
        embedding=("model/shared",),
        norms=("**/*{layer_norm,layernorm_embedding}/{scale,bias}",),
        **LIKE_BART,
    ),
    model(
        "ViT",
        build=vit,
        query_value=("**/{query,value}",),
        key_value=("**/{key,value}",),
        inner=("**/layer/*/output/dense",),
        outputs=("**/attention/output/dense", "**/layer/*/output/dense"),
        attention=("**/attention/attention",),
        embedding=("**/projection",),
        norms=("**/layernorm*/{scale,bias}",),
        skipped=("vit/embeddings/position_embeddings",),
    ),
    model(
        "Whisper",
        build=whisper,
        attention=CROSS,
        embedding=("**/embed_tokens",),
        norms=("**/*layer_norm/{scale,bias}",),
        skipped=("model/encoder/embed_positions/embedding",),
        **LIKE_BART,
    ),
    model(
        "CLIP",
        build=clip,
        attention=("**/self_attn",),
        embedding=("**/token_embedding", "**/patch_embedding"),
        norms=("**/*{layer_norm,layernorm,layrnorm}*/{scale,bias}",),
        **LIKE_BART,
    ),
    model("Llama", build=lambda: llama("Llama"), **LIKE_LLAMA),
    model("Mistral", build=lambda: llama("Mistral", sliding_window=3), **LIKE_LLAMA),
)
