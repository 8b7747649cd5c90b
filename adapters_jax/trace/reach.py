"""What the outputs of a traced function depend on, and the operands of its scans."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Reach(NamedTuple):
    """What outputs depend on.

    Attributes:
        inputs: for each input, whether some output depends on it.
        names: the names of values that some output depends on.
    """

    inputs: list[bool]
    names: set[str]


def named(tree: Any, name: str) -> Any:
    """A tree whose float arrays have a name that `reaching` finds."""

    def mark(x: Any) -> Any:
        floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
        return checkpoint_name(x, name) if floats else x

    return jax.tree.map(mark, tree)


def reaching(jaxpr: jex.Jaxpr, outputs: Sequence[bool] | None = None) -> Reach:
    """What the outputs of a jaxpr depend on.

    Args:
        jaxpr: the jaxpr.
        outputs: which of the outputs count; by default all.

    Example:
        >>> traced = jax.make_jaxpr(lambda x, y: (named(x, "one") + 1.0, named(y, "two"))[:1])
        >>> reaching(traced(1.0, 2.0).jaxpr)
        Reach(inputs=[True, False], names={'one'})
    """
    wanted = [True] * len(jaxpr.outvars) if outputs is None else outputs
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    names: set[str] = set()
    for eqn in reversed(jaxpr.eqns):
        given = [v in live for v in eqn.outvars]
        if not any(given) and not eqn.effects:
            continue
        if eqn.primitive.name == "name":
            names.add(eqn.params["name"])
        used = [True] * len(eqn.invars)
        for inner in _inside(eqn):
            is_call = len(inner.outvars) == len(given) and eqn.primitive.name in _CALLS
            below = reaching(inner, given if is_call else None)
            names |= below.names
            used = below.inputs if is_call and len(below.inputs) == len(used) else used
        live |= {v for v, use in zip(eqn.invars, used, strict=True) if use and _is_var(v)}
    return Reach([v in live for v in jaxpr.invars], names)


def operands_of_scan(
    operands: Sequence[Any], params: Mapping[str, Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The constants, the initial carry and the stacked operands of a scan, given its parameters."""
    if "ft_in" in params:  # since jax 0.12
        consts, carry, xs = (list(part) for part in params["ft_in"].update(operands).unpack())
        return consts, carry, xs
    n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[:n]), list(operands[n:m]), list(operands[m:])


_CALLS = ("jit", "pjit", "remat2", "checkpoint", "closed_call")


def _is_var(v: Any) -> bool:
    return not isinstance(v, jex.Literal)


def _inside(eqn: Any) -> Iterator[jex.Jaxpr]:
    """The jaxprs among an operation's parameters."""
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if isinstance(jaxpr, jex.Jaxpr):
                yield jaxpr
