"""Finds attentions: two products of activations with a softmax between.

The axes of the first product are followed up to the second one, which sums over the positions of
the keys. So it does not matter in which order a program writes queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters_jax.suggesting.graph import Graph, Operation

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
        n = len(graph.shapes)
        self.found: list[Attention] = []
        self._graph = graph
        self._operands: dict[int, tuple[int, int]] = {}  # of products of activations
        # For every value the products that it is made of, with whether an exponential comes after.
        self._logits: list[dict[int, bool]] = [{} for _ in range(n)]
        # For each axis of such a value, the operands of the product that it comes from: "l" left,
        # "r" right, "b" both or none.
        self._axes: list[Sequence[str]] = [()] * n

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
            summed = "".join(axes[axis] for axis in contracted[side] if axis < len(axes))
            firsts = [first for first, seen in self._logits[weights].items() if seen]
            for first in firsts:
                a, b = self._operands[first]
                query, key = (b, a) if "l" in summed and "r" not in summed else (a, b)
                self.found.append(Attention(query, key, value, number))
            if firsts:
                break
        free = [
            len(self._graph.shapes[x]) - len(contracted[i]) - len(batch[i])
            for i, x in enumerate((left, right))
        ]
        self._operands[number] = left, right
        self._logits[output] = {number: False, **dict.fromkeys(firsts, True)}
        self._axes[output] = ["b"] * len(batch[0]) + ["l"] * free[0] + ["r"] * free[1]
        return bool(firsts)

    def chunks(self, a: int, b: int) -> bool:
        """Whether two values are parts of one attention, which a loop over the keys sums up."""
        return not self._logits[a].keys().isdisjoint(self._logits[b])

    def _moved(self, operation: Operation) -> Sequence[str]:
        """Where the axes of an operation's output come from; empty if that is unknown."""
        found = next((x for x in operation.inputs if x is not None and self._axes[x]), None)
        if found is None:
            return ()
        axes, name, params = self._axes[found], operation.name, operation.params
        shape = self._graph.shapes[operation.outputs[0]]
        if name == "transpose":
            return [axes[axis] for axis in params["permutation"]]
        if name == "reshape":
            return _regrouped(axes, self._graph.shapes[found], shape)
        if name == "broadcast_in_dim":
            where = dict(zip(params["broadcast_dimensions"], axes, strict=True))
            return [where.get(axis, "b") for axis in range(len(shape))]
        gone = params.get("axes", params.get("dimensions", ()))
        if name == "squeeze" or name.startswith("reduce_"):
            return [label for axis, label in enumerate(axes) if axis not in gone]
        return axes if len(axes) == len(shape) else ()


def _regrouped(labels: Sequence[str], old: Sequence[int], new: Sequence[int]) -> list[str]:
    """The labels of axes after a reshape; an axis that several become has all their labels.

    Example:
        >>> _regrouped(["b", "l", "r"], (2, 6, 5), (2, 3, 2, 5))
        ['b', 'l', 'l', 'r']
        >>> _regrouped(["b", "l", "r"], (2, 6, 5), (12, 5, 1))
        ['bl', 'r', '']
    """
    regrouped: list[str] = []
    i = j = 0
    while i < len(old) or j < len(new):
        start, a, b = i, 1, 1
        before = j
        while a != b or (i, j) == (start, before):
            if j == len(new) or (a <= b and i < len(old)):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        regrouped += ["".join(labels[start:i])] * (j - before)
    return regrouped
