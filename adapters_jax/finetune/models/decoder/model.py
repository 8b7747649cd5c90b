"""The decoder (flax.nnx): one model for all families; their configurations tell them apart.

Rotary or learned positions or ALiBi, grouped-query attention, a feed-forward with or without a
gate, RMS or layer norms.

Reference: Touvron et al., LLaMA (2023), https://arxiv.org/abs/2302.13971; see `families` for the
others.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from adapters_jax.errors import UserError, check_size
from adapters_jax.files.names import Keys
from adapters_jax.finetune.models.decoder.config import DecoderConfig
from adapters_jax.finetune.models.decoder.keys import attention_keys
from adapters_jax.finetune.models.decoder.layers import (
    Context,
    DecoderLayer,
    Parts,
    Seen,
    empty_cache,
    extend_layers,
)
from adapters_jax.finetune.models.decoder.per_layer import PerLayerInputs, Stream
from adapters_jax.finetune.models.parts.attention import Choice, attention_function
from adapters_jax.finetune.models.parts.blocks import check_remat, distinct, make_nnx, run_nnx
from adapters_jax.finetune.models.parts.cache import Cache
from adapters_jax.finetune.models.parts.functions import capped
from adapters_jax.finetune.models.parts.relative import Places
from adapters_jax.finetune.models.parts.rotary import LayerKind, Rotation, rotation, warmed
from adapters_jax.finetune.models.parts.tokens import (
    Embed,
    check_tokens,
    chunks,
    token_positions,
)
from adapters_jax.methods.places import known_tokens
from adapters_jax.trace.masks import Mask
from adapters_jax.weights.meshes import split_rows


class Decoder(nnx.Module):
    """The language model.

    Args:
        config: the model's shape.
        dtype: the computation dtype; None means that of inputs and parameters together.
        param_dtype: the dtype of the parameters.
        attention: "auto", "dense" or "flash", or the attention function of every layer; see
            `attention_function` and `DecoderAttention`.
        remat: True recomputes each block in the backward pass instead of storing its activations;
            the name of a policy in `blocks.POLICIES` stores some of them.
        scan: whether `layers` is one block, with leaves stacked on their first axis, instead of a
            list of blocks.
        only: the numbers of the layers to make; all by default.
        rngs: the random numbers of the initial parameters.

    Raises:
        UserError: `attention` or `remat` is not one of the choices, or layers of unlike modules are
            to be scanned.

    Example:
        >>> config = DecoderConfig(vocab_size=16, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> def logits(ids):
        ...     return Decoder(config, rngs=nnx.Rngs(0))(ids)
        >>> nnx.eval_shape(logits, jnp.array([[1, 2, 3]])).shape
        (1, 3, 16)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        attention: Choice = "auto",
        remat: bool | str = False,
        scan: bool = False,
        only: Sequence[int] | None = None,
        rngs: nnx.Rngs,
    ):
        check_remat(remat)
        init = nnx.initializers.normal(config.initializer_range)
        attention_fn = attention_function(attention)
        self.config = config
        self.dtype = dtype
        self.remat = remat
        self.scan = scan

        def parts(rngs: nnx.Rngs) -> Parts:
            return Parts(config, attention_fn, dtype, param_dtype, rngs)

        width, own = config.hidden_size, parts(rngs)
        inner = config.embedding_size or width
        embed: Callable[..., Embed] = partial(Embed, embedding_init=init, **own.rest)
        self.embeddings = embed(config.vocab_size, inner)
        self.projects = inner != width
        if self.projects:
            self.embedding_projection = own.linear(inner, width)
        if config.learned_positions:
            positions = config.max_position_embeddings + config.position_offset
            self.position_embeddings = embed(positions, width)
        if config.embedding_norm:
            self.embedding_norm = own.norm(width)
        numbers = range(config.num_hidden_layers) if only is None else only
        self.layers = self._layers(parts, numbers, rngs)
        if config.hidden_size_per_layer_input:
            self.per_layer = PerLayerInputs(own)
        if config.norm_placement != "sum":
            self.norm = own.norm(width)
        if self.projects:
            self.head_projection = own.linear(width, inner)
        self._make_head(own, inner)

    def _make_head(self, parts: Parts, width: int) -> None:
        """Makes what reads the hidden states, which have this width."""
        config = self.config
        if not config.tie_word_embeddings:
            self.head = parts.linear(width, config.vocab_size, config.head_bias)

    def _layers(
        self, parts: Callable[[nnx.Rngs], Parts], numbers: Sequence[int], rngs: nnx.Rngs
    ) -> Any:
        """The blocks with these numbers."""
        config, forms = self.config, self.config.layer_forms
        if not self.scan:
            return nnx.List(DecoderLayer(parts(rngs), form=forms[number]) for number in numbers)
        if len(set(forms)) > 1:
            kinds = [*dict.fromkeys(config.layer_types or ())]
            kinds += ["with and without experts"] * (len({form.dense for form in forms}) > 1)
            raise UserError(
                f"scan=True: the layers of a {config.model_type} have unlike modules "
                f"({', '.join(kinds)}), "
                "expected those of one kind; load it with scan=False."
            )
        length = len(numbers)
        return make_nnx(lambda rngs: DecoderLayer(parts(rngs), form=forms[0]), length, True, rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Computes float32 logits of the next token; the arguments are those of `hidden`."""
        return self.logits(self.hidden(input_ids, attention_mask, positions, segments))

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Computes float32 logits of hidden states."""
        tied = self.config.tie_word_embeddings
        logits = self.embeddings.attend(hidden) if tied else self.head(hidden)
        logits = logits.astype(jnp.float32)
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        return capped(logits, self.config.final_logit_softcapping)

    def hidden(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length d"]:
        """Computes the hidden states after the last norm.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens and 0 for padding, of any dtype.
            positions: those of the rotation or of the learned embeddings; by default the tokens of
                each text count from 0.
            segments: the number of each token's text, if a row holds several texts; a token sees
                only its own text.
        """
        check_tokens(input_ids, attention_mask, self.longest)
        if positions is None:
            positions = token_positions(input_ids, attention_mask, segments)
        length = input_ids.shape[1]
        masks = self._masks(attention_mask, segments, positions)
        contexts = self._contexts(masks, positions, length, positions)
        x = self._embed(input_ids, positions)
        kinds = distinct(self.config.layer_kinds)[1]
        x = self._stream(x, input_ids)
        with known_tokens(attention_mask, segments):
            x = run_nnx(self.layers, x, contexts, kinds, remat=self.remat)
        return self._last(x)

    def _stream(self, x: Float[Array, "batch length d"], input_ids: Array) -> Any:
        """What goes from block to block, at the first one."""
        config = self.config
        if config.hidden_size_per_layer_input:
            return Stream(x, {}, self.per_layer(input_ids, x))
        return Stream(x, {}, ()) if config.num_kv_shared_layers or config.layer_scalar else x

    @property
    def longest(self) -> int | None:
        """The largest number of tokens of a row, if positions are learned; otherwise None."""
        config = self.config
        return config.max_position_embeddings if config.learned_positions else None

    @property
    def attention_keys(self) -> tuple[Keys, ...] | str:
        """How the keys of each layer turn by position; see `keys.attention_keys`."""
        return attention_keys(self.config)

    def _embed(
        self, input_ids: Int[Array, "batch length"], positions: Int[Array, "#batch length"]
    ) -> Float[Array, "batch length d"]:
        x, factor = split_rows(self.embeddings(input_ids)), self.config.embedding_multiplier
        x = x if factor == 1.0 else x * factor
        x = self.embedding_projection(x) if self.projects else x
        x = self.embedding_norm(x) if self.config.embedding_norm else x
        if self.longest is None:
            return x
        places = jnp.maximum(positions, 0) + self.config.position_offset  # padding may be before 0
        return x + self.position_embeddings(places)

    def _last(self, x: Any) -> Float[Array, "batch length inner"]:
        """What follows the last block, before the head."""
        x = x.hidden if isinstance(x, Stream) else x
        x = x if self.config.norm_placement == "sum" else self.norm(x)
        return self.head_projection(x) if self.projects else x

    def _masks(
        self,
        attention_mask: Num[Array, "batch length"] | None,
        segments: Int[Array, "batch length"] | None,
        positions: Int[Array, "#batch length"],
    ) -> list[Seen]:
        """The mask of each kind of layer, without a cache."""
        limits = [(kind.window, kind.chunk) for kind in distinct(self.config.layer_kinds)[0]]
        length, masks = positions.shape[1], []
        for window, chunk in limits:
            texts = segments if chunk is None else chunks(positions, segments, chunk)
            masks.append(Mask.of(attention_mask, texts, causal=True, window=window))
        if self.scan and len(set(limits)) > 1:  # one program for all, which reads its own array
            return [mask.dense(length, length) for mask in masks]
        return [*masks]

    def _contexts(
        self,
        masks: Sequence[Seen],
        positions: Int[Array, "#batch length"],
        longest: int,
        keys: Int[Array, "#batch keys"],
    ) -> list[Context]:
        """The context of each kind of layer.

        Args:
            positions: those of the rotation.
            longest: the length of the text, see `RopeScaling.frequencies`.
        """

        def turned(kind: LayerKind) -> Rotation | None:
            if kind.linear or not self.config.rotates:
                return None
            rotated = kind.rotated or self.config.rotated
            if kind.warming:
                return warmed(positions, self.config.head_width, kind.warming)
            return rotation(positions, rotated, kind.rope_theta, kind.rope_scaling, longest)

        kinds, _ = distinct(self.config.layer_kinds)
        places = Places(positions, keys) if self.config.alibi else None
        both = zip(masks, kinds, strict=True)
        return [Context(mask, turned(kind), places) for mask, kind in both]

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache for `batch` rows of at most `slots` tokens, padding included; see `extend`."""
        dtype = self.dtype or self.embeddings.embedding.dtype
        return empty_cache(self.layers, self.config.num_hidden_layers, batch, slots, dtype)

    def extend(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"],
        cache: Cache,
        longest: int | None = None,
    ) -> tuple[Float[Array, "batch length d"], Cache]:
        """Computes the hidden states of further tokens, and extends the cache by them.

        Args:
            input_ids: token ids; the earlier ones are in the cache.
            attention_mask: 1 for tokens and 0 for padding.
            cache: from `empty_cache` or an earlier call. It must have room for the tokens; only the
                first call can check that.
            longest: the length of the text, on which some rotations depend; by default the slots of
                the cache. All calls for one cache need the same.

        Returns:
            The hidden states after the last norm, and the extended cache.
        """
        check_tokens(input_ids, attention_mask)
        cache, positions, mask = cache.reserve(attention_mask)
        own, theirs = positions[:, None, :, None], cache.positions[:, None, None, :]
        kinds, numbers = distinct(self.config.layer_kinds)
        tokens, seen = Mask.of(attention_mask), mask

        def of(kind: LayerKind) -> Seen:
            if kind.linear:
                return tokens
            mask = seen if kind.window is None else seen & (own - theirs < kind.window)
            return (
                mask if kind.chunk is None else mask & (own // kind.chunk == theirs // kind.chunk)
            )

        masks = [of(kind) for kind in kinds]
        longest = cache.held.shape[1] if longest is None else longest
        contexts = self._contexts(masks, positions, longest, cache.positions)
        x = self._stream(self._embed(input_ids, positions), input_ids)
        with known_tokens(attention_mask, before=positions):
            x, cache = extend_layers(self.layers, x, contexts, numbers, cache)
        return self._last(x), cache


class DecoderClassifier(Decoder):
    """A decoder whose `score` reads the state of each row's last token, instead of a head.

    Args:
        num_labels: the width of the score; 1 for regression.
        options: those of `Decoder`.

    Raises:
        UserError: `num_labels` is no whole number of at least 1.

    Example:
        >>> config = DecoderConfig(vocab_size=16, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> def logits(ids):
        ...     return DecoderClassifier(config, 3, rngs=nnx.Rngs(0))(ids)
        >>> nnx.eval_shape(logits, jnp.array([[1, 2, 3]])).shape
        (1, 3)
    """

    def __init__(self, config: DecoderConfig, num_labels: int, **options: Any):
        check_size("DecoderClassifier", "num_labels", num_labels)
        self.num_labels = num_labels
        super().__init__(config, **options)

    def _make_head(self, parts: Parts, width: int) -> None:
        self.score = parts.linear(width, self.num_labels)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"],
        attention_mask: Num[Array, "batch length"] | None = None,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch labels"]:
        """Computes float32 logits of the labels; the arguments are those of `hidden`."""
        hidden = self.hidden(input_ids, attention_mask, positions, segments)
        if attention_mask is None:
            return self.logits(hidden[:, -1])
        # Padding may be on either side.
        last = jnp.argmax(jnp.arange(input_ids.shape[1]) * (attention_mask != 0), axis=1)
        return self.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def logits(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch labels"]:
        """Computes float32 logits of hidden states."""
        return self.score(hidden).astype(jnp.float32)


def abstract_decoder(
    config: DecoderConfig, *, scan: bool = False, num_labels: int | None = None, **options: Any
) -> Decoder:
    """Returns a decoder, or a classifier, without arrays; the options are those of `Decoder`."""
    make: Any = Decoder if num_labels is None else partial(DecoderClassifier, num_labels=num_labels)
    make = partial(make, config, **options)
    if scan:
        return nnx.eval_shape(lambda: make(scan=True, rngs=nnx.Rngs(0)))
    # One block of each form is traced, since flax's time for n grows as n squared.
    forms, numbers = distinct(config.layer_forms)
    first = [numbers.index(form) for form in range(len(forms))]
    model = nnx.eval_shape(lambda: make(only=first, rngs=nnx.Rngs(0)))
    parts: list[Any] = [nnx.split(layer) for layer in model.layers]
    model.layers = nnx.List(nnx.merge(*parts[number], copy=True) for number in numbers)
    return model
