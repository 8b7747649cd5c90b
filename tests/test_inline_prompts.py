"""Prompts in attentions that compute in line, in the styles of many libraries, by a plain formula.

All styles compute the same attention of the same weights, each in a layout of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj

B, T, D, H, W, K = 2, 5, 12, 4, 6, 3
rng = np.random.default_rng(0)
X = rng.standard_normal((B, T, D)).astype(np.float32)
MASK = np.tril(np.ones((T, T), bool))
BIAS = rng.standard_normal((H, T, T)).astype(np.float32)  # by head and position, as T5 has
ANGLES = np.arange(T)[:, None] * np.array([1.0, 0.3, 0.1])  # for W / 2 pairs


def weights(kv):
    """Kernels (D, heads, W) and biases (heads, W) of query, key and value."""
    draw = np.random.default_rng(kv).standard_normal
    sizes = {"q": H, "k": kv, "v": kv}
    kernels = {name: 0.4 * draw((D, n, W)).astype(np.float32) for name, n in sizes.items()}
    biases = {f"{name}b": draw((n, W)).astype(np.float32) for name, n in sizes.items()}
    return {**kernels, **biases}


def halves(x, angles, np=jnp):
    """Rotates the first half of each head with the second."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def added_halves(x, angles):
    """The same as a sum of two products, as Hugging Face writes it."""
    a, b = jnp.split(x, 2, -1)
    cos, sin = (jnp.tile(f(angles), 2)[:, None] for f in (jnp.cos, jnp.sin))
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def pairs(x, angles, np=jnp):
    """Rotates each even position of a head with the next one."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def complex_pairs(x, angles):
    """The same with complex numbers."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(x[..., 0], x[..., 1]) * jnp.exp(1j * angles)[:, None]
    return jnp.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-2], -1)


@dataclass(frozen=True)
class Style:
    """How a library computes an attention.

    Attributes:
        run: computes it of its own weights and the input: (B, T, H * W).
        layout: its own weights of those of `weights`.
        kv: the number of key heads.
        rotate: rotates queries and keys.
        scale, cap, bias: of the logits.
        biased: whether the projections have biases.
    """

    run: Callable[..., Any]
    layout: Callable[..., Any] = dict
    kv: int = H
    rotate: Any = None
    scale: float = W**-0.5
    cap: float = 0.0
    bias: Any = 0.0
    biased: bool = False


