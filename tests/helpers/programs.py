"""What a traced program computes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any


def operations(traced: Any) -> Counter[str]:
    """How many operations of each name a traced program has, those of jitted functions too."""
    return Counter(_names(traced.jaxpr))


def _names(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            yield from _names(eqn.params["jaxpr"].jaxpr)
        else:
            yield eqn.primitive.name
