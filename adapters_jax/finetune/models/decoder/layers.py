"""The layers of a decoder (flax.nnx): attention, feed-forward, norms and the block that they make.

An encoder-decoder is made of them as well: its blocks have biases of positions, and those of its
decoder attend to what the encoder has read.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from adapters_jax.finetune.models.decoder.delta import GatedDelta
from adapters_jax.finetune.models.decoder.experts import DecoderMixture
from adapters_jax.finetune.models.decoder.forms import LayerForm
from adapters_jax.finetune.models.decoder.latent import LatentAttention
from adapters_jax.finetune.models.decoder.per_layer import PerLayerInput, Stream
from adapters_jax.finetune.models.parts.blocks import extend_nnx, recomputed
from adapters_jax.finetune.models.parts.cache import Cache, Kept, LayerCache
from adapters_jax.finetune.models.parts.functions import ACTIVATIONS, gated, normalize, split_heads
from adapters_jax.finetune.models.parts.relative import Places, alibi
from adapters_jax.finetune.models.parts.rotary import Rotation, rotate
from adapters_jax.methods.places import known_tokens
from adapters_jax.trace.masks import Mask
from adapters_jax.trace.registry import register_attention
from adapters_jax.weights.meshes import split_rows

Hidden = Float[Array, "batch length d"]
Heads = Float[Array, "batch length heads head_dim"]
Seen = Mask | Bool[Array, "#batch 1 #length keys"]
Source = Hidden | tuple[Heads, Heads]


class Context(NamedTuple):
    """What a block reads beside the hidden states.

    Attributes:
        mask: the keys that each query sees; None sees all.
        bias: added to the scores of the self-attention; or the positions of ALiBi.
        source: what the cross-attention attends to, or its keys and values from `read`.
        seen: the mask of these.
    """

    mask: Seen | None = None
    rotation: Rotation | None = None
    bias: Float[Array, "#batch heads length keys"] | Places | None = None
    source: Source | None = None
    seen: Seen | None = None


class RMSNorm(nnx.RMSNorm):
    """RMS normalisation over the last axis, as in flax, with the derivative of `normalize`.

    The factor of each row is `offset + scale`.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        offset: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        init = nnx.initializers.constant(1.0 - offset)
        super().__init__(features, epsilon=epsilon, scale_init=init, rngs=rngs, **types)
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Divides each row of `x` by its root mean square and scales it; takes no mask."""
        scale: Any = self.scale
        x, scale = self.promote_dtype((x, scale[...]), dtype=self.dtype)
        if self.offset:  # in float32, so that 1 + scale keeps all digits of the scale
            scale = self.offset + scale.astype(jnp.promote_types(scale.dtype, jnp.float32))
        return normalize(x, scale, self.epsilon, False).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation over the last axis, as in flax, with the derivative of `normalize`."""

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:  # type: ignore[override]
        """Normalises, scales and, with a bias, shifts each row of `x`; takes no mask."""
        own: Any = [self.scale] if self.bias is None else [self.scale, self.bias]
        x, scale, *bias = self.promote_dtype((x, *(each[...] for each in own)), dtype=self.dtype)
        y = normalize(x, scale, self.epsilon, True)
        return (y + bias[0] if bias else y).astype(x.dtype)


Norm = RMSNorm | LayerNorm