def partial(x, angles, np=jnp):
    """Rotates the first four positions of a head, in halves, and leaves the others."""
    return np.concatenate([halves(x[..., :4], angles[:, :2], np), x[..., 4:]], -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def formula(style, own, method):
    """The adapted attention in float64, a head at a time."""
    w = {name: x.astype(np.float64) for name, x in weights(style.kv).items()}
    own = {name: np.asarray(x, np.float64) for name, x in own.items()}

    def project(name, x):
        y = np.einsum("...d,dnw->...nw", x, w[name])
        return y + w[f"{name}b"] if style.biased else y

    query, key, value = (project(name, X.astype(np.float64)) for name in "qkv")
    if style.rotate:
        query, key = style.rotate(query, ANGLES, np), style.rotate(key, ANGLES, np)

    def logits(q, k):
        scores = q @ k.T * style.scale
        return style.cap * np.tanh(scores / style.cap) if style.cap else scores

    bias = np.broadcast_to(style.bias, (H, T, T))
    gated = isinstance(method, aj.LlamaAdapter)
    out = np.zeros((B, T, H, W))
    for b in range(B):
        for h in range(H):
            q, g = query[b, :, h], h // (H // style.kv)
            scores = np.where(MASK, logits(q, key[b, :, g]) + bias[h], -np.inf)
            if gated:
                ahead = {name: project(name, own["embedding"])[:, g] for name in "kv"}
                branch = softmax(logits(q, ahead["k"])) @ ahead["v"]
                out[b, :, h] = softmax(scores) @ value[b, :, g]
                out[b, :, h] += np.tanh(own["gate"][h]) * branch
            else:
                ahead = own["key"][:, g], own["value"][:, g]
                mixed = softmax(np.concatenate([logits(q, ahead[0]), scores], -1))
                out[b, :, h] = mixed @ np.concatenate([ahead[1], value[b, :, g]])
    return out.reshape(B, T, -1)


def separate(rotate=None, swap=False):
    """Three kernels (D, n * W) with biases; scores as (b, h, t, s)."""

    def run(w, x):
        q, k, v = ((x @ w[n] + w[f"{n}b"]).reshape(B, T, -1, W) for n in "qkv")
        if rotate:
            q, k = rotate(q, ANGLES), rotate(k, ANGLES)
        q, k, v = (jnp.repeat(y, H // y.shape[2], axis=2).swapaxes(1, 2) for y in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(W)
        if swap:  # keys are the left operand
            scores = jnp.einsum("bhsw,bhtw->bhst", k, q).swapaxes(-1, -2) * W**-0.5
        mixed = jax.nn.softmax(jnp.where(MASK, scores, -1e30)) @ v
        return mixed.swapaxes(1, 2).reshape(B, T, -1)

    return run


def flat(w):
    return {n: x.reshape(*x.shape[: x.ndim - 2], -1) for n, x in w.items()}


def fused(w, x):
    """One kernel (D, 3 * H * W), cut in three, as GPT-2's."""
    q, k, v = (y.reshape(B, T, H, W) for y in jnp.split(x @ w["qkv"] + w["qkvb"], 3, axis=-1))
    weight = nn.dot_product_attention_weights(q, k, mask=MASK[None, None])
    return jnp.einsum("...hqk,...khd->...qhd", weight, v).reshape(B, T, -1)


def fused_layout(w):
    w = flat(w)
    return {e: np.concatenate([w[n + e[3:]] for n in "qkv"], -1) for e in ("qkv", "qkvb")}


def by_head(w, x):
    """One kernel in which the columns of a head are those of its query, key and value."""
    y = (x @ w["qkv"]).reshape(B, T, H, 3, W)
    q, k, v = y[:, :, :, 0], y[:, :, :, 1], y[..., 2, :]
    return separate_core(q, k, v)


def separate_core(q, k, v):
    scores = jnp.einsum("bthw,bshw->bhts", q, k) * W**-0.5
    mixed = jax.nn.softmax(scores, where=MASK)
    return jnp.einsum("bhts,bshw->bthw", mixed, v).reshape(B, T, -1)


def stacked(w, x):
    """Kernels (3, H, D, W) in one einsum, as gemma's."""
    q, k, v = jnp.einsum("BTD,SNDH->SBTNH", x, w["qkv"])
    q = halves(q * W**-0.5, ANGLES)
    scores = jnp.where(MASK[:, None], jnp.einsum("BTNH,BSNH->BTNS", q, halves(k, ANGLES)), -1e30)
    return jnp.einsum("BTNS,BSNH->BTNH", jax.nn.softmax(scores, -1), v).reshape(B, T, -1)


def groups(w, x):
    """Query heads in groups, as tunix's Llama has; a soft cap as Gemma 2's."""
    q, k, v = (jnp.einsum("BTD,DNH->BTNH", x, w[n]) for n in "qkv")
    q = halves(q, ANGLES).reshape(B, T, 2, H // 2, W)
    scores = jnp.einsum("BTHGD,BSHD->BHGTS", q, halves(k, ANGLES)) * 0.3
    scores = jnp.tanh(scores / 2.0) * 2.0
    scores = jnp.where(MASK, scores.reshape(B, H, T, T), -1e30)
    mixed = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).reshape(B, 2, H // 2, T, T)
    return jnp.einsum("BHGTS,BSHD->BTHGD", mixed, v).reshape(B, T, -1)


def shared(w, x):
    """One key head for all queries, without an axis of its own."""
    q = jnp.einsum("btd,dnw->bntw", x, w["q"]) / W**0.5
    k, v = x @ w["k"][:, 0], x @ w["v"][:, 0]
    scores = jnp.einsum("bntw,bsw->bnts", q, k)
    scores = jnp.where(MASK, scores, -1e30)
    weight = jnp.exp(scores - scores.max(-1, keepdims=True))
    weight = weight * (1 / weight.sum(-1, keepdims=True))
    return jnp.einsum("bnts,bsw->btnw", weight, v).reshape(B, T, -1)


def relative(w, x):
    """No scale, and a bias by head and position, as T5's."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    scores = jnp.einsum("bthw,bshw->bhts", q, k) + BIAS
    mixed = nn.softmax(scores + jnp.where(MASK, 0.0, -1e30))
    return jnp.einsum("bhts,bshw->bthw", mixed, v).reshape(B, T, -1)


def shifted(w, x):
    """The maximum is subtracted once more, as against overflow."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    scores = jnp.where(MASK, jnp.einsum("bthw,bshw->bhts", q, k) * W**-0.5, -1e30)
    weight = jax.nn.softmax(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhts,bshw->bthw", weight, v).reshape(B, T, -1)


def repeated_work(w, x):
    """The same within `jax.checkpoint` and `jax.jit`."""
    return jax.checkpoint(jax.jit(fused))(w, x)


def one_by_one(w, x):
    """A loop over the heads, each with its columns of the projections."""
    q, k, v = (x @ w[n] for n in "qkv")
    mixed = []
    for head in range(H):
        own, of = (slice(i * W, (i + 1) * W) for i in (head, head * k.shape[-1] // q.shape[-1]))
        scores = jnp.where(MASK, q[..., own] @ k[..., of].swapaxes(1, 2) * W**-0.5, -1e30)
        mixed.append(jax.nn.softmax(scores) @ v[..., of])
    return jnp.concatenate(mixed, -1)


def products_by_head(w, x):
    """A loop over the heads, each with products of its own."""
    mixed = []
    for head in range(H):
        q, k, v = (jnp.einsum("btd,dw->btw", x, w[n][:, head]) for n in "qkv")
        scores = jnp.where(MASK, jnp.einsum("btw,bsw->bts", q, k) * W**-0.5, -1e30)
        mixed.append(jnp.einsum("bts,bsw->btw", jax.nn.softmax(scores), v))
    return jnp.concatenate(mixed, -1)


STYLES = {
    "heads one by one": Style(one_by_one, flat),
    "heads in groups one by one": Style(one_by_one, flat, kv=2),
    "products by head": Style(products_by_head),
    "heads one by one in a checkpoint": Style(jax.checkpoint(one_by_one), flat),
    "separate": Style(separate(), flat, biased=True),
    "keys first": Style(separate(swap=True), flat, biased=True),
    "repeated keys": Style(separate(halves), flat, 2, halves, biased=True),
    "rotary as a sum": Style(separate(added_halves), flat, 2, halves, biased=True),
    "rotary in pairs": Style(separate(pairs), flat, 2, pairs, biased=True),
    "complex rotary": Style(separate(complex_pairs), flat, 2, pairs, biased=True),
    "partial rotary": Style(separate(partial), flat, 2, partial, biased=True),
    "fused": Style(fused, fused_layout, biased=True),
    "fused by head": Style(
        by_head, lambda w: {"qkv": np.stack([w[n] for n in "qkv"], 2).reshape(D, -1)}
    ),
    "stacked": Style(
        stacked, lambda w: {"qkv": np.stack([w[n].swapaxes(0, 1) for n in "qkv"])}, rotate=halves
    ),
    "groups": Style(groups, kv=2, rotate=halves, scale=0.3, cap=2.0),
    "one key head": Style(shared, kv=1),
    "relative": Style(relative, scale=1.0, bias=BIAS),
    "shifted": Style(shifted),
    "checkpoint": Style(repeated_work, fused_layout, biased=True),
}
METHODS = {"gated": aj.LlamaAdapter("attention", K), "prefix": aj.PrefixTuning("attention", K)}


class Attention(nn.Module):
    style: Style

    @nn.compact
    def __call__(self, x):
        own = self.style.layout(weights(self.style.kv))
        return self.style.run({n: self.param(n, lambda _, y=y: y) for n, y in own.items()}, x)


class Model(nn.Module):
    style: Style

    @nn.compact
    def __call__(self, x):
        return Attention(self.style, name="attention")(x)


class NnxAttention(nnx.Module):
    def __init__(self, style):
        self.run, self.names = style.run, list(style.layout(weights(style.kv)))
        self.names = nnx.static(tuple(self.names))
        for name, value in style.layout(weights(style.kv)).items():
            setattr(self, name, nnx.Param(jnp.asarray(value)))

    def __call__(self, x):
        return self.run({name: getattr(self, name)[...] for name in self.names}, x)


class NnxModel(nnx.Module):
    def __init__(self, style):
        self.attention = NnxAttention(style)

    def __call__(self, x):
        return self.attention(x)


def noise(tree, seed=1):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.5 * draw(x.shape), jnp.float32), tree)


@pytest.mark.witness(
    "heads one by one-prefix",
    "repeated keys-prefix",
    "rotary in pairs-gated",
    "fused by head-gated",
    "stacked-prefix",
    "shifted-gated",
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_style_computes_the_formula(style, method):
    slot = method.slot
    model = aj.adapt(Model(style), method)
    params = Model(style).init(jax.random.key(0), X)["params"]
    params = aj.init_adapters(model, params, jax.random.key(0), X)
    own = noise(params["attention"][slot])
    params["attention"][slot] = own
    expected = formula(style, own, method)
    for apply in (model.apply, jax.jit(model.apply)):
        np.testing.assert_allclose(apply({"params": params}, X), expected, atol=2e-5)

    other = aj.adapt(NnxModel(style), method, rngs=nnx.Rngs(0), example_inputs=(X,))
    nnx.update(other.attention, {slot: own})
    for call in (NnxModel.__call__, nnx.jit(NnxModel.__call__)):
        np.testing.assert_allclose(call(other, X), expected, atol=2e-5)


def lookalike(w, x):
    """Linear attention: products of activations without a softmax."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    return jnp.einsum("bthw,bshw,bshv->bthv", nn.elu(q) + 1, nn.elu(k) + 1, v).reshape(B, T, -1)


def flash(w, x):
    """The keys one by one, with a running sum."""
    q, k, v = (jnp.einsum("btd,dnw->nbtw", x, w[n]) for n in "qkv")

    def step(carry, kv):
        score = jnp.exp(jnp.einsum("nbtw,nbw->nbt", q, kv[0]))[..., None]
        return (carry[0] + score * kv[1][:, :, None], carry[1] + score), None

    start = jnp.zeros_like(q), jnp.zeros((*q.shape[:-1], 1))
    (mixed, total), _ = jax.lax.scan(step, start, (jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0)))
    return jnp.moveaxis(mixed / total, 0, 2).reshape(B, T, -1)


def weighed(change=lambda s: s, mask=None, after=None, axis=-1, sink=0.0, then=lambda p: p):
    """An attention with something between its products that is not alike for all scores."""

    def run(w, x):
        q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
        scores = change(jnp.einsum("bthw,bshw->bhts", q, k) * W**-0.5)
        weight = jnp.exp(scores - scores.max(-1, keepdims=True))
        weight = weight if mask is None else weight * mask
        total = weight.sum(axis, keepdims=True)
        total = total + sink if sink else total
        if after:
            mixed = jnp.einsum("bhts,bshw->bthw", weight, v) / total.swapaxes(1, 2)
            return mixed.reshape(B, T, -1)
        mixed = jnp.einsum("bhts,bshw->bthw", then(weight / total), v)
        return jnp.broadcast_to(mixed, v.shape).reshape(B, T, -1)

    return run


def changed(**change):
    """An attention of queries, keys or values that are changed after their projections."""

    def run(w, x):
        made = {n: jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv"}
        return separate_core(*(change.get(n, lambda y: y)(y) for n, y in made.items()))

    return run


def differential(w, x):
    """The difference of two softmaxes, as the differential transformer has."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    one, other = (
        jax.nn.softmax(jnp.einsum("bthw,bshw->bhts", a, b))
        for a, b in zip(jnp.split(q, 2, -1), jnp.split(k, 2, -1), strict=True)
    )
    return jnp.einsum("bhts,bshw->bthw", one - 0.3 * other, v).reshape(B, T, -1)


def two_products(w, x):
    """Scores that are sums of two products, as those of latent attention are."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    scores = jnp.einsum("bthw,bshw->bhts", q, k) + jnp.einsum("bthw,bshw->bhts", q, v)
    return jnp.einsum("bhts,bshw->bthw", jax.nn.softmax(scores), v).reshape(B, T, -1)


def tiled(w, x):
    """Query head i reads key head i % 2, not i // 2."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    return separate_core(q, jnp.tile(k, (1, 1, 2, 1)), jnp.tile(v, (1, 1, 2, 1)))


def moved(w, x):
    """Keys with something of the input added to them."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    return separate_core(q, k + x[:, :, None, :W], v)


def bent(w, x):
    """Keys plus a function of them."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    return separate_core(q, k + jnp.tanh(k), v)


def rolled(w, x):
    """Values whose columns are in another order within a head."""
    q, k, v = (jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")
    return separate_core(q, k, jnp.concatenate([v[..., 1:], v[..., :1]], -1))


def twice(w, x):
    """Two attentions."""
    return separate_core(*(jnp.einsum("btd,dnw->btnw", x, w[n]) for n in "qkv")) + stacked(
        {"qkv": jnp.stack([w[n].swapaxes(0, 1) for n in "qkv"])}, x
    )


def of_two_inputs(w, x):
    """Two heads, of which the second one reads its keys from another input."""
    mixed = []
    for head, other in enumerate((x, x[:, ::-1])):
        q, k, v = (
            jnp.einsum("btd,dw->btw", y, w[n][:, head])
            for n, y in zip("qkv", (x, other, other), strict=True)
        )
        mixed.append(jax.nn.softmax(jnp.einsum("btw,bsw->bts", q, k)) @ v)
    return jnp.tile(jnp.concatenate(mixed, -1), 2)


REFUSED = {
    "heads of two inputs": (Style(of_two_inputs), "computes 2 attentions"),
    "no softmax": (Style(lookalike), "no softmax between two products"),
    "a loop over keys": (Style(flash), "no softmax between two products"),
    "a scale for each head": (
        Style(weighed(lambda s: s * jnp.arange(1.0, H + 1)[:, None, None])),
        "scores that are changed by mul",
    ),
    "a softmax over queries": (Style(weighed(axis=-2)), "its softmax over other axes"),
    "two products": (Style(two_products), "scores that are computed from several products"),
    "divided after": (Style(weighed(after=True)), "divides by the sum of its softmax after"),
    "other groups": (Style(tiled, kv=2), "heads in another order"),
    "something added": (Style(moved), "keys that have something else added"),
    "a sum with itself": (
        Style(weighed(lambda s: s + s)),
        "scores that are computed from one another",
    ),
    "distances": (
        Style(weighed(lambda s: -(BIAS - 2 * s))),
        "scores that are subtracted from others",
    ),
    "a choice of caps": (
        Style(weighed(lambda s: jnp.where(MASK, 2 * jnp.tanh(s / 2), s))),
        "scores that are chosen from several ones",
    ),
    "two softmaxes": (Style(differential), "scores that are computed from several products"),
    "pooled queries": (
        Style(weighed(then=lambda p: p.mean(2, keepdims=True))),
        "sums its weights before the second product",
    ),
    "an activation of keys": (Style(changed(k=jax.nn.silu)), "keys that are computed from one"),
    "rolled heads": (
        Style(changed(k=lambda k: jnp.roll(k, 1, 2))),
        "mixes columns of its projections across heads",
    ),
    "a function of keys": (Style(bent), "keys that are computed from one another"),
    "reordered values": (Style(rolled), "mixes the columns of its values"),
    "two": (Style(twice), "computes 2 attentions"),
}


@pytest.mark.parametrize(("style", "why"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_derived_is_refused_with_the_reason(style, why):
    with raises(aj.TargetError, "attention (Attention", why):
        aj.adapt(Model(style), aj.LlamaAdapter("attention", K)).init(jax.random.key(0), X)
    with raises(aj.TargetError, "attention (NnxAttention", why):
        method = aj.LlamaAdapter("attention", K)
        aj.adapt(NnxModel(style), method, rngs=nnx.Rngs(0), example_inputs=(X,))


HIDDEN = {
    "a mask": {"mask": MASK},
    "a sink": {"sink": 1.0},
    "a mask after a shift": {"change": lambda s: jnp.where(MASK, s - s.max(-1)[..., None], -1e30)},
    "a bias after a shift": {"change": lambda s: s - s.max(-1)[..., None] + BIAS},
    "normalised again": {"then": lambda p: p * MASK / (p * MASK).sum(-1, keepdims=True)},
}


@pytest.mark.parametrize("hidden", HIDDEN.values(), ids=HIDDEN)
def test_a_softmax_that_does_not_show_its_logits_has_no_prefix(hidden):
    """A mask on its exponentials, say, or more in the sum, which leave a gated prompt as it is."""
    style = Style(weighed(**hidden))
    gated = aj.adapt(Model(style), METHODS["gated"])
    params = gated.init(jax.random.key(0), X)["params"]
    params["attention"]["prompt"] = own = noise(params["attention"]["prompt"])
    base = Model(style).init_with_output(jax.random.key(0), X)[0]
    plain = Style(weighed(mask=MASK))
    branch = formula(plain, own, METHODS["gated"])
    branch -= Model(plain).init_with_output(jax.random.key(0), X)[0]
    np.testing.assert_allclose(gated.apply({"params": params}, X), base + branch, atol=2e-5)
    with raises(aj.TargetError, "attention (Attention", "does not show the logits"):
        aj.adapt(Model(style), METHODS["prefix"]).init(jax.random.key(0), X)
    with raises(aj.TargetError, "attention (NnxAttention", "does not show the logits"):
        aj.adapt(NnxModel(style), METHODS["prefix"], rngs=nnx.Rngs(0), example_inputs=(X,))


@pytest.mark.parametrize("name", ["heads of two inputs", "two"])
def test_several_attentions_are_refused_with_what_to_do_instead(name):
    instead = "aj.LoRA", "aj.Bottleneck", "an axis of heads", "if modules inside it compute one"
    with raises(aj.TargetError, "computes 2 attentions", *instead):
        model = aj.adapt(Model(REFUSED[name][0]), aj.LlamaAdapter("attention", K))
        model.init(jax.random.key(0), X)


@pytest.mark.slow
@pytest.mark.witness("gated")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_queries_without_the_batch_of_the_keys(method):
    """As of learned latents: they are read with every row of the batch, in which all are alike."""

    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, rows):
            query = nn.DenseGeneral((H, W), name="query")(x)
            key, value = (nn.DenseGeneral((H, W), name=n)(rows) for n in ("key", "value"))
            return separate_core(query, key, value)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x, rows):
            return Reader(name="attention")(x, rows)

    model, one = aj.adapt(Whole(), method), jnp.asarray(X[:1])
    params = model.init(jax.random.key(0), one, X)["params"]
    params["attention"][method.slot] = noise(params["attention"][method.slot])
    repeated = model.apply({"params": params}, jnp.repeat(one, B, 0), X)
    np.testing.assert_allclose(model.apply({"params": params}, one, X), repeated, atol=1e-6)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.LinearGeneral(D, (H, W), rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return separate_core(self.q(x), self.k(x), self.v(x))


class Around(nnx.Module):
    def __init__(self, rngs):
        self.attention = Layers(rngs)

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_prompts_beside_changed_projections_of_nnx(method):
    """The keys of the tokens have the change of the weight too."""
    recipe = aj.Recipe(aj.LoRA("attention/k", rank=2), method)
    model = aj.adapt(Around(nnx.Rngs(0)), recipe, rngs=nnx.Rngs(0), example_inputs=(X,))
    own = {n: noise(nnx.to_pure_dict(nnx.state(model.attention))[n]) for n in (method.slot,)}
    change = noise(nnx.to_pure_dict(nnx.state(model.attention.k))["lora"])
    nnx.update(model.attention, {**own, "k": {"lora": change}})
    merged = Around(nnx.Rngs(0))
    merged.attention.k.kernel[...] = model.attention.k(jnp.eye(D)) - model.attention.k.bias[...]
    merged = aj.adapt(merged, method, rngs=nnx.Rngs(0), example_inputs=(X,))
    nnx.update(merged.attention, own)
    for call in (Around.__call__, nnx.jit(Around.__call__)):
        np.testing.assert_allclose(call(model, X), merged(X), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_token_ids_of_numpy(method):
    class Ids(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(9, D, name="embed")(ids)
            return separate_core(*(nn.DenseGeneral((H, W), name=n)(x) for n in "qkv"))

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return Ids(name="attention")(ids)

    ids = np.arange(B * T).reshape(B, T) % 9
    model = aj.adapt(Whole(), method)
    params = model.init(jax.random.key(0), ids)["params"]
    params["attention"][method.slot] = noise(params["attention"][method.slot])
    traced = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(model.apply({"params": params}, ids), traced, atol=1e-6)


def test_keys_that_come_from_elsewhere():
    class Given(nn.Module):
        @nn.compact
        def __call__(self, x):
            key = nn.DenseGeneral((H, W), name="key")(x)
            return Core(name="attention")(x, key)

    class Core(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            query, value = (nn.DenseGeneral((H, W), name=n)(x) for n in ("query", "value"))
            return separate_core(query, key, value)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Given(name="block")(x)

    with raises(aj.TargetError, "block/attention (Core gets its keys from no product"):
        aj.adapt(Whole(), aj.LlamaAdapter("block/attention", K)).init(jax.random.key(0), X)
    model = aj.adapt(Whole(), aj.LlamaAdapter("block", K))  # the module around it has both
    own = model.init(jax.random.key(0), X)["params"]["block"]["prompt"]
    assert own["embedding"].shape == (K, D)


@pytest.mark.slow
def test_both_kinds_of_prompts_share_no_softmax():
    """The prefix is in the softmax of the context, the gated prompt beside it, in either order."""
    style = STYLES["groups"]
    gated, prefix = METHODS["gated"], METHODS["prefix"]
    outputs = []
    for recipe in (aj.Recipe(gated, prefix), aj.Recipe(prefix, gated)):
        model = aj.adapt(Model(style), recipe)
        params = model.init(jax.random.key(0), X)["params"]
        own = {n: noise(params["attention"][n], seed=len(n)) for n in ("prompt", "prefix")}
        outputs.append(model.apply({"params": {"attention": params["attention"] | own}}, X))
    base = Model(style).init_with_output(jax.random.key(0), X)[0]
    branch = formula(style, own["prompt"], gated) - base
    expected = formula(style, own["prefix"], prefix) + branch
    for output in outputs:
        np.testing.assert_allclose(output, expected, atol=2e-5)


def test_only_the_prompt_gets_gradients_and_few_operations_are_added():
    style = STYLES["repeated keys"]
    model = aj.adapt(Model(style), METHODS["gated"])
    params = model.init(jax.random.key(0), X)["params"]
    params["attention"]["prompt"] = noise(params["attention"]["prompt"])

    def loss(own, apply):
        whole = {"attention": params["attention"] | {"prompt": own}}
        return jnp.square(apply({"params": whole}, X)).sum()

    own = params["attention"]["prompt"]
    found = jax.grad(loss)(own, model.apply)
    for name, leaf in own.items():
        step = jnp.zeros(leaf.shape).at[(1,) * leaf.ndim].set(1e-2)
        ahead, behind = (loss({**own, name: leaf + s * step}, model.apply) for s in (1, -1))
        slope = (ahead - behind) / 2e-2
        np.testing.assert_allclose(found[name][(1,) * leaf.ndim], slope, rtol=2e-2, atol=1e-2)
    products = [
        str(jax.make_jaxpr(apply)({"params": p}, X)).count("dot_general")
        for apply, p in (
            (
                Model(style).apply,
                {"attention": {n: params["attention"][n] for n in style.layout(weights(2))}},
            ),
            (model.apply, params),
        )
    ]
    assert products == [5, 9]  # two projections and two products more


@pytest.mark.witness("True")
@pytest.mark.parametrize("remat", [False, True])
def test_the_innermost_of_several_targets_is_adapted(remat):
    """Around a rematerialised module the same attention is seen twice, which is an error."""
    style = STYLES["groups"]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return (nn.remat(Attention) if remat else Attention)(style, name="attention")(x)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="block")(x) + Block(name="other")(x)

    model = aj.adapt(Whole(), aj.LlamaAdapter("**", K))
    if remat:
        with raises(aj.TargetError, "targets block and block/attention", "'!block'"):
            model.init(jax.random.key(0), X)
        model = aj.adapt(Whole(), aj.LlamaAdapter(("**", "!block", "!other"), K))
    params = model.init(jax.random.key(0), X)["params"]
    own = noise(params["block"]["attention"]["prompt"])
    for name in ("block", "other"):
        assert set(params[name]) == {"attention"}
        params[name]["attention"]["prompt"] = own
    expected = 2 * formula(style, own, METHODS["gated"])
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, atol=4e-5)
