"""The roles of a model's parameters and modules, from how its data flows."""

import itertools
import posixpath
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapters_jax.targets import around, join
from adapters_jax.trace.flow import Attention, Flow, Trace
from adapters_jax.trace.reads import Lookup, Product

Paths = tuple[str, ...]


@dataclass(frozen=True)
class Roles:
    """Paths by role. A weight is named by its module where it is the module's only one.

    Attributes:
        query, key, value: the weights nearest before an attention's two products.
        attention_output: the modules that return the weight's product with an attention's result.
        attention: the modules around the queries, keys and values of each attention.
        self_attention: those where all three come from one input.
        up, down: the weights of a feed-forward layer, before and after its activation.
        feed_forward_output: the modules that return the product with `down`.
        feed_forward: the modules that take the input of `up` and return the output of `down`.
        norms: parameters that scale or shift a normalised array.
        embeddings: the weights whose rows are looked up by the model's inputs.
        head: the modules of the last layers, if they are no vocabulary's.
        fused: weights that make queries, and keys or values as well.
        slices: of the outputs of each weight that makes queries or values, the ranges that are
            these; empty where other weights make them, in other ranges, or heads in turns.
        kernels: names of operations that cannot be looked into.
    """

    query: Paths
    key: Paths
    value: Paths
    attention_output: Paths
    attention: Paths
    self_attention: Paths
    up: Paths
    down: Paths
    feed_forward_output: Paths
    feed_forward: Paths
    norms: Paths
    embeddings: Paths
    head: Paths
    fused: Paths
    slices: tuple[tuple[int, int], ...]
    kernels: Paths


def find_roles(traced: Trace) -> Roles:
    """The roles in a traced model."""
    return _Finder(traced).roles()


def around_attentions(traced: Trace) -> list[str]:
    """The path of each attention in the order of the program: what holds the weights before it."""
    finder = _Finder(traced)
    products = finder.flow.products_in
    return [
        finder._around([n for x in (a.query, a.key, a.value) for n in products(x)])
        for a in finder.flow.attentions
    ]


