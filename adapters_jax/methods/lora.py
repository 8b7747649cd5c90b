"""LoRA: a low-rank change of a frozen weight.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. The scale
alpha / sqrt(r) is Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", arXiv:2312.03732. The
initialisation from principal components is Meng et al. 2024, "PiSSA", arXiv:2404.02948, the
orthonormal one Büyükakyüz 2024, "OLoRA", arXiv:2406.01775; that of a quantised weight Li et al.
2023, "LoftQ", arXiv:2310.08659; that from activations Paischer et al. 2024, "EVA",
arXiv:2410.07170.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import LARGEST, RecipeError, UserError, shown
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Shape, Shapes, Weight
from adapters_jax.methods.base import AttachmentPoint, Count, Leaf, Leaves, Method
from adapters_jax.methods.calibration import Inputs
from adapters_jax.methods.ranked import Ranked, sizes_of
from adapters_jax.methods.settings import choice, flag, number, size
from adapters_jax.targets import matches
from adapters_jax.trace.inputs import is_abstract
from adapters_jax.weights.axes import Axes, fitting
from adapters_jax.weights.changes import Change, LowRank
from adapters_jax.weights.factors import Factor

# A fan-in counts all input axes: of a convolution its window times its channels.
# Initialisers of A, given the fan-in and the rank; the paper's is Gaussian, without a deviation.
INITS = {
    "gaussian": lambda fan_in, rank: arrays.normal(1.0 / math.sqrt(fan_in)),
    "uniform": lambda fan_in, rank: arrays.uniform(1.0 / math.sqrt(fan_in)),
    "gaussian_rank": lambda fan_in, rank: arrays.normal(1.0 / rank),
    # `LoRA.start` computes these from the weight or its inputs, or `LoRA.quantized` does.
    **dict.fromkeys(("pissa", "olora", "loftq", "loftq_5", "eva"), lambda *_: arrays.zeros),
}
_ROUNDS = {"loftq": 1, "loftq_5": 5}  # PEFT's default, and the number in the paper
# Starts whose base is another one than the original.
CHANGING = ("pissa", "olora", *_ROUNDS)


def lora_parameters(inputs: int, outputs: int, rank: int) -> int:
    """Parameters of one pair of factors: r(in + out).

    Args:
        inputs: size of the weight's input axes.
        outputs: size of its output axes.
        rank: r.

    Example:
        >>> lora_parameters(768, 768, 8)
        12288
    """
    return rank * (inputs + outputs)


@dataclass(frozen=True)
class LoRA(Ranked):
    """Low-rank factors of weights: whatever reads W sees `W + scale * A B`.

    A has the weight's input axes and the rank, B the rank and the weight's output axes: (in, r) and
    (r, out) for a dense layer, (window, in, r) and (r, out) for a convolution, (vocabulary, r) and
    (r, d) for an embedding. Both have the axes of stacked layers and experts, since each of these
    has its own pair: (experts, in, r) and (experts, r, out). B starts at zero and A random; for an
    embedding A starts at zero and B from N(0, 1). The scale is alpha / r. Leaves are float32 and
    are cast to the dtype of the weight's input.

    Where the weight meets an input in a product, a convolution or a lookup, this is computed as
    `x W + scale * (x A) B`; where the model does something else with it, the sum is formed.

    Args:
        targets: patterns of modules, or of leaves.
        rank: r.
        alpha: None means r, for a scale of 1 (the paper sets alpha to the first r tried).
        dropout: probability of zeroing an entry of the product's input while training; a lookup,
            and a sum that is formed, have no input to zero, and so no dropout. Calls of one module
            in one pass of a linen model (as of a layer that ALBERT repeats) zero the same entries.
        a_init: initialiser of A: "gaussian" has deviation 1/sqrt(in); "uniform" is within
            1/sqrt(in) (the authors' code and PEFT); "gaussian_rank" has deviation 1/r (PEFT's
            "gaussian"); "pissa" sets A and B to the weight's r principal components and
            subtracts them from the frozen weight: the output starts as the base's, up to rounding;
            "olora" does so with the first r columns and rows of the weight's QR decomposition, so
            that B has orthonormal rows. "loftq" is for a model that is quantised once it is
            adapted: `aj.quantize` sets A and B to the principal components of what it rounds away,
            W - Q(W), in one round; "loftq_5" in five, and each quantises W - scale A B. Until
            then both are zero, and do not train. "eva" sets A to the r directions along which the
            weight's inputs vary most, which `aj.calibrate` finds.
        rank_stabilized: scale by alpha / sqrt(r) instead (rsLoRA).
        rank_pattern: other ranks for some targets, a mapping from patterns; the first match counts.
            A rank above min(in, out), as some files of PEFT have it, has to be one of these.
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

    kind: ClassVar[str] = "lora"
    slot: ClassVar[str] = "lora"
    paper: ClassVar[str] = "2106.09685"
    leaf_names: ClassVar[tuple[str, ...]] = ("a", "b")  # type: ignore[misc]
    size_fields: ClassVar[tuple[str, ...]] = (
        *("rank", "alpha", "rank_stabilized", "rank_pattern", "alpha_pattern"),
        *("a_init", "dropout"),
    )

    targets: str | tuple[str, ...]
    rank: int = size(8)
    alpha: float | None = number(None)
    dropout: float = number(0.0, high=1.0, closed=True)
    a_init: str = choice("gaussian", INITS)
    rank_stabilized: bool = flag(False)
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    slices: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "slices", ranges(self.slices))
        if self.slices and self.from_weight:
            raise UserError(
                f"{type(self).__name__}: slices={shown(self.slices)}, unsupported with "
                f"a_init={' or '.join(map(repr, CHANGING))} and with DoRA; write slices=(), which "
                "changes the whole weight"
            )

    @property
    def from_weight(self) -> Literal["", "reads", "changes"]:
        """PiSSA and OLoRA subtract their initial factors from the weight, LoftQ quantises it."""
        return "changes" if self.a_init in CHANGING else ""

    @property
    def from_inputs(self) -> bool:
        """EVA's A has the principal directions of the inputs."""
        return self.a_init == "eva"

    @property
    def other_starts(self) -> str:
        """The starts that leave the weight as it is."""
        return " or ".join(f"a_init={name!r}" for name in INITS if name not in CHANGING)

    def divisor(self, rank: int) -> float:
        """r, or its root where the rank is stabilised."""
        return math.sqrt(rank) if self.rank_stabilized else rank

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The factors A and B of one weight.

        Raises:
            RecipeError: the rank exceeds the weight's fan-in or fan-out, and no pattern sets it, or
                slices do not fit the weight.
        """
        axes, rank, shape = point.axes, self.rank_at(point.path), point.weight_shape
        fan_in, fan_out, _ = axes.sizes(shape)
        b_shape = axes.b_shape(shape, rank)
        if self.slices:
            fan_out = self._sliced(point)
            b_shape = (*b_shape[:-1], fan_out)
        # A product of a higher rank has no more freedom than one at min(in, out), only more
        # parameters, so such a rank is a mistake, unless it is set for this target.
        if rank > min(fan_in, fan_out) and not self._may_exceed(point.path):
            raise RecipeError(
                f"{type(self).__name__}: rank {rank} at {point.path!r} exceeds min(in, out) = "
                f"min({fan_in}, {fan_out}) = {min(fan_in, fan_out)}; lower it, here alone "
                f"with rank_pattern={{{point.path!r}: {min(fan_in, fan_out)}}}"
            )
        # One factor at zero makes the start exact, the other one at random gives it a gradient. In
        # a lookup A is the table, which PEFT leaves at zero.
        a = arrays.zeros if axes.lookup else INITS[self.a_init](fan_in, rank)
        b = arrays.normal(1.0) if axes.lookup and self.a_init not in _ROUNDS else arrays.zeros
        return {"a": Leaf(axes.a_shape(shape, rank), a), "b": Leaf(b_shape, b)}

    def _may_exceed(self, path: str) -> bool:
        """Whether a pattern sets the rank, and the factors do not start from the weight's own."""
        own = self.a_init not in CHANGING and not self.from_inputs
        return own and any(matches(pattern, path) for pattern, _ in self.rank_pattern)

    def _sliced(self, point: AttachmentPoint) -> int:
        """The total width of the slices; raises RecipeError where they do not fit."""
        outputs = tuple(point.weight_shape[i] for i in point.axes.outputs)
        if len(outputs) != 1 or self.slices[-1][1] > outputs[0]:
            raise RecipeError(
                f"LoRA: slices {self.slices} do not fit {point.path!r}, whose outputs are "
                f"{outputs}; give ranges of a dense layer's last axis"
            )
        return sum(stop - start for start, stop in self.slices)

    def start(
        self, leaves: Leaves, point: AttachmentPoint, weight: Weight, inputs: Inputs | None = None
    ) -> tuple[dict[str, Array], Array]:
        """The initial leaves given the weight, and the weight to keep: W - scale A B for PiSSA."""
        if inputs is not None:
            a = inputs.first(self.rank_at(point.path), point.path)
            return {**leaves, "a": a.reshape(leaves["a"].shape)}, weight
        if self.a_init not in ("pissa", "olora"):
            return dict(leaves), weight
        axes, rank, scale = point.axes, self.rank_at(point.path), self.scale_at(point.path)
        # jax has no SVD in half precision, and W - scale A B would lose its last bits in it.
        matrix = axes.as_matrix(weight.astype(jnp.float32))
        if self.a_init == "pissa":
            a, b, _ = arrays.nearest_factors(matrix, rank, scale)
        else:
            # Of the weight with its outputs first, as in the authors' code, and without the scale.
            q, r = jnp.linalg.qr(matrix.mT)
            a, b = r[..., :rank, :].mT, q[..., :rank].mT
        # By default a TPU multiplies float32 in bfloat16, whose error the weight would keep.
        product = scale * jnp.matmul(a, b, precision="highest")
        rest = weight.astype(jnp.float32) - axes.from_matrix(product, weight.shape)
        factors = {"a": a.reshape(leaves["a"].shape), "b": b.reshape(leaves["b"].shape)}
        return {**leaves, **factors}, rest.astype(weight.dtype)

    def quantized(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        weight: Weight,
        quantize: Callable[[Weight], Any] | None,
    ) -> tuple[dict[str, Array], Any]:
        """LoftQ's leaves and quantised weight; leaves that were trained stay as they are."""
        if self.a_init not in _ROUNDS:
            return super().quantized(leaves, point, weight, quantize)
        if quantize is None:
            raise RecipeError(
                f"{type(self).__name__} at {point.path!r} has a_init={self.a_init!r}, and its "
                "weight is not among those that are quantised; add it to the targets of "
                f"aj.quantize, or write {self.other_starts}"
            )
        if is_abstract(weight):
            return dict(leaves), quantize(weight)
        axes, rank, scale = point.axes, self.rank_at(point.path), self.scale_at(point.path)
        whole = axes.as_matrix(weight.astype(jnp.float32))
        product = jnp.zeros_like(whole)
        for _ in range(_ROUNDS[self.a_init]):
            stored = quantize(axes.from_matrix(whole - product, weight.shape))
            error = whole - axes.as_matrix(stored.unbox().astype(jnp.float32))
            a, b, _ = arrays.nearest_factors(error, rank, scale)
            product = scale * jnp.matmul(a, b, precision="highest")
        # New leaves are zeros, and have stayed so. Those of a file are loaded onto the float base,
        # and the same rounds then give the base that they were trained on.
        new = ~(jnp.any(leaves["a"]) | jnp.any(leaves["b"]))
        made = {name: x.reshape(leaves[name].shape) for name, x in (("a", a), ("b", b))}
        return {**leaves, **{n: jnp.where(new, x, leaves[n]) for n, x in made.items()}}, stored

    def unready(self, leaves: Leaves) -> str:
        """LoftQ's factors are both zero, and so without a gradient, until the base is quantised."""
        if self.a_init not in _ROUNDS or any(jnp.any(x) for x in leaves.values()):
            return ""
        return (
            f"its a_init={self.a_init!r} starts where the base is quantised; write model = "
            f"aj.quantize(model, ...) before, or {self.other_starts}"
        )

    def infer(self, shapes: Shapes, weight: Shape, path: str) -> Axes | None:
        """The roles of the weight's axes by the shapes of A and B, which has slices of outputs."""
        own = functools.partial(self.weight_axes, path=path)
        return fitting(shapes, weight, own, ("b",) if self.slices else ())

    def weight_axes(self, axes: Axes, path: str) -> dict[str, tuple[int, ...]]:
        """The weight's axes of A and B; `RANK` marks the one that the weight does not have."""
        return {"a": axes.a, "b": axes.b}

    def count(self, path: str, shapes: Shapes, weight: Shape) -> Count:
        """The closed form r(in + out): r is the recipe's, in and out the base weight's."""
        rank = self.rank_at(path)
        fan_in, fan_out, copies = sizes_of(shapes["a"], shapes["b"], weight)
        fan_out = sum(stop - start for start, stop in self.slices) or fan_out
        parameters = lora_parameters(fan_in, fan_out, rank)
        return Count(f"{rank}*({fan_in} + {fan_out})", parameters, copies)

    def inverse(self, leaves: Leaves, point: AttachmentPoint) -> Leaves:
        """Leaves whose change has the opposite sign."""
        return {**leaves, "b": -leaves["b"]}

    def size(self, leaves: Leaves) -> int:
        """The rank."""
        return leaves["a"].shape[-1]

    def fitted(self, leaves: Leaves, path: str, whole: Method) -> dict[str, Array]:
        """The same change at the scale of `whole`, whose ratio goes into B."""
        # Either factor could take the ratio; B does, so that A stays as it is in the file.
        ratio = self.scale_at(path) / whole.scale_at(path)  # type: ignore[attr-defined]
        return {**leaves, "b": leaves["b"] * ratio}

    def factors(self, leaves: Leaves, path: str) -> tuple[Array, Array]:
        """A and scale * B; raises RecipeError where the change is not their product alone."""
        if self.slices or self.from_weight:
            raise RecipeError(
                f"combine: {type(self).__name__} at {path!r} has slices or a_init={self.a_init!r}, "
                "which combine does not support"
            )
        a, b = (jnp.asarray(leaves[name], jnp.float32) for name in ("a", "b"))
        return a, self.scale_at(path) * b

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """The low-rank change of the weight, one for each slice."""
        axes = point.axes
        a, b, scale = Factor(leaves["a"], axes.a), leaves["b"], self.scale_at(point.path)
        if not self.slices:
            whole = LowRank(a, Factor(b, axes.b), None, self.dropout, key, scale)
            return {point.weight: (whole,)}
        # jnp.split takes where parts end, without the end of the last one.
        ends = list(itertools.accumulate(stop - start for start, stop in self.slices))[:-1]
        parts, (output,) = jnp.split(b, ends, axis=-1), axes.outputs
        return {
            point.weight: tuple(
                LowRank(a, Factor(part, axes.b), (output, start), self.dropout, key, scale)
                for part, (start, _) in zip(parts, self.slices, strict=True)
            )
        }


def ranges(value: Any) -> tuple[tuple[int, int], ...]:
    """Checked ranges of whole numbers: in order, not empty, not overlapping."""
    if not isinstance(value, tuple | list) or not all(map(_is_range, value)):
        valid = False
    else:
        ends = [end for each in value for end in each]
        valid = ends == sorted(ends)
    if not valid:
        raise UserError(
            f"LoRA: slices={shown(value)}, expected ranges in order such as ((0, 768),)"
        )
    return tuple((start, stop) for start, stop in value)


def _is_range(item: Any) -> bool:
    pair = isinstance(item, tuple | list) and len(item) == 2 and all(type(x) is int for x in item)
    return pair and 0 <= item[0] < item[1] < LARGEST
