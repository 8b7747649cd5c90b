"""Converts parameters between checkpoints of PyTorch ("theirs") and our trees.

Each model's package has its own `NameTable`; this module has the code that all models share.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.distributed.mesh import place
from adapters_jax.errors import UserError, compare_trees
from adapters_jax.transforms.stacking import Stack

HEADS = ("lm_head", "classifier", "score")


class Part(NamedTuple):
    """The share of one of our arrays in a tensor that fuses several along its outputs.

    Attributes:
        start: the shares before it.
        size: its own shares.
        whole: all shares.

    Example:
        >>> query, key = parts_of([8, 4])
        >>> key, key.columns(6)
        (Part(start=8, size=4, whole=12), slice(4, 6, None))
    """

    start: int
    size: int
    whole: int

    def columns(self, length: int) -> slice | None:
        """Its columns of `length` ones; None if they do not divide into the shares."""
        first, last = (length * n for n in (self.start, self.start + self.size))
        if first % self.whole or last % self.whole:
            return None
        return slice(first // self.whole, last // self.whole)


def parts_of(sizes: Iterable[int]) -> list[Part]:
    """The parts of a fused tensor, in order, by the sizes of our arrays or in equal ratios."""
    ends = list(accumulate(sizes, initial=0))
    return [Part(start, end - start, ends[-1]) for start, end in pairwise(ends)]


class Rule(NamedTuple):
    """One line of a `NameTable`: a pattern over our module paths, their module's name, and a part.

    `part` is `(index, count)` if their module fuses `count` of ours along its output axis. These
    may differ in width.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None


class ParameterRule(NamedTuple):
    """One line of a `NameTable` for a parameter that a module holds itself, such as its experts'.

    Attributes:
        ours: a pattern over the paths of our parameters.
        theirs: the whole name of their parameter, `layers.0.mlp.experts.down_proj`.
        swapped: whether its last two axes are the other way round than ours.
        is_transposed: the attribute of this name of their module, by which PEFT tells a stack of
            matrices `(experts, in, out)`, True, from `(experts, out, in)`. None where it tells the
            truth if ours is `(experts, in, out)`; say False for a stack `(experts, in, out)` in a
            module that does not have the attribute, such as Llama 4's.
    """

    ours: str
    theirs: str
    swapped: bool = False
    is_transposed: bool | None = None


class Source(NamedTuple):
    """The tensor that one of our arrays comes from, and how its axes differ from ours.

    `part` is that of the `Rule`, and `share` the columns that it is, which depend on the others.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    swapped: bool = False
    share: Part | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor if ours has `shape`."""
        if self.share:
            shape = (*shape[:-1], shape[-1] * self.share.whole // self.share.size)
        if self.swapped:
            return (*shape[:-2], shape[-1], shape[-2])
        return shape[::-1] if self.transposed else shape

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Our array with its axes in their order, or theirs with its axes in ours."""
        if self.swapped:
            return np.swapaxes(array, -1, -2)
        return array.T if self.transposed else array

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Takes our array out of their tensor."""
        tensor = self.turn(tensor)
        return tensor[..., self.share.columns(tensor.shape[-1])] if self.share else tensor


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which `numpy.asarray` reads anew each time.

    Args:
        shape: its shape, known without reading it.
        read: reads the array.

    Example:
        >>> np.asarray(Stored((2,), lambda: np.ones(2)))
        array([1., 1.])
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype)


Tensor = np.ndarray | Stored


