"""Compacter: a bottleneck whose projections are sums of Kronecker products.

Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647.
The sums are those of Zhang et al. 2021, "Beyond Fully-Connected Layers with Quaternions:
Parameterization of Hypercomplex Multiplications with 1/n Parameters", arXiv:2102.08597.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Shapes
from adapters_jax.methods.base import Leaf, Leaves
from adapters_jax.methods.bottleneck import Bottleneck
from adapters_jax.methods.settings import choice, flag, number, size


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

    def _shapes(self, d: int = 0, m: int = 0) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of the projections between the widths d and m."""
        n, made = self.phm_dim, dict[str, tuple[int, ...]]()
        for side, a, b in (("down", d // n, m // n), ("up", m // n, d // n)):
            made |= _matrices(f"{side}_weight", (n, a, b), 0 if self.full else self.phm_rank)
            # The bias has two axes since the kernel's columns are n blocks: a bank pads each one.
            made |= {f"{side}_bias": (n, b)} if self.bias else {}
            rule = "rule" if self.shared_rule else f"{side}_rule"
            made |= _matrices(rule, (n, n, n), int(self.factored_rule))
        return made

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the arrays of its projections."""
        return tuple(self._shapes())

    @property
    def shared_leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the arrays that all modules share."""
        shared = ["weight"] * self.shared_weights + ["rule"] * self.shared_rule
        return tuple(name for name in self._shapes() if any(part in name for part in shared))

    @property
    def frozen_leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the arrays that do not train."""
        return tuple(name for name in self._shapes() if "rule" in name and not self.train_rule)

    def projection_leaves(self, path: str, d: int, m: int) -> dict[str, Leaf]:
        """The arrays of the projections.

        Raises:
            RecipeError: n does not divide both widths.
        """
        if d % self.phm_dim or m % self.phm_dim:
            raise RecipeError(
                f"Compacter: at {path!r} the output is {d} wide and the bottleneck {m}, which "
                f"phm_dim={self.phm_dim} does not divide; choose another phm_dim or width"
            )
        return {name: Leaf(x, self._init(name, x)) for name, x in self._shapes(d, m).items()}

    def _init(self, name: str, shape: tuple[int, ...]) -> arrays.Initializer:
        """The initialiser of an array of the projections."""
        if "rule" in name:
            return getattr(arrays, self.rule_init)(self.init_std)
        glorot = arrays.normal((2 / (shape[-2] + shape[-1])) ** 0.5)
        return arrays.zeros if name.endswith("bias") else glorot

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is 2r(d + m) + d + m by default."""
        return self.phm_dim * shapes["down_weight" if self.full else "down_weight_left"][-2]

    def size(self, leaves: Leaves) -> int:
        """The width between the projections, divided by n."""
        return leaves["down_weight" if self.full else "down_weight_right"].shape[-1]

    def projection(self, leaves: Leaves, name: str) -> tuple[Array, Array | None]:
        """Kernel, formed in float32, and bias of the projection "down" or "up"."""
        rule = _whole(leaves, "rule" if self.shared_rule else f"{name}_rule")
        weight = _whole(leaves, f"{name}_weight")
        kernel = jnp.einsum("nab,ncd->acbd", rule, weight, precision="highest")
        bias = leaves[f"{name}_bias"].reshape(-1) if self.bias else None
        return kernel.reshape(rule.shape[1] * weight.shape[1], -1), bias


def _matrices(name: str, shape: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of n matrices (n, a, b), or with a rank of the two factors of each."""
    n, a, b = shape
    return {f"{name}_left": (n, a, rank), f"{name}_right": (n, rank, b)} if rank else {name: shape}


def _whole(leaves: Leaves, name: str) -> Array:
    """n matrices, the products of their factors where they have such."""
    if name in leaves:
        return leaves[name]
    return jnp.matmul(leaves[f"{name}_left"], leaves[f"{name}_right"], precision="highest")
