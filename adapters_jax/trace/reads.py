"""Who reads the leaves of a model, and how: where weights meet activations in a program.

A weight meets an activation in a *product* (a matrix product or a convolution) or in a *lookup*
(rows of a table). On its way there it may be cast, transposed, cut or chosen from a stack of
layers; its axes are found again by what each operation does to them. So they are where a product
reads a *sum*, what else the model computes of weights: a concatenation of several, one with a mask,
or what a function with a custom gradient gets.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapters_jax.trace.primitives import (
    COPIES,
    LAYOUT,
    PRODUCTS,
    Labels,
    contraction,
    moved,
    rows_of,
)
from adapters_jax.trace.program import Graph, Operation, reaching

Axes = frozenset[int]
_NONE = Axes()
# Operations of one weight that look at it in another way.
_VIEWS = {*COPIES, "broadcast_in_dim", "dynamic_slice", "layer", "neg", "reshape", "slice"}
_VIEWS |= {"split", "squeeze", "transpose", "unstack"}
# What reads a weight in there gets the formed sum, as `weights.lazy` computes it: the gradients of
# custom functions are the model's own, and shards have parts of the axes.
_SUMMED = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map")
# Operations after which a product is the same numbers, to which a bias may then be added.
_KEPT = {*COPIES, "broadcast_in_dim", "layer", "layers", "reshape", "squeeze", "transpose"}
# Systems of equations, which sum over the last axis but one of the matrix and of the other side.
_SOLVES = ("custom_linear_solve", "triangular_solve", "tridiagonal_solve")


@dataclass(frozen=True)
class Read:
    """One operation that reads a leaf.

    Attributes:
        how: "product" and "lookup" meet an input; "sum" is any other use of the weight.
        inputs: axes of the leaf that are contracted with the input, or looked up.
        window: those of them that run over positions of the input, as a convolution's do.
        shared: axes of the leaf that the operation batches, or sees one index of.
        outputs: the other axes of the leaf.
        packed: the platforms on which the operation reads a quantised leaf without its floats;
            None of other leaves.
    """

    operation: str
    how: str
    inputs: Axes = _NONE
    shared: Axes = _NONE
    outputs: Axes = _NONE
    window: Axes = _NONE
    packed: tuple[str, ...] | None = field(default=None, kw_only=True)


@dataclass
class Tracked:
    """A leaf whose reads are recorded.

    Attributes:
        shape: its shape, where that is known.
        reaches: whether the model's outputs depend on it.
        trains: whether a gradient of the outputs gets to it.
        biases: the paths of the leaves that are added to its products, and to nothing else there.
    """

    path: str
    reads: list[Read] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    reaches: bool = True
    trains: bool = True
    biases: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A value that is a leaf, seen in another way.

    Attributes:
        axes: for each axis of the value, the leaf's axes in it.
        indexed: axes of the leaf that the value has one index of.
        looked_up: axes of the leaf along which an input chose the rows that the value has.
        spent: the value is computed from the leaf, in whose place the leaf's axes are still found.
    """

    path: str
    axes: Labels
    indexed: Axes = _NONE
    looked_up: Axes = _NONE
    spent: bool = False

    def within(self, axes: Sequence[int] | None = None) -> Axes:
        """The leaf's axes in some axes of the value, by default in all."""
        every = range(len(self.axes)) if axes is None else axes
        return _NONE.union(*(self.axes[axis] for axis in every))

    def on(self, axes: Sequence[int | None], spent: bool = True) -> "View":
        """What is computed from the value, whose axes the result has in this order; None is new."""
        kept = tuple(_NONE if axis is None else self.axes[axis] for axis in axes)
        return replace(self, axes=kept, spent=spent)

    def read(
        self, operation: str, how: str, inputs: Any = (), batch: Any = (), window: Any = ()
    ) -> Read:
        """A read that contracts or batches these axes of the value."""
        shared = self.indexed | self.looked_up | self.within(batch)
        used = self.within(inputs) - shared
        how = "sum" if self.spent else how
        if how == "lookup":
            used, shared = self.looked_up, self.indexed
        positions = self.within(window) & used
        return Read(operation, how, used, shared, self.within() - used - shared, positions)


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


