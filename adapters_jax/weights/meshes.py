"""How arrays lie over the devices of the mesh on which what is traced now will run.

A base whose weights are split over `fsdp` lets XLA choose: gather each weight where it is used, or
split the activations by heads and give every device all rows. It often chooses the second, which
exchanges activations many times larger than the weights. Models tell it by `split_rows`. A weight
that is read in a loop is gathered in each round, unless `gathered` does it in front of the loop.
"""

import math
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from adapters_jax.trace.through import holding

SLICE = "slice"  # the axis of a mesh over slices, which the network of a data centre joins
BATCH = (SLICE, "data", "fsdp")  # the axes of a mesh that split batches
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
_GROUPS: ContextVar[bool] = ContextVar("groups", default=False)


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[None]:
    """What is traced in the body runs on this mesh, which `split_rows` then uses."""
    return holding(_MESH, mesh)


def current_mesh() -> Mesh | None:
    """The mesh on which what is traced now will run, if it is known."""
    return _MESH.get()


def batch_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh that split `rows`; none without a mesh, or where they do not divide."""
    mesh = _MESH.get()
    if mesh is None:
        return ()
    axes = tuple(name for name in BATCH if mesh.shape.get(name, 1) > 1)
    return () if rows % math.prod(mesh.shape[name] for name in axes) else axes


def over_groups(groups: int) -> str | None:
    """The axis of the mesh for `jax.vmap(..., spmd_axis_name=)` over groups of rows.

    None where groups are not split, and where two axes would: XLA then leaves rows of a decoder's
    step in the order of the other axis (jaxlib 0.10.2, data=2,fsdp=2,model=2).
    """
    axes = batch_axes(groups)
    return axes[0] if len(axes) == 1 else None


def groups_split(axis: str | None) -> AbstractContextManager[None]:
    """What is traced in the body is mapped over groups of rows, which `over_groups` splits.

    The map adds the axis to what `split_rows` says.
    """
    return holding(_GROUPS, axis is not None or _GROUPS.get())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays lie on; None where they lie on one device.

    Args:
        tree: a pytree of arrays; some of them may be on no mesh.

    Example:
        >>> import jax.numpy as jnp
        >>> mesh_of([jnp.ones(2)]) is None
        True
    """
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (each.mesh for each in found if isinstance(each, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def split_rows(x: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
    """Keeps the rows of activations split over a mesh's axes `slice`, `data` and `fsdp`.

    The models here call it after each sum with the residual stream. Call it likewise in a model or
    a loss of your own: `make_train_step` and `make_eval_step` know the mesh of a state that `shard`
    has laid out.

    Args:
        x: activations, whose first axis has the rows of the batch.

    Returns:
        `x`, with a constraint for XLA; without one where there is no mesh, or where its axes do not
        divide the rows.

    Example:
        >>> import jax.numpy as jnp
        >>> split_rows(jnp.ones((2, 3))).tolist()  # on no mesh
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    mesh, axes = _MESH.get(), batch_axes(x.shape[0])
    if mesh is None or not (axes or _GROUPS.get()):
        return x
    first = P.UNCONSTRAINED if _GROUPS.get() else axes
    spec = P(first, *[P.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Gathers a weight that is split over a mesh's axes `data` and `fsdp`, here and only once.

    Returns:
        `x`, whole on each device; as it is where there is no mesh, or one with another axis, over
        which weights stay split.

    Example:
        >>> import jax.numpy as jnp
        >>> gathered(jnp.ones((2, 3))).shape
        (2, 3)
    """
    mesh = _MESH.get()
    if mesh is None or any(size > 1 for name, size in mesh.shape.items() if name not in BATCH):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
