"""Generation with a decoder: one pass over the prompts, then one pass a token with a cache.

The whole of it is one jitted function. The prompts are read by the decoder itself, or by the
encoder before it.

Reference: Holtzman et al., The Curious Case of Neural Text Degeneration (top-p sampling, 2020),
https://arxiv.org/abs/1904.09751
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray, Shaped

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.parts.tokens import check_tokens
from adapters_jax.methods.invocation import from_invocation
from adapters_jax.methods.mixed import Rows


class CachedModel(Protocol):
    """The methods that `generate` needs of an `nnx.Module`; the cache is any pytree.

    A model that reads the prompts by `extend` also has `empty_cache(batch, slots)`, a cache for
    rows of at most `slots` tokens, padding included. One that reads them with an encoder has
    `read_prompts(input_ids, attention_mask, slots)`: the tokens with which the decoder begins,
    their mask, and a cache for `slots` tokens. One whose encoder reads something else has
    `listen(source, slots)`, such a cache.
    """

    def extend(self, input_ids: Array, attention_mask: Array, cache: Any) -> tuple[Array, Any]:
        """Hidden states `(batch, length, d)` of further tokens, and the cache extended by them."""

    def logits(self, hidden: Array) -> Array:
        """Float32 logits `(batch, vocab)` of hidden states `(batch, d)`."""


class Generated(NamedTuple):
    """The result of `generate`.

    Attributes:
        ids: the new tokens, with zeros after the end of a row.
        lengths: the number of new tokens of each row, without the stop token. A row without a stop
            token has `max_new_tokens`.
    """

    ids: Int[Array, "batch new"]
    lengths: Int[Array, " batch"]


class _Sampling(NamedTuple):
    """How to choose tokens. The values are arrays, so that new ones compile nothing."""

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    key: PRNGKeyArray
    stop: Int[Array, " stops"]


class _Begin(NamedTuple):
    """What a generation begins with: the prompts, and what is known of them."""

    prompts: Int[Array, "batch length"]
    mask: Bool[Array, "batch length"]
    source: Float[Array, "batch ..."] | None
    cache: Any
    invoked: Bool[Array, "batch length"] | None


class _Loop(NamedTuple):
    step: Int[Array, ""]
    last: Int[Array, " batch"]
    done: Bool[Array, " batch"]
    made: Generated
    cache: Any


def generate(
    model: nnx.Module,
    input_ids: Int[Array, "batch length"],
    attention_mask: Num[Array, "batch length"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: PRNGKeyArray | None = None,
    stop: Sequence[int] = (),
    adapters: Rows | None = None,
    source: Float[Array, "batch ..."] | None = None,
    invoked: Bool[Array, "batch length"] | None = None,
    cache: Any = None,
) -> Generated:
    """Continues or, with an encoder, answers each prompt of a batch, independently of the others.

    It compiles once for each combination of model structure, shape of the prompts, `max_new_tokens`
    and number of stop tokens. The model runs in evaluation mode, without dropout, and stays as it
    was.

    Args:
        model: a decoder such as `models.decoder.Decoder`, or an encoder-decoder such as
            `models.t5.T5`, adapted or not; see `CachedModel`.
        input_ids: the prompts, padded on either side.
        attention_mask: 1 for tokens and 0 for padding; by default there is no padding.
        max_new_tokens: the largest number of tokens to generate for a row.
        temperature: 0 takes the likeliest token; any other value divides the logits.
        top_p: sample among the fewest tokens that have this probability together.
        key: the random key for sampling; row i draws from `jax.random.fold_in(key, i)`, whatever
            the other rows are.
        stop: tokens that end a row.
        adapters: which adapter of a bank each row has, where the model is the bank's.
        source: what the encoder of a `models.whisper.Whisper` reads, its log-mel features; the
            prompts are then the tokens with which the decoder begins.
        invoked: of a bank's model with an `ActivatedLoRA`, the tokens that each row's adapter acts
            on, as `aj.invoked` gives them; other models find the invocation in the prompts. New
            tokens are as the last one of their prompt.
        cache: what was read before the prompts, as `extend` returns it, with slots for the prompts
            and the new tokens: with an `ActivatedLoRA`, also what its base read.

    Returns:
        The new tokens, and their number in each row.

    Raises:
        UserError: an argument is out of range, a prompt is empty, the key is missing, or a prompt
            and its new tokens are longer than the model's longest text; the message lists
            everything that is wrong.
        TypeError: the model is not a decoder.

    Example:
        >>> from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=16, hidden_size=8, intermediate_size=12,
        ...     num_hidden_layers=1, num_attention_heads=2)
        >>> decoder = Decoder(config, rngs=nnx.Rngs(0))
        >>> ids, lengths = generate(decoder, jnp.array([[3, 1, 4]]), max_new_tokens=2)
        >>> ids.shape, lengths.tolist()
        ((1, 2), [2])
    """
    _check_model(model)
    if hasattr(model, "listen") != (source is not None):
        raise UserError(
            f"generate: {type(model).__name__} "
            + ("needs a source, its features" if source is None else "has no encoder for a source")
        )
    if attention_mask is None:
        attention_mask = jnp.ones(input_ids.shape, bool)
    check_tokens(input_ids, attention_mask)
    _check(attention_mask, max_new_tokens, temperature, top_p, key)
    held = 0 if cache is None else np.asarray(cache.held).sum(1)
    check_length(model, (np.asarray(attention_mask) != 0).sum(1) + held, max_new_tokens)
    _check_cache(model, cache, input_ids.shape, max_new_tokens)
    acts = _where_invoked(model, input_ids, attention_mask, adapters, invoked)
    sampling = _Sampling(
        jnp.float32(temperature),
        jnp.float32(top_p),
        jax.random.key(0) if key is None else key,  # unused, but of the same program
        jnp.asarray(stop, jnp.int32),
    )
    prompts, mask = jnp.asarray(input_ids, jnp.int32), attention_mask != 0
    begin = _Begin(prompts, mask, source, cache, acts)
    return _generate(*nnx.split(model), begin, sampling, adapters, max_new_tokens)


def _check_cache(model: Any, cache: Any, shape: tuple[int, ...], new: int) -> None:
    """Raises UserError where a cache has other rows, or too few slots."""
    if cache is None:
        return
    if not hasattr(model, "empty_cache"):
        raise UserError(f"generate: {type(model).__name__} reads prompts by its encoder; no cache=")
    rows, slots = cache.held.shape
    free = slots - int(cache.used)
    if rows != shape[0] or free < shape[1] + new:
        raise UserError(
            f"generate: the cache has {rows} rows with {free} free slots, expected {shape[0]} with "
            f"{shape[1] + new}, for the prompts and {new} new tokens"
        )


def _where_invoked(
    model: Any, ids: Array, mask: Array, adapters: Rows | None, invoked: Any
) -> Bool[Array, "batch length"] | None:
    """The tokens of the prompts that an `ActivatedLoRA` acts on; None for a model without one."""
    methods = vars(model).get("adapter_recipe", ())
    if not any(method.gated for method in methods):
        if invoked is not None:
            raise UserError("generate: invoked= is for a model with an ActivatedLoRA")
        return None
    if not hasattr(model, "empty_cache"):
        raise UserError(
            f"generate: {type(model).__name__} reads prompts by its encoder, and an ActivatedLoRA "
            "is invoked in the text that a decoder continues"
        )
    if adapters is not None and invoked is None:
        raise UserError(
            "generate: the rows of a bank have invocations of their own; write "
            "invoked=aj.invoked(input_ids, [(49152, 1598), None, ...]), None for other adapters"
        )
    if invoked is None:  # padding is a text by itself
        return from_invocation(methods, ids, mask)["invoked"]
    found = jnp.asarray(invoked)
    if found.shape != ids.shape or found.dtype != bool:
        raise UserError(
            f"generate: invoked is {found.dtype}{list(found.shape)}, expected bool{[*ids.shape]}"
        )
    return found


def _check_model(model: Any) -> None:
    begins = any(hasattr(model, name) for name in ("empty_cache", "read_prompts", "listen"))
    able = begins and hasattr(model, "extend") and hasattr(model, "logits")
    if not able or not isinstance(model, nnx.Module):
        raise TypeError(
            f"generate: {type(model).__name__} is not a decoder; expected an nnx module with the "
            "methods of adapters_jax.finetune.models.generation.CachedModel, such as Decoder or T5."
        )


def check_length(model: Any, lengths: Sequence[int], new_tokens: int) -> None:
    """Checks that a model has positions for its prompts and their new tokens.

    Args:
        model: a decoder, whose `config.longest` is the limit; without one, there is none.
        lengths: the number of tokens of each prompt.
        new_tokens: the largest number of tokens to generate.

    Raises:
        UserError: the longest prompt and its new tokens are more.
    """
    longest = getattr(getattr(model, "config", None), "longest", None)
    row = int(np.argmax(lengths))
    prompt = int(lengths[row])
    if longest is None or prompt + new_tokens <= longest:
        return
    room = longest - prompt
    fix = f"generate at most {room} new tokens, or shorten it" if room > 0 else "shorten it"
    raise UserError(
        f"prompt {row + 1} has {prompt} tokens, which are {prompt + new_tokens} with {new_tokens} "
        f"new ones, but the model reads at most {longest}; {fix}."
    )


def _check(mask: Array, max_new_tokens: int, temperature: float, top_p: float, key: Any) -> None:
    """Raises one `UserError` that lists everything wrong with the arguments."""
    empty = np.flatnonzero(~(np.asarray(mask) != 0).any(1)).tolist()
    wrong = []
    if mask.shape[0] == 0 or empty:
        rows = f"row {', '.join(map(str, empty[:8]))}" if empty else "a batch without rows"
        wrong.append(f"a prompt needs a token, but {rows} has none; begin it with the bos token")
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens <= 0:
        wrong.append(f"max_new_tokens must be a whole number, at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        wrong.append(f"temperature must be 0 (greedy) or greater, got {temperature}")
    if not 0 < top_p <= 1:
        wrong.append(f"top_p must be above 0 and at most 1 (all tokens), got {top_p}")
    if temperature > 0 and key is None:
        wrong.append(f"sampling at temperature {temperature} needs a key: key=jax.random.key(0)")
    if wrong:
        raise UserError(f"generate: {'; '.join(wrong)}.")


@partial(jax.jit, static_argnums=(0, 5))
def _generate(
    graphdef: Any, state: Any, begin: _Begin, sampling: _Sampling, adapters: Rows | None, new: int
) -> Generated:
    given: dict[str, Rows] = {}
    if adapters is not None:  # each token writes into the cache that the one before left
        given["adapters"] = adapters.replace(grouped=True)  # type: ignore[attr-defined]

    def run(ids: Array, mask: Array, cache: Any, acts: Array | None) -> tuple[Array, Any]:
        """The cache extended by tokens, and the logits after the last token of each row."""
        model = _model(graphdef, state)
        hidden, cache = model.extend(ids, mask, cache, **given, **_invoked(acts))
        hidden = _last(hidden, mask)[:, 0]
        acts = None if acts is None else _last(acts[..., None], mask)[:, 0, 0]
        return model.logits(hidden, **given, **_invoked(acts)), cache

    # The pass over the prompts is outside of the loop, since its shapes differ from a token's.
    prompts, batch = begin.prompts, len(begin.prompts)
    ones, acts = jnp.ones((batch, 1), bool), begin.invoked
    logits, cache = run(*_begin(_model(graphdef, state), begin, new, given), acts)
    after = None if acts is None else _last(acts[..., None], begin.mask)[..., 0]
    nothing = Generated(jnp.zeros((batch, new), jnp.int32), jnp.zeros(batch, jnp.int32))
    start = _Loop(jnp.int32(0), prompts[:, 0], jnp.zeros(batch, bool), nothing, cache)

    def step(loop: _Loop) -> _Loop:
        logits, cache = run(loop.last[:, None], ones, loop.cache, after)
        return _record(loop._replace(cache=cache), logits, sampling)

    def goes_on(loop: _Loop) -> Array:
        return (loop.step < new) & ~loop.done.all()

    return jax.lax.while_loop(goes_on, step, _record(start, logits, sampling)).made


def _last(x: Shaped[Array, "batch length d"], mask: Array) -> Shaped[Array, "batch 1 d"]:
    """What belongs to the last token of each row."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(x, last[:, None, None], 1)


