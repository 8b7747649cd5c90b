"""The roles of the axes of weights of flax's own layers, which need no example inputs."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from adapters_jax.weights.axes import Axes


def _dense(layer: Any) -> tuple[str, int, Axes]:
    return "kernel", 2, Axes((0,), (1,))


def _dense_general(layer: Any) -> tuple[str, int, Axes]:
    def count(axes: Any) -> int:
        return 1 if isinstance(axes, int) else len(tuple(axes))

    shared, inputs = len(layer.batch_axis), count(layer.axis)
    n = shared + inputs + count(layer.out_features)
    roles = tuple(range(shared, shared + inputs)), tuple(range(shared + inputs, n))
    return "kernel", n, Axes(*roles, tuple(range(shared)))


def _parts(layer: nnx.Einsum) -> tuple[str, str, str]:
    """The axes of input, weight and output in a layer's equation; of the output none if unsaid."""
    left, _, y = (layer.einsum_str or "").replace(" ", "").partition("->")
    x, _, w = left.partition(",")
    return x, w, y


def _einsum(layer: Any) -> tuple[str, int, Axes] | None:
    x, w, y = _parts(layer)
    if "->" not in (layer.einsum_str or "") or "." in w:
        return None
    inputs = tuple(i for i, c in enumerate(w) if c in x and c not in y)
    outputs = tuple(i for i, c in enumerate(w) if c not in x)
    shared = tuple(i for i, c in enumerate(w) if c in x and c in y)
    return "kernel", len(w), Axes(inputs, outputs, shared)


def last_axis(layer: Any, axes: Axes) -> int | None:
    """The axis of a layer's weight that is the last of its output; None where that is another's."""
    if not isinstance(layer, nnx.Einsum):
        return axes.outputs[-1] if axes.outputs else None
    _, w, y = _parts(layer)
    return w.index(y[-1]) if y and y[-1] in w else None


def _conv(layer: Any) -> tuple[str, int, Axes]:
    size = layer.kernel_size
    n = 1 if isinstance(size, int) else len(tuple(size))
    x, y = (n + 1, n) if getattr(layer, "transpose_kernel", False) else (n, n + 1)
    return "kernel", n + 2, Axes((*range(n), x), (y,), (), tuple(range(n)))


def _embed(layer: Any) -> tuple[str, int, Axes]:
    return "embedding", 2, Axes((0,), (1,), lookup=True)


_LAYERS: dict[type, Callable[[Any], tuple[str, int, Axes] | None]] = {
    nnx.Linear: _dense,
    nnx.LinearGeneral: _dense_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv,
    nnx.Embed: _embed,
}


def known_weight(layer: Any) -> tuple[str, Axes, int] | None:
    """The name of the weight of one of flax's layers, and the roles of its axes.

    Axes in front of the layer's own, whose number comes with them, are layers that it is stacked
    on. None for other modules.
    """
    build = next((_LAYERS[base] for base in type(layer).__mro__ if base in _LAYERS), None)
    found = build and build(layer)
    if not found:
        return None
    name, ndim, axes = found
    outside = len(vars(layer)[name].shape) - ndim
    return name, axes.under(outside), outside
