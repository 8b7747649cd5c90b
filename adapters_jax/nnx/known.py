"""The weights of flax's own layers, whose use is known without example inputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from adapters_jax.weights.axes import Axes


class KnownWeight(NamedTuple):
    """The weight of a layer.

    Attributes:
        name: its name in the layer.
        axes: the roles of its axes.
        layers: the sizes of the axes in front of the layer's own, which it is stacked on.
        width: the size of the last axis of the layer's output; None where it is not the weight's.
    """

    name: str
    axes: Axes
    layers: tuple[int, ...]
    width: int | None


def _dense(layer: Any) -> Axes:
    return Axes((0,), (1,))


def _dense_general(layer: Any) -> Axes:
    def count(axes: Any) -> int:
        return 1 if isinstance(axes, int) else len(tuple(axes))

    shared, inputs = len(layer.batch_axis), count(layer.axis)
    n = shared + inputs + count(layer.out_features)
    roles = tuple(range(shared, shared + inputs)), tuple(range(shared + inputs, n))
    return Axes(*roles, tuple(range(shared)))


def _parts(layer: nnx.Einsum) -> tuple[str, str, str]:
    """The axes of input, weight and output in a layer's equation; of the output none if unsaid."""
    left, _, y = (layer.einsum_str or "").replace(" ", "").partition("->")
    x, _, w = left.partition(",")
    return x, w, y


def _einsum(layer: Any) -> Axes | None:
    x, w, y = _parts(layer)
    if "->" not in (layer.einsum_str or "") or "." in w:
        return None
    inputs = tuple(i for i, c in enumerate(w) if c in x and c not in y)
    outputs = tuple(i for i, c in enumerate(w) if c not in x)
    shared = tuple(i for i, c in enumerate(w) if c in x and c in y)
    return Axes(inputs, outputs, shared)


def _conv(layer: Any) -> Axes:
    size = layer.kernel_size
    n = 1 if isinstance(size, int) else len(tuple(size))
    x, y = (n + 1, n) if getattr(layer, "transpose_kernel", False) else (n, n + 1)
    return Axes((*range(n), x), (y,), (), tuple(range(n)))


def _embed(layer: Any) -> Axes:
    return Axes((0,), (1,), lookup=True)


_LAYERS: dict[type, Callable[[Any], Axes | None]] = {
    nnx.Linear: _dense,
    nnx.LinearGeneral: _dense_general,
    nnx.Einsum: _einsum,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv,
    nnx.Embed: _embed,
}


def known_weight(layer: Any) -> KnownWeight | None:
    """The weight of one of flax's layers; None for other modules."""
    build = next((_LAYERS[base] for base in type(layer).__mro__ if base in _LAYERS), None)
    axes = build and build(layer)
    if not axes:
        return None
    name = "embedding" if axes.lookup else "kernel"
    shape = tuple(vars(layer)[name].shape)
    outside = len(shape) - axes.ndim
    last = axes.outputs[-1:]
    if isinstance(layer, nnx.Einsum):
        _, w, y = _parts(layer)
        last = tuple(w.index(c) for c in y[-1:] if c in w)
    width = next((shape[outside + i] for i in last), None)
    return KnownWeight(name, axes.under(outside), shape[:outside], width)
