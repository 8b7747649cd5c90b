"""Meshes: devices on named axes, and the batches that are split over them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from adapters_jax.errors import UserError, shown
from adapters_jax.trees import Tree
from adapters_jax.weights.meshes import BATCH, SLICE

AXES = (SLICE, "data", "fsdp", "model")  # of `--mesh`; your own rules may name others


class ShardingError(UserError):
    """A mesh does not fit the devices, or a layout does not fit a parameter or a batch."""


def make_mesh(axes: str | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of named axes.

    Args:
        axes: sizes by name, as a mapping or as in `"data=4,model=2"`; one size may be -1, which
            stands for the number of devices divided by the other sizes. Batches are split over
            `slice`, `data` and `fsdp`, and a base without rules over `fsdp` and `model`. `slice` is
            the number of slices of TPUs, which only the network of the data centre joins; each
            slice has the whole base.
        devices: by default all devices of all hosts.

    Returns:
        The mesh.

    Raises:
        ShardingError: the text has another form, or the product of the sizes is not the number of
            devices; or they are in several slices, and `slice` is not their number.

    Example:
        >>> make_mesh("data=-1,model=1").axis_names
        ('data', 'model')
    """
    if not isinstance(axes, str | Mapping):
        raise ShardingError(
            f"make_mesh: axes={shown(axes)}, expected sizes by name; write "
            "aj.make_mesh('data=4,model=2') or aj.make_mesh({'data': 4, 'model': 2})"
        )
    sizes = mesh_sizes(axes) if isinstance(axes, str) else dict(axes)
    devices = jax.devices() if devices is None else devices
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    open_ones = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_ones) == 1 and known > 0:
        sizes[open_ones[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or min(sizes.values(), default=0) < 1:
        raise ShardingError(
            f"mesh {text!r} does not multiply to the {len(devices)} devices that there are; "
            f"write data={len(devices)}, or factors of {len(devices)}"
        )
    # Auto axes leave the choice to GSPMD. With explicit ones, which jax may make by default, every
    # operation of a model would have to fit the shardings of its inputs.
    kinds = (AxisType.Auto,) * len(sizes)
    # GPUs have this number too, one for each host, but no slower network between slices.
    slices = {getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}
    if len(slices) > 1:
        if sizes.get(SLICE) != len(slices):
            raise ShardingError(
                f"mesh {text!r}: the {len(devices)} devices are in {len(slices)} slices; write "
                f"{SLICE}={len(slices)} and the axes of one slice, as in "
                f"{SLICE}={len(slices)},fsdp=-1"
            )
        inside = [1 if name == SLICE else size for name, size in sizes.items()]
        between = [size if name == SLICE else 1 for name, size in sizes.items()]
        placed = mesh_utils.create_hybrid_device_mesh(inside, between, devices)
        return Mesh(placed, tuple(sizes), axis_types=kinds)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), kinds, devices=devices)


def check_mesh(caller: str, mesh: Any) -> None:
    """Raises ShardingError where an argument is not a mesh."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        text = mesh if isinstance(mesh, str) and "=" in mesh else "data=-1"
        raise ShardingError(
            f"{caller}: mesh={shown(mesh)}, expected a mesh; write aj.make_mesh({text!r})"
        )


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes by name, of a text such as `"data=4,model=2"`."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in pairs}
    whole = {name for name, size in sizes.items() if size.removeprefix("-").isdecimal()}
    wrong = [f"{n}={s}" for n, s in sizes.items() if not n.isidentifier() or n not in whole]
    if wrong or len(sizes) < len(pairs):
        raise ShardingError(
            f"mesh {text!r} does not read as NAME=SIZE,...: {', '.join(wrong) or 'a name twice'}; "
            "write data=4,model=2"
        )
    return {name: int(size) for name, size in sizes.items()}


def check_axes(names: Iterable[str]) -> None:
    """Raises ShardingError for an axis over which the commands split nothing."""
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise ShardingError(
            f"--mesh: {', '.join(map(repr, unknown))} is not an axis of it; the axes are "
            f"{', '.join(AXES)}"
        )


def mesh_of_flag(text: str | None, rows: int, flag: str) -> Mesh | None:
    """The mesh of a command's `--mesh`; it splits batches of `rows`, which the flag `flag` gives.

    Raises:
        ShardingError: the flag does not read, the devices are others, or the rows do not split.
    """
    if text is None:
        return None
    mesh = make_mesh(text)
    check_axes(mesh.axis_names)
    try:
        batch_sharding(rows, mesh)
    except ShardingError as error:
        raise ShardingError(f"{flag} {rows}: {error}") from None
    return mesh


def batch_parts(sizes: Mapping[str, int]) -> int:
    """The number of parts that a mesh with axes of these sizes splits a batch into."""
    return math.prod(sizes.get(name, 1) for name in BATCH)


def place(x: Any, sharding: Sharding) -> Any:
    """Puts an array onto devices; on several hosts each has the whole array and copies its part.

    Args:
        x: an array of numpy or jax, or a random key; an abstract array gets the sharding.
        sharding: on any mesh.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    # device_put takes no array of one process to devices of another.
    if sharding.is_fully_addressable or getattr(x, "sharding", None) == sharding:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        # jax.make_array_from_callback takes numbers alone, and a key is words with a type around
        # them.
        words = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    own = np.asarray(x)
    return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])


