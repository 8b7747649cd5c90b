"""A Llama with one method in its code, as a function of arrays, and its step; no adapters_jax.

Parameters have the paths of `finetune.models.decoder.Decoder`, in one flat dictionary, so that both
sides start from the same weights.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Weights = Mapping[str, jax.Array]


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    return x * (jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon) * scale)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def projected(w: Weights, path: str, x: jax.Array) -> jax.Array:
    y = x @ w[f"{path}/kernel"]
    if f"{path}/lora/a" in w:
        y = y + x @ w[f"{path}/lora/a"] @ w[f"{path}/lora/b"]
    return y


def prompted(w: Weights, path: str, query: jax.Array, kv_heads: int) -> jax.Array:
    """The gated attention to a prompt."""
    width, prompt = query.shape[-1], w[f"{path}/prompt/embedding"]
    key, value = (
        (prompt @ w[f"{path}/{name}/kernel"]).reshape(-1, kv_heads, width)
        for name in ("key", "value")
    )
    groups = query.reshape(*query.shape[:2], kv_heads, -1, width) / jnp.sqrt(width)
    weights = jax.nn.softmax(jnp.einsum("btkgh,pkh->bkgtp", groups, key))
    mixed = jnp.einsum("bkgtp,pkh->btkgh", weights, value).reshape(query.shape)
    return jnp.tanh(w[f"{path}/prompt/gate"])[:, None] * mixed


def logits(config: Any, w: Weights, ids: jax.Array) -> jax.Array:
    """The logits of a model with tied embeddings."""
    batch, length = ids.shape
    width = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** -(jnp.arange(0, width, 2) / width)
    angles = jnp.arange(length)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    norm = partial(rms_norm, epsilon=config.rms_norm_eps)
    x = w["embeddings/embedding"][ids]
    for i in range(config.num_hidden_layers):
        at = f"layers/{i}"
        inner = norm(x, w[f"{at}/attention_norm/scale"])
        query, key, value = (
            projected(w, f"{at}/attention/{name}", inner).reshape(batch, length, -1, width)
            for name in ("query", "key", "value")
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = nnx.dot_product_attention(query, key, value, mask=mask)
        if f"{at}/attention/prompt/gate" in w:
            mixed = mixed + prompted(w, f"{at}/attention", query, value.shape[-2])
        x = x + projected(w, f"{at}/attention/output", mixed.reshape(batch, length, -1))
        inner = norm(x, w[f"{at}/mlp_norm/scale"])
        gate = jax.nn.silu(projected(w, f"{at}/mlp/gate", inner))
        x = x + projected(w, f"{at}/mlp/output", gate * projected(w, f"{at}/mlp/up", inner))
    return norm(x, w["norm/scale"]) @ w["embeddings/embedding"].T


def next_token_loss(values: jax.Array, ids: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(values[:, :-1], ids[:, 1:]).mean()


def step_of(config: Any, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Makes `step(adapters, opt_state, base, ids)`; it returns new adapters, state and loss."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Weights, opt_state: Any, base: Weights, ids: jax.Array) -> Any:
        def loss_of(adapters: Weights) -> jax.Array:
            return next_token_loss(logits(config, {**base, **adapters}, ids), ids)

        loss, grads = jax.value_and_grad(loss_of)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, loss

    return step
