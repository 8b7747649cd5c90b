"""Adapters as NNX modules, to write into a model by hand."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from adapters_jax import methods
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.nnx.adapted import children_of, grow
from adapters_jax.nnx.classes import refresh
from adapters_jax.nnx.graph import key_of, read
from adapters_jax.placement import Placement
from adapters_jax.weights.axes import Axes


class Bottleneck(nnx.Module):
    """A bottleneck adapter to write into a model by hand: `x + up(f(down(x)))`.

    The kernels are `down/kernel` (d, m) and `up/kernel` (m, d), each with a bias, all float32. They
    start near zero, so the module starts near the identity.

    Args:
        features: d, the width of its input and output.
        bottleneck_dim: m.
        rngs: seeds the kernels, and dropout.
        **fields: scale, activation, dropout, init_std, norm_before and norm_after as in
            `adapters_jax.Bottleneck`.

    Raises:
        UserError: `bottleneck_dim` or a field is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter = Bottleneck(768, 64, rngs=nnx.Rngs(0))
        >>> adapter.down["kernel"].shape, adapter(jnp.ones((2, 768))).shape
        ((768, 64), (2, 768))
        >>> adapter.up["bias"][...] += 0.5
        >>> adapter(jnp.ones((1, 768))).mean().round(2)
        Array(1.5, dtype=float32)

    Reference: Houlsby et al. 2019, arXiv:1902.00751.
    """

    def __init__(self, features: int, bottleneck_dim: int, *, rngs: nnx.Rngs, **fields: Any):
        self.method = methods.Bottleneck("**", bottleneck_dim, **fields)
        self.point = AttachmentPoint("output", "", width=features)
        placed = Placement(self.method, "", "", width=features).with_arrays()
        for name, child in children_of(placed, rngs).items():
            setattr(self, name, child)

    def __call__(self, x: Float[Array, "... d"], y: Array | None = None) -> Float[Array, "... d"]:
        """The adapter on x; or, given the output y of a sublayer of x, beside that sublayer.

        Args:
            x: (..., d), of any float dtype.
            y: (..., d), for the parallel form.

        Returns:
            (..., d), in the dtype of y, or of x where there is no y.
        """
        placement = "sequential" if y is None else "parallel"
        method = dataclasses.replace(self.method, placement=placement)  # type: ignore[arg-type]
        return method.forward(
            read(self, method), self.point, x, x if y is None else y, key_of(self)
        )


class LoRALinear(nnx.Linear):
    """A linear layer with low-rank factors, to write into a model by hand.

    It takes arrays (..., in) and returns (..., out). Its parameters are `kernel` and `bias` as in
    `nnx.Linear`, and the float32 factors `lora/a` (in, r) and `lora/b` (r, out). B starts at zero,
    so the layer starts as the plain one.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        rank: r.
        alpha: the scale is alpha / r; None follows the rank.
        rngs: seeds all parameters, and dropout.
        lora: further fields of `adapters_jax.LoRA`, as a mapping.
        **fields: further arguments of `nnx.Linear`.

    Raises:
        UserError: `rank`, `alpha` or a field of `lora` is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = LoRALinear(4, 3, rank=2, rngs=nnx.Rngs(0))
        >>> layer.lora["a"].shape, layer.lora["b"].shape
        ((4, 2), (2, 3))
        >>> x, plain = jnp.ones((1, 4)), layer(jnp.ones((1, 4)))
        >>> layer.lora["a"][...] = jnp.ones((4, 2))
        >>> layer.lora["b"][...] = jnp.ones((2, 3))
        >>> (layer(x) - plain).round(3).tolist()  # 4 * 1 * 1, for each of 2 ranks
        [[8.0, 8.0, 8.0]]

    Reference: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 8,
        alpha: float | None = None,
        rngs: nnx.Rngs,
        lora: Mapping[str, Any] | None = None,
        **fields: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **fields)
        method = methods.LoRA("**", rank, alpha, **(lora or {}))
        axes, shape = Axes((0,), (1,)), (in_features, out_features)
        placed = Placement(method, "", "", weight="kernel", shape=shape, axes=axes)
        grow(self, placed.with_arrays(), rngs)
        refresh(self)
