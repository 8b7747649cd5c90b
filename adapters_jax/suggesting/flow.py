"""Follows parameters and activations through a model's graph.

A weight meets an activation in a *product* (a matrix product or a convolution) or in a *lookup*
(rows of a table). Where a layer's output is added to its input, a *sum*, the residual stream goes
on.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapters_jax.suggesting.graph import LAYOUT, LINEAR, PRODUCTS, Operation, Value
from adapters_jax.suggesting.norms import Norms
from adapters_jax.suggesting.ranges import Ranges
from adapters_jax.suggesting.softmax import Attention, Softmaxes
from adapters_jax.suggesting.trace import ENTERS, RETURNS, Trace

_KERNELS = ("attention", "pallas", "custom_call", "ffi_call", "callback")


@dataclass(frozen=True)
class Product:
    """A weight that meets an activation.

    Attributes:
        leaves: the parameters that the weight is made of.
        source: the activation.
        contracted: how many numbers of the activation go into a sum.
        kept: how many such sums there are.
        window: the size of a convolution's window; 1 elsewhere.
    """

    leaves: frozenset[str]
    source: int
    contracted: int
    kept: int
    window: int = 1


@dataclass(frozen=True)
class Lookup:
    """A table whose rows are read; by the model's inputs, or by positions that are constants."""

    leaves: frozenset[str]
    rows: int
    by_input: bool


