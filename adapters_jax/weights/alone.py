"""A computation that has another form in programs that run on one device.

XLA splits a program over the devices of a mesh, but not a kernel of Pallas in it. Over how many
devices it is split is known when it is lowered, so the form is chosen there, as
`jax.lax.platform_dependent` chooses by the platform.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

_alone = Primitive("alone")
_alone.multiple_results = True


def where_alone(one: Callable[..., Any], several: Callable[..., Any], *args: Any) -> jax.Array:
    """`one(*args)` in a program for one device, and otherwise `several(*args)`.

    `one` is not traced before the program is lowered. Who asks about the program sees `several`,
    and a derivative is that of it.

    Args:
        one: a function of trees of arrays that gives an array. It uses no other traced values.
        several: the same, which XLA can split over devices.
    """
    leaves, tree = jax.tree.flatten(args)

    def of_leaves(run: Callable[..., Any], *leaves: Any) -> Any:
        return run(*jax.tree.unflatten(tree, leaves))

    body = jax.make_jaxpr(functools.partial(of_leaves, several))(*leaves)
    (found,) = _alone.bind(*leaves, one=functools.partial(of_leaves, one), several=body)
    return found


@_alone.def_impl
def _(*leaves: Any, **forms: Any) -> list[Any]:
    return jax.jit(lambda *leaves: _alone.bind(*leaves, **forms))(*leaves)


@_alone.def_abstract_eval
def _(*avals: Any, one: Any, several: Any) -> list[Any]:
    return list(several.out_avals)


def _lowered(ctx: Any, *leaves: Any, one: Any, several: Any) -> Any:
    # As Pallas itself asks whether a kernel may run: one device, or `shard_map` over all axes.
    where = ctx.module_context.axis_context
    devices = getattr(where, "num_devices", None)
    if devices is None:
        alone = where.manual_axes == frozenset(where.mesh.axis_names)
    else:
        alone = devices == 1
    run = one if alone else jaxpr_as_fun(several)
    return mlir.lower_fun(run, multiple_results=not alone)(ctx, *leaves)


mlir.register_lowering(_alone, _lowered, cacheable=False)


def _differentiated(primals: Sequence[Any], tangents: Sequence[Any], **forms: Any) -> Any:
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def run(*moved: Any) -> Any:
        leaves = list(primals)
        for i, leaf in zip(moving, moved, strict=True):
            leaves[i] = leaf
        return jaxpr_as_fun(forms["several"])(*leaves)

    return jax.jvp(run, [primals[i] for i in moving], [tangents[i] for i in moving])


ad.primitive_jvps[_alone] = _differentiated


def _mapped(axis: Any, leaves: Any, dims: Any, one: Any, several: Any) -> tuple[list[Any], Any]:
    def general(*leaves: Any) -> Any:
        return jaxpr_as_fun(several)(*leaves)[0]

    forms = (
        jax.vmap(run, in_axes=dims, axis_size=axis.size, spmd_axis_name=axis.spmd_name)
        for run in (one, general)
    )
    return [where_alone(*forms, *leaves)], [0]


batching.fancy_primitive_batchers[_alone] = _mapped