Views = dict[str, View]  # the leaves that a value is made of, by path


class Reads:
    """Follows leaves through a graph, one operation after the other.

    Args:
        leaves: the path of each value that is a leaf, or a part of one.
        inputs: the values that are activations; what does not depend on them counts as a constant,
            such as random keys and a batch norm's averages.

    Attributes:
        active: for every value, whether it depends on the inputs.
        leaves: for every value that does not, the leaves that it is made of.
        found: the leaves by path, with their reads.
        products, lookups: by the number of their operation.
        between: the reads of leaves by other weights, by path.
    """

    def __init__(self, graph: Graph, leaves: Mapping[int, str], inputs: Iterable[int]):
        n = len(graph.avals)
        self.active = [False] * n
        self.leaves: list[frozenset[str]] = [frozenset()] * n
        self.found = {path: Tracked(path, [], graph.shape(x)) for x, path in leaves.items()}
        self.products: dict[int, Product] = {}
        self.lookups: dict[int, Lookup] = {}
        self.between: dict[str, Read] = {}
        self._graph = graph
        self._views: dict[int, Views] = {}
        self._mixed: dict[int, tuple[str, Views]] = {}  # with an input, by which operation
        self._uses = Counter(x for each in graph.operations for x in each.inputs)
        self._uses.update(2 * graph.outputs)
        self._onehot: set[int] = set()
        self._sums: dict[int, str] = {}  # values that are a product of a weight, and its biases
        self._ranks = {path: len(graph.shape(value)) for value, path in leaves.items()}
        for value, path in leaves.items():
            self.leaves[value] = frozenset([path])
            axes = tuple(Axes([axis]) for axis in range(len(graph.shape(value))))
            self._views[value] = {path: View(path, axes)}
        for value in inputs:
            self.begin(value)

    def begin(self, value: int) -> None:
        """An activation that comes from nowhere: an input of the model, or a learned one."""
        self.active[value], self.leaves[value] = True, frozenset()
        self._views.pop(value, None)

    def visit(self, number: int, operation: Operation) -> bool:
        """Notes an operation; says whether a weight meets an activation in it."""
        name, inputs = operation.name, operation.inputs
        # `jax.nn.one_hot` compares with "eq"; a product with its result looks rows up.
        onehot = not self._onehot.isdisjoint(inputs) and name in LAYOUT
        if onehot or name == "eq":
            self._onehot.update(operation.outputs)
        if name in PRODUCTS:
            return self._meet(number, operation)
        if name == "gather" and self.leaves[inputs[0]]:
            return self._look_up(number, operation)
        if name == "xor":  # only makes quantised weights wait for the layer's input
            inputs = tuple(x for x in inputs if self.leaves[x]) or inputs
        self._made_of(operation, inputs)
        if any(x in self._sums for x in inputs):
            self._add(operation, inputs)
        if any(x in self._mixed for x in inputs):
            self._go_on(operation, inputs)
        elif any(x in self._views for x in inputs):
            self._see(operation, inputs)
        return False

    def _add(self, operation: Operation, inputs: Sequence[int]) -> None:
        """An operation on a product: one that adds a bias, or leaves the numbers as they are."""
        summed = [x for x in inputs if x in self._sums]
        others = [x for x in inputs if x not in self._sums]
        path = self._sums[summed[0]]
        if operation.name in _KEPT and len(inputs) == 1:
            self._sums.update(dict.fromkeys(operation.outputs, path))
        elif operation.name in ("add", "add_any") and len(summed) == len(others) == 1:
            bias = self._alone(others[0])
            if bias is not None and not bias.spent and not bias.looked_up:
                self.found[path].biases.append(bias.path)
                self._sums[operation.outputs[0]] = path

    def _alone(self, value: int) -> View | None:
        """The leaf that a value is; None where it is made of several, or of none."""
        views = self._views.get(value, {})
        return next(iter(views.values())) if len(views) == 1 else None

    def _made_of(self, operation: Operation, inputs: Sequence[int]) -> None:
        """Notes whether the results are activations, and else the leaves that they are made of."""
        active = any(self.active[x] for x in inputs)
        leaves = (
            frozenset[str]() if active else frozenset().union(*(self.leaves[x] for x in inputs))
        )
        for output in operation.outputs:
            self.active[output], self.leaves[output] = active, leaves

    def _meet(self, number: int, operation: Operation) -> bool:
        """A product: of a weight and an activation, of two activations, or of two weights."""
        self._made_of(operation, operation.inputs)
        left, right = operation.inputs[:2]
        for side, (x, other) in enumerate(((left, right), (right, left))):
            name, views = self._mixed.get(x, ("", {}))
            if self.active[other] and self._is_whole(x, views):
                axes = contraction(operation.name, operation.params, side)
                for path, view in views.items():
                    self._note(view.read(operation.name, "sum", *axes), path)
            else:
                self._drop(name, views)
        if left in self._views and right in self._views:
            self._join(operation, left, right)
        for side, (weight, source) in enumerate(((left, right), (right, left))):
            met = contraction(operation.name, operation.params, side)
            if weight in self._views and source not in self._views:
                self._record(operation, weight, "product", *met)
            if self.active[source] and self.leaves[weight]:
                leaves, shape = self._widest(self.leaves[weight]), self._graph.shape(weight)
                size = lambda axes, s=shape: math.prod(s[axis] for axis in axes)  # noqa: E731
                window = size(met.window)
                contracted = size(met.inputs) // max(window, 1)
                kept = size(axis for axis in range(len(shape)) if axis not in met.gone)
                if source in self._onehot:
                    self.lookups[number] = Lookup(leaves, contracted, True)
                else:
                    self.products[number] = Product(leaves, source, contracted, kept, window)
                # A vector may have scaled the weight, whose bias this is all the same.
                views = self._views.get(weight, {})
                if len(wide := [path for path in views if self._ranks[path] > 1]) == 1:
                    self._sums[operation.outputs[0]] = wide[0]
                return True
        return False

    def _join(self, operation: Operation, left: int, right: int) -> None:
        """A product of two weights, in whose result the axes that both keep are found."""
        met = [contraction(operation.name, operation.params, side) for side in (0, 1)]
        self._record(operation, left, "product", *met[0])
        for path, view in self._views[right].items():
            self.between.setdefault(path, view.read(operation.name, "sum", *met[1]))
        views: Views = {}
        if operation.name == "dot_general":
            free = [
                [axis for axis in range(len(self._graph.shape(x))) if axis not in side.gone]
                for x, side in zip((left, right), met, strict=True)
            ]
            for side, x in enumerate((left, right)):
                around = [[None] * len(axes) if i != side else axes for i, axes in enumerate(free)]
                axes = (*met[side].batch, *around[0], *around[1])
                views |= {path: view.on(axes) for path, view in self._views[x].items()}
        if views:
            self._views[operation.outputs[0]] = views

    def _look_up(self, number: int, operation: Operation) -> bool:
        """Rows of a table, or a weight chosen from a stack of weights, by indices."""
        (table, indices), (output,) = operation.inputs, operation.outputs
        shape, sizes = self._graph.shape(table), tuple(operation.params["slice_sizes"])
        rows = len(shape) == 2 and sizes == (1, shape[1])
        by_input = self.active[indices]
        if rows:
            leaves = self._widest(self.leaves[table])
            self.lookups[number] = Lookup(leaves, shape[0], by_input)
        meets = self.active[output] = rows and by_input
        self.leaves[output] = frozenset() if meets else self.leaves[table]
        if table in self._views:
            loops = (loop.begin <= number < loop.end for loop in self._graph.loops)
            one = not by_input and len(self._graph.shape(indices)) == 1 and not any(loops)
            self._see_rows(operation, one)
        return meets

    def _see_rows(self, operation: Operation, one: bool) -> None:
        """Rows along one axis; of a matrix they are activations, else the rows may be weights.

        So may be `one` row at a position that is a constant.
        """
        (table, indices), (output,) = operation.inputs, operation.outputs
        shape = self._graph.shape(table)
        along, places = rows_of(operation.params, shape)
        others = [i for i in range(len(shape)) if i not in along]
        if not along or indices in self._views:
            return self._sum(operation, operation.inputs)
        axes: list[int | None] = [None] * len(self._graph.shape(output))
        for old, new in zip(others, places, strict=True):
            axes[new] = old
        for path, view in self._views[table].items():
            chosen, name = view.within(along), "indexed" if one else "looked_up"
            seen = replace(view.on(axes, view.spent), **{name: getattr(view, name) | chosen})
            if one or len(shape) > 2:
                self._views.setdefault(output, {})[path] = seen
            else:
                self._note(seen.read(operation.name, "lookup"), path)
        return None

    def _see(self, operation: Operation, inputs: Sequence[int]) -> None:
        """An operation that looks at a weight in another way, or one that uses it."""
        first, *others = inputs
        number = operation.name in ("mul", "div") and self._is_scaled(operation)
        if number:
            first = next(x for x in inputs if x in self._views)
        elif operation.name not in _VIEWS or any(x in self._views for x in others):
            return self._sum(operation, inputs)
        old, origin = self._graph.shape(first), operation.params.get("broadcast_dimensions")
        for output in operation.outputs:
            new = self._graph.shape(output)
            expanded = origin is not None and any(old[i] != new[j] for i, j in enumerate(origin))
            if expanded or self._graph.is_float(first) > self._graph.is_float(output):
                return self._sum(operation, inputs)
            self._views[output] = {
                path: self._moved(operation, view, first, output)
                for path, view in self._views[first].items()
            }
        return None

    def _moved(self, operation: Operation, view: View, value: int, output: int) -> View:
        """A view of a value in a result that has its axes, moved or cut."""
        old, new = self._graph.shape(value), self._graph.shape(output)
        axes = moved(operation.name, operation.params, view.axes, old, new)
        indexed = view.indexed
        if operation.name in ("squeeze", "layer", "unstack"):
            indexed |= view.within() - _NONE.union(*axes)
        return replace(view, axes=axes, indexed=indexed)

    def _is_scaled(self, operation: Operation) -> bool:
        """Whether a weight is multiplied or divided by a number."""
        seen = [x in self._views for x in operation.inputs]
        other = operation.inputs[1 - seen.index(True)]
        alone = seen == [True, False] or (operation.name == "mul" and seen == [False, True])
        return alone and not self._graph.shape(other)

    def _sum(self, operation: Operation, inputs: Sequence[int]) -> None:
        """An operation that uses weights otherwise; their axes may be found in its results."""
        views = {x: self._views[x] for x in inputs if x in self._views}
        chosen = any(view.looked_up for each in views.values() for view in each.values())
        if chosen or any(self.active[x] for x in inputs):
            return self._use(operation, views)
        found: set[str] = set()
        for output in operation.outputs:
            for x, each in views.items():
                fits = self._graph.is_float(output) and self._fits(operation, x, output)
                for path, view in each.items() if fits else ():
                    found.add(path)
                    seen = replace(self._moved(operation, view, x, output), spent=True)
                    self._views.setdefault(output, {}).setdefault(path, seen)
        for each in views.values():
            self._drop(operation.name, {p: view for p, view in each.items() if p not in found})
        return None

    def _fits(self, operation: Operation, value: int, output: int) -> bool:
        """Whether the axes of a value are found in a result by `moved`."""
        old, new = self._graph.shape(value), self._graph.shape(output)
        return len(old) == len(new) or operation.name in ("stack", "broadcast_in_dim")

    def _use(self, operation: Operation, views: Mapping[int, Views]) -> None:
        """An operation of weights and activations that is no product."""
        name, (output, *_) = operation.name, operation.outputs
        for x, each in views.items():
            ndim = len(self._graph.shape(x))
            if name in _SOLVES and ndim > 1:
                self._record(operation, x, "sum", (ndim - 2,), range(ndim - 2))
            elif len(views) == 1 and self._mixes(operation, x, each):
                self._mixed[output] = name, {p: replace(v, spent=True) for p, v in each.items()}
            else:
                self._drop(name, each)

    def _mixes(self, operation: Operation, value: int, views: Views) -> bool:
        """Whether an operation with an input, number by number, may be a part of a product.

        So is a multiplication before a sum, and what is done to a weight as a whole, as by a mask.
        """
        output, shape = operation.outputs[0], self._graph.shape(value)
        if self._uses[output] != 1 or any(view.looked_up for view in views.values()):
            return False
        if operation.name in ("mul", "div"):
            return len(self._graph.shape(output)) == len(shape)
        return self._graph.shape(output) == shape and self._is_whole(value, views)

    def _is_whole(self, value: int, views: Views) -> bool:
        """Whether a value has the axes of its leaves and no others, such as those of a batch."""
        shape = self._graph.shape(value)
        return all(
            axes or n == 1
            for view in views.values()
            for n, axes in zip(shape, view.axes, strict=True)
        )

    def _go_on(self, operation: Operation, inputs: Sequence[int]) -> None:
        """An operation on a weight with an input: one that sums, or one that goes on with it."""
        first, (output, *_) = next(x for x in inputs if x in self._mixed), operation.outputs
        name, views = self._mixed[first]
        others = [x for x in inputs if x != first and (x in self._mixed or x in self._views)]
        seen = operation.name in _VIEWS and len(inputs) == 1 and self._uses[output] == 1
        if operation.name == "reduce_sum" and name in ("mul", "div"):
            for path, view in views.items():
                self._note(view.read(operation.name, "sum", operation.params["axes"]), path)
        elif not others and (seen or self._mixes(operation, first, views)):
            name = name if seen else operation.name
            self._mixed[output] = (
                name,
                {path: self._moved(operation, view, first, output) for path, view in views.items()},
            )
        else:
            for x in {first, *others}:
                self._drop(*self._mixed.get(x, (operation.name, self._views.get(x, {}))))

    def _record(self, operation: Operation, value: int, how: str, *axes: Sequence[int]) -> None:
        for path, view in self._views[value].items():
            self._note(view.read(operation.name, how, *axes), path)

    def _drop(self, name: str, views: Views) -> None:
        """An operation behind which the axes of leaves are not found."""
        for path, view in views.items():
            self._note(view.read(name, "lookup" if view.looked_up else "sum"), path)

    def _note(self, read: Read, path: str) -> None:
        self.found[path].reads.append(read)

    def _widest(self, leaves: frozenset[str]) -> frozenset[str]:
        """The leaves with the most axes; others only scale them."""
        most = max(self._ranks[leaf] for leaf in leaves)
        return frozenset(leaf for leaf in leaves if self._ranks[leaf] == most)