def _invoked(acts: Array | None) -> dict[str, Array]:
    return {} if acts is None else {"invoked": acts}


def _begin(model: Any, begin: _Begin, new: int, given: dict[str, Rows]) -> tuple[Array, Array, Any]:
    """The first tokens that the decoder reads, their mask, and the cache before them."""
    prompts, mask, source = begin.prompts, begin.mask, begin.source
    if begin.cache is not None:
        return prompts, mask, begin.cache
    if hasattr(model, "read_prompts"):
        return model.read_prompts(prompts, mask, new + 1, **given)
    batch, length = prompts.shape
    if source is not None:
        return prompts, mask, model.listen(source, length + new, **given)
    return prompts, mask, model.empty_cache(batch, length + new)


def _model(graphdef: Any, state: Any) -> Any:
    model = nnx.merge(graphdef, state, copy=True)  # Variables of this trace
    model.eval()
    return model


def _record(loop: _Loop, logits: Float[Array, "batch vocab"], sampling: _Sampling) -> _Loop:
    """Chooses a token for every row and records it; rows that are done get none."""
    token = _choose(logits, loop.step, sampling)
    done = loop.done | (token[:, None] == sampling.stop[None]).any(1)
    ids = loop.made.ids.at[:, loop.step].set(jnp.where(done, 0, token))
    made = Generated(ids, loop.made.lengths + ~done)
    return loop._replace(step=loop.step + 1, last=token, done=done, made=made)