class Parts:
    """Makes the layers of a block, with the settings of a model."""

    def __init__(
        self,
        config: Any,
        attention_fn: Callable[..., Array],
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        self.config, self.attention_fn, self.dtype = config, attention_fn, dtype
        self.rest: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

    def linear(
        self, inputs: int, outputs: int, use_bias: bool = False, factor: float = 1.0
    ) -> nnx.Linear:
        """A linear layer; `factor` multiplies the deviation of its new weights."""
        init = nnx.initializers.normal(self.config.deviation(inputs) * factor)
        return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, **self.rest)

    def to_heads(
        self, heads: int, width: int, biased: bool, factor: float = 1.0
    ) -> nnx.Linear | nnx.LinearGeneral:
        """A projection of hidden states to heads of a width; they may be an axis of its weight."""
        inputs = self.config.hidden_size
        if not self.config.head_axis:
            return self.linear(inputs, heads * width, biased, factor)
        init = nnx.initializers.normal(self.config.deviation(inputs) * factor)
        more = {"use_bias": biased, "kernel_init": init, **self.rest}
        return nnx.LinearGeneral(inputs, (heads, width), **more)

    def norm(self, width: int, offset: float | None = None, epsilon: float | None = None) -> Norm:
        """A norm of this width; `offset` and `epsilon` are the configuration's by default."""
        c = self.config
        epsilon = c.rms_norm_eps if epsilon is None else epsilon
        if c.norm_type == "layer":
            bias = c.norm_bias
            return LayerNorm(width, epsilon=epsilon, use_bias=bias, **self.rest)
        offset = c.norm_offset if offset is None else offset
        return RMSNorm(width, epsilon=epsilon, offset=offset, **self.rest)


