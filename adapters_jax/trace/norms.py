"""Finds the parameters of norms: those that scale or shift an array divided by its own statistics.

Step by step: a *statistic* of an array (a mean of squares), its *root* or *inverse* root, the array
*normed* by it, then *scaled* by a parameter, and shifted by another one. Libraries differ in the
order: the parameter may scale the inverse first, or the array before it is divided.
"""

from collections.abc import Sequence

from adapters_jax.trace.primitives import LAYOUT, LINEAR
from adapters_jax.trace.program import Graph, Operation

_NO_GAIN: tuple[frozenset[str], int] = (frozenset(), -1)


class Norms:
    """The norms of a graph.

    Attributes:
        found: their parameters, in the order of the program.
    """

    def __init__(self, graph: Graph):
        n = len(graph.avals)
        self.found: dict[str, None] = {}
        self._graph = graph
        self._step = [""] * n
        self._base = list(range(n))  # the value that, with no other one, a value was made of
        self._gain = [_NO_GAIN] * n  # parameters that scale a value, and the base of that value

    def visit(self, operation: Operation, active: Sequence[int], weights: frozenset[str]) -> None:
        """Notes an operation on some activations and on values made of parameters."""
        step = self._next(operation, active, weights)
        bases = {self._base[x] for x in active}
        gain = _NO_GAIN
        if len(active) == 1 and operation.name in LAYOUT:
            gain = self._gain[active[0]]
        elif len(active) == 1 and operation.name == "mul" and weights:
            gain = weights, self._base[active[0]]
        for output in operation.outputs:
            self._step[output], self._gain[output] = step, gain
            self._base[output] = min(bases) if len(bases) == 1 and not weights else output

    def _next(self, operation: Operation, active: Sequence[int], weights: frozenset[str]) -> str:
        """The step that the outputs of an operation are at; empty for none."""
        name, steps = operation.name, [self._step[x] for x in active]
        if name == "reduce_sum" and active:
            axes, last = operation.params["axes"], len(self._graph.shape(active[0])) - 1
            return "" if 0 in axes and last not in axes else "statistic"  # not that of a batch
        if name == "dot_general":
            return "statistic" if len(active) == 2 and active[0] == active[1] else ""
        if len(active) == 1:
            return self._alone(name, steps[0], weights)
        if name in ("mul", "div") and len(active) == 2:
            if "scaled inverse" in steps:
                return "scaled"
            if (name == "div" and steps[1] == "root") or (name == "mul" and "inverse" in steps):
                return "scaled" if self._scaled_before(*active) else "normed"
        return steps[0] if len(set(steps)) == 1 and steps[0] != "inverse" else ""

    def _alone(self, name: str, step: str, weights: frozenset[str]) -> str:
        """The step after an operation on one activation, with numbers or parameters beside it."""
        if step == "statistic":
            return {"rsqrt": "inverse", "pow": "inverse", "sqrt": "root"}.get(name, step)
        if step == "root" and name == "div":
            return "inverse"
        if name == "mul" and weights and step in ("inverse", "normed"):
            self._note(weights)
            return "scaled inverse" if step == "inverse" else "scaled"
        if name == "add" and weights and step in ("normed", "scaled"):
            self._note(weights)
            return ""
        return step if name in LINEAR and not weights else ""

    def _scaled_before(self, a: int, b: int) -> bool:
        """Whether one of two values is scaled by parameters that the other's statistic has not."""
        for x, y in ((a, b), (b, a)):
            weights, base = self._gain[x]
            if weights and self._base[y] == base:
                self._note(weights)
                return True
        return False

    def _note(self, weights: frozenset[str]) -> None:
        self.found.update(dict.fromkeys(sorted(weights)))
