"""BERT with adapters in its code, in linen and in NNX, and its training step; no adapters_jax.

This is what you write if you have the source of the model and need one method. Parameters have the
paths of `finetune.models.bert.BertClassifier`, so that all sides can start from the same weights;
only LoRA's factors are called `lora_a` and `lora_b`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx, traverse_util

Batch = dict[str, jax.Array]
NORMAL = linen.initializers.normal(0.02)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the encoder, of its adapters (0 for none), of its head and of a batch."""

    layers: int = 6
    d: int = 768
    heads: int = 12
    ffn: int = 3072
    vocab: int = 30522
    positions: int = 512
    labels: int = 2
    rank: int = 0
    bottleneck: int = 0
    pooler: bool = False
    batch: int = 8
    length: int = 128


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    weights = (mask != 0).astype(jnp.float32)[:, :, None]
    return (hidden * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1.0)


def heads_of(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


# linen


class LinenProjection(linen.Module):
    d: int
    rank: int

    @linen.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (x.shape[-1], self.d))
        y = x @ kernel + self.param("bias", linen.initializers.zeros, (self.d,))
        if self.rank:
            a = self.param("lora_a", NORMAL, (x.shape[-1], self.rank))
            b = self.param("lora_b", linen.initializers.zeros, (self.rank, self.d))
            y = y + x @ a @ b
        return y


class LinenAdapter(linen.Module):
    m: int

    @linen.compact
    def __call__(self, x):
        hidden = linen.gelu(linen.Dense(self.m, name="down")(x))
        return x + linen.Dense(x.shape[-1], name="up")(hidden)


class LinenOutput(linen.Module):
    d: int
    m: int

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(self.d, name="dense")(x)
        return LinenAdapter(self.m, name="adapter")(x) if self.m else x


class LinenAttention(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, x, mask):
        s = self.sizes
        q = heads_of(LinenProjection(s.d, s.rank, name="query")(x), s.heads)
        k = heads_of(LinenProjection(s.d, 0, name="key")(x), s.heads)
        v = heads_of(LinenProjection(s.d, s.rank, name="value")(x), s.heads)
        mixed = linen.dot_product_attention(q, k, v, mask=mask)
        return LinenOutput(s.d, s.bottleneck, name="output")(mixed.reshape(x.shape))


class LinenMlp(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, x):
        hidden = linen.gelu(linen.Dense(self.sizes.ffn, name="intermediate")(x), approximate=False)
        return LinenOutput(self.sizes.d, self.sizes.bottleneck, name="output")(hidden)


class LinenLayer(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, x, mask):
        norm = functools.partial(linen.LayerNorm, epsilon=1e-12)
        x = norm(name="attention_norm")(x + LinenAttention(self.sizes, name="attention")(x, mask))
        return norm(name="mlp_norm")(x + LinenMlp(self.sizes, name="mlp")(x))


class LinenEmbeddings(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, ids):
        s = self.sizes
        x = linen.Embed(s.vocab, s.d, name="word")(ids)
        x = x + linen.Embed(s.positions, s.d, name="position")(jnp.arange(ids.shape[1])[None])
        x = x + linen.Embed(2, s.d, name="token_type")(jnp.zeros_like(ids))
        return linen.LayerNorm(epsilon=1e-12, name="norm")(x)


class LinenEncoder(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, ids, mask):
        x = LinenEmbeddings(self.sizes, name="embeddings")(ids)
        for i in range(self.sizes.layers):
            x = LinenLayer(self.sizes, name=f"layer_{i}")(x, (mask != 0)[:, None, None, :])
        if self.sizes.pooler:
            return jnp.tanh(LinenOutput(self.sizes.d, 0, name="pooler")(x[:, 0]))
        return mean_pool(x, mask)


class LinenBert(linen.Module):
    sizes: Sizes

    @linen.compact
    def __call__(self, ids, mask):
        pooled = LinenEncoder(self.sizes, name="bert")(ids, mask)
        return linen.Dense(self.sizes.labels, name="head")(pooled)


# NNX; without adapters it is also the model that adapters_jax adapts


class NnxProjection(nnx.Linear):
    def __init__(self, d, rank, rngs):
        super().__init__(d, d, rngs=rngs)
        self.rank = rank
        if rank:
            self.lora_a = nnx.Param(NORMAL(rngs.params(), (d, rank)))
            self.lora_b = nnx.Param(jnp.zeros((rank, d)))

    def __call__(self, x):  # type: ignore[override]
        y = super().__call__(x)
        return y + x @ self.lora_a[...] @ self.lora_b[...] if self.rank else y


class NnxAdapter(nnx.Module):
    def __init__(self, d, m, rngs):
        self.down = nnx.Linear(d, m, rngs=rngs)
        self.up = nnx.Linear(m, d, rngs=rngs)

    def __call__(self, x):
        return x + self.up(nnx.gelu(self.down(x)))


class NnxOutput(nnx.Module):
    def __init__(self, width, d, m, rngs):
        self.dense = nnx.Linear(width, d, rngs=rngs)
        self.m = m
        if m:
            self.adapter = NnxAdapter(d, m, rngs)

    def __call__(self, x):
        x = self.dense(x)
        return self.adapter(x) if self.m else x


