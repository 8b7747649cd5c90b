"""Finds attentions: two products of activations with a softmax between.

The axes of the first product are followed up to the second one, which sums over the positions of
the keys. So it does not matter in which order a program writes queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters_jax.trace.primitives import Labels, moved
from adapters_jax.trace.program import Graph, Operation

_EXPONENTIALS = ("exp", "exp2", "logistic")


@dataclass(frozen=True)
class Attention:
    """The values that the two products of an attention read, and the operation of the second."""

    query: int
    key: int
    value: int
    operation: int


class Softmaxes:
    """The attentions of a graph.

    Attributes:
        found: in the order of the program.
    """

    def __init__(self, graph: Graph):
        n = len(graph.avals)
        self.found: list[Attention] = []
        self._graph = graph
        self._operands: dict[int, tuple[int, int]] = {}  # of products of activations
        # For every value the products that it is made of, with whether an exponential comes after.
        self._logits: list[dict[int, bool]] = [{} for _ in range(n)]
        # For each axis of such a value, the operands of the product that it comes from: 0 the left
        # one, 1 the right one; none of them where it is an axis of both or a new one.
        self._axes: list[Labels] = [()] * n

    def visit(self, operation: Operation, active: Sequence[int]) -> None:
        """Notes an operation that is no product with a weight."""
        logits: dict[int, bool] = {}
        for x in active:
            for first, seen in self._logits[x].items():
                seen = seen or operation.name in _EXPONENTIALS
                logits[first] = logits.get(first, False) or seen
        for output in operation.outputs:
            self._logits[output] = logits
            self._axes[output] = self._moved(operation) if logits else ()

    def meet(self, number: int, operation: Operation, left: int, right: int) -> bool:
        """Notes a product of two activations; says whether it is the second of an attention."""
        (contracted, batch), (output,) = operation.params["dimension_numbers"], operation.outputs
        firsts: list[int] = []
        for side, (weights, value) in enumerate(((left, right), (right, left))):
            axes = self._axes[weights]
            summed = {x for axis in contracted[side] if axis < len(axes) for x in axes[axis]}
            firsts = [first for first, seen in self._logits[weights].items() if seen]
            for first in firsts:
                a, b = self._operands[first]
                query, key = (b, a) if summed == {0} else (a, b)
                self.found.append(Attention(query, key, value, number))
            if firsts:
                break
        free = [
            len(self._graph.shape(x)) - len(contracted[i]) - len(batch[i])
            for i, x in enumerate((left, right))
        ]
        self._operands[number] = left, right
        self._logits[output] = {number: False, **dict.fromkeys(firsts, True)}
        none, own = frozenset[int](), (frozenset([0]), frozenset([1]))
        self._axes[output] = (none,) * len(batch[0]) + own[:1] * free[0] + own[1:] * free[1]
        return bool(firsts)

    def chunks(self, a: int, b: int) -> bool:
        """Whether two values are parts of one attention, which a loop over the keys sums up."""
        return not self._logits[a].keys().isdisjoint(self._logits[b])

    def _moved(self, operation: Operation) -> Labels:
        """Where the axes of an operation's output come from; empty if that is unknown."""
        found = next((x for x in operation.inputs if self._axes[x]), None)
        if found is None:
            return ()
        axes, old = self._axes[found], self._graph.shape(found)
        new = self._graph.shape(operation.outputs[0])
        after = moved(operation.name, operation.params, axes, old, new)
        return after if len(after) == len(new) else ()
