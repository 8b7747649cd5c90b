"""What a traced program computes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any


def operations(traced: Any) -> Counter[str]:
    """How many operations of each name a traced program has.

    Those of the functions in it count too, and those of one branch of each condition.
    """
    return Counter(_names(traced.jaxpr))


def _names(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            yield from _names(eqn.params["jaxpr"].jaxpr)
            continue
        yield eqn.primitive.name
        if eqn.primitive.name == "cond":
            yield from _names(eqn.params["branches"][0].jaxpr)
        elif eqn.primitive.name == "custom_jvp_call":
            yield from _names(eqn.params["call_jaxpr"].jaxpr)
        elif eqn.primitive.name == "remat2":
            yield from _names(eqn.params["jaxpr"])
