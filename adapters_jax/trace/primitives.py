"""What jax's primitives do with the axes of their operands: one table for all who follow values.

The names and parameters of primitives are no public interface of jax, and differ between its
releases (`pjit` became `jit`, the operands of a scan moved). Whatever depends on them is here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.lax import GatherScatterMode

# Operations whose outputs are their first operand's numbers, moved, cast or copied.
COPIES = (
    "convert_element_type", "copy", "copy_p", "mesh_cast", "name", "pvary", "reduce_precision",
    "reshard", "sharding_constraint", "stop_gradient",
)  # fmt: skip
_MOVES = ("concatenate", "expand_dims", "gather", "pad", "reshape", "rev", "squeeze", "transpose")
_PARTS = ("broadcast_in_dim", "dynamic_slice", "slice", "split", "stack", "unstack")
_OF_SCANS = ("layer", "layers")  # of `Graph`
LAYOUT = frozenset(COPIES + _MOVES + _PARTS + _OF_SCANS)
# Products and sums, and what is linear in one operand while the others are numbers.
PRODUCTS = ("conv_general_dilated", "dot_general", "ragged_dot_general")
_SUMS = ("add", "add_any", "cumsum", "psum", "reduce_sum", "scatter", "scatter-add", "sub")
LINEAR = LAYOUT | {*PRODUCTS, *_SUMS, "div", "dynamic_update_slice", "mul", "neg", "select_n"}

Origin = list[int | None]  # for each axis of a result the operand's axis that it is; None: new


def origin_of_axes(name: str, params: Mapping[str, Any], ndim: int, shape: Sequence[int]) -> Origin:
    """Where the axes of a result are in the operand, for what keeps each of them whole or cuts it.

    Args:
        name: the primitive; for one that is not known here, the axes stay where they are.
        ndim: the number of axes of its first operand.

    Example:
        >>> origin_of_axes("transpose", {"permutation": (1, 0)}, 2, (5, 4))
        [1, 0]
        >>> origin_of_axes("broadcast_in_dim", {"broadcast_dimensions": (1,)}, 1, (3, 4))
        [None, 0]
    """
    if name == "transpose":
        return list(params["permutation"])
    if name == "broadcast_in_dim":
        where = {new: old for old, new in enumerate(params["broadcast_dimensions"])}
        return [where.get(axis) for axis in range(len(shape))]
    if name == "squeeze" or name.startswith("reduce_"):
        gone = {axis % ndim for axis in params.get("dimensions", params.get("axes", ()))}
        return [axis for axis in range(ndim) if axis not in gone]
    if name == "layer":
        return list(range(1, ndim))
    if name == "unstack":
        return [axis for axis in range(ndim) if axis != params["axis"]]
    if name == "stack":
        return [*range(params["axis"]), None, *range(params["axis"], ndim)]
    return list(range(ndim))


def rows_of(params: Mapping[str, Any], shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The axis along which a gather takes whole rows, and where the other axes are in its result.

    Args:
        shape: the shape of what it gathers from.

    Returns:
        Lists with the one axis and the places; without anything where it gathers otherwise.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> traced = jax.make_jaxpr(lambda x, i: x[i])(jnp.ones((7, 4)), jnp.arange(3))
        >>> rows_of(traced.eqns[-1].params, (7, 4))
        ([0], [1])
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    # `x[i]` in a batch also has starts along the whole axes, which are clipped to 0.
    clipped = params["mode"] != GatherScatterMode.FILL_OR_DROP
    starts = [i for i in numbers.start_index_map if not (clipped and sizes[i] == shape[i])]
    kept = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
    whole = all(size == (1 if i in starts else shape[i]) for i, size in enumerate(sizes))
    if len(starts) != 1 or not whole or numbers.operand_batching_dims:
        return [], []
    places = zip(kept, numbers.offset_dims, strict=True)
    return starts, [place for i, place in places if i not in starts]


class Contraction(NamedTuple):
    """How an operand meets the other one in a product, by the numbers of its axes.

    Attributes:
        inputs: the axes that are summed.
        batch: the axes that both operands have; each sum sees one index of them.
        window: those of the inputs that run over positions, as a convolution's do.
    """

    inputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    window: tuple[int, ...] = ()

    @property
    def gone(self) -> frozenset[int]:
        """The axes that the output does not keep as features."""
        return frozenset((*self.inputs, *self.batch))


def contraction(name: str, params: Mapping[str, Any], side: int) -> Contraction:
    """How the weight of a product meets its input.

    Args:
        name: one of `PRODUCTS`.
        side: 0 if the weight is the left operand, 1 if it is the right one.
    """
    if name == "conv_general_dilated":
        _, inner, *window = params["dimension_numbers"].rhs_spec
        return Contraction((inner, *window), (), tuple(window))
    groups: tuple[int, ...] = ()
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        groups = tuple(numbers.rhs_group_dimensions) if side == 1 else ()
        summed, batch = numbers.dot_dimension_numbers
    else:
        summed, batch = params["dimension_numbers"]
    return Contraction(tuple(summed[side]), (*groups, *batch[side]))


def operands_of_scan(
    operands: Sequence[Any], params: Mapping[str, Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The constants, the initial carry and the stacked operands of a scan, given its parameters."""
    if "ft_in" in params:  # since jax 0.12
        consts, carry, xs = (list(part) for part in params["ft_in"].update(operands).unpack())
        return consts, carry, xs
    n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:n]), list(operands[n:m]), list(operands[m:])


def blocks_of(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of consecutive axes of equal sizes in two shapes of one array.

    Example:
        >>> blocks_of((4, 6, 5), (4, 2, 3, 5))
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(left), j + len(right)
        while (size := math.prod(old[a] for a in left)) != (
            other := math.prod(new[a] for a in right)
        ):
            if size < other:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        blocks.append((left, right))
    return blocks


Labels = tuple[frozenset[Any], ...]  # for each axis of a value, what is found in it


def moved(
    name: str, params: Mapping[str, Any], labels: Labels, old: Sequence[int], new: Sequence[int]
) -> Labels:
    """The labels of a result's axes, given those of the first operand's.

    An axis that several become has the labels of all; axes that one becomes have each its labels.

    Args:
        name: the primitive, one that moves numbers or sums them.
        labels: what is found in each axis of the operand.
        old: the operand's shape.
        new: the result's shape.

    Example:
        >>> labels = tuple(map(frozenset, ("b", "l", "r")))
        >>> [*map(sorted, moved("reshape", {}, labels, (2, 6, 5), (12, 5, 1)))]
        [['b', 'l'], ['r'], []]
    """
    none = frozenset[Any]()
    if name != "reshape":
        origin = origin_of_axes(name, params, len(old), new)
        return tuple(none if axis is None else labels[axis] for axis in origin)
    after = [none] * len(new)
    for left, right in blocks_of(old, new):
        inside = none.union(*(labels[axis] for axis in left))
        for axis in right:
            after[axis] = inside if new[axis] > 1 or len(right) == 1 else none
    return tuple(after)