def local_rows(rows: int, mesh: Mesh) -> slice:
    """The rows of a batch that this process's devices need: all of them in a single process.

    Args:
        rows: the number of rows of the batch, over all processes.
        mesh: of named axes.

    Returns:
        The first row and the row behind the last one.

    Raises:
        ShardingError: the mesh's parts do not divide the rows.

    Example:
        >>> local_rows(8, make_mesh("data=-1"))
        slice(0, 8, None)
    """
    where = batch_sharding(rows, mesh).addressable_devices_indices_map((rows,))
    # One range is enough: jax.make_mesh puts the devices of a process side by side.
    taken = [index[0].indices(rows) for index in where.values() if index is not None]
    return slice(min(start for start, _, _ in taken), max(stop for _, stop, _ in taken))


def shard_batch(batch: Tree, mesh: Mesh, rows: int | None = None) -> Tree:
    """Splits a batch's leading axis over `slice`, `data` and `fsdp`.

    Args:
        batch: arrays `(rows, ...)`, or without axes, which every device gets.
        mesh: of named axes.
        rows: the number of rows over all processes, where `batch` has only the rows that
            `local_rows` gives; by default every process has all rows.

    Returns:
        The batch on the mesh, `(rows, ...)`.

    Raises:
        ShardingError: the mesh's parts do not divide the rows, or the batch lacks the rows that
            this process needs; or `mesh` is not a mesh, or has only axes of other names.

    Example:
        >>> batch = shard_batch(np.ones((8, 3)), make_mesh("data=-1"))
        >>> batch.shape, batch.sharding.mesh.axis_names
        ((8, 3), ('data',))
    """
    check_mesh("shard_batch", mesh)

    def put(x: Any) -> Any:
        shape = np.shape(x)
        if not shape:
            return place(x, NamedSharding(mesh, P()))
        sharding = batch_sharding(shape[0] if rows is None else rows, mesh)
        if rows is None:
            return place(x, sharding)
        own = local_rows(rows, mesh)
        if shape[0] != own.stop - own.start:
            raise ShardingError(
                f"a batch of {shape[0]} rows, expected the {own.stop - own.start} from {own.start} "
                f"on, of {rows}, in this process; take batch[aj.local_rows({rows}, mesh)]"
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), (rows, *shape[1:]))

    return jax.tree.map(put, batch)


def batch_sharding(rows: int, mesh: Mesh) -> NamedSharding:
    """The sharding of a batch.

    Raises:
        ShardingError: the parts do not divide its rows, or no axis has a name that splits a batch.
    """
    others = {name for name, size in mesh.shape.items() if size > 1} - {*AXES}
    if others and not {*BATCH} & {*mesh.axis_names}:  # or every device would compute all rows
        raise ShardingError(
            f"no axis of the mesh splits a batch: it has {', '.join(mesh.axis_names)}, expected "
            f"data, fsdp or {SLICE}; rename one, or add data=1 if all devices shall have all rows"
        )
    names, parts = tuple(n for n in BATCH if mesh.shape.get(n, 1) > 1), batch_parts(mesh.shape)
    if rows % parts:
        raise ShardingError(
            f"a batch of {rows} rows does not split into {parts} parts "
            f"({', '.join(f'{n}={mesh.shape[n]}' for n in names)}); choose a multiple of {parts}"
        )
    # Axes of size 1 are left out: they would split nothing, and make equal shardings compare
    # unequal.
    return NamedSharding(mesh, P(names) if names else P())
