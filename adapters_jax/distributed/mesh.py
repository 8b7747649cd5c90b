"""Meshes: devices under named axes, and the batches that are split over them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.errors import UserError
from adapters_jax.trees import Tree

BATCH = ("data", "fsdp")  # the axes that split batches


class ShardingError(UserError):
    """A mesh that the devices do not make, or a layout that does not fit a parameter."""


def make_mesh(axes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of named axes.

    Args:
        axes: sizes by name, as a mapping or as in `"data=4,model=2"`; one size may be -1, which is
            what the devices leave. Batches are split over `data` and `fsdp`, and a base without
            rules over `fsdp` and `model`.
        devices: all of them, of all hosts, by default.

    Raises:
        ShardingError: the text does not read so, or the sizes do not multiply to the devices.

    Example:
        >>> make_mesh("data=-1,model=1").axis_names
        ('data', 'model')
    """
    sizes = mesh_sizes(axes) if isinstance(axes, str) else dict(axes)
    devices = jax.devices() if devices is None else devices
    said = ",".join(f"{name}={size}" for name, size in sizes.items())
    open_ones = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_ones) == 1 and known > 0:
        sizes[open_ones[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or min(sizes.values(), default=0) < 1:
        raise ShardingError(
            f"mesh {said!r} does not multiply to the {len(devices)} devices that there are; "
            f"write data={len(devices)}, or factors of {len(devices)}"
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes by name, as `"data=4,model=2"` says them."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in pairs}
    wrong = [f"{n}={s}" for n, s in sizes.items() if not n.isidentifier() or not _whole(s)]
    if wrong or len(sizes) < len(pairs):
        raise ShardingError(
            f"mesh {text!r} does not read as NAME=SIZE,...: {', '.join(wrong) or 'a name twice'}; "
            "write data=4,model=2"
        )
    return {name: int(size) for name, size in sizes.items()}


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Over how many devices a mesh of axes of such sizes splits a batch."""
    return math.prod(sizes.get(name, 1) for name in BATCH)


def place(x: Any, sharding: NamedSharding) -> Any:
    """An array where a sharding says; on several hosts each has the same one, and copies its part.

    Args:
        x: numpy's or jax's, or a random key; an abstract one gets the sharding.
        sharding: on any mesh.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if sharding.is_fully_addressable or getattr(x, "sharding", None) == sharding:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        words = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def local_rows(rows: int, mesh: Mesh) -> slice:
    """Which rows of a batch this process's devices need: all of them where it is alone.

    Args:
        rows: of the batch, over all processes.
        mesh: of named axes.

    Raises:
        ShardingError: the rows do not divide, or there are fewer than parts.

    Example:
        >>> local_rows(8, make_mesh("data=-1"))
        slice(0, 8, None)
    """
    where = _of_batch(rows, mesh).addressable_devices_indices_map((rows,))
    taken = [index[0].indices(rows) for index in where.values() if index is not None]
    return slice(min(start for start, _, _ in taken), max(stop for _, stop, _ in taken))


def shard_batch(batch: Tree, mesh: Mesh, rows: int | None = None) -> Tree:
    """Splits a batch's leading axis over `data` and `fsdp`.

    Args:
        batch: arrays `(rows, ...)`, or without axes, which every device gets.
        mesh: of named axes.
        rows: of the batch over all processes, where `batch` has only those that `local_rows` says;
            by default every process has all of them.

    Returns:
        The batch on the mesh, `(rows, ...)`.

    Raises:
        ShardingError: the rows do not divide, or are not those that this process needs.

    Example:
        >>> shard_batch(np.ones((8, 3)), make_mesh("data=-1")).shape
        (8, 3)
    """

    def put(x: Any) -> Any:
        shape = np.shape(x)
        if not shape:
            return place(x, NamedSharding(mesh, P()))
        sharding = _of_batch(shape[0] if rows is None else rows, mesh)
        if rows is None:
            return place(x, sharding)
        own = local_rows(rows, mesh)
        if shape[0] != own.stop - own.start:
            raise ShardingError(
                f"a batch of {shape[0]} rows, and this process needs the {own.stop - own.start} "
                f"from {own.start} on, of {rows}; take those that local_rows says"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (rows, *shape[1:]))

    return jax.tree.map(put, batch)


def _of_batch(rows: int, mesh: Mesh) -> NamedSharding:
    """Where a batch goes; raises ShardingError where its rows do not divide."""
    names, parts = tuple(n for n in BATCH if mesh.shape.get(n, 1) > 1), batch_parts(mesh.shape)
    if rows % parts:
        raise ShardingError(
            f"a batch of {rows} rows does not split into {parts} parts "
            f"({', '.join(f'{n}={mesh.shape[n]}' for n in names)}); choose a multiple of {parts}"
        )
    return NamedSharding(mesh, P(names) if names else P())