class Flow:
    """What every value of a graph is made of.

    Args:
        traced: the model. Its state, such as random keys and a batch norm's averages, counts as
            constants.

    Attributes:
        products, lookups: by the number of their operation.
        attentions, norms: in the order of the program.
        sums: by the number of their operation, the sources of both terms.
        sources: for every value, the numbers of the operations that it is made of, each with
            whether something that is not linear comes after it. Not looked for beyond products,
            lookups, attentions, sums and kernels; a float input has a negative number.
        taken: the first array that a module takes in its last call, by the module's path.
        returned: the values that it returns.
        ranges: which outputs of a product a value is made of.
        kernels: names of operations that cannot be looked into.
    """

    def __init__(self, traced: Trace):
        graph, parameters = traced.graph, traced.parameters
        n = len(graph.shapes)
        self.products: dict[int, Product] = {}
        self.lookups: dict[int, Lookup] = {}
        self.sums: dict[int, tuple[frozenset[int], frozenset[int]]] = {}
        self.taken: dict[str, int] = {}
        self.returned: dict[str, list[int]] = {}
        self.kernels: set[str] = set()
        self.sources: list[dict[int, bool]] = [{} for _ in range(n)]
        self.ranges = Ranges(graph)
        self._graph, self._softmaxes, self._norms = graph, Softmaxes(graph), Norms(graph)
        self._active = [False] * n  # whether a value depends on the model's inputs
        self._weights: list[frozenset[str]] = [frozenset()] * n  # else, the parameters in it
        self._onehot = [False] * n
        self._ranks = {path: len(graph.shapes[value]) for value, path in parameters.items()}
        for value, path in parameters.items():
            self._weights[value] = frozenset([path])
        for value in traced.arguments:
            self._begin(value)
        for number, operation in enumerate(graph.operations):
            self._visit(number, operation)

    @property
    def attentions(self) -> list[Attention]:
        """Every pair of products of activations with a softmax between."""
        return self._softmaxes.found

    @property
    def norms(self) -> tuple[str, ...]:
        """The parameters that scale or shift an array divided by its own statistics."""
        return tuple(self._norms.found)

    def _begin(self, value: int) -> None:
        """An activation that comes from nowhere: an input of the model, or a learned one."""
        self._active[value], self._weights[value] = True, frozenset()
        self.sources[value] = {-1 - value: False} if self._graph.floating[value] else {}

    def _visit(self, number: int, operation: Operation) -> None:
        """Fills in the facts about an operation's outputs."""
        first, second = (*operation.inputs, None, None)[:2]
        if operation.name in PRODUCTS and first is not None and second is not None:
            self._meet(number, operation, first, second)
        elif operation.name == "gather" and first is not None and self._weights[first]:
            self._read(number, operation, first, second)
        else:
            self._pass(number, operation)
        if operation.name == "name":
            self._mark(operation.params["name"], operation.outputs[0])
        elif operation.outputs and any(part in operation.name for part in _KERNELS):
            self.kernels.add(operation.name)
            for output in operation.outputs:
                self.sources[output] = {number: False}

    def _meet(self, number: int, operation: Operation, left: int, right: int) -> None:
        """A product: of a weight and an activation, of two activations, or of two weights."""
        (output,) = operation.outputs
        for side, (weight, source) in enumerate(((left, right), (right, left))):
            if self._active[source] and self._weights[weight]:
                self._active[output], self.sources[output] = True, {number: False}
                leaves = self._widest(self._weights[weight])
                sizes = _sizes(operation, side, self._graph.shapes[weight])
                if self._onehot[source]:
                    self.lookups[number] = Lookup(leaves, sizes[0], True)
                else:
                    self.products[number] = Product(leaves, source, *sizes)
                    self.ranges.begin(number, output, sizes[1])
                return
        self._pass(number, operation)
        activations = self._active[left] and self._active[right]
        inner = activations and operation.name == "dot_general"
        if inner and self._softmaxes.meet(number, operation, left, right):
            self.sources[output] = {number: False}

    def _read(self, number: int, operation: Operation, table: int, indices: Value) -> None:
        """Rows of a table, or a weight chosen from a stack of weights, by indices."""
        shape, (output,) = self._graph.shapes[table], operation.outputs
        rows = len(shape) == 2 and tuple(operation.params["slice_sizes"]) == (1, shape[1])
        by_input = indices is not None and self._active[indices]
        if rows:
            leaves = self._widest(self._weights[table])
            self.lookups[number] = Lookup(leaves, shape[0], by_input)
        if rows and by_input:
            self._active[output], self.sources[output] = True, {number: False}
        else:
            self._weights[output] = self._weights[table]

    def _widest(self, leaves: frozenset[str]) -> frozenset[str]:
        """The parameters with the most axes; others only scale them."""
        most = max(self._ranks[leaf] for leaf in leaves)
        return frozenset(leaf for leaf in leaves if self._ranks[leaf] == most)

    def _pass(self, number: int, operation: Operation) -> None:
        """Any other operation."""
        inputs = [x for x in operation.inputs if x is not None]
        if operation.name == "xor":  # only makes quantised weights wait for the layer's input
            inputs = [x for x in inputs if self._weights[x]] or inputs
        active = [x for x in inputs if self._active[x]]
        weights = frozenset(leaf for x in inputs for leaf in self._weights[x])
        sources = self._made_of(number, operation, active)
        onehot = operation.name in LAYOUT and any(self._onehot[x] for x in inputs)
        for output in operation.outputs:
            self._active[output], self.sources[output] = bool(active), sources
            self._weights[output] = frozenset() if active else weights
            self._onehot[output] = onehot or operation.name == "eq"
        self._softmaxes.visit(operation, active)
        self._norms.visit(operation, active, weights)
        self.ranges.visit(operation, active)

    def _made_of(self, number: int, operation: Operation, active: list[int]) -> dict[int, bool]:
        """The sources of an operation's outputs; those of a residual sum begin anew."""
        if operation.name in ("add", "add_any") and len(active) == 2:
            a, b = (frozenset(self.sources[x]) for x in active)
            if not (a <= b or b <= a or self._softmaxes.chunks(*active)):
                self.sums[number] = a, b
                return {number: False}
        bends = self._bends(operation, active)
        sources: dict[int, bool] = {}
        for x in active:
            for source, bent in self.sources[x].items():
                sources[source] = sources.get(source, False) or bent or bends
        return sources

    def _bends(self, operation: Operation, active: list[int]) -> bool:
        """Whether an operation is not linear in the activations."""
        if operation.name in ("mul", "div"):
            return len(active) == 2
        if operation.name == "select_n":
            condition = operation.inputs[0]
            return condition in active and bool(self.sources[active[0]])
        return operation.name not in LINEAR

    def _mark(self, name: str, value: int) -> None:
        """The beginning or the end of a module's call."""
        if name.startswith(ENTERS):
            self.taken[name.removeprefix(ENTERS)] = value
            if not self._active[value]:  # a parameter where other modules take an activation
                self._begin(value)
        elif name.startswith(RETURNS):
            self.returned.setdefault(name.removeprefix(RETURNS), []).append(value)

    def products_in(self, value: int) -> list[int]:
        """The numbers of the products that a value is made of."""
        return [source for source in self.sources[value] if source in self.products]

    def before(self, numbers: Iterable[int]) -> set[int]:
        """The products before some products in series, and the sums and others that they read."""
        found: set[int] = set()
        todo = [n for n in numbers if n in self.products]
        while todo:
            new = self.sources[self.products[todo.pop()].source].keys() - found
            todo.extend(n for n in new if n in self.products)
            found |= new
        return found

    def is_residual(self, number: int) -> bool:
        """Whether a product is added to something that it was made of, perhaps with others."""
        before, parts = self.before([number]), {number}
        for sum_, (a, b) in self.sums.items():
            for branch, other in ((a, b), (b, a)):
                if parts & branch:
                    if before & other:
                        return True
                    parts.add(sum_)
        return False


def _sizes(operation: Operation, side: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The sizes of the contracted and the kept axes of a product's weight, and of its window.

    Args:
        operation: the product.
        side: 0 if the weight is its left operand, 1 if it is its right one.
        shape: the weight's.
    """
    params: Any = operation.params
    if operation.name == "conv_general_dilated":
        kept, contracted, *window = (shape[axis] for axis in params["dimension_numbers"].rhs_spec)
        return contracted, kept, math.prod(window)
    groups: tuple[int, ...] = ()
    if operation.name == "ragged_dot_general":
        params = params["ragged_dot_dimension_numbers"]
        groups = tuple(params.rhs_group_dimensions) if side == 1 else ()
        (contracted, batch) = params.dot_dimension_numbers
    else:
        (contracted, batch) = params["dimension_numbers"]
    others = {*contracted[side], *batch[side], *groups}
    kept = math.prod(n for axis, n in enumerate(shape) if axis not in others)
    return math.prod(shape[axis] for axis in contracted[side]), kept, 1