@dataclass(frozen=True)
class NameTable:
    r"""The correspondence of one model's parameter paths to a checkpoint's tensor names.

    Args:
        rules: one or more for each module: a regular expression over our paths, and a template of
            their name. The paths are those of unrolled layers.
        prefixes: prefixes that a checkpoint's names may have (`"bert."`).
        ignored: patterns of tensors that may remain unused, such as buffers and other heads.
        fan_in_fan_out: whether linear weights are stored `(in, out)` like ours, not `(out, in)`.
        stack: the model's names of unrolled and of scanned layers; None if it cannot scan them.
        parameters: rules for parameters that modules hold themselves. Those of one module are in
            the order in which PyTorch's module defines them, by which PEFT nests their factors.
        tied: their output layer and their embedding, `("lm_head", "embed_tokens")`, which are one
            weight in a model that has no such output layer of its own.
        heads: their modules beside the base, whose names have no prefix.

    Example:
        >>> table = NameTable((Rule(r"layer_(\d+)/query", r"layer.\1.self.q"),))
        >>> table.source("layer_3/query/kernel").name
        'layer.3.self.q.weight'
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    stack: Stack | None = None
    parameters: tuple[ParameterRule, ...] = ()
    tied: tuple[str, str] | None = None
    heads: tuple[str, ...] = HEADS

    def parameter(self, path: str) -> tuple[int, str] | None:
        """The number of the rule for our parameter at `path`, and its name; None without a rule."""
        for number, rule in enumerate(self.parameters):
            match = re.fullmatch(rule.ours, path)
            if match:
                return number, match.expand(rule.theirs)
        return None

    def module(self, path: str) -> Source:
        """Their module for ours at `path`, without the leaf (`weight`, `bias`)."""
        for rule in self.rules:
            match = re.fullmatch(rule.ours, path)
            if match:
                return Source(match.expand(rule.theirs), part=rule.part)
        raise UserError(f"no rule gives {path!r} a name in a checkpoint; add one to the NameTable.")

    def source(self, path: str) -> Source:
        """Their tensor for our parameter at `path`."""
        if own := self.parameter(path):
            return Source(own[1], swapped=self.parameters[own[0]].swapped)
        module, _, leaf = path.rpartition("/")
        theirs = self.module(module)
        transposed = leaf == "kernel" and not self.fan_in_fan_out
        return Source(
            f"{theirs.name}.{'bias' if leaf == 'bias' else 'weight'}", transposed, theirs.part
        )

    def sources(self, leaves: Iterable[tuple[Any, Any]]) -> list[tuple[dict[str, Source], bool]]:
        """Their tensors for each of our leaves, by our path; and whether the leaf is stacked.

        A leaf of scanned layers has one tensor for each layer.

        Args:
            leaves: the keys and the array of every leaf of the parameters.

        Raises:
            UserError: their tensor fuses several of our arrays, of which some are not here.
        """
        found = []
        for keys, leaf in leaves:
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            rows = [path]
            if stacked := bool(self.stack and self.stack.holds(path)):
                rows = [str(self.stack.layer(path, i)) for i in range(leaf.shape[0])]  # type: ignore[union-attr]
            found.append(({own: self.source(own) for own in rows}, stacked, leaf.shape))
        fused: dict[str, dict[tuple[int, int], int]] = {}
        for sources, _, shape in found:
            for source in sources.values():
                if source.part:
                    fused.setdefault(source.name, {})[source.part] = shape[-1]
        shares = {name: _shares(name, widths) for name, widths in fused.items()}

        def shared(source: Source) -> Source:
            if source.part is None:
                return source
            return source._replace(share=shares[source.name][source.part])

        return [
            ({own: shared(source) for own, source in sources.items()}, stacked)
            for sources, stacked, _ in found
        ]

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names without prefix; gamma and beta of old files are renamed."""
        theirs: dict[str, str] = {}
        for name in tensors:
            clash = theirs.setdefault(self._canonical_name(name), name)
            if clash != name:
                raise UserError(f"{clash} and {name} name the same tensor; keep one of them.")
        return {name: tensors[original] for name, original in theirs.items()}

    def _canonical_name(self, name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may remain unused."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _shares(name: str, widths: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], Part]:
    """The share of each part of a fused tensor, by the widths of our arrays."""
    parts = sorted(widths)
    if parts != [(i, parts[0][1]) for i in range(parts[0][1])]:
        raise UserError(
            f"{name} fuses {parts[0][1]} of our arrays, but the tree has {len(parts)} of them; "
            "give the whole model's parameters"
        )
    return dict(zip(parts, parts_of(widths[part] for part in parts), strict=True))


def from_tensors(tensors: Mapping[str, Tensor], names: NameTable, like: Any) -> Any:
    """Converts a checkpoint's tensors to a model's parameters.

    Args:
        tensors: the checkpoint's tensors by name; see `read_tensors`. They are read one by one.
        names: the model's table.
        like: the model's parameters, which may be abstract; they set the structure, dtypes and
            shardings of the result.

    Returns:
        A tree of arrays.

    Raises:
        MismatchError: tensors are missing, unexpected or of another shape; the message names all of
            them by path and by name, with the shapes that a checkpoint has.

    Example:
        >>> like = {"query": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
        >>> table = NameTable((Rule("query", "q_proj"),))
        >>> from_tensors({"q_proj.weight": np.ones((3, 2))}, table, like)["query"]["kernel"].shape
        (2, 3)
    """
    found = names.canonical(tensors)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    # In the error, our arrays have both names, and unused tensors have only theirs.
    expected: dict[str, Any] = {}
    got: dict[str, Any] = {}
    used, reads = set(), []
    for (_, leaf), (sources, stacked) in zip(leaves, names.sources(leaves), strict=True):
        reads.append((tuple(sources.values()), stacked, leaf))
        for own, source in sources.items():
            label, shape = f"{own} ({source.name})", leaf.shape[1:] if stacked else leaf.shape
            expected[label] = jax.ShapeDtypeStruct(source.shape(shape), leaf.dtype)
            used.add(source.name)
            if source.name in found:
                got[label] = found[source.name]
    got |= {name: t for name, t in found.items() if name not in used and not names.ignores(name)}
    compare_trees("the checkpoint", got, expected, "Is it of this architecture and size?")

    def read(sources: Sequence[Source], stacked: bool, leaf: Any) -> jax.Array:
        arrays = (source.take(np.asarray(found[source.name])) for source in sources)
        return _stacked(arrays, leaf) if stacked else _placed(next(arrays), leaf)

    return jax.tree_util.tree_unflatten(structure, [read(*each) for each in reads])


def _stacked(layers: Iterable[np.ndarray], like: Any) -> jax.Array:
    """Stacks layers along a first axis one by one, so that memory holds at most one twice."""
    where = row = getattr(like, "sharding", None)
    if isinstance(where, NamedSharding):
        row = NamedSharding(where.mesh, P(*where.spec[1:]))
    one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=row)
    whole = jnp.zeros(like.shape, like.dtype, device=where)
    for i, layer in enumerate(layers):
        whole = jax.block_until_ready(_put(whole, _placed(layer, one), i, where))
    return whole


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(whole: jax.Array, layer: jax.Array, i: int, where: Any) -> jax.Array:
    """Replaces one row of an array in place."""
    whole = whole.at[i].set(layer)
    return whole if where is None else jax.lax.with_sharding_constraint(whole, where)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """Converts an array to the dtype and sharding of another."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(array, like.dtype)
    return place(array.astype(like.dtype, copy=False), sharding)


def to_tensors(tree: Any, names: NameTable) -> dict[str, np.ndarray]:
    """Converts a model's parameters to a checkpoint's tensors; the inverse of `from_tensors`.

    Args:
        tree: the parameters, also of scanned layers.
        names: the model's table; its first prefix begins every name but the heads'.

    Raises:
        UserError: one of their tensors fuses several of our arrays, of which some are not here.

    Example:
        >>> table = NameTable((Rule("query", "q_proj"),), prefixes=("model.",))
        >>> tensors = to_tensors({"query": {"kernel": np.ones((2, 3))}}, table)
        >>> tensors["model.q_proj.weight"].shape
        (3, 2)
    """
    found: dict[str, list[tuple[Source, np.ndarray]]] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (_, leaf), (sources, stacked) in zip(leaves, names.sources(leaves), strict=True):
        array = np.asarray(leaf)
        for own, source in zip(array if stacked else [array], sources.values(), strict=True):
            found.setdefault(source.name, []).append((source, own))
    tensors = {}
    for name, parts in found.items():
        parts = sorted(parts, key=lambda each: each[0].part or (0, 1))
        whole = np.concatenate([own for _, own in parts], -1) if len(parts) > 1 else parts[0][1]
        prefix = "" if name.split(".")[0] in names.heads else "".join(names.prefixes[:1])
        tensors[prefix + name] = np.ascontiguousarray(parts[0][0].turn(whole))
    return tensors
