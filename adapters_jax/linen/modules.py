"""Adapters as linen modules, to write into a model by hand."""

from typing import Any, cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adapters_jax import methods
from adapters_jax.linen.interceptor import dropout_key, grow_in, leaves_in
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placement
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import dropout

# The fields of `adapters_jax.Bottleneck` that the module has as well.
_FIELDS = ("scale", "activation", "dropout", "init_std", "norm_before", "norm_after")


class Bottleneck(nn.Module):
    """A bottleneck adapter to write into a model by hand: `x + up(f(down(x)))`.

    The kernels are `down/kernel` (d, m) and `up/kernel` (m, d), each with a bias, all float32. They
    start near zero, so the module starts near the identity.

    Args:
        bottleneck_dim: m.
        scale, activation, dropout, init_std, norm_before, norm_after: as in
            `adapters_jax.Bottleneck`.

    Raises:
        UserError: when it is called, a field is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> adapter = Bottleneck(64)
        >>> params = adapter.init(jax.random.key(0), jnp.ones((2, 768)))["params"]
        >>> jax.tree.map(jnp.shape, params["down"])
        {'bias': (64,), 'kernel': (768, 64)}
        >>> params["up"]["bias"] += 0.5
        >>> adapter.apply({"params": params}, jnp.ones((1, 768))).mean().round(2)
        Array(1.5, dtype=float32)

    Reference: Houlsby et al. 2019, arXiv:1902.00751.
    """

    bottleneck_dim: int
    scale: float = 1.0
    activation: str = "gelu"
    dropout: float = 0.0
    init_std: float = 1e-2
    norm_before: bool = False
    norm_after: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "... d"], y: Array | None = None, deterministic: bool | None = None
    ) -> Float[Array, "... d"]:
        """The adapter on x; or, given the output y of a sublayer of x, beside that sublayer.

        Args:
            x: (..., d), of any float dtype.
            y: (..., d), for the parallel form.
            deterministic: no dropout; by default there is dropout where a "dropout" key is given.

        Returns:
            (..., d), in the dtype of y, or of x where there is no y.
        """
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields["placement"] = "sequential" if y is None else "parallel"
        method = methods.Bottleneck("**", self.bottleneck_dim, **fields)
        y = x if y is None else y
        point = AttachmentPoint("output", "/".join(self.path), width=x.shape[-1])
        leaves = leaves_in(self.scope, method, point)
        return method.forward(leaves, point, x, y, dropout_key(self, method, deterministic))


class LoRADense(nn.Dense):
    """A dense layer with low-rank factors, to write into a model by hand.

    Its parameters are `kernel` and `bias` as in `nn.Dense`, and the float32 factors `lora/a`
    (in, r) and `lora/b` (r, out). B starts at zero, so the layer starts as the plain one.

    Args:
        features: width of the output; the fields of `nn.Dense` after it are taken too.
        rank: r.
        alpha: the scale is alpha / r; None follows the rank.
        dropout, a_init, rank_stabilized: as in `adapters_jax.LoRA`.

    Raises:
        UserError: when it is called, a field of LoRA is out of its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer, x = LoRADense(3, rank=2), jnp.ones((1, 4))
        >>> params = layer.init(jax.random.key(0), x)["params"]
        >>> jax.tree.map(jnp.shape, params["lora"])
        {'a': (4, 2), 'b': (2, 3)}
        >>> ones = jax.tree.map(jnp.ones_like, params["lora"])
        >>> changed = layer.apply({"params": {**params, "lora": ones}}, x)
        >>> (changed - layer.apply({"params": params}, x)).round(3).tolist()  # 4 * 1 * 1, twice
        [[8.0, 8.0, 8.0]]

    Reference: Hu et al. 2021, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    a_init: str = "gaussian"
    rank_stabilized: bool = False

    @nn.nowrap
    def method(self) -> methods.LoRA:
        """The configuration of the factors."""
        return methods.LoRA(
            "**", self.rank, self.alpha, self.dropout, self.a_init, self.rank_stabilized
        )

    def __call__(
        self, inputs: Float[Array, "... in"], deterministic: bool | None = None
    ) -> Float[Array, "... out"]:
        """The dense layer with its low-rank branch.

        Args:
            inputs: (..., in), of any float dtype.
            deterministic: no dropout; by default there is dropout where a "dropout" key is given.

        Returns:
            (..., out), in the dtype of `nn.Dense`.
        """
        y = super().__call__(inputs)
        method, module = self.method(), cast(Any, self)
        kernel = nn.meta.unbox(module.scope.get_variable("params", "kernel"))
        path, axes = "/".join(self.path), Axes((0,), (1,))
        placed = Placement(method, path, "", weight="kernel", shape=kernel.shape, axes=axes)
        point = placed.point()
        if not module.scope.has_variable("params", "lora"):
            grow_in(module.scope, placed)
        scope = module.scope.push("lora", reuse=True)
        key = dropout_key(self, method, deterministic)
        changes = method.changes(leaves_in(scope, method, point), point, lambda: kernel, key)
        change: Any = changes["kernel"][0]
        x = dropout(inputs.astype(y.dtype), change.dropout, change.key)
        for factor in change.scaled:
            x = jnp.matmul(x, factor.array.astype(y.dtype), precision=self.precision)
        return y + x
