"""The number of a decoder's parameters, by a formula of its configuration."""

from typing import Any

from adapters_jax.finetune.models.decoder.forms import LayerForm
from adapters_jax.finetune.models.parts.counts import dense


def count(config: Any) -> int:
    """The number of parameters of the model of a `DecoderConfig`."""
    width, norm = config.hidden_size, 1 + (config.norm_type == "layer" and config.norm_bias)
    inner, layers = config.embedding_size or width, config.num_layers
    tokens = config.vocab_size * inner * (1 if config.tie_word_embeddings else 2)
    tokens += 2 * inner * width * (inner != width) + config.vocab_size * config.head_bias
    positions = config.max_position_embeddings + config.position_offset
    norms = (config.norm_placement != "sum") + config.embedding_norm + layers * _norms(config)
    rows = positions * config.learned_positions + norms * norm
    each = sum(_attention(config, norm, form) for form in config.layer_forms)
    each += sum(_feed_forward(config, form) for form in config.layer_forms)
    return tokens + rows * width + each + layers * config.layer_scalar + _per_layer(config)


def _norms(config: Any) -> int:
    """The number of norms of hidden states in a layer."""
    return 4 if config.norm_placement == "both" else 1 if config.parallel == "shared" else 2


def _per_layer(config: Any) -> int:
    """Those that make the separate inputs of each layer."""
    width, own = config.hidden_size, config.hidden_size_per_layer_input
    if not own:
        return 0
    model = (config.vocab_size_per_layer_input + width) * config.num_layers * own + own
    return model + config.num_layers * (2 * width * own + width)


def _attention(config: Any, norm: int, form: LayerForm) -> int:
    """Those of the attention of a layer; a norm has this number for each feature."""
    width, head = config.hidden_size, config.head_width
    if form.delta and config.delta:
        return config.delta.parameters(width)
    if config.latent:
        return config.latent.parameters(width, config.num_attention_heads, config.attention_bias)
    head = form.head_width or head
    queries, keys = head * config.num_attention_heads, head * (form.kv_heads or config.kv_heads)
    normed = {"head": 2 * head, "projection": queries + keys}.get(config.qk_norm or "", 0)
    pairs = keys if form.key_is_value else 2 * keys
    if form.borrows:
        pairs, normed = 0, normed // 2
    gates = queries * config.attention_gate
    inputs = dense(width, queries + gates + pairs, config.attention_bias)
    sinks = config.num_attention_heads * config.attention_sinks
    return inputs + dense(queries, width, config.has_output_bias) + normed * norm + sinks


def _feed_forward(config: Any, form: LayerForm) -> int:
    """Those of the feed-forward of a layer, of all its experts if it has some."""
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    inner *= 1 + form.wide
    if config.num_experts and not form.dense:
        shared = 3 * width * (config.shared_expert_intermediate_size or 0)
        shared += width * config.shared_expert_gate
        inner, bias = config.moe_intermediate_size or inner, config.expert_bias
        expert = 2 * dense(width, inner, bias) + dense(inner, width, bias)
        router = dense(width, config.num_experts, config.router_bias)
        router += config.num_experts * config.router_correction
        router += (width + config.num_experts) * config.router_scale
        if config.experts_beside:
            shared += 3 * width + 3 * width * config.intermediate_size * (1 + form.wide)
        return router + config.num_experts * expert + shared
    return (1 + config.mlp_gate) * dense(width, inner, bias) + dense(inner, width, bias)
