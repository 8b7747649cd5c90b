"""The number of a decoder's parameters by its configuration, without the model."""

from typing import Any

from adapters_jax.finetune.models.parts.counts import dense


def parameters(config: Any) -> int:
    """The parameters of a model of a `DecoderConfig`."""
    width, layers, norm = config.hidden_size, config.num_layers, _norm(config)
    tokens = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    positions = config.max_position_embeddings * config.learned_positions
    norms = 1 + layers * (4 if config.norm_placement == "both" else 2)
    each = _attention(config) + _mlp(config)
    return (tokens + positions + norms * norm) * width + layers * each


def _norm(config: Any) -> int:
    """The parameters of a norm for each feature."""
    return 2 if config.norm_type == "layer" else 1


def _attention(config: Any) -> int:
    """The parameters of the attention of a layer."""
    width, head = config.hidden_size, config.head_width
    queries, keys = head * config.num_attention_heads, head * config.kv_heads
    normed = {None: 0, "head": 2 * head, "projection": queries + keys}[config.qk_norm]
    inputs = dense(width, queries + 2 * keys, config.attention_bias)
    return inputs + dense(queries, width, config.has_output_bias) + normed * _norm(config)


def _mlp(config: Any) -> int:
    """The parameters of the feed-forward of a layer, of all its experts if it has some."""
    width = config.hidden_size
    if config.num_experts:
        inner = config.moe_intermediate_size or config.intermediate_size
        return config.num_experts * (width + 3 * width * inner)
    inner, bias = config.intermediate_size, config.mlp_bias
    return (1 + config.mlp_gate) * dense(width, inner, bias) + dense(inner, width, bias)
