"""LoRA: a low-rank change of a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The scale
alpha / sqrt(r) is Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", arXiv:2312.03732. The
initialisation from principal components is Meng et al. 2024, "PiSSA", arXiv:2404.02948.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import checks
from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import arrays
from adapters_jax.methods.base import (
    AttachmentPoint,
    Count,
    Frozen,
    Leaf,
    Leaves,
    Method,
    contraction_of,
    nothing,
)
from adapters_jax.targets import as_patterns, matches
from adapters_jax.weights import linear

# Initialisers of A, given the fan-in and the rank; the paper's is Gaussian, without a deviation.
INITS = {
    "gaussian": lambda fan_in, rank: arrays.normal(1.0 / math.sqrt(fan_in)),
    "uniform": lambda fan_in, rank: arrays.uniform(1.0 / math.sqrt(fan_in)),
    "gaussian_rank": lambda fan_in, rank: arrays.normal(1.0 / rank),
    "pissa": lambda fan_in, rank: arrays.zeros,  # `LoRA.start` computes it from the weight
}


def lora_parameters(inputs: int, outputs: int, rank: int) -> int:
    """Parameters of one pair of factors: r(in + out).

    Example:
        >>> lora_parameters(768, 768, 8)
        12288
    """
    return rank * (inputs + outputs)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank factors beside the weights of linear layers: `y + scale * B(A(x))`.

    A has the weight's input axes and the rank, B the rank and the weight's output axes: (in, r) and
    (r, out) for a dense layer, (window, in, r) and (r, out) for a convolution, (vocabulary, r) and
    (r, d) for an embedding. B starts at zero and A random; for an embedding A starts at zero and B
    from N(0, 1). The scale is alpha / r. Leaves are float32 and are cast to the dtype of y.

    Args:
        targets: patterns of module paths.
        rank: r.
        alpha: None means r, for a scale of 1 (the paper sets alpha to the first r tried).
        dropout: probability of zeroing an entry of the branch's input while training.
        a_init: initialiser of A: "gaussian" has deviation 1/sqrt(in); "uniform" is within
            1/sqrt(in) (the authors' code and PEFT); "gaussian_rank" has deviation 1/r (PEFT's
            "gaussian"); "pissa" sets A and B to the weight's r principal components and
            subtracts them from the frozen weight: the output starts as the base's, up to rounding.
        rank_stabilized: scale by alpha / sqrt(r) instead (rsLoRA).
        rank_pattern: other ranks for some targets, a mapping from patterns; the first match counts.
        alpha_pattern: likewise other alphas, matched independently of the ranks.
        slices: adapt only these ranges of a dense layer's outputs, such as the queries and values
            of a fused projection: `((0, 768), (1536, 2304))`. B has as many columns.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> lora = LoRA("**/query", rank=8, rank_pattern={"layer_0/**": 4})
        >>> lora.rank_at("layer_0/query"), lora.rank_at("layer_1/query")
        (4, 8)
    """

    name: ClassVar[str] = "lora"
    slot: ClassVar[str] = "lora"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")  # type: ignore[misc]
    stated: ClassVar[tuple[str, ...]] = ("targets", "rank", "alpha")
    pattern_fields: ClassVar[Mapping[str, str]] = {"rank_pattern": "rank", "alpha_pattern": "alpha"}
    weight_axes: ClassVar[Mapping[str, Literal["input", "output"]]] = {"a": "input", "b": "output"}

    targets: str | tuple[str, ...]
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    a_init: str = "gaussian"
    rank_stabilized: bool = False
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    slices: Any = ()

    def __post_init__(self) -> None:
        owner = type(self).__name__
        super().__post_init__()
        for field in self.pattern_fields:
            object.__setattr__(self, field, pairs(field, getattr(self, field)))
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            checks.check_size(owner, "rank", rank)
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if alpha is not None:
                checks.check_number(owner, "alpha", alpha)
        checks.check_number(owner, "dropout", self.dropout, high=1.0, closed=True)
        checks.check_choice(owner, "a_init", self.a_init, INITS)
        checks.check_flag(owner, "rank_stabilized", self.rank_stabilized)
        object.__setattr__(self, "slices", ranges(self.slices))
        if self.slices and self.from_weight:
            raise UserError(f"{owner}: slices are unsupported with a_init='pissa' and with DoRA")

    @property
    def from_weight(self) -> Literal["", "reads", "changes"]:
        """PiSSA subtracts its initial factors from the weight."""
        return "changes" if self.a_init == "pissa" else ""

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the module is a known linear layer."""
        return point.contraction is not None

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        return linear.why_not(module)

    def rank_at(self, path: str) -> int:
        """The rank at one target."""
        return next((r for p, r in self.rank_pattern if matches(p, path)), self.rank)

    def scale_at(self, path: str) -> float:
        """The factor on the branch at one target: alpha / r, or alpha / sqrt(r)."""
        rank = self.rank_at(path)
        alpha = next((a for p, a in self.alpha_pattern if matches(p, path)), self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors A and B of one weight.

        Raises:
            RecipeError: the rank exceeds the weight's fan-in or fan-out, or slices do not fit it.
        """
        layer, rank = contraction_of(point), self.rank_at(point.path)
        inputs, outputs = layer.split_shape(point.weight_shape)
        if self.slices:
            outputs = self._sliced(point, outputs)
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        if rank > min(fan_in, fan_out):
            raise RecipeError(
                f"{type(self).__name__}: rank {rank} at {point.path!r} exceeds min(in, out) = "
                f"min({fan_in}, {fan_out}) = {min(fan_in, fan_out)}; lower it, here alone "
                f"with rank_pattern={{{point.path!r}: {min(fan_in, fan_out)}}}"
            )
        a = arrays.zeros if layer.lookup else INITS[self.a_init](fan_in, rank)
        b = arrays.normal(1.0) if layer.lookup else arrays.zeros
        return {"a": Leaf((*inputs, rank), a), "b": Leaf((rank, *outputs), b)}

    def _sliced(self, point: AttachmentPoint, outputs: tuple[int, ...]) -> tuple[int]:
        """The total width of the slices; raises RecipeError where they do not fit."""
        if (
            len(outputs) != 1
            or not contraction_of(point).trailing
            or self.slices[-1][1] > outputs[0]
        ):
            raise RecipeError(
                f"LoRA: slices {self.slices} do not fit {point.path!r}, whose outputs are "
                f"{outputs}; give ranges of a dense layer's last axis"
            )
        return (sum(stop - start for start, stop in self.slices),)

    def start(
        self, leaves: Leaves, point: AttachmentPoint, weight: Float[Array, "..."]
    ) -> tuple[dict[str, Array], Array]:
        """The initial leaves given the weight, and the weight to keep: W - scale A B for PiSSA.

        The decomposition W = U S V^T gives A = U_r sqrt(S_r / scale), B = sqrt(S_r / scale) V_r^T.
        """
        if self.a_init != "pissa":
            return dict(leaves), weight
        layer, rank, scale = (
            contraction_of(point),
            self.rank_at(point.path),
            self.scale_at(point.path),
        )
        matrix = layer.as_matrix(weight.astype(jnp.float32))
        u, s, v = jnp.linalg.svd(matrix, full_matrices=False)
        root = jnp.sqrt(s[:rank] / scale)
        factors = {
            "a": (u[:, :rank] * root).reshape(leaves["a"].shape),
            "b": (root[:, None] * v[:rank]).reshape(leaves["b"].shape),
        }
        rest = weight.astype(jnp.float32) - scale * layer.product(factors["a"], factors["b"])
        return {**leaves, **factors}, rest.astype(weight.dtype)

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...]
    ) -> Count:
        """The closed form r(in + out): r is the recipe's, in and out the base weight's."""
        rank = self.rank_at(path)
        copies = len(shapes["a"]) + len(shapes["b"]) - 2 - len(weight)
        fan_in = math.prod(shapes["a"][copies:-1])
        fan_out = sum(b - a for a, b in self.slices) or math.prod(weight[copies:]) // fan_in
        return Count(
            f"{rank}*({fan_in} + {fan_out})",
            lora_parameters(fan_in, fan_out, rank),
            math.prod(weight[:copies]),
        )

    def merged(
        self, leaves: Leaves, point: AttachmentPoint, own: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The weight plus the change, added in float32 and cast once to the weight's dtype."""
        name = contraction_of(point).weight
        whole = own[name].astype(jnp.float32) + self.delta(leaves, point, own[name])
        return {name: whole.astype(own[name].dtype)}

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        return {**leaves, "b": -leaves["b"]}

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """A and scale * B; raises RecipeError where the change is not their product alone."""
        if self.slices or self.from_weight:
            raise RecipeError(
                f"combine: {type(self).__name__} at {path!r} has slices or a_init='pissa', which "
                "combine does not support"
            )
        a, b = (jnp.asarray(leaves[name], jnp.float32) for name in ("a", "b"))
        return a, self.scale_at(path) * b

    def delta(self, leaves: Leaves, point: AttachmentPoint, weight: Float[Array, "..."]) -> Array:
        """The change of the weight, scale * A B, in float32 and in the weight's layout."""
        a, b = (leaves[name].astype(jnp.float32) for name in ("a", "b"))
        change = self.scale_at(point.path) * contraction_of(point).product(a, b)
        return self._spread(change, weight.shape[-1]) if self.slices else change

    def _spread(self, part: Float[Array, "... part"], width: int) -> Float[Array, "... width"]:
        """The slices' outputs at their own columns among `width`; zeros at the others."""
        columns = [i for start, stop in self.slices for i in range(start, stop)]
        whole = jnp.zeros((*part.shape[:-1], width), part.dtype)
        return whole.at[..., jnp.asarray(columns)].set(part)

    def forward(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        x: Any,
        y: Float[Array, "..."],
        key: PRNGKeyArray | None = None,
        frozen: Frozen = nothing,
    ) -> Float[Array, "..."]:
        """The adapted output.

        Args:
            leaves: the factors by name.
            point: the linear layer that they adapt.
            x: the layer's input, of whatever form the layer takes.
            y: the layer's output.
            key: for dropout while training; None in evaluation.
            frozen: the layer's own parameters by name.

        Returns:
            An array of the shape and dtype of y.
        """
        return y + self.branch(leaves, point, x, y, key)

    def branch(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Array, key: PRNGKeyArray | None
    ) -> Float[Array, "..."]:
        """scale * B(A(x)), of the shape and dtype of y."""
        layer = contraction_of(point)
        a = leaves["a"].astype(y.dtype)
        b = (leaves["b"] * self.scale_at(point.path)).astype(y.dtype)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x = arrays.dropout(x.astype(y.dtype), self.dropout, key)
        change = layer.expand(layer.project(x, a), b)
        return self._spread(change, y.shape[-1]) if self.slices else change


def pairs(field: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """A mapping from patterns, or its items, as checked pairs."""
    items = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, tuple | list) or not all(map(_is_pair, items)):
        raise UserError(
            f"LoRA: {field}={checks.shown(value)}, expected a mapping such as {{'layer_0/**': 4}}"
        )
    for pattern, _ in items:
        as_patterns(pattern, f"LoRA {field}")
    return tuple((pattern, number) for pattern, number in items)


def ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """Checked ranges of whole numbers: in order, not empty, not overlapping."""
    if not isinstance(value, tuple | list) or not all(map(_is_range, value)):
        valid = False
    else:
        ends = [end for each in value for end in each]
        valid = ends == sorted(ends)
    if not valid:
        raise UserError(
            f"LoRA: slices={checks.shown(value)}, expected ranges in order such as ((0, 768),)"
        )
    return tuple((start, stop) for start, stop in value)


def _is_range(item: Any) -> bool:
    pair = isinstance(item, tuple | list) and len(item) == 2 and all(type(x) is int for x in item)
    return pair and 0 <= item[0] < item[1] < checks.LARGEST


def _is_pair(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str)