class NnxAttention(nnx.Module):
    def __init__(self, s, rngs):
        self.heads = s.heads
        self.query = NnxProjection(s.d, s.rank, rngs)
        self.key = NnxProjection(s.d, 0, rngs)
        self.value = NnxProjection(s.d, s.rank, rngs)
        self.output = NnxOutput(s.d, s.d, s.bottleneck, rngs)

    def __call__(self, x, mask):
        q, k, v = (heads_of(part(x), self.heads) for part in (self.query, self.key, self.value))
        mixed = nnx.dot_product_attention(q, k, v, mask=mask)
        return self.output(mixed.reshape(x.shape))


class NnxMlp(nnx.Module):
    def __init__(self, s, rngs):
        self.intermediate = nnx.Linear(s.d, s.ffn, rngs=rngs)
        self.output = NnxOutput(s.ffn, s.d, s.bottleneck, rngs)

    def __call__(self, x):
        return self.output(nnx.gelu(self.intermediate(x), approximate=False))


class NnxLayer(nnx.Module):
    def __init__(self, s, rngs):
        self.attention = NnxAttention(s, rngs)
        self.attention_norm = nnx.LayerNorm(s.d, epsilon=1e-12, rngs=rngs)
        self.mlp = NnxMlp(s, rngs)
        self.mlp_norm = nnx.LayerNorm(s.d, epsilon=1e-12, rngs=rngs)

    def __call__(self, x, mask):
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class NnxEmbeddings(nnx.Module):
    def __init__(self, s, rngs):
        self.word = nnx.Embed(s.vocab, s.d, rngs=rngs)
        self.position = nnx.Embed(s.positions, s.d, rngs=rngs)
        self.token_type = nnx.Embed(2, s.d, rngs=rngs)
        self.norm = nnx.LayerNorm(s.d, epsilon=1e-12, rngs=rngs)

    def __call__(self, ids):
        x = self.word(ids) + self.position(jnp.arange(ids.shape[1])[None])
        return self.norm(x + self.token_type(jnp.zeros_like(ids)))


class NnxEncoder(nnx.Module):
    def __init__(self, s, rngs):
        self.layers = s.layers
        self.embeddings = NnxEmbeddings(s, rngs)
        for i in range(s.layers):
            setattr(self, f"layer_{i}", NnxLayer(s, rngs))
        if s.pooler:
            self.pooler = NnxOutput(s.d, s.d, 0, rngs)

    def __call__(self, ids, mask):
        x = self.embeddings(ids)
        for i in range(self.layers):
            x = getattr(self, f"layer_{i}")(x, (mask != 0)[:, None, None, :])
        if hasattr(self, "pooler"):
            return jnp.tanh(self.pooler(x[:, 0]))
        return mean_pool(x, mask)


class NnxBert(nnx.Module):
    def __init__(self, sizes, rngs):
        self.bert = NnxEncoder(sizes, rngs)
        self.head = nnx.Linear(sizes.d, sizes.labels, rngs=rngs)

    def __call__(self, ids, mask):
        return self.head(self.bert(ids, mask))


# What trains, and the step


def trains(path: tuple[Any, ...], sizes: Sizes) -> bool:
    """Whether a parameter trains: adapters, the head, and layer norms with bottlenecks."""
    names = set(path)
    norm = any("norm" in str(name) for name in path)
    return bool(names & {"lora_a", "lora_b", "adapter", "head"}) or bool(sizes.bottleneck and norm)


def make_step(loss: Callable[..., jax.Array], tx: optax.GradientTransformation):
    """Makes a jitted step that differentiates only its first argument and donates its state."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(adapters: Any, opt_state: Any, base: Any, batch: Batch):
        value, grads = jax.value_and_grad(loss)(adapters, base, batch)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state, value

    return step


def linen_side(sizes: Sizes, params: dict[tuple[str, ...], jax.Array], tx: Any):
    """`(step, adapters, base)` of the linen model; parameters by path."""
    model = LinenBert(sizes)
    adapters = {path: x for path, x in params.items() if trains(path, sizes)}
    base = {path: x for path, x in params.items() if path not in adapters}

    def loss(adapters: Any, base: Any, batch: Batch) -> jax.Array:
        whole = traverse_util.unflatten_dict({**adapters, **base})
        logits: Any = model.apply({"params": whole}, batch["ids"], batch["mask"])
        return cross_entropy(logits, batch["labels"])

    return make_step(loss, tx), adapters, base


def nnx_side(sizes: Sizes, model: NnxBert, tx: Any):
    """`(step, adapters, base)` of the NNX model."""
    parts: Any = nnx.split(model, lambda path, _: trains(path, sizes), ...)
    graphdef, adapters, base = parts

    def loss(adapters: Any, base: Any, batch: Batch) -> jax.Array:
        whole = nnx.merge(graphdef, adapters, base)
        return cross_entropy(whole(batch["ids"], batch["mask"]), batch["labels"])

    return make_step(loss, tx), adapters, base
