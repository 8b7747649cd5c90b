"""A computation with a form of its own for programs that run on one device.

XLA splits a program over the devices of a mesh, but not a kernel of Pallas in it. Over how many
devices it is split is known when it is lowered, so the form is chosen there, as
`jax.lax.platform_dependent` chooses by the platform.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_alone = Primitive("alone")
_alone.multiple_results = True


def where_alone(
    one: Callable[..., Any], several: Callable[..., Any], like: Any, *args: Any
) -> jax.Array:
    """`one(*args)` in a program for one device, and otherwise `several(*args)`.

    Neither is traced before the program is lowered. A derivative is that of `several`.

    Args:
        one: a function of trees of arrays that gives an array.
        several: the same, which XLA can split over devices.
        like: the shape and the dtype of the array.
    """
    leaves, tree = jax.tree.flatten(args)

    def of_leaves(run: Callable[..., Any], *leaves: Any) -> Any:
        return run(*jax.tree.unflatten(tree, leaves))

    forms = {"one": one, "several": several}
    bound = {name: functools.partial(of_leaves, run) for name, run in forms.items()}
    (found,) = _alone.bind(*leaves, **bound, shape=tuple(like.shape), dtype=like.dtype)
    return found


@_alone.def_impl
def _(*leaves: Any, **params: Any) -> list[Any]:
    return jax.jit(lambda *leaves: _alone.bind(*leaves, **params))(*leaves)


@_alone.def_abstract_eval
def _(*avals: Any, shape: Any, dtype: Any, **forms: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype)]


def _lowered(ctx: Any, *leaves: Any, one: Any, several: Any, **like: Any) -> Any:
    # As Pallas itself asks whether a kernel may run: one device, or `shard_map` over all axes.
    where = ctx.module_context.axis_context
    devices = getattr(where, "num_devices", None)
    if devices is None:
        alone = where.manual_axes == frozenset(where.mesh.axis_names)
    else:
        alone = devices == 1
    return mlir.lower_fun(one if alone else several, multiple_results=False)(ctx, *leaves)


mlir.register_lowering(_alone, _lowered, cacheable=False)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def run(*moved: Any) -> Any:
        leaves = list(primals)
        for i, leaf in zip(moving, moved, strict=True):
            leaves[i] = leaf
        return params["several"](*leaves)

    pairs = [primals[i] for i in moving], [tangents[i] for i in moving]
    y, tangent = jax.jvp(run, *pairs)
    return [y], [tangent]


ad.primitive_jvps[_alone] = _differentiated


def _mapped(
    axis: Any, leaves: Any, dims: Any, one: Any, several: Any, shape: Any, dtype: Any
) -> tuple[list[Any], list[int]]:
    mapped = functools.partial(
        jax.vmap, in_axes=dims, axis_size=axis.size, spmd_axis_name=axis.spmd_name
    )
    shape = (axis.size, *shape)
    found = _alone.bind(*leaves, one=mapped(one), several=mapped(several), shape=shape, dtype=dtype)
    return found, [0]


batching.fancy_primitive_batchers[_alone] = _mapped
