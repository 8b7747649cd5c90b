"""What is known of the inputs of weights, for starts from activations.

`Observer` collects it from a running model, `Calibration` holds it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError, UserError, first_few
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves
from adapters_jax.methods.leaf import LeafMethod, axes_of
from adapters_jax.targets import join
from adapters_jax.weights.changes import Change
from adapters_jax.weights.factors import Factor
from adapters_jax.weights.observed import SUMS, Observed


@dataclass(frozen=True)
class Inputs:
    """The principal directions of a weight's inputs.

    Attributes:
        target: the path of the target, by which a method has its rank.
        shape: the shape of the weight.
        directions: (layers..., in, k), orthonormal columns, the one of most variance first.
        explained: (layers..., k), the share of each direction in the variance of the inputs.
        count: the number of inputs, the least of any layer.
    """

    target: str
    shape: tuple[int, ...]
    directions: Float[np.ndarray, "*layers in k"]
    explained: Float[np.ndarray, "*layers k"]
    count: float

    def first(self, rank: int, path: str) -> Array:
        """The first directions; raises UserError where fewer are known."""
        known = self.directions.shape[-1]
        if rank > known or rank >= self.count:
            raise UserError(
                f"a_init='eva' at {path!r} needs {rank} directions, and the calibration has "
                f"{known} of {self.count:.0f} inputs; give aj.calibrate more batches, or size="
                f"{max(2 * rank, 8)} or more"
            )
        return jnp.asarray(self.directions[..., :rank])


@dataclass(frozen=True)
class Calibration:
    """What `aj.calibrate` saw of the inputs of a model's weights.

    Attributes:
        inputs: by the path of the weight.

    Example:
        >>> Calibration({})
        Calibration(0 weights)
    """

    inputs: Mapping[str, Inputs]

    def __repr__(self) -> str:
        return f"Calibration({len(self.inputs)} weights)"


def inputs_for(caller: str, placements: Iterable[Any], given: Any) -> dict[str, Inputs]:
    """The inputs of each weight whose adapter starts from them, by the path of the weight.

    Args:
        caller: the beginning of error messages.
        placements: where the adapters are.
        given: a `Calibration`, or None.

    Raises:
        UserError: there is none, or one that nothing uses, or it is of another model.
        TypeError: `given` is something else.
    """
    wanted = {each.weight_path: each for each in placements if each.method.from_inputs}
    if given is None and wanted:
        raise UserError(
            f"{caller}: {first_few(list(wanted))} start from activations (a_init='eva'); write "
            "calibration=aj.calibrate(base, recipe, batches), or with params after a linen base"
        )
    if given is None:
        return {}
    if not isinstance(given, Calibration):
        raise TypeError(
            f"{caller}: calibration is {type(given).__name__}, of aj.calibrate expected"
        )
    if not wanted:
        raise UserError(
            f"{caller}: no method of the recipe starts from activations; write a_init='eva', or "
            "leave calibration out"
        )
    other = [
        f"{path} of {list(each.shape)}"
        + (f", not {list(given.inputs[path].shape)}" if path in given.inputs else "")
        for path, each in wanted.items()
        if path not in given.inputs or given.inputs[path].shape != each.shape
    ]
    if other:
        raise UserError(
            f"{caller}: the calibration is of another model or of other targets: it lacks "
            f"{first_few(other)}; call aj.calibrate with this base and recipe"
        )
    return {path: given.inputs[path] for path in wanted}


_COUNTED: ContextVar[Array | None] = ContextVar("counted", default=None)


@contextmanager
def counting(rows: Array | None) -> Any:
    """In its body, observers count only these rows of inputs, or count them as much as it says."""
    token = _COUNTED.set(rows)
    try:
        yield
    finally:
        _COUNTED.reset(token)


@dataclass(frozen=True)
class Observer(LeafMethod):
    """Changes nothing, and has a tape beside each weight; `Observed` says what gets onto it.

    It is never in a recipe that is stored, so that it has no place in the registry.
    """

    name: ClassVar[str] = "observer"
    slot: ClassVar[str] = "observed"
    leaf_names: ClassVar[tuple[str, ...]] = ("tape",)  # type: ignore[misc]

    probes: int = 256

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The tape of one weight; raises RecipeError for a table."""
        axes, shape = axes_of(point), point.weight_shape
        if axes.lookup:
            raise RecipeError(
                f"calibrate: {point.path!r} looks rows up, and has no activations for "
                f"a_init='eva'; leave it out: '!{point.path}'"
            )
        width = min(self.probes, math.prod(shape[i] for i in axes.inputs))
        own = len(axes.inputs)
        return {"tape": Leaf(axes.a_shape(shape, width + SUMS), lambda k, s: _probes(k, s, own))}

    def changes(
        self,
        leaves: Leaves,
        point: AttachmentPoint,
        weight: Callable[[], Array],
        key: PRNGKeyArray | None = None,
    ) -> dict[str, tuple[Change, ...]]:
        """What notes the inputs."""
        tape = Factor(leaves["tape"], axes_of(point).a)
        # A target is a module, or the weight itself.
        own = point.path.rpartition("/")[2] == point.weight
        path = point.path if own else join(point.path, point.weight)
        return {point.weight: (Observed(tape, _COUNTED.get(), path),)}


def _probes(key: PRNGKeyArray, shape: tuple[int, ...], own: int) -> Array:
    """The unit vectors where there is room for all of them, else random ones; no sums yet."""
    inputs, width = shape[-1 - own : -1], shape[-1] - SUMS
    fan_in = math.prod(inputs)
    flat = jnp.eye(fan_in) if width == fan_in else jax.random.normal(key, (fan_in, width))
    whole = jnp.pad(flat.reshape(*inputs, width), [*[(0, 0)] * own, (0, SUMS)])
    return jnp.broadcast_to(whole, shape)


def principal(
    probes: Float[np.ndarray, "in k"], found: Float[np.ndarray, "in columns"]
) -> tuple[np.ndarray, np.ndarray, float]:
    """The principal directions of centred inputs, their shares of the variance, and the count.

    From all unit vectors as probes they are exact. From random ones, V, the covariance C is
    approximated as C V (V^T C V)^-1 V^T C (Tropp et al. 2017, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data"), of which the first half is kept.

    Args:
        probes: V.
        found: X^T X V, and the sums of `SUMS`, for inputs in the rows of X.
    """
    products, (sums, squares, ones) = found[:, :-SUMS], found[:, -SUMS:].T
    count = ones.max()
    mean = sums / max(count, 1)
    products = products - np.outer(mean, sums @ probes)
    total = max(squares.sum() - count * (mean**2).sum(), np.finfo(float).tiny)
    fan_in, width = probes.shape
    if width == fan_in:
        values, vectors = np.linalg.eigh((products + products.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        inner = probes.T @ products
        scale, turn = np.linalg.eigh((inner + inner.T) / 2)
        kept = scale > 1e-6 * scale[-1]  # below it are the rounding errors of float32
        vectors, roots, _ = np.linalg.svd(
            products @ (turn[:, kept] / np.sqrt(scale[kept])), full_matrices=False
        )
        vectors, values = vectors[:, : width // 2], roots[: width // 2] ** 2
    return vectors, np.maximum(values, 0) / total, float(count)
