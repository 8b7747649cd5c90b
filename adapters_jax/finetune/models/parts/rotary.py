"""Rotary positions: each pair of features of a query or key is rotated by its position's angle.

A model that was trained on short texts reads longer ones if its frequencies are scaled;
`RopeScaling` says how, under the names that the `rope_scaling` of a `config.json` uses.

Reference: Su et al., RoFormer (2021), https://arxiv.org/abs/2104.09864. Scaling: linear, Chen et
al. (2023), https://arxiv.org/abs/2306.15595; yarn, Peng et al. (2023),
https://arxiv.org/abs/2309.00071; longrope, Ding et al. (2024), https://arxiv.org/abs/2402.13753;
llama3, Dubey et al. (2024), https://arxiv.org/abs/2407.21783.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from adapters_jax.errors import UserError, check_choice
from adapters_jax.finetune.base_files.typed_settings import check_settings

Frequencies = Float64[np.ndarray, " half"]
REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": (*("factor", "original_max_position_embeddings"), *("short_factor", "long_factor")),
    "llama3": (
        *("factor", "original_max_position_embeddings"),
        *("low_freq_factor", "high_freq_factor"),
    ),
    "proportional": ("factor",),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are scaled.

    Attributes:
        rope_type: one of `linear`, `dynamic`, `yarn`, `longrope`, `llama3` and `proportional`.
        factor: how many times longer than those of the training texts may be.
        original_max_position_embeddings: the length of the training texts.
        low_freq_factor: llama3; frequencies with fewer turns than this in a training text are
            divided by `factor`.
        high_freq_factor: llama3; frequencies with more turns than this stay as they are.
        beta_fast: yarn; frequencies with more turns than this stay as they are.
        beta_slow: yarn; frequencies with fewer turns than this are divided by `factor`.
        truncate: yarn; whether the bounds between them are rounded to whole features.
        attention_factor: yarn and longrope; the factor of rotated queries and keys. None means that
            of the paper.
        mscale: yarn; with `mscale_all_dim` the factor is a quotient.
        mscale_all_dim: see `mscale`.
        short_factor: longrope; divides each frequency in texts that are not longer than the
            training's.
        long_factor: longrope; divides each frequency in longer ones.
        proportion: proportional; the part of the pairs that turn, those of the highest frequencies.

    Raises:
        UserError: the type is not supported, or a value that it needs is absent.

    Example:
        >>> RopeScaling("linear", factor=4.0).frequencies(4, 100.0, length=8)[0].tolist()
        [0.25, 0.025]
    """

    rope_type: str
    factor: float = 0.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    proportion: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rope_scaling", "rope_type", self.rope_type, REQUIRED)
        check_settings("rope_scaling", self)
        absent = [name for name in REQUIRED[self.rope_type] if not getattr(self, name)]
        if absent:
            raise UserError(
                f"rope_scaling of type {self.rope_type!r} lacks {', '.join(absent)}; add what the "
                "model was trained with."
            )

    def frequencies(self, features: int, theta: float, length: int) -> tuple[Frequencies, float]:
        """The frequency of each pair of features, and the factor of rotated queries and keys.

        Args:
            features: the number of a head's features that are rotated.
            theta: the base of the frequencies.
            length: the number of positions of the text; `dynamic` and `longrope` depend on it.
        """
        plain = frequencies(features, theta)
        match self.rope_type:
            case "linear":
                return plain / self.factor, 1.0
            case "dynamic":
                most = self.original_max_position_embeddings
                stretch = self.factor * max(length, most) / most - (self.factor - 1)
                return frequencies(features, theta * stretch ** (features / (features - 2))), 1.0
            case "yarn":
                return self._yarn(plain, theta), self._yarn_factor()
            case "proportional":
                turning = np.arange(len(plain)) < int(self.proportion * features // 2)
                return plain * turning / self.factor, 1.0
            case "longrope":
                return self._longrope(plain, length), self._longrope_factor()
            case _:
                return self._llama3(plain), 1.0

    def _llama3(self, plain: Frequencies) -> Frequencies:
        # How often each pair turns in a text of the training's length.
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = turns >= low if low == high else np.clip((turns - low) / (high - low), 0, 1)
        return plain * ((1 - kept) / self.factor + kept)

    def _yarn(self, plain: Frequencies, theta: float) -> Frequencies:
        length, half = self.original_max_position_embeddings, len(plain)

        def pair_with(turns: float) -> float:
            return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        high += 0.001 if low == high else 0
        divided = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        return plain * (divided / self.factor + 1 - divided)

    def _yarn_factor(self) -> float:
        def scale(by: float = 1.0) -> float:
            return 0.1 * by * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale()

    def _longrope(self, plain: Frequencies, length: int) -> Frequencies:
        long = length > self.original_max_position_embeddings
        factors = np.array(self.long_factor if long else self.short_factor, np.float64)
        if factors.shape != plain.shape:
            raise UserError(
                f"rope_scaling has {len(factors)} {'long' if long else 'short'} factors, expected "
                f"{len(plain)}, one for each pair of a head's rotated features."
            )
        return plain / factors

    def _longrope_factor(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )


class LayerKind(NamedTuple):
    """What tells the attention of a layer from that of others.

    Attributes:
        window: the number of tokens that a token sees to a side, itself included; None sees all.
        rope_theta: the base of the rotary frequencies; None rotates nothing.
        rope_scaling: how these frequencies are scaled.
        linear: whether it has no softmax, and so neither window nor rotation.
        chunk: the number of tokens of a chunk; a token sees nothing outside of its chunk. None sees
            all.
        warming: of a layer without rotation, the two numbers by which `warmed` grows.
        rotated: the number of a head's features that are rotated; None has the configuration's.
    """

    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    linear: bool = False
    chunk: int | None = None
    warming: tuple[int, float] | None = None
    rotated: int | None = None


def frequencies(features: int, theta: float) -> Frequencies:
    """The frequency of each pair of features, in radians a position."""
    return theta ** -(np.arange(0, features, 2) / features)


class Rotation(NamedTuple):
    """The rotation of each position: cosine and sine of the angle of each pair of features."""

    cos: Float[Array, "#batch length half"]
    sin: Float[Array, "#batch length half"]


def rotation(
    positions: Int[Array, "#batch length"],
    features: int,
    theta: float | None,
    scaling: RopeScaling | None = None,
    length: int = 0,
) -> Rotation:
    """Computes the rotation of each position, in float32.

    Args:
        features: the number of a head's features that are rotated.
        theta: the base of the frequencies; None rotates nothing.
        length: see `RopeScaling.frequencies`.

    Returns:
        Cosines and sines, times the scaling's factor of queries and keys.
    """
    # Layers that do not rotate may share a scan with others, which need arrays of the same shapes.
    if theta is None:
        ones = jnp.ones((*positions.shape, features // 2), jnp.float32)
        return Rotation(ones, 0 * ones)
    turns, factor = frequencies(features, theta), 1.0
    if scaling:
        turns, factor = scaling.frequencies(features, theta, length)
    # In float32, since bfloat16 cannot tell positions beyond 256 apart.
    angles = positions[:, :, None] * jnp.asarray(turns, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Rotation(cos, sin) if factor == 1.0 else Rotation(cos * factor, sin * factor)


def warmed(
    positions: Int[Array, "#batch length"], features: int, warming: tuple[int, float]
) -> Rotation:
    """A factor of queries that grows with their position, in the form of a rotation by no angle.

    Args:
        features: the number of a head's features.
        warming: the number of positions after which it grows, and by how much.

    Reference: Nakanishi, Scalable-softmax is superior for attention (2025),
        https://arxiv.org/abs/2501.19399
    """
    every, by = warming
    factor = 1.0 + by * jnp.log1p(jnp.floor((positions + 1.0) / every))
    cos = jnp.broadcast_to(factor[..., None], (*positions.shape, features // 2))
    return Rotation(cos, 0 * cos)


def rotate(
    x: Float[Array, "batch length heads head_dim"], by: Rotation, interleaved: bool = False
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates the pairs (feature i of the first half, feature i of the second half).

    The halves are those of the features that the rotation has; further features stay as they are.
    With `interleaved`, the pairs are of neighbours, (feature 2 i, feature 2 i + 1).

    Example:
        >>> quarter = rotation(jnp.array([[1]]), 2, 1.0)
        >>> rotate(jnp.array([[[[1.0, 0.0, 5.0]]]]), quarter).round(3).ravel().tolist()
        [0.5400000214576721, 0.8410000205039978, 5.0]
    """
    cos, sin = (part[:, :, None] for part in by)
    turning, rest = jnp.split(x.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    if interleaved:
        first, second = turning[..., ::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        parts = [jnp.stack(parts, axis=-1).reshape(turning.shape)]
    whole = jnp.concatenate([*parts, rest] if rest.size else parts, axis=-1)
    return whole.astype(x.dtype)