class DecoderAttention(nnx.Module):
    """Attention where groups of query heads share a key and a value head.

    `attention_fn` is called as flax's attention modules call theirs, except that the mask may be a
    `Mask` (a model's `attention` of your own gets an array), and with `bias`, `softcap` and `sinks`
    where there are biases or bounds of the scores, and sinks. Query and key are rotated already.
    Key and value are not repeated: their shape is `(batch, length, kv_heads, head_dim)`, and with a
    cache their length is its number of slots.
    """

    def __init__(self, parts: Parts, form: LayerForm = LayerForm()):
        config, width = parts.config, parts.config.hidden_size
        self.head_dim = form.head_width or config.head_width
        self.kv_heads = form.kv_heads or config.kv_heads
        self.heads, self.borrows = config.num_attention_heads, form.borrows
        self.key_is_value = form.key_is_value
        self.value_eps = config.rms_norm_eps if config.value_norm else None
        heads, kv_heads = (n * self.head_dim for n in (config.num_attention_heads, self.kv_heads))
        biased, self.head_axis = config.attention_bias, config.head_axis
        self.gated = config.attention_gate
        queries = config.num_attention_heads, self.head_dim * (1 + self.gated)
        self.query = parts.to_heads(*queries, biased, config.query_init)
        if not self.borrows:
            self.key = parts.to_heads(self.kv_heads, self.head_dim, config.has_key_bias)
        if not (self.borrows or self.key_is_value):
            self.value = parts.to_heads(self.kv_heads, self.head_dim, biased)
        self.output = parts.linear(heads, width, config.has_output_bias)
        self.rotary_interleaved, self.bare = config.rotary_interleaved, form.bare
        self.qk_norm = None if form.bare else config.qk_norm
        self.epsilon = config.rms_norm_eps
        if self.qk_norm in ("head", "projection"):
            by_head = self.qk_norm == "head"
            self.query_norm = parts.norm(self.head_dim if by_head else heads)
            if not self.borrows:
                self.key_norm = parts.norm(self.head_dim if by_head else kv_heads)
        # The factor of queries, by which `attention_fn`, dividing by a root, gets its own scale.
        factor = config.attention_multiplier
        self.scale = 1.0 if factor is None else factor * self.head_dim**0.5
        self.softcap = config.attn_logit_softcapping
        if config.attention_sinks:
            heads = config.num_attention_heads
            self.sinks = nnx.Param(jnp.zeros(heads, parts.rest["param_dtype"]))
        self.attention_fn = parts.attention_fn
        self.dtype = parts.dtype

    def __call__(
        self,
        x: Hidden,
        mask: Seen | None,
        rotation: Rotation | None = None,
        bias: Array | Places | None = None,
        source: Source | None = None,
        cache: LayerCache | None = None,
    ) -> Hidden:
        """Mixes, for each position, the values of the positions that `mask` lets it see.

        Args:
            x: what the queries are computed from.
            mask, rotation, bias: see `Context`.
            source: what it attends to, or keys and values from `read`; by default `x` itself.
            cache: the earlier keys and values.
        """
        query, gate = self.query(x), None
        if self.gated:  # of each head beside its query
            query, gate = jnp.split(split_heads(query, 2 * self.head_dim), 2, axis=-1)
            query = query.reshape(*x.shape[:-1], -1)
        query = self._turned("query", query, rotation)
        if source is None or isinstance(source, tuple):
            pair = self.read(x, rotation) if source is None else source
        else:  # another text than that of the queries
            with known_tokens(mask.tokens if isinstance(mask, Mask) else None):
                pair = self.read(source, rotation)
        key, value = pair if cache is None else cache.extend(*pair)
        if isinstance(bias, Places):  # formed here, where XLA adds it to the scores and keeps none
            bias = alibi(bias, query.shape[-2])
        sinks = self.sinks[...] if hasattr(self, "sinks") else None
        more = {"bias": bias, "softcap": self.softcap, "sinks": sinks}
        mixed = self.attention_fn(
            query if self.scale == 1.0 else query * self.scale,
            key,
            value,
            mask=mask,
            dropout_rng=None,
            dropout_rate=0.0,
            broadcast_dropout=False,
            deterministic=True,
            dtype=self.dtype,
            **{name: x for name, x in more.items() if x is not None},
        )
        mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
        return self.output(mixed.reshape(*x.shape[:-1], -1))

    def read(self, source: Hidden, rotation: Rotation | None = None) -> tuple[Heads, Heads]:
        """The keys and the values of hidden states."""
        keys = self.key(source)
        value = self._split(keys if self.key_is_value else self.value(source))
        if self.value_eps is not None:
            scale = jnp.ones(self.head_dim, jnp.float32)
            value = normalize(value, scale, self.value_eps, False).astype(value.dtype)
        # Without positions, a rotation is a factor of queries alone.
        return self._turned("key", keys, None if self.bare else rotation), value

    def _split(self, y: Array) -> Heads:
        return y if self.head_axis else split_heads(y, self.head_dim)

    def empty_cache(self, batch: int, slots: int, dtype: Dtype) -> Kept:
        """What it keeps before the first token: no keys and values."""
        empty = jnp.zeros((batch, slots, self.kv_heads, self.head_dim), dtype)
        return Kept() if self.borrows else Kept((empty, empty))

    def _turned(self, name: str, y: Hidden, rotation: Rotation | None) -> Heads:
        """Queries or keys, normalised where the configuration says so, and rotated."""
        if self.qk_norm == "projection":
            y = getattr(self, f"{name}_norm")(y)
        y = self._split(y)
        if self.qk_norm == "head":
            y = getattr(self, f"{name}_norm")(y)
        if self.qk_norm == "unit":
            ones = jnp.ones(self.head_dim, jnp.float32)
            y = normalize(y, ones, self.epsilon, False).astype(y.dtype)
        return y if rotation is None else rotate(y, rotation, self.rotary_interleaved)


class KeyIsValueAttention(DecoderAttention):
    """Attention whose key projection computes the values as well."""


register_attention(DecoderAttention, heads="heads")
register_attention(KeyIsValueAttention, value="key", heads="heads")


