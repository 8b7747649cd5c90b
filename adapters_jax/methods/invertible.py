"""MAD-X's invertible adapter: two additive couplings of the halves of an embedding.

Pfeiffer et al. 2020, "MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer",
arXiv:2005.00052, section 3.3; the coupling is NICE's, Dinh et al. 2015, arXiv:1410.8516.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from adapters_jax.methods import arrays
from adapters_jax.methods.arrays import Key, Output, Shapes
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves, Method, zeros
from adapters_jax.methods.bottleneck import ACTIVATIONS
from adapters_jax.methods.settings import choice, number

_NETWORKS = ("first", "second")  # AdapterHub's F and G
_PARTS = ("down/kernel", "down/bias", "up/kernel", "up/bias")


@dataclass(frozen=True)
class Invertible(Method):
    """An invertible adapter on the output of an embedding.

    With the halves y_1 and y_2 of an output of width d, `y_1 += first(y_2)`, then
    `y_2 += second(y_1)`. Both are `up(f(down(.)))` with biases; their middle is as wide as their
    input divided by `reduction_factor`. `undone` takes the adapter out of an array again, which
    the paper does before the output embedding while it trains a language. Leaves are float32.

    Args:
        targets: patterns of modules that return embeddings.
        reduction_factor: by which the middles are narrower than their inputs; 2 in the paper.
        activation: a name in `methods.bottleneck.ACTIVATIONS`; "relu" in the authors' code.
        init_std: standard deviation of the kernels, 0.02 in the authors' code.

    Raises:
        UserError: a field is out of its range.

    Example:
        >>> point = AttachmentPoint("output", "embed", width=5)
        >>> leaves = Invertible("embed").leaves(point)
        >>> leaves["first/down/kernel"].shape, leaves["second/up/kernel"].shape
        ((3, 1), (1, 3))
    """

    kind: ClassVar[str] = "invertible"
    slot: ClassVar[str] = "invertible"
    paper: ClassVar[str] = "2005.00052"
    size_fields: ClassVar[tuple[str, ...]] = ("init_std",)
    unmergeable: ClassVar[str] = "nonlinearities stand between its projections"
    leaf_names: ClassVar[tuple[str, ...]] = tuple(  # type: ignore[misc]
        f"{network}/{part}" for network in _NETWORKS for part in _PARTS
    )
    neutral = zeros

    targets: str | tuple[str, ...]
    reduction_factor: float = number(2.0)
    activation: str = choice("relu", ACTIVATIONS)
    init_std: float = number(0.02, closed=True)

    def _sizes(self, d: int) -> dict[str, tuple[int, int, int]]:
        """The widths of each network: of its input, its middle and its output."""
        half, rest = d // 2, d - d // 2
        middle = lambda n: max(1, int(n // self.reduction_factor))  # noqa: E731
        return {"first": (rest, middle(rest), half), "second": (half, middle(half), rest)}

    def fits(self, point: AttachmentPoint) -> bool:
        """Whether the output has two halves."""
        return point.width > 1

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The arrays of both networks."""
        made: dict[str, Leaf] = {}
        for network, (before, middle, after) in self._sizes(point.width).items():
            kernel = arrays.normal(self.init_std)
            made |= {
                f"{network}/down/kernel": Leaf((before, middle), kernel),
                f"{network}/down/bias": Leaf((middle,), arrays.zeros),
                f"{network}/up/kernel": Leaf((middle, after), kernel),
                f"{network}/up/bias": Leaf((after,), arrays.zeros),
            }
        return made

    def width_of(self, shapes: Shapes) -> int:
        """The width d; the count is d m_1 + m_1 + d m_2 + m_2 + d, of middles m_1 and m_2."""
        return shapes["first/up/bias"][-1] + shapes["second/up/bias"][-1]

    def forward(
        self, leaves: Leaves, point: AttachmentPoint, x: Any, y: Output, key: Key = None
    ) -> Output:
        """The adapted embedding."""
        one, two = jnp.split(y, [y.shape[-1] // 2], -1)
        one = one + self._network("first", leaves, two, point.precision)
        two = two + self._network("second", leaves, one, point.precision)
        return jnp.concatenate([one, two], -1)

    def undone(self, leaves: Leaves, y: Output, precision: Any = None) -> Output:
        """What `forward` makes y of.

        Args:
            leaves: the arrays by name.
            y: an array of the width that they were made for.
            precision: as in `jnp.matmul`.

        Example:
            >>> import jax
            >>> adapter, point = Invertible("**"), AttachmentPoint("output", "", width=6)
            >>> leaves = {n: x.init(jax.random.key(0), x.shape)
            ...           for n, x in adapter.leaves(point).items()}
            >>> y = jax.random.normal(jax.random.key(1), (2, 6))
            >>> again = adapter.undone(leaves, adapter.forward(leaves, point, None, y))
            >>> bool(jnp.allclose(again, y, atol=1e-6))
            True
        """
        one, two = jnp.split(y, [y.shape[-1] // 2], -1)
        two = two - self._network("second", leaves, one, precision)
        one = one - self._network("first", leaves, two, precision)
        return jnp.concatenate([one, two], -1)

    def _network(self, name: str, leaves: Leaves, x: Array, precision: Any) -> Array:
        """up(f(down(x))) of one of both networks, in the dtype of x."""
        down, down_bias, up, up_bias = (leaves[f"{name}/{part}"] for part in _PARTS)
        hidden = ACTIVATIONS[self.activation](arrays.affine(x, down, down_bias, precision))
        return arrays.affine(hidden, up, up_bias, precision)
