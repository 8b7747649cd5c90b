"""The bottleneck adapter: down-projection, nonlinearity, up-projection, residual.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751. The parallel
placement is He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning",
arXiv:2110.04366; the one around a norm is Pfeiffer et al. 2021, "AdapterFusion", arXiv:2005.00247.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.errors import RecipeError, UserError
from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Output, Shapes
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, Method, zeros
from adapters_jax.methods.settings import choice, flag, number, size
from adapters_jax.weights.changes import dropout

# By name, since a recipe is JSON; the names are those of jax.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "identity": lambda x: x,
}
_PLACEMENTS = ("sequential", "parallel", "norm")
_NORMS = ("norm_before", "norm_after")


def bottleneck_parameters(d: int, m: int) -> int:
    """Parameters of one bottleneck adapter with both biases: 2md + d + m.

    Args:
        d: width of the output that the adapter acts on.
        m: width between its projections.

    Example:
        >>> bottleneck_parameters(1024, 64)
        132160
    """
    return 2 * m * d + d + m


@dataclass(frozen=True)
class Bottleneck(Method):
    """Bottleneck adapters on the outputs of modules.

    Sequential: `y + scale * up(f(down(y)))` of the module's output y (Houlsby, Pfeiffer).
    Parallel: `y + scale * up(f(down(x)))` of the module's input x, which must be as wide as y.
    Norm: `norm(x + scale * up(f(down(y))))`, where the module is a norm, x its input and
    y = norm(x) (Pfeiffer's form in post-norm transformers, where x is the sum with the residual).
    Both projections have a bias. Leaves are float32, kernels (d, m) and (m, d), and are cast to the
    dtype of y.

    A module may return several arrays, in tuples, dictionaries, dataclasses and what else jax takes
    for containers. Then y is the only one of floats, or else the only one that has the shape of x,
    unless `output` says which; it is chosen anew in each call. The others stay as they are.

    Args:
        targets: patterns of module paths.
        bottleneck_dim: m, the width between the projections.
        reduction_factor: instead of `bottleneck_dim`: m = max(1, floor(d / reduction_factor)).
        placement: "sequential", "parallel" or "norm".
        scale: factor on the branch; He et al. use 4 for the parallel form.
        activation: "gelu" (tanh form, as in Houlsby's code), or another name in `ACTIVATIONS`.
        dropout: probability of zeroing an entry between the projections while training.
        init_std: standard deviation of both kernels, truncated at two of them; 1e-2 in the paper.
        norm_before: whether the adapter has a layer norm before the down-projection.
        norm_after: whether it has one after the scaled up-projection.
        output: which of several outputs is y: a position or a name, or a path of them such as
            `"0/hidden"`; None where one is plainly meant.

    Raises:
        UserError: a field is out of its range, or both or none of the width fields are given.

    Example:
        >>> Bottleneck("**/output", reduction_factor=16).width(768)
        48
    """

    kind: ClassVar[str] = "bottleneck"
    slot: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "1902.00751"
    unmergeable: ClassVar[str] = "a nonlinearity stands between its projections"
    size_fields: ClassVar[tuple[str, ...]] = (
        *("bottleneck_dim", "reduction_factor"),
        *("scale", "dropout", "init_std"),
    )
    linear_in: ClassVar[tuple[str, ...]] = ("up/kernel", "up/bias")  # the branch, in any of these
    neutral = zeros

    targets: str | tuple[str, ...]
    bottleneck_dim: int | None = size(None)
    reduction_factor: float | None = number(None)
    placement: Literal["sequential", "parallel", "norm"] = choice("sequential", _PLACEMENTS)
    scale: float = number(1.0, low=-math.inf)
    activation: str = choice("gelu", ACTIVATIONS)
    dropout: float = number(0.0, high=1.0, closed=True)
    init_std: float = number(1e-2, closed=True)
    norm_before: bool = flag(False)
    norm_after: bool = flag(False)
    output: str | int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.bottleneck_dim is None) == (self.reduction_factor is None):
            raise UserError(
                f"Bottleneck: bottleneck_dim={self.bottleneck_dim} and reduction_factor="
                f"{self.reduction_factor}, expected exactly one of them, such as bottleneck_dim=64"
            )

    @property
    def leaf_names(self) -> tuple[str, ...]:
        """The names of its arrays."""
        own = [f"{name}/{part}" for name in self.norms for part in ("scale", "bias")]
        return (*self.projections, *own)

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of the arrays of its projections."""
        return ("down/kernel", "down/bias", "up/kernel", "up/bias")

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the adapter's layer norms."""
        return tuple(name for name in _NORMS if getattr(self, name))

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether `placement` fits the module: for "norm" it must not be a linear layer."""
        return self.placement != "norm" or all(len(shape) < 2 for shape in point.own.values())

    def why_not(self, module: Any) -> str:
        """Why the method cannot attach to a module."""
        norm = " or is not a norm" if self.placement == "norm" else ""
        return f"{type(module).__name__} does not return an array of floats{norm}"

    def width(self, d: int) -> int:
        """The bottleneck's width m on an output of width d."""
        # `__post_init__` has seen that one of both is given; `or 1` is for the type checker.
        return self.bottleneck_dim or max(1, int(d // (self.reduction_factor or 1)))

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The arrays of one adapter: of its projections and its norms."""
        d = point.width
        leaves = self.projection_leaves(point.path, d, self.width(d))
        for name in self.norms:
            leaves |= {
                f"{name}/scale": Leaf((d,), arrays.ones),
                f"{name}/bias": Leaf((d,), arrays.zeros),
            }
        return leaves

    def projection_leaves(self, path: str, d: int, m: int) -> dict[str, Leaf]:
        """The arrays of the projections, W1 (d, m) and W2 (m, d) with their biases."""
        # Houlsby's code draws with TensorFlow's truncated_normal, whose deviation after truncation
        # is below init_std as well; it is not corrected.
        kernel = arrays.truncated_normal(self.init_std)
        return {
            "down/kernel": Leaf((d, m), kernel),
            "down/bias": Leaf((m,), arrays.zeros),
            "up/kernel": Leaf((m, d), kernel),
            "up/bias": Leaf((d,), arrays.zeros),
        }

    def projection(self, leaves: Leaves, name: str) -> tuple[Array, Array | None]:
        """Kernel and bias of the projection "down" or "up"."""
        return leaves[f"{name}/kernel"], leaves[f"{name}/bias"]

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is 2md + d + m, plus 2d for each norm, with the recipe's m."""
        return shapes["down/kernel"][-2]

    @property
    def changes_input(self) -> bool:
        """Whether the branch is added to the module's input: with placement "norm"."""
        return self.placement == "norm"

    def forward(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """The adapted output, or with placement "norm" the adapted input; see `branch`."""
        branch, stream = self.branch(leaves, point, x, y, key), x if self.changes_input else y
        return stream + branch.astype(stream.dtype)

    def branch(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """What is added to the output, or with placement "norm" to the input.

        Args:
            leaves: the arrays by name.
            point: the module that they adapt.
            x: the module's input; not used by the sequential placement.
            y: the module's output, (..., d).
            key: for dropout while training; None in evaluation.

        Returns:
            An array of the shape and dtype of y.

        Raises:
            RecipeError: `placement` is not "sequential", and x and y differ in shape.
        """
        if self.placement != "sequential" and getattr(x, "shape", None) != y.shape:
            shape = getattr(x, "shape", type(x).__name__)
            raise RecipeError(
                f"{self.placement} Bottleneck at {point.path!r}: input {shape} and output "
                f"{y.shape} differ; target a module that keeps the shape"
            )
        # A residual stream may be float32 beside a module that computes in bfloat16; the branch
        # computes in the module's dtype.
        source = x if self.placement == "parallel" else y
        return self._branch(leaves, source.astype(y.dtype), point.precision, key)

    def size(self, leaves: Leaves) -> int:
        """The width between the projections."""
        return leaves["down/bias"].shape[-1]

    def fitted(self, leaves: Leaves, path: str, whole: Method) -> dict[str, Array]:
        """The same branch at the scale of `whole`, whose ratio goes into the up-projection."""
        if whole.scale == 0.0:  # type: ignore[attr-defined]
            raise RecipeError(
                f"Bank: the Bottleneck at {path!r} of the bank's recipe has scale=0.0, so that no "
                "adapter could act there; make the bank of a recipe with scale=1.0"
            )
        ratio = self.scale / whole.scale  # type: ignore[attr-defined]
        if ratio != 1.0 and self.norm_after:
            raise RecipeError(
                f"Bank: the Bottleneck at {path!r} has a norm after its scale of {self.scale}, "
                f"expected the bank's, {whole.scale}"  # type: ignore[attr-defined]
            )
        up = {name: leaves[name] * ratio for name in self.linear_in if name in leaves}
        return {**leaves, **up}

    def _branch(self, leaves: Leaves, x: Output, precision: Any, key: Key) -> Output:
        """scale * up(f(down(x))), with the adapter's norms before and after it."""
        # Cast here and not when they are stored: training keeps float32, products run in the dtype
        # of the model.
        own = {name: leaves[name].astype(x.dtype) for name in leaves if name.startswith("norm_")}

        def project(x: Array, name: str) -> Array:
            return arrays.affine(x, *self.projection(leaves, name), precision)

        if self.norm_before:
            x = arrays.layer_norm(x, own["norm_before/scale"], own["norm_before/bias"])
        hidden = ACTIVATIONS[self.activation](project(x, "down"))
        y = project(dropout(hidden, self.dropout, key), "up")
        # An array of y's dtype, since a NumPy float64 as the scale would promote y.
        y = y if self.scale == 1.0 else y * jnp.asarray(self.scale, y.dtype)
        if self.norm_after:
            y = arrays.layer_norm(y, own["norm_after/scale"], own["norm_after/bias"])
        return y