class DecoderMLP(nnx.Module):
    """The feed-forward: `output(act(gate(x)) * up(x))`, or `output(act(up(x)))` without a gate.

    Without a gate the first layer may have another name than `up`.
    """

    def __init__(self, parts: Parts, inner: int | None = None):
        config = parts.config
        width, biased = config.hidden_size, config.mlp_bias
        inner = inner or config.intermediate_size
        self.first = "gate" if config.mlp_gate else config.mlp_first
        self.gated = config.mlp_gate
        setattr(self, self.first, parts.linear(width, inner, biased))
        if self.gated:
            self.up = parts.linear(width, inner, biased)
        self.output = parts.linear(inner, width, biased)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms each position by itself."""
        products = [getattr(self, name)(x) for name in (self.first, *["up"] * self.gated)]

        def rest(*products: Hidden) -> Hidden:
            act = self.activation
            return self.output(gated(act, *products) if self.gated else act(*products))

        return recomputed(rest, self.output, *products)


class DecoderSum(nnx.Module):
    """The residual sum: the input of a sublayer plus its output.

    It is a module so that it can be an attachment point of adapters.
    """

    def __call__(self, x: Hidden, y: Hidden) -> Hidden:
        """Adds the input `x` and the output `y` of a sublayer."""
        return split_rows(x + y)


class DecoderLayer(nnx.Module):
    """One block: attention, perhaps cross-attention, and feed-forward.

    Their norms are before them, after them or both, or of their sums with the input. In a parallel
    block the feed-forward reads what the attention reads; the sums follow each other all the same.
    """

    def __init__(self, parts: Parts, crosses: bool = False, form: LayerForm = LayerForm()):
        config = parts.config
        placement = config.norm_placement
        self.before, self.after = placement in ("pre", "both"), placement in ("post", "both")
        self.of_sum = placement == "sum"
        self.crosses, self.multiplier = crosses, config.residual_multiplier
        self.parallel = config.parallel

        def add(name: str, make: Callable[[Parts], nnx.Module]) -> None:
            """Makes a sublayer, the norms around it and its residual sum."""
            own = not (name == "mlp" and self.parallel == "shared")
            if (self.before or self.of_sum) and own:
                setattr(self, f"{name}_norm", parts.norm(config.hidden_size))
            setattr(self, name, make(parts))
            if self.after:
                setattr(self, f"{name}_post_norm", parts.norm(config.hidden_size))
            setattr(self, f"{name}_sum", DecoderSum())

        self.pool, self.borrows = form.pool, form.borrows
        kind = KeyIsValueAttention if form.key_is_value else DecoderAttention
        usual: Callable[..., nnx.Module] = partial(kind, form=form)
        mixing = LatentAttention if config.latent else usual
        add("attention", GatedDelta if form.delta else mixing)
        if crosses:
            add("cross_attention", DecoderAttention)
        inner = config.intermediate_size * 2 if form.wide else None
        mixed = bool(config.num_experts) and not form.dense
        self.beside = mixed and config.experts_beside
        add("mlp", _mixture if mixed and not self.beside else partial(DecoderMLP, inner=inner))
        if self.beside:
            self.mixture = _mixture(parts)
            for name in ("mlp_own", "mixture", "mixture_post"):
                setattr(self, f"{name}_norm", parts.norm(config.hidden_size))
        self.reads_input = config.hidden_size_per_layer_input > 0
        if self.reads_input:
            self.per_layer, self.per_layer_sum = PerLayerInput(parts), DecoderSum()
        if config.layer_scalar:
            self.scalar = nnx.Param(jnp.ones(1, parts.rest["param_dtype"]))

    def __call__(self, x: Any, context: Context, cache: LayerCache | None = None) -> Any:
        """Computes the hidden states after the block, or the stream with them."""
        if not isinstance(x, Stream):
            return self._hidden(x, context, cache)
        shared, inputs, pair = dict(x.shared), x.inputs, None
        if self.pool is not None:
            pair = shared.get(self.pool)
            if not self.borrows:
                own: Any = self
                pair = own.attention.read(self._read("attention", x.hidden), context.rotation)
                pair = shared[self.pool] = pair if cache is None else cache.extend(*pair)
            cache = None
        hidden = self._hidden(x.hidden, context, cache, pair)
        if self.reads_input:
            given, *rest = inputs
            hidden, inputs = self.per_layer_sum(hidden, self.per_layer(hidden, given)), tuple(rest)
        if hasattr(self, "scalar"):
            hidden = hidden * self.scalar[...].astype(hidden.dtype)
        return Stream(hidden, shared, inputs)

    def _hidden(
        self,
        x: Hidden,
        context: Context,
        cache: LayerCache | None,
        pair: tuple[Heads, Heads] | None = None,
    ) -> Hidden:
        """The hidden states after all sublayers; `pair` are keys and values that layers share."""
        mask, rotation, bias, source, seen = context
        read = self._read("attention", x)
        given = {} if pair is None else {"source": pair}
        y = self._add("attention", x, read, mask, rotation, bias, cache=cache, **given)
        if self.crosses:
            y = self._add(
                "cross_attention", y, self._read("cross_attention", y), seen, source=source
            )
        if self.parallel != "shared":
            read = self._read("mlp", x if self.parallel else y)
        return self._add("mlp", y, read)

    def empty_cache(self, batch: int, slots: int, dtype: Dtype) -> Kept:
        """What it keeps before the first token, of rows of at most `slots` tokens."""
        attention: Any = self.attention  # type: ignore[attr-defined]
        return attention.empty_cache(batch, slots, dtype)

    def _read(self, name: str, x: Hidden) -> Hidden:
        """What a sublayer reads of hidden states."""
        return getattr(self, f"{name}_norm")(x) if self.before else x

    def _add(self, name: str, x: Hidden, read: Hidden, *args: Any, **options: Any) -> Hidden:
        """The residual sum of hidden states and a sublayer of what it reads."""
        y = getattr(self, name)(read, *args, **options)
        if name == "mlp" and self.beside:
            own: Any = self
            y = own.mlp_own_norm(y)
            y = y + own.mixture_post_norm(self.mixture(own.mixture_norm(x), x))
        y = getattr(self, f"{name}_post_norm")(y) if self.after else y
        y = y if self.multiplier == 1.0 else y * self.multiplier
        x = getattr(self, f"{name}_sum")(x, y)
        return getattr(self, f"{name}_norm")(x) if self.of_sum else x


def _mixture(parts: Parts) -> DecoderMixture:
    """The experts of a layer, with the one that all tokens take."""
    inner = parts.config.shared_expert_intermediate_size
    return DecoderMixture(parts, DecoderMLP(parts, inner) if inner else None)


def empty_cache(layers: Any, length: int, batch: int, slots: int, dtype: Dtype) -> Cache:
    """A cache without tokens for blocks.

    Args:
        layers: from `make_nnx`.
        slots: the largest number of tokens of a row, padding included.
    """
    sizes = batch, slots, dtype
    if isinstance(layers, nnx.List):
        return Cache.empty([layer.empty_cache(*sizes) for layer in layers], batch, slots)
    kept = layers.empty_cache(*sizes)
    kept = jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), kept)
    return Cache.empty(kept, batch, slots)


def extend_layers(
    layers: Any,
    x: Hidden,
    contexts: Sequence[Context],
    kinds: Sequence[int],
    cache: Cache,
    *source: Any,
) -> tuple[Hidden, Cache]:
    """Runs blocks on further tokens, and extends a cache by them.

    Args:
        layers: from `make_nnx`.
        contexts: of each kind of block.
        kinds: the number of each block's kind.
        cache: the cache, after `Cache.reserve` has given the tokens their slots.
        *source: the keys and the values of cross-attentions, in the form of the cache's layers.

    Returns:
        The output of the last block, and the cache with what the blocks keep of the tokens.
    """
    hidden = x.hidden if isinstance(x, Stream) else x
    start = cache.used - hidden.shape[1]  # `reserve` has counted these tokens already

    def step(
        x: Array, layer: Any, context: Context, kept: Kept, *source: Any
    ) -> tuple[Array, Kept]:
        memory = LayerCache(kept, start)
        x = layer(x, context._replace(source=source[0]) if source else context, memory)
        return x, memory.kept

    x, kept = extend_nnx(step, layers, x, contexts, kinds, cache.layers, *source)
    return x, cache._replace(layers=kept)