def _choose(
    logits: Float[Array, "batch vocab"], step: Int[Array, ""], sampling: _Sampling
) -> Int[Array, " batch"]:
    def sample() -> Array:
        scaled = logits / sampling.temperature
        kept = jax.lax.cond(
            sampling.top_p < 1, lambda: nucleus(scaled, sampling.top_p), lambda: scaled
        )
        return jax.vmap(draw)(jnp.arange(logits.shape[0]), kept).astype(jnp.int32)

    def draw(row: Array, kept: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(sampling.key, row), step)
        return jax.random.categorical(key, kept)

    # A branch, not a select: a greedy step does not pay for sorting the vocabulary.
    return jax.lax.cond(
        sampling.temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    )


def nucleus(
    logits: Float[Array, "*batch vocab"], top_p: float | Float[Array, ""]
) -> Float[Array, "*batch vocab"]:
    """Keeps the logits of the fewest tokens that have probability `top_p` together.

    The others become minus infinity. Tokens as likely as the least likely one kept are kept too.

    Example:
        >>> nucleus(jnp.array([1.0, 3.0, 2.0]), 0.9).tolist()
        [-inf, 3.0, 2.0]
    """
    falling = jnp.sort(logits, axis=-1, descending=True)
    probability = jax.nn.softmax(falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    least = jnp.where(before < top_p, falling, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)
