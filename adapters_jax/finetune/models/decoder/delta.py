"""The gated delta rule (flax.nnx): attention without a softmax, whose memory is a matrix a head.

A token first decays the memory, then replaces what the memory holds for its key by its value, in
part, and reads what it holds for its query. Tokens are read in chunks; in a chunk, all is products
of matrices; a chunk of one token is the recurrence itself.

Reference: Yang et al., Gated delta networks (2024), https://arxiv.org/abs/2412.06464; the form by
chunks, Yang et al., Parallelizing linear transformers with the delta rule over sequence length
(2024), https://arxiv.org/abs/2406.06484
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError, check_size
from adapters_jax.finetune.models.parts.cache import Kept, LayerCache
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS
from adapters_jax.trace.masks import Mask

CHUNK = 64  # tokens
Hidden = Float[Array, "batch length d"]
Texts = Int[Array, "batch length"]
Heads = Float[Array, "batch length heads width"]
Rates = Float[Array, "batch length heads"]
State = Float[Array, "batch heads key_width value_width"]


@dataclass(frozen=True)
class DeltaSizes:
    """The sizes of layers with the gated delta rule.

    Attributes:
        key_heads: the number of heads of queries and keys.
        value_heads: the number of heads of values; consecutive ones share a query and a key.
        kernel: the number of tokens that the short convolution sees, the token itself included.
        fused: whether two projections, whose outputs are sorted by key head, compute all that the
            rule needs.

    Raises:
        UserError: a size is not a whole number of at least 1, or the heads do not divide.

    Example:
        >>> DeltaSizes(key_heads=2, value_heads=3)
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 3 value heads do not divide into 2 key heads.
    """

    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128
    value_width: int = 128
    kernel: int = 4
    fused: bool = False

    def __post_init__(self) -> None:
        for each in fields(self)[:-1]:
            check_size("DeltaSizes", each.name, getattr(self, each.name))
        if self.value_heads % self.key_heads:
            raise UserError(
                f"{self.value_heads} value heads do not divide into {self.key_heads} key heads."
            )

    @property
    def keys(self) -> int:
        """The number of features of all keys, or of all queries."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        """The number of features of all values."""
        return self.value_heads * self.value_width

    @property
    def mixed(self) -> int:
        """The number of features of queries, keys and values."""
        return 2 * self.keys + self.values

    def parameters(self, width: int) -> int:
        """The number of parameters of a layer with hidden states of this width."""
        heads = self.value_heads
        products = width * (self.mixed + self.values + 2 * heads) + self.values * width
        return products + self.kernel * self.mixed + 2 * heads + self.value_width


class ShortConvolution(nnx.Module):
    """A causal convolution over few tokens, of each feature by itself."""

    def __init__(self, features: int, length: int, parts: Any):
        init = nnx.initializers.normal(parts.config.deviation(length))
        shape = (length, 1, features)
        self.kernel = nnx.Param(init(parts.rest["rngs"].params(), shape, parts.rest["param_dtype"]))
        self.dtype = parts.dtype

    def __call__(
        self,
        x: Float[Array, "batch length features"],
        before: Float[Array, "batch past features"],
        texts: Texts | None = None,
    ) -> Float[Array, "batch length features"]:
        """Convolves tokens with those before them, in float32 at least.

        Args:
            x: the features of the tokens.
            before: those of the tokens before the first one, one fewer than the kernel has.
            texts: the number of each token's text, from 0 and ascending; it sees no other text.
        """
        kernel = self.kernel[...][:, 0]
        dtype = jnp.promote_types(jnp.promote_types(x.dtype, kernel.dtype), jnp.float32)
        whole = jnp.concatenate([before.astype(x.dtype), x], axis=1)
        past, length = before.shape[1], x.shape[1]
        total = jnp.zeros((), dtype)
        for at in range(past + 1):
            seen = whole[:, at : at + length].astype(dtype)
            if texts is not None:
                first = jnp.pad(texts, ((0, 0), (past, 0)))[:, at : at + length]
                seen = jnp.where((first == texts)[..., None], seen, 0)
            total = total + seen * kernel[at].astype(dtype)
        return total


class GatedOutput(nnx.Module):
    """What the heads of a layer become: their norms times a gate, then a projection."""

    def __init__(self, parts: Any):
        sizes = parts.config.delta
        self.norm = parts.norm(sizes.value_width, offset=0.0)
        self.dense = parts.linear(sizes.values, parts.config.hidden_size)

    def __call__(self, mixed: Heads, gate: Heads) -> Hidden:
        """The hidden states of the values that the heads have read."""
        wide = jnp.promote_types(gate.dtype, jnp.float32)
        opened = self.norm(mixed).astype(wide) * jax.nn.silu(gate.astype(wide))
        return self.dense(opened.astype(mixed.dtype).reshape(*mixed.shape[:-2], -1))


class GatedDelta(nnx.Module):
    """A layer with the gated delta rule, in the place of an attention.

    Queries, keys and values go through a short convolution. Padding changes neither its window nor
    the memory, on whichever side of the tokens it is.
    """

    def __init__(self, parts: Any):
        config, sizes = parts.config, parts.config.delta
        self.sizes = sizes
        heads, values, mixed = sizes.value_heads, sizes.values, sizes.mixed
        outputs = {"query_key_value": mixed, "gate": values, "beta": heads, "decay": heads}
        if sizes.fused:
            outputs = {"query_key_value_gate": mixed + values, "beta_decay": 2 * heads}
        for name, features in outputs.items():
            setattr(self, name, parts.linear(config.hidden_size, features))
        self.convolution = ShortConvolution(mixed, sizes.kernel, parts)
        self.activation = ACTIVATIONS[config.hidden_act]
        dtype = parts.rest["param_dtype"]
        rates = jax.random.uniform(parts.rest["rngs"].params(), heads, minval=0.01, maxval=16.0)
        self.log_rate = nnx.Param(jnp.log(rates).astype(dtype))
        self.decay_bias = nnx.Param(jnp.ones(heads, dtype))
        self.output = GatedOutput(parts)

    def empty_cache(self, batch: int, slots: int, dtype: Dtype) -> Kept:
        """What it keeps before the first token: empty memories, in float32, and no tokens."""
        s = self.sizes
        memory = jnp.zeros((batch, s.value_heads, s.key_width, s.value_width), jnp.float32)
        return Kept(state=(memory, jnp.zeros((batch, s.kernel - 1, s.mixed), dtype)))

    def __call__(
        self, x: Hidden, mask: Mask, *unused: Any, cache: LayerCache | None = None
    ) -> Hidden:
        """Computes, for each token, what the memories of the tokens up to it hold for its query.

        Args:
            mask: which positions are tokens, and the text of each.
            *unused: what a softmax attention needs.
            cache: the memories and the last tokens before; they are replaced by those after.
        """
        tokens, texts, order = mask.tokens, mask.segments, None
        mixed, gate, beta, decay = self._projected(x)
        if tokens is not None:  # first, in their order, so that each is next to the one before
            # Not before the projections, whose adapters may act on some positions of the text.
            order = jnp.argsort(~tokens, axis=1, stable=True)
            mixed, beta, decay = (_permuted(each, order) for each in (mixed, beta, decay))
            texts = None if texts is None else jnp.take_along_axis(texts, order, axis=1)
        counts = None if tokens is None else tokens.sum(1, dtype=jnp.int32)
        if texts is not None:  # by ascending numbers, from 0
            changes = jnp.diff(texts, prepend=texts[:, :1]) != 0
            texts = jnp.cumsum(changes, axis=1, dtype=jnp.int32)
        empty = self.empty_cache(len(x), 0, mixed.dtype)
        memory, before = (empty if cache is None else cache.kept).state
        turned = self.activation(self.convolution(mixed, before, texts)).astype(mixed.dtype)
        if counts is not None:  # padding neither decays the memory nor writes into it
            is_token = (jnp.arange(x.shape[1]) < counts[:, None])[..., None]
            beta, decay = jnp.where(is_token, beta, 0), jnp.where(is_token, decay, 0)
        query, key, value = self._heads(turned)
        read, after = delta_rule(query, key, value, decay, beta, memory, texts)
        if cache is not None:
            last = _last(
                jnp.concatenate([before.astype(mixed.dtype), mixed], axis=1), counts, before
            )
            cache.kept = cache.kept._replace(state=(after.astype(memory.dtype), last))
        read = read if order is None else _permuted(read, jnp.argsort(order, axis=1))
        return self.output(read, gate)

    def _projected(self, x: Hidden) -> tuple[Hidden, Heads, Rates, Rates]:
        """Queries, keys and values side by side; gates; betas; and logarithms of decays."""
        s, shape = self.sizes, x.shape[:-1]
        if s.fused:
            values = s.value_heads // s.key_heads * s.value_width
            cuts = [s.key_width, 2 * s.key_width, 2 * s.key_width + values]
            parts = self._split("query_key_value_gate", x, cuts)
            mixed, gate = jnp.concatenate(parts[:3], axis=-1), parts[3]
            beta, decay = self._split("beta_decay", x, 2)
        else:
            names = "query_key_value", "gate", "beta", "decay"
            mixed, gate, beta, decay = (getattr(self, name)(x) for name in names)
        wide = jnp.promote_types(decay.dtype, jnp.float32)
        rate, bias = self.log_rate[...].astype(wide), self.decay_bias[...].astype(wide)
        decay = -jnp.exp(rate) * jax.nn.softplus(decay.astype(wide) + bias)
        gate = gate.reshape(*shape, s.value_heads, s.value_width)
        return mixed, gate, jax.nn.sigmoid(beta), decay

    def _split(self, name: str, x: Hidden, cuts: Any) -> list[Hidden]:
        """The parts of a fused projection, which has them of one key head after the other."""
        whole = getattr(self, name)(x).reshape(*x.shape[:-1], self.sizes.key_heads, -1)
        return [part.reshape(*x.shape[:-1], -1) for part in jnp.split(whole, cuts, axis=-1)]

    def _heads(self, mixed: Hidden) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values by head, as many of each."""
        s, shape = self.sizes, mixed.shape[:-1]
        query, key, value = jnp.split(mixed, [s.keys, 2 * s.keys], axis=-1)
        pairs = (each.reshape(*shape, s.key_heads, s.key_width) for each in (query, key))
        query, key = (jnp.repeat(each, s.value_heads // s.key_heads, axis=2) for each in pairs)
        return query, key, value.reshape(*shape, s.value_heads, s.value_width)


def delta_rule(
    query: Heads,
    key: Heads,
    value: Heads,
    decay: Rates,
    beta: Rates,
    state: State,
    texts: Texts | None = None,
    chunk: int = CHUNK,
) -> tuple[Heads, State]:
    """The gated delta rule, in float32 at least.

    With the memory S of a head, and a token's query q and key k, of length 1, it computes
    `S = exp(decay) S; S = S + beta k (v - S^T k)^T; y = S^T q / sqrt(width)`.

    Args:
        query: queries, of any length.
        key: keys, of any length.
        decay: the logarithm of the factor of the memory, at most 0.
        beta: the part of the memory's value that the token replaces, from 0 to 1.
        state: the memories before the first token.
        texts: the number of each token's text, from 0 and ascending; a text begins with an empty
            memory, but for the one with number 0, which goes on with `state`.
        chunk: the number of tokens of a chunk.

    Returns:
        What each token reads, in the dtype of `query`, and the memories after the last one.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    length, width = query.shape[1], query.shape[-1]
    chunk = min(chunk, length)
    wide = (each.astype(dtype) for each in (query, key))
    query, key = (x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6) for x in wide)
    beta = beta.astype(dtype)[..., None]
    if texts is None:
        texts = jnp.zeros((1, length), jnp.int32)
    begins = jnp.diff(texts, axis=1, prepend=0)  # texts that begin at this token

    def chunks(x: Array) -> Array:
        """(batch, length, heads, ...) as (chunks, batch, heads, tokens, ...)."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    rows = query * width**-0.5, key, key * beta, value.astype(dtype) * beta
    parts = map(chunks, (*rows, decay.astype(dtype)[..., None], begins[..., None, None]))
    state, read = jax.lax.scan(_chunk, state.astype(dtype), tuple(parts))
    read = jnp.moveaxis(jnp.moveaxis(read, 2, 3), 0, 1)
    read = read.reshape(read.shape[0], -1, *read.shape[3:])[:, :length]
    return read.astype(value.dtype), state


def _chunk(state: State, parts: tuple[Array, ...]) -> tuple[State, Array]:
    """The memories after a chunk, and what its tokens read; see `delta_rule`."""
    query, key, weighted, value, decay, begins = parts
    total = jnp.cumsum(decay, axis=-2)  # since the begin of the chunk
    texts = jnp.cumsum(begins, axis=-2)
    last, text = total[..., -1:, :], texts[..., -1:, :]
    size = query.shape[-2]
    seen = jnp.tri(size, dtype=bool) & (texts == jnp.swapaxes(texts, -1, -2))
    between = jnp.exp(jnp.where(seen, total - jnp.swapaxes(total, -1, -2), -jnp.inf))
    since = jnp.where(texts == 0, jnp.exp(total), 0)  # what is left of `state` at each token
    keys = jnp.swapaxes(key, -1, -2)
    # What a token writes depends on what those before it in the chunk have written: a system of
    # equations with a unit triangular matrix.
    system = (weighted @ keys) * between
    known = jnp.concatenate([value, weighted * since], axis=-1)
    if size > 1:
        known = jax.lax.linalg.triangular_solve(
            system, known, left_side=True, lower=True, unit_diagonal=True
        )
    new, old = jnp.split(known, [value.shape[-1]], axis=-1)
    new = new - old @ state
    read = (query * since) @ state + ((query @ keys) * between) @ new
    left = jnp.where(texts == text, jnp.exp(last - total), 0)
    kept = jnp.where(text == 0, jnp.exp(last), 0)
    return state * kept + jnp.swapaxes(key * left, -1, -2) @ new, read


def _permuted(
    x: Num[Array, "batch length *rest"], order: Texts
) -> Num[Array, "batch length *rest"]:
    """The rows of each text in another order."""
    return jax.vmap(lambda x, order: x.at[order].get(unique_indices=True))(x, order)


def _last(x: Array, counts: Array | None, like: Array) -> Array:
    """The last tokens of each row, as many as `like` has; `counts` follow the first ones."""
    size, dtype = like.shape[1], like.dtype
    if counts is None:
        return x[:, x.shape[1] - size :].astype(dtype)
    return jax.vmap(lambda x, n: jax.lax.dynamic_slice_in_dim(x, n, size))(x, counts).astype(dtype)
