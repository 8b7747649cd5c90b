"""LoRA: a low-rank change beside a frozen linear map.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The scale
alpha / sqrt(r) is Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", arXiv:2312.03732.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import registry
from adapters_jax.contraction import Contraction
from adapters_jax.errors import RecipeError
from adapters_jax.methods import base
from adapters_jax.methods.base import Count, Leaf, Leaves, Site
from adapters_jax.targets import as_patterns, matches

# How A starts, given the fan-in and the rank: the paper says Gaussian and gives no deviation.
INITS = {
    "gaussian": lambda fan_in, rank: base.normal(1.0 / math.sqrt(fan_in)),
    "uniform": lambda fan_in, rank: base.uniform(1.0 / math.sqrt(fan_in)),
    "gaussian_rank": lambda fan_in, rank: base.normal(1.0 / rank),
}


def lora_parameters(inputs: int, outputs: int, rank: int) -> int:
    """Parameters of one pair of factors: r(in + out).

    Example:
        >>> lora_parameters(768, 768, 8)
        12288
    """
    return rank * (inputs + outputs)


@dataclass(frozen=True)
class LoRA:
    """Low-rank factors beside the weights of linear layers: `y + scale * B(A(x))`.

    A has the weight's input axes and the rank, B the rank and the weight's output axes: (in, r) and
    (r, out) for a dense layer, (window, in, r) and (r, out) for a convolution, (vocabulary, r) and
    (r, d) for an embedding. B starts at zero and A random; for an embedding A starts at zero and B
    from N(0, 1). The scale is alpha / r. Leaves are float32 and compute in the dtype of y.

    Args:
        targets: patterns of module paths.
        rank: r.
        alpha: None follows the rank, for a scale of 1 (the paper: set alpha to the first r tried).
        dropout: probability of zeroing an entry of the branch's input while training.
        a_init: law of A: "gaussian" has deviation 1/sqrt(in), "uniform" is within 1/sqrt(in) (the
            authors' code and PEFT), "gaussian_rank" has deviation 1/r (PEFT's "gaussian").
        rank_stabilized: scale by alpha / sqrt(r) instead (rsLoRA).
        rank_pattern: other ranks for some targets, a mapping from patterns; first match wins.
        alpha_pattern: other alphas likewise, resolved on their own.

    Raises:
        ValueError: a field out of its range.

    Example:
        >>> lora = LoRA("**/query", rank=8, rank_pattern={"layer_0/**": 4})
        >>> lora.rank_at("layer_0/query"), lora.rank_at("layer_1/query")
        (4, 8)
    """

    name: ClassVar[str] = "lora"
    slot: ClassVar[str] = "lora"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")
    stated: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")

    targets: str | tuple[str, ...]
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    a_init: str = "gaussian"
    rank_stabilized: bool = False
    rank_pattern: Any = ()
    alpha_pattern: Any = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", as_patterns(self.targets, "LoRA"))
        for field in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, field, _pairs(field, getattr(self, field)))
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            base.check_size("LoRA", "rank", rank)
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if alpha is not None:
                base.check_number("LoRA", "alpha", alpha)
        base.check_number("LoRA", "dropout", self.dropout, high=1.0, closed=True)
        base.check_choice("LoRA", "a_init", self.a_init, INITS)

    def fits(self, site: Site) -> bool:
        """Whether the method can attach there: to every linear layer that is known."""
        return site.contraction is not None

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return registry.why_not(module)

    def rank_at(self, path: str) -> int:
        """The rank at one target."""
        return next((r for p, r in self.rank_pattern if matches(p, path)), self.rank)

    def scale_at(self, path: str) -> float:
        """The factor on the branch at one target: alpha / r, or alpha / sqrt(r)."""
        rank = self.rank_at(path)
        alpha = next((a for p, a in self.alpha_pattern if matches(p, path)), self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        """The factors A and B of one weight.

        Raises:
            RecipeError: the rank is more than the weight can hold.
        """
        layer, rank = linear(site), self.rank_at(site.path)
        inputs, outputs = layer.split_shape(site.weight_shape)
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        if rank > min(fan_in, fan_out):
            raise RecipeError(
                f"LoRA: rank {rank} at {site.path!r} exceeds min(in, out) = "
                f"min({fan_in}, {fan_out}) = {min(fan_in, fan_out)}; lower it, here alone "
                f"with rank_pattern={{{site.path!r}: {min(fan_in, fan_out)}}}"
            )
        a = base.zeros if layer.lookup else INITS[self.a_init](fan_in, rank)
        b = base.normal(1.0) if layer.lookup else base.zeros
        return {"a": Leaf((*inputs, rank), a), "b": Leaf((rank, *outputs), b)}

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form r(in + out): r from this recipe, in and out from the base weight."""
        rank = self.rank_at(path)
        copies = len(shapes["a"]) + len(shapes["b"]) - 2 - len(weight)
        fan_in = math.prod(shapes["a"][copies:-1])
        fan_out = math.prod(weight[copies:]) // fan_in
        return Count(
            f"{rank}*({fan_in} + {fan_out})",
            lora_parameters(fan_in, fan_out, rank),
            math.prod(weight[:copies]),
        )

    def merged(self, leaves: Leaves, site: Site, weight: Float[Array, "..."]) -> Array:
        """The weight with the change folded in: summed in float32, cast once to its own dtype."""
        a, b = (leaves[name].astype(jnp.float32) for name in ("a", "b"))
        delta = self.scale_at(site.path) * linear(site).product(a, b)
        return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

    def forward(
        self,
        leaves: Leaves,
        site: Site,
        x: Any,
        y: Float[Array, "..."],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "..."]:
        """The adapted output.

        Args:
            leaves: the factors by name.
            site: the linear layer they are attached to.
            x: the layer's input, of whatever form the layer takes.
            y: the layer's output.
            key: for dropout while training; None in evaluation.

        Returns:
            An array like y, of its dtype.
        """
        layer = linear(site)
        a = leaves["a"].astype(y.dtype)
        b = (leaves["b"] * self.scale_at(site.path)).astype(y.dtype)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x = base.dropout(x.astype(y.dtype), self.dropout, key)
        return y + layer.expand(layer.project(x, a), b)


def _pairs(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from patterns, or its items, as pairs."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) or not all(map(_is_pair, items)):
        raise ValueError(f"LoRA: {field}={value!r}, wanted a mapping such as {{'layer_0/**': 4}}")
    for pattern, _ in items:
        as_patterns(pattern, f"LoRA {field}")
    return tuple((pattern, number) for pattern, number in items)


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)


def linear(site: Site) -> Contraction:
    """The contraction of a site; raises RecipeError where it is not a known linear layer."""
    if site.contraction is None:
        raise RecipeError(f"LoRA cannot attach to {site.path!r}: it is not a known linear layer")
    return site.contraction
