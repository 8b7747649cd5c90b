"""What is known of the inputs of weights, for starts from activations, and what collects it."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.errors import RecipeError, UserError, first_few
from adapters_jax.methods.arrays import Key
from adapters_jax.methods.base import AttachmentPoint, Leaf, Leaves
from adapters_jax.methods.leaf import LeafMethod
from adapters_jax.targets import join
from adapters_jax.trace.through import holding
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

    Args:
        inputs: by the path of the weight, with `directions`, `explained` and `count`.

    Example:
        >>> Calibration({})
        Calibration(0 weights)
    """

    inputs: Mapping[str, Inputs]

    def __repr__(self) -> str:
        return f"Calibration({len(self.inputs)} weights)"


def inputs_for(caller: str, placements: Iterable[Any], given: Any) -> dict[str, Inputs]:
    """The inputs of each weight whose adapter starts from them, by the path of the weight.

    Raises:
        UserError: there is no `Calibration`, one that nothing uses, or one of another model.
        TypeError: what is given is something else.
    """
    wanted = {each.weight_path: each for each in placements if each.method.from_inputs}
    if given is None and not wanted:
        return {}
    if not isinstance(given, Calibration | None):
        raise TypeError(f"{caller}: calibration is {type(given).__name__}, expected aj.calibrate's")
    if given is None or not wanted:
        have = first_few(list(wanted)) if wanted else "no weights of the recipe"
        raise UserError(
            f"{caller}: {have} start from activations (a_init='eva'), and calibration is {given}; "
            "write calibration=aj.calibrate(base, recipe, batches) for such weights alone"
        )
    other = []
    for path, shape in ((path, each.shape) for path, each in wanted.items()):
        seen = given.inputs[path].shape if path in given.inputs else None
        other += [f"{path} of {list(shape)}, not {seen and list(seen)}"] if seen != shape else []
    if other:
        raise UserError(
            f"{caller}: the calibration is of another model, or of other targets: "
            f"{first_few(other)}; call aj.calibrate with this base and recipe"
        )
    return {path: given.inputs[path] for path in wanted}


_COUNTED: ContextVar[Array | None] = ContextVar("counted", default=None)


def counting(rows: Array | None) -> AbstractContextManager[None]:
    """In its body, observers count each input as much as an array of its first axes says."""
    return holding(_COUNTED, rows)


@dataclass(frozen=True)
class Observer(LeafMethod):
    """Changes nothing, and has a tape beside each weight; `Observed` says what gets onto it."""

    kind: ClassVar[str] = "observer"
    slot: ClassVar[str] = "observed"
    leaf_names: ClassVar[tuple[str, ...]] = ("tape",)  # type: ignore[misc]

    probes: int = 256

    def leaves(self, point: AttachmentPoint) -> dict[str, Leaf]:
        """The tape of one weight; raises RecipeError for a table."""
        axes, shape = point.axes, point.weight_shape
        if axes.lookup:
            raise RecipeError(
                f"calibrate: {point.path!r} looks rows up, and has no activations for "
                f"a_init='eva'; leave it out: '!{point.path}'"
            )
        inputs = tuple(shape[i] for i in axes.inputs)
        width = min(self.probes, math.prod(inputs))

        def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
            # All unit vectors, where there is room for them; and no sums yet.
            whole = width == math.prod(inputs)
            flat = jnp.eye(width) if whole else jax.random.normal(key, (math.prod(inputs), width))
            tape = jnp.pad(flat, [(0, 0), (0, SUMS)]).reshape(*inputs, -1)
            return jnp.broadcast_to(tape, shape)

        return {"tape": Leaf(axes.a_shape(shape, width + SUMS), init)}

    def changes(
        self, leaves: Leaves, point: AttachmentPoint, weight: Callable[[], Array], key: Key = None
    ) -> dict[str, tuple[Change, ...]]:
        """What notes the inputs."""
        # A target is a module, or the weight itself.
        own = point.path.rpartition("/")[2] == point.weight
        path = point.path if own else join(point.path, point.weight)
        tape = Factor(leaves["tape"], point.axes.a)
        return {point.weight: (Observed(tape, _COUNTED.get(), path),)}
