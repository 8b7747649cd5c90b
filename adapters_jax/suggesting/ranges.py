"""Finds which outputs of a fused layer make the queries, and which the keys or values."""

from collections.abc import Sequence

from adapters_jax.suggesting.graph import Graph, Operation

_Range = tuple[int, int, int]  # a product, then the start and the stop of its outputs


class Ranges:
    """For every value, the product that it is a part of, and the least range that has all of it.

    A range gets smaller where the product's last axis is sliced or split while it is whole. After a
    reshape into heads it stays as it is, so that heads with queries, keys and values in turns
    have the range of all outputs.
    """

    def __init__(self, graph: Graph):
        self._shapes = graph.shapes
        self._found: list[_Range | None] = [None] * len(graph.shapes)

    def begin(self, number: int, output: int, kept: int) -> None:
        """Notes a product with as many outputs as `kept`."""
        self._found[output] = number, 0, kept

    def visit(self, operation: Operation, active: Sequence[int]) -> None:
        """Notes an operation on some activations."""
        parts = {part for x in active if (part := self._found[x])}
        if len({number for number, _, _ in parts}) != 1:
            return
        number = next(iter(parts))[0]
        start, stop = min(a for _, a, _ in parts), max(b for _, _, b in parts)
        shape = self._shapes[active[0]]
        whole = len(active) == 1 and shape[-1:] == (stop - start,)
        splits = whole and operation.name == "split" and operation.params["axis"] == len(shape) - 1
        if whole and operation.name == "slice":
            start += int(operation.params["start_indices"][-1])
            stop = start + self._shapes[operation.outputs[0]][-1]
        for output in operation.outputs:
            if splits:
                stop = start + self._shapes[output][-1]
            self._found[output] = number, start, stop
            start = stop if splits else start

    def of(self, value: int, number: int) -> tuple[int, int] | None:
        """The outputs of a product that a value is made of; None if it is made of others too."""
        found = self._found[value]
        return found[1:] if found and found[0] == number else None
