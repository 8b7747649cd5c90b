"""What the values of a model are made of: products, sums, attentions, and modules around them.

Where a layer's output is added to its input, a *sum*, the residual stream goes on.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from adapters_jax.trace import parts
from adapters_jax.trace.activations import Scores, Seen
from adapters_jax.trace.following import read
from adapters_jax.trace.norms import Norms
from adapters_jax.trace.primitives import LINEAR
from adapters_jax.trace.program import Graph, Operation
from adapters_jax.trace.reads import Reads

# The names of what a module takes and returns; the module's path follows.
ENTERS, RETURNS = "adapters_jax enters ", "adapters_jax returns from "
_KERNELS = ("attention", "pallas", "custom_call", "ffi_call", "callback")


@dataclass(frozen=True)
class Trace:
    """A model's graph.

    Attributes:
        graph: the operations of a call of the model.
        parameters: the path of each value that is a parameter, or a part of one.
        arguments: the values that are example inputs; the others are the model's state.
        modules: the paths of the modules, the model itself under the empty one.
    """

    graph: Graph
    parameters: Mapping[int, str]
    arguments: frozenset[int]
    modules: frozenset[str]


@dataclass(frozen=True)
class Attention:
    """The values that the two products of an attention read, and the operation of the second."""

    query: int
    key: int
    value: int
    operation: int


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
        graph = traced.graph
        self.sums: dict[int, tuple[frozenset[int], frozenset[int]]] = {}
        self.taken: dict[str, int] = {}
        self.returned: dict[str, list[int]] = {}
        self.kernels: set[str] = set()
        self.sources: list[dict[int, bool]] = [{} for _ in graph.avals]
        self.ranges = Ranges(graph)
        self.attentions: list[Attention] = []
        self._graph, self._norms = graph, Norms(graph)
        self._seen: dict[int, Seen] = {}  # activations, as a prompt would follow them
        self._reads = Reads(graph, traced.parameters, traced.arguments)
        self.products, self.lookups = self._reads.products, self._reads.lookups
        for value in traced.arguments:
            self._begin(value)
        for number, operation in enumerate(graph.operations):
            self._visit(number, operation)

    @property
    def norms(self) -> tuple[str, ...]:
        """The parameters that scale or shift an array divided by its own statistics."""
        return tuple(self._norms.found)

    def _begin(self, value: int) -> None:
        """An activation that comes from nowhere: an input of the model, or a learned one."""
        self._reads.begin(value)
        self._seen[value] = Seen(value, parts.rows(self._graph.shape(value)))
        self.sources[value] = {-1 - value: False} if self._graph.is_float(value) else {}

    def _visit(self, number: int, operation: Operation) -> None:
        """Fills in the facts about an operation's outputs."""
        meets = self._reads.visit(number, operation)
        read(self._graph, number, self._seen)
        for output in operation.outputs:
            if not self._reads.active[output]:  # as of a weight that an input has chosen
                self._seen.pop(output, None)
        if meets:
            (output,) = operation.outputs
            self.sources[output] = {number: False}
            if number in self.products:
                self.ranges.begin(number, output, self.products[number].kept)
        else:
            self._pass(number, operation)
        if operation.name == "name":
            self._mark(operation.params["name"], operation.outputs[0])
        elif operation.outputs and any(part in operation.name for part in _KERNELS):
            self.kernels.add(operation.name)
            for output in operation.outputs:
                self.sources[output] = {number: False}

    def _pass(self, number: int, operation: Operation) -> None:
        """Any operation but a weight that meets an activation."""
        reads = self._reads
        active = [x for x in operation.inputs if reads.active[x]]
        weights = frozenset(leaf for x in operation.inputs for leaf in reads.leaves[x])
        sources = self._made_of(number, operation, active)
        for output in operation.outputs:
            self.sources[output] = sources
        self._norms.visit(operation, active, weights)
        self.ranges.visit(operation, active)
        inner = len(active) == 2 and operation.name == "dot_general"
        if inner and self._is_second(number, operation):
            self.sources[operation.outputs[0]] = {number: False}

    def _is_second(self, number: int, operation: Operation) -> bool:
        """Whether a product of two activations is the second one of an attention, which is noted.

        It sums over the positions of the keys. So a program may write queries and keys in
        either order.
        """
        contracted, _ = operation.params["dimension_numbers"]
        both = [self._seen[x] for x in operation.inputs]
        for side, (weights, value) in enumerate((both, both[::-1])):
            summed = {part for axis in contracted[side] for part in weights.axes[axis]}
            origins = [p.source.axes[p.axis] for p in summed if isinstance(p.source, Scores)]
            # The positions of the keys are an axis of one operand of the first product alone.
            swapped = {left is None for left, right in origins if None in (left, right)} == {False}
            firsts = [scores for scores, past in weights.made.items() if past]
            for scores in firsts:
                query, key = (x.value for x in scores.operands[:: -1 if swapped else 1])
                self.attentions.append(Attention(query, key, value.value, number))
            if firsts:
                return True
        return False

    def _made_of(self, number: int, operation: Operation, active: list[int]) -> dict[int, bool]:
        """The sources of an operation's outputs; those of a residual sum begin anew."""
        if operation.name in ("add", "add_any") and len(active) == 2:
            a, b = (frozenset(self.sources[x]) for x in active)
            # A loop over the keys sums up parts of one attention.
            one, other = (self._seen[x].made.keys() for x in active)
            if not (a <= b or b <= a or one & other):
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
            if not self._reads.active[value]:  # a parameter where other modules take an activation
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


_Range = tuple[int, int, int]  # a product, then the start and the stop of its outputs


class Ranges:
    """For every value, the product that it is a part of, and the least range that has all of it.

    A range gets smaller where the product's last axis is sliced or split while it is whole. After a
    reshape into heads it stays as it is, so that heads with queries, keys and values in turns
    have the range of all outputs.
    """

    def __init__(self, graph: Graph):
        self._graph = graph
        self._found: list[_Range | None] = [None] * len(graph.avals)

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
        shape = self._graph.shape(active[0])
        whole = len(active) == 1 and shape[-1:] == (stop - start,)
        splits = whole and operation.name == "split" and operation.params["axis"] == len(shape) - 1
        if whole and operation.name == "slice":
            start += int(operation.params["start_indices"][-1])
            stop = start + self._graph.shape(operation.outputs[0])[-1]
        for output in operation.outputs:
            if splits:
                stop = start + self._graph.shape(output)[-1]
            self._found[output] = number, start, stop
            start = stop if splits else start

    def of(self, value: int, number: int) -> tuple[int, int] | None:
        """The outputs of a product that a value is made of; None if it is made of others too."""
        found = self._found[value]
        return found[1:] if found and found[0] == number else None