class _Finder:
    def __init__(self, traced: Trace):
        self.flow = flow = Flow(traced)
        self.graph = traced.graph
        self.modules = traced.modules
        self.leaves = list(dict.fromkeys(traced.parameters.values()))
        self.reads: dict[int, Product | Lookup] = {**flow.products, **flow.lookups}
        read = {leaf for x in self.reads.values() for leaf in x.leaves}
        self.owners = Counter(map(posixpath.dirname, read))
        self.attentions = [
            a
            for a in flow.attentions
            if all(map(flow.products_in, (a.query, a.key, a.value)))  # else it has no weights
        ]

    def roles(self) -> Roles:
        """All roles."""
        flow = self.flow
        query, key, value = (self._before(side) for side in ("query", "key", "value"))
        ends = [n for a in self.attentions for n in self._after(a)]
        attending = {*query, *key, *value, *ends}
        pairs = self._feed_forwards(attending)
        ups = [up for below in pairs.values() for up in below]
        fused = [n for n in query if n in key or n in value]
        looked_up = [n for n, lookup in flow.lookups.items() if lookup.by_input]
        around, alone = self._around_attentions()
        return Roles(
            query=self._named(query),
            key=self._named(key),
            value=self._named(value),
            attention_output=self._returning(ends),
            attention=around,
            self_attention=alone,
            up=self._named(ups),
            down=self._named(pairs),
            feed_forward_output=self._returning(pairs),
            feed_forward=self._whole(pairs),
            norms=flow.norms,
            embeddings=self._named(looked_up),
            head=self._head({*attending, *pairs, *ups}),
            fused=self._named(fused),
            slices=self._slices({*query, *value}),
            kernels=tuple(sorted(flow.kernels)),
        )

    def _before(self, side: str) -> list[int]:
        """The products that make the queries, keys or values of all attentions."""
        return [n for a in self.attentions for n in self.flow.products_in(getattr(a, side))]

    def _after(self, attention: Attention) -> list[int]:
        """The products that read an attention's result."""
        sources, products = self.flow.sources, self.flow.products.items()
        return [n for n, product in products if attention.operation in sources[product.source]]

    def _slices(self, numbers: set[int]) -> tuple[tuple[int, int], ...]:
        """The ranges of queries and values in the outputs of products, if all have the same."""
        found: dict[int, set[Any]] = {number: set() for number in numbers}
        for a in self.attentions:
            for value in (a.query, a.value):
                for number in self.flow.products_in(value):
                    found[number].add(self.flow.ranges.of(value, number))
        first, *others = found.values() or [set()]
        alike = None not in first and all(ranges == first for ranges in others)
        ranges = sorted(first) if alike else []
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        return tuple(ranges) if apart and len(ranges) > 1 else ()

    def _feed_forwards(self, others: set[int]) -> dict[int, list[int]]:
        """The last product of each feed-forward layer, with the first ones.

        Products in series with something between that is not linear, whose last returns to the
        width that the first read, and is added to the residual stream.
        """
        flow, found = self.flow, {}
        for number, down in flow.products.items():
            before = flow.sources[down.source]
            if number in others or down.window > 1 or before.keys() - flow.products.keys():
                continue
            ups = [n for n in before.keys() - others if self._widths_fit(flow.products[n], down)]
            if any(before[n] for n in ups) and flow.is_residual(number):
                found[number] = sorted(ups)
        return found

    def _widths_fit(self, up: Product, down: Product) -> bool:
        """Whether two products go from a width to another one and back; gates may be beside."""
        return up.contracted == down.kept and up.kept % max(down.contracted, 1) == 0

    def _named(self, numbers: Iterable[int]) -> Paths:
        """The weights that operations read."""
        return _unique(path for n in numbers for path in self._weights(n))

    def _weights(self, number: int) -> list[str]:
        """The module of each weight that an operation reads, or its path if the module has more."""
        paths = []
        for leaf in sorted(self.reads[number].leaves):
            owner = posixpath.dirname(leaf)
            alone = owner in self.modules and self.owners[owner] == 1
            paths.append(owner if owner and alone else leaf)
        return paths

    def _around(self, numbers: Iterable[int]) -> str:
        """The innermost module that the weights of products are in; empty for the whole model."""
        owners = [posixpath.dirname(p) for n in numbers for p in self._weights(n)]
        path = posixpath.commonpath(owners) if all(owners) and owners else ""
        while path and path not in self.modules:
            path = posixpath.dirname(path)
        return path

    def _around_attentions(self) -> tuple[Paths, Paths]:
        """The modules of all attentions, and of those that attend to their own input."""
        flow, every, alone = self.flow, [], []
        for a in self.attentions:
            query, key, value = (flow.products_in(x) for x in (a.query, a.key, a.value))
            path = self._around([*query, *key, *value])
            every.append(path)
            if (flow.before(query) & flow.before(key)) - flow.products.keys():
                alone.append(path)
        return _unique(filter(None, every)), _unique(filter(None, alone))

    def _returning(self, numbers: Iterable[int]) -> Paths:
        """For each product, the innermost module around its weight whose call returns it.

        A module that only wraps this one, such as a layer with its dropout, stands for it.
        """
        found = []
        for number in sorted(numbers):
            for leaf in sorted(self.flow.products[number].leaves):
                path = next((p for p in around(leaf) if self._returns(p, number)), "")
                while path and self._returns(above := posixpath.dirname(path), number):
                    if not above or self._below(above) != self._below(path):
                        break
                    path = above
                found.append(path)
        return _unique(filter(None, found))

    def _returns(self, path: str, number: int) -> bool:
        """Whether a module returns a product, and no sum with the residual stream."""
        returned = self.flow.returned.get(path, ())
        return any(number in self.flow.sources[value] for value in returned)

    def _below(self, path: str) -> list[str]:
        return [leaf for leaf in self.leaves if leaf.startswith(join(path, ""))]

    def _whole(self, pairs: dict[int, list[int]]) -> Paths:
        """The modules that are a whole feed-forward layer: of one shape before and after it."""
        found, shape = [], self.graph.shape
        for down, ups in pairs.items():
            path = self._around([down, *ups])
            if path and self._returns(path, down) and path in self.flow.taken:
                returned = self.flow.returned[path]
                if all(shape(y) == shape(self.flow.taken[path]) for y in returned):
                    found.append(path)
        return _unique(found)

    def _head(self, blocks: set[int]) -> Paths:
        """The modules of the last products before the model's outputs."""
        flow = self.flow
        tables = [x for x in flow.lookups.values() if x.by_input]
        vocabulary = max((x.rows for x in tables), default=0)
        tied = {leaf for x in tables for leaf in x.leaves}
        found = []
        for output in self.graph.outputs:
            for number, bent in flow.sources[output].items():
                product = flow.products.get(number)
                if product is None or number in blocks or product.leaves & tied:
                    continue
                if bent or product.kept == vocabulary:
                    continue  # a pooler, before its tanh; the head of a language model
                found += [self._topmost(path, blocks) for path in self._weights(number)]
        return _unique(path for path in found if path in self.modules)

    def _topmost(self, path: str, blocks: set[int]) -> str:
        """The outermost module around a head that has no part of a block and no table."""
        if not blocks:
            return path
        others = {leaf for n in blocks for leaf in self.flow.products[n].leaves}
        others |= {leaf for x in self.flow.lookups.values() for leaf in x.leaves}
        while (above := posixpath.dirname(path)) and not others.intersection(self._below(above)):
            path = above
        return path


def _unique(paths: Iterable[str]) -> Paths:
    return tuple(dict.fromkeys(paths))
