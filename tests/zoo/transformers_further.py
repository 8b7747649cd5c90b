"""Further Flax models of transformers 4: speech, pictures, shared layers, and other decoders."""

import functools
from typing import Any

from .models import FEED_FORWARD, HEADS, LENGTH, VOCAB, D, Model
from .transformers_models import (
    LIKE_BART,
    LIKE_BERT,
    PICTURE,
    PROJECTIONS,
    QUIET,
    SIZES,
    built,
    ids,
    noise,
)

NARROW = 12  # embeddings that a projection widens
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
FROM_HALF = {"prompt": (ids()[:, :4], "input_ids")}


def encoder(name: str, head: str):
    return built(
        name,
        {"input_ids": ids()},
        head=head,
        embedding_size=NARROW,
        **WORDS,
        **SIZES,
        **STILL,
    )


def dinov2():
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    return built(
        "Dinov2",
        {"pixel_values": noise(2, 3, 8, 8)},
        head="ForImageClassification",
        num_labels=5,
        mlp_ratio=2,
        **sizes,
        **PICTURE,
        **STILL,
    )


def wav2vec2():
    return built(
        "Wav2Vec2",
        {"input_values": noise(2, 8 * LENGTH)},
        head="ForCTC",
        vocab_size=VOCAB,
        conv_dim=(D, D),
        conv_stride=(4, 2),
        conv_kernel=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        mask_time_prob=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        **SIZES,
    )


def decoder(name: str, **config: Any):
    return built(
        name,
        {"input_ids": ids()},
        head="ForCausalLM",
        **FROM_HALF,
        **config,
        **QUIET,
    )


def opt():
    return decoder(
        "OPT",
        hidden_size=D,
        word_embed_proj_dim=NARROW,
        ffn_dim=FEED_FORWARD,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        dropout=0.0,
        **WORDS,
    )


def gptj():
    return decoder(
        "GPTJ",
        vocab_size=VOCAB,
        n_embd=D,
        n_layer=2,
        n_head=HEADS,
        n_inner=FEED_FORWARD,
        n_positions=LENGTH,
        rotary_dim=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )


def bloom():
    return decoder(
        "Bloom",
        vocab_size=VOCAB,
        hidden_size=D,
        n_layer=2,
        n_head=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


model = functools.partial(Model, library="transformers")
HEAD = D // HEADS
FURTHER = (
    model(
        "ELECTRA",
        build=lambda: encoder("Electra", "ForMaskedLM"),
        norms=("**/LayerNorm/{scale,bias}",),
        **LIKE_BERT,
    ),
    model(
        "ALBERT",
        build=lambda: encoder("Albert", "ForMaskedLM"),
        query_value=("**/attention/{query,value}",),
        key_value=("**/attention/{key,value}",),
        inner=("**/ffn_output",),
        outputs=("**/attention/dense", "**/ffn_output"),
        attention=("**/attention",),
        embedding=("**/word_embeddings",),
        norms=("**/*{LayerNorm,layer_norm}/{scale,bias}",),
    ),
    model(
        "DINOv2",
        build=dinov2,
        query_value=("**/{query,value}",),
        key_value=("**/{key,value}",),
        inner=("**/fc2",),
        outputs=("**/attention/output/dense", "**/fc2"),
        attention=("**/attention/attention",),
        embedding=("**/projection",),
        norms=("**/{norm*,layernorm}/{scale,bias}",),
        skipped=("dinov2/embeddings/position_embeddings",),
    ),
    model(
        "Wav2Vec2",
        build=wav2vec2,
        inner=("**/output_dense",),
        outputs=("**/out_proj", "**/output_dense"),
        attention=("**/attention",),
        embedding=("**/feature_projection/projection",),
        norms=("**/*layer_norm/{scale,bias}",),
        axes={"**/weight_v": "oii"},
        **PROJECTIONS,
    ),
    model(
        "OPT",
        build=opt,
        attention=("**/self_attn",),
        embedding=("**/embed_tokens",),
        norms=("**/*layer_norm/{scale,bias}",),
        **LIKE_BART,
    ),
    model(
        "GPT-J",
        build=gptj,
        inner=("**/fc_out",),
        outputs=("**/out_proj", "**/fc_out"),
        attention=("**/attn",),
        embedding=("**/wte",),
        norms=("**/ln_*/{scale,bias}",),
        **PROJECTIONS,
    ),
    model(
        "BLOOM",
        build=bloom,
        query_value=("**/query_key_value",),
        slices=tuple(  # of each head the query, the key and the value
            ((3 * head + part) * HEAD, (3 * head + part + 1) * HEAD)
            for head in range(HEADS)
            for part in (0, 2)
        ),
        key_value=("**/query_key_value",),
        inner=("**/dense_4h_to_h",),
        outputs=("**/self_attention/dense", "**/dense_4h_to_h"),
        attention=("**/self_attention",),
        embedding=("**/word_embeddings",),
        norms=("**/{*layernorm,ln_f}/{scale,bias}",),
    ),
)
