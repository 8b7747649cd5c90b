"""Compacter: a bottleneck whose projections are sums of Kronecker products.

Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647.
The sums are those of Zhang et al. 2021, "Beyond Fully-Connected Layers with Quaternions:
Parameterization of Hypercomplex Multiplications with 1/n Parameters", arXiv:2102.08597.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.base import Count, Leaf, Leaves
from adapters_jax.methods.bottleneck import Bottleneck
from adapters_jax.methods.settings import choice, flag, number, size

SIDES = ("down", "up")


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """Bottleneck adapters whose kernels are `sum_i kron(A_i, s_i t_i)`, i from 1 to n.

    All but the kernels is as in `Bottleneck`. The rules A_i are (n, n), by default the same for
    both projections of all modules of the entry: they are stored once, at the top of the tree. Of
    a kernel (d, m), s_i is (d/n, r) and t_i is (r, m/n). The kernels are formed in float32.

    Args:
        targets, bottleneck_dim, reduction_factor, placement, scale: as in `Bottleneck`.
        activation, dropout, norm_before, norm_after, output: likewise.
        init_std: of the rules at the start, see `rule_init`.
        phm_dim: n, which divides the width of the output and that of the bottleneck.
        phm_rank: r.
        full: whether whole (d/n, m/n) matrices stand in place of the products `s_i t_i`.
        shared_rule: whether all modules share the rules; else each projection has its own.
        factored_rule: whether each A_i is a product of an (n, 1) and a (1, n).
        train_rule: whether the rules train.
        shared_weights: whether all modules share s and t as well, so that all are as wide.
        bias: whether the projections have biases.
        rule_init: the rules start "normal", of deviation `init_std`, or "uniform" within it. s and
            t start as in Glorot and Bengio 2010, normal, and the biases at zero.

    Raises:
        UserError: a field is out of its range, or both or none of the width fields are given.
        RecipeError: modules would have nothing of their own.

    Example:
        >>> from adapters_jax.methods import AttachmentPoint
        >>> leaves = Compacter("**/output", 8).leaves(AttachmentPoint("output", "x", width=16))
        >>> {name: leaf.shape for name, leaf in leaves.items() if "down_weight" in name}
        {'down_weight_left': (4, 4, 1), 'down_weight_right': (4, 1, 2)}
        >>> leaves["down_bias"].shape, leaves["rule"].shape
        ((4, 2), (4, 4, 4))
    """

    kind: ClassVar[str] = "compacter"
    slot: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "2106.04647"
    size_fields: ClassVar[tuple[str, ...]] = (*Bottleneck.size_fields, "rule_init")
    linear_in: ClassVar[tuple[str, ...]] = ("up_weight", "up_weight_right", "up_bias")

    init_std: float = number(1e-4, closed=True)
    phm_dim: int = size(4)
    phm_rank: int = size(1)
    full: bool = flag(False)
    shared_rule: bool = flag(True)
    factored_rule: bool = flag(False)
    train_rule: bool = flag(True)
    shared_weights: bool = flag(False)
    bias: bool = flag(True)
    rule_init: Literal["normal", "uniform"] = choice("normal", ("normal", "uniform"))

    def __post_init__(self) -> None:
        if self.shared_weights and self.shared_rule and not (self.bias or self.norms):
            raise RecipeError(
                "Compacter: with shared_weights=True, shared_rule=True and bias=False no module "
                "has an array of its own; set one of them otherwise"
            )
        super().__post_init__()

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the arrays of the rules."""
        every = ["rule"] if self.shared_rule else [f"{side}_rule" for side in SIDES]
        return tuple(x for name in every for x in _parts(name, self.factored_rule))

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the arrays that the kernels are made of beside the rules."""
        return tuple(x for side in SIDES for x in _parts(f"{side}_weight", not self.full))

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the arrays of its projections."""
        biases = [f"{side}_bias" for side in SIDES if self.bias]
        return (*self.weights, *biases, *self.rules)

    @property
    def shared_leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the arrays that all modules share."""
        shared = self.weights if self.shared_weights else ()
        return (*shared, *self.rules) if self.shared_rule else shared

    @property
    def frozen_leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the arrays that do not train."""
        return () if self.train_rule else self.rules

    def projection_leaves(self, path: str, d: int, m: int) -> dict[str, Leaf]:
        """The arrays of the projections.

        Raises:
            RecipeError: n does not divide both widths.
        """
        n = self.phm_dim
        if d % n or m % n:
            raise RecipeError(
                f"Compacter: at {path!r} the output is {d} wide and the bottleneck {m}, which "
                f"phm_dim={n} does not divide; choose another phm_dim or width"
            )
        shapes = self._shapes(d, m)
        return {name: Leaf(shape, self._init(name, shape)) for name, shape in shapes.items()}

    def _init(self, name: str, shape: tuple[int, ...]) -> arrays.Initializer:
        """The initialiser of an array of the projections."""
        if name.endswith("bias"):
            return arrays.zeros
        if name in self.rules:
            start = arrays.normal if self.rule_init == "normal" else arrays.uniform
            return start(self.init_std)
        return arrays.normal(math.sqrt(2 / (shape[-2] + shape[-1])))

    def _shapes(self, d: int, m: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of the projections between the widths d and m."""
        n, r = self.phm_dim, self.phm_rank
        every: dict[str, tuple[int, ...]] = dict.fromkeys(self.rules, (n, n, n))
        every |= {name: (n, n, 1) for name in self.rules if name.endswith("left")}
        every |= {name: (n, 1, n) for name in self.rules if name.endswith("right")}
        for side, a, b in (("down", d // n, m // n), ("up", m // n, d // n)):
            # The bias has two axes since the kernel's columns are n blocks: a bank pads each one.
            every |= {f"{side}_weight": (n, a, b), f"{side}_bias": (n, b)}
            every |= {f"{side}_weight_left": (n, a, r), f"{side}_weight_right": (n, r, b)}
        return {name: every[name] for name in self.projections}

    def count(
        self, path: str, shapes: Mapping[str, tuple[int, ...]], weight: tuple[int, ...] | None
    ) -> Count:
        """The closed form of a module's own arrays that train: by default 2r(d + m) + d + m."""
        n, r = self.phm_dim, self.phm_rank
        d, m = n * shapes[self.weights[0]][-2], n * shapes[self._inner][-1]
        terms = []
        if not self.shared_weights:
            whole = (f"2*{d}*{m}/{n}", 2 * d * m // n)
            terms.append(whole if self.full else (f"2*{r}*({d} + {m})", 2 * r * (d + m)))
        if self.bias:
            terms.append((f"{d} + {m}", d + m))
        if self.train_rule and not self.shared_rule:
            terms.append((f"4*{n}^2", 4 * n**2) if self.factored_rule else (f"2*{n}^3", 2 * n**3))
        terms += [(f"2*{d}", 2 * d)] * len(self.norms)
        own = {**self._shapes(d, m), **{f"{norm}/scale": (d,) for norm in self.norms}}
        name = next(name for name in own if name in self.own_leaves)
        layers = shapes[name][: len(shapes[name]) - len(own[name])]
        formula = " + ".join(term for term, _ in terms) or "0"
        return Count(formula, sum(value for _, value in terms), math.prod(layers))

    @property
    def _inner(self) -> str:
        """The name of the array whose last axis is m/n."""
        return _parts("down_weight", not self.full)[-1]

    def size(self, leaves: Leaves) -> int:
        """The width between the projections, divided by n."""
        return leaves[self._inner].shape[-1]

    def projection(self, leaves: Leaves, name: str) -> tuple[Array, Array | None]:
        """Kernel, formed in float32, and bias of the projection "down" or "up"."""
        rule = _whole(leaves, "rule" if self.shared_rule else f"{name}_rule")
        weight = _whole(leaves, f"{name}_weight")
        kernel = jnp.einsum("nab,ncd->acbd", rule, weight, precision="highest")
        a, c, b, d = kernel.shape
        bias = leaves[f"{name}_bias"].reshape(-1) if self.bias else None
        return kernel.reshape(a * c, b * d), bias


def _parts(name: str, factored: bool) -> tuple[str, ...]:
    """The names of the arrays of n matrices: of each one, or of the two factors of each one."""
    return (f"{name}_left", f"{name}_right") if factored else (name,)


def _whole(leaves: Leaves, name: str) -> Array:
    """n matrices, the products of their factors where they have such."""
    if name in leaves:
        return leaves[name]
    return jnp.matmul(leaves[f"{name}_left"], leaves[f"{name}_right"], precision="highest")