def reads_of(closed: Any, leaves: Mapping[int, str], inputs: Iterable[int]) -> dict[str, Tracked]:
    """How a traced function reads the leaves among its arguments, by path.

    Args:
        closed: its jaxpr.
        leaves: the paths of leaves, by the numbers of the arguments.
        inputs: the numbers of the arguments that are activations.

    Returns:
        For each leaf its reads, and whether the function's results depend on it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> traced = jax.make_jaxpr(lambda w, x: x @ w.T)(jnp.ones((3, 4)), jnp.ones((2, 4)))
        >>> found = reads_of(traced, {0: "kernel"}, [1])["kernel"]
        >>> [(read.how, *read.inputs, *read.outputs) for read in found.reads]
        [('product', 1, 0)]
    """
    graph = Graph(closed, entered=_SUMMED)
    followed = Reads(graph, leaves, inputs)
    for number, operation in enumerate(graph.operations):
        followed.visit(number, operation)
    for path, read in followed.between.items():
        reads = followed.found[path].reads
        reads += [] if any(other.inputs for other in reads) else [read]
    reached, trained = reaching(graph), reaching(graph, gradient=True)
    for number, path in leaves.items():
        leaf = followed.found[path]
        leaf.reaches, leaf.trains = reached.inputs[number], trained.inputs[number]
    return followed.found
