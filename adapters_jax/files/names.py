"""Converts parameters between checkpoints of PyTorch ("theirs") and our trees.

Each model's package has its own `NameTable`; this module has the code that all models share.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.distributed.mesh import place
from adapters_jax.errors import BaseMismatchError, UserError, compare_trees, first_few
from adapters_jax.files.layouts import WHOLE, Span, outputs_first, outputs_last, spans
from adapters_jax.transforms.stacking import Stack

HEADS = ("lm_head", "classifier", "score")
ROW = "{}"  # the number of a row of ours in their name


class Rule(NamedTuple):
    """One line of a `NameTable`: a pattern over our module paths, their module's name, and a part.

    `part` is `(index, count)` if their module fuses `count` of ours along its output axis, in the
    order of their indices and as wide as they are.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None


class ParameterRule(NamedTuple):
    """One line of a `NameTable` for a parameter that a module holds itself, such as its experts'.

    Attributes:
        ours: a pattern over the paths of our parameters.
        theirs: the whole name of their parameter, `layers.0.mlp.experts.down_proj`. With `{}` for a
            number, they have a parameter for each row of ours, `layers.0.mlp.experts.{}.w1.weight`.
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
    """The tensor that one of our arrays comes from, and how its axes differ from ours."""

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    swapped: bool = False

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The names of their tensors if ours has `shape`: one, or one for each of our rows."""
        if ROW not in self.name:
            return [self.name]
        return [self.name.replace(ROW, str(i)) for i in range(shape[0])]

    def shape(self, shape: tuple[int, ...], span: Span = WHOLE) -> tuple[int, ...]:
        """The shape of each of their tensors if ours has `shape` and is this part of them."""
        shape = shape[1:] if ROW in self.name else shape
        own = span.stop - span.start
        shape = (*shape[:-1], shape[-1] * span.total // own) if own < span.total else shape
        if self.swapped:
            return (*shape[:-2], shape[-1], shape[-2])
        return (*shape[:-3:-1], *shape[:-2]) if self.transposed else shape

    def ours(self, array: np.ndarray) -> np.ndarray:
        """Their array with its axes in our order: a kernel's outputs last, its window first."""
        if self.swapped:
            return np.swapaxes(array, -1, -2)
        return outputs_last(array) if self.transposed else array

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array with its axes in their order."""
        if self.swapped:
            return np.swapaxes(array, -1, -2)
        return outputs_first(array) if self.transposed else array

    def take(self, tensor: np.ndarray, span: Span = WHOLE) -> np.ndarray:
        """Takes our array, this part of their tensor, out of it; their shape is checked before."""
        turned = self.ours(tensor)
        return turned if span is WHOLE else span.of(turned)  # type: ignore[return-value]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which `numpy.asarray` reads anew each time.

    Args:
        shape: its shape, known without reading it.
        dtype: its dtype, likewise.
        read: reads the array.

    Example:
        >>> np.asarray(Stored((2,), np.float64, lambda: np.ones(2)))
        array([1., 1.])
    """

    shape: tuple[int, ...]
    dtype: Any
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
            weight in a model that does not have the output layer as a module.
        heads: their modules beside the base, whose names have no prefix.
        held_twice: their modules that others of theirs hold and call under another name. PEFT
            replaces them where they have this name, which changes nothing.

    Example:
        >>> table = NameTable((Rule(r"layer_(\d+)/query", r"layer.\1.self.q"),))
        >>> table.source("layer_3/query/kernel")
        Source(name='layer.3.self.q.weight', transposed=True, part=None, swapped=False)
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    stack: Stack | None = None
    parameters: tuple[ParameterRule, ...] = ()
    tied: tuple[str, str] | None = None
    heads: tuple[str, ...] = HEADS
    held_twice: tuple[str, ...] = ()

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
        name, _, part, _ = self.module(module)
        transposed = leaf == "kernel" and not self.fan_in_fan_out
        return Source(f"{name}.{'bias' if leaf == 'bias' else 'weight'}", transposed, part)

    def sources(self, path: str, shape: tuple[int, ...]) -> tuple[dict[str, Source], bool]:
        """Their tensors for our parameter at `path`, by our path; and whether it is stacked.

        A leaf of scanned layers has one tensor for each layer.
        """
        if self.stack and self.stack.holds(path):
            each = (str(self.stack.layer(path, i)) for i in range(shape[0]))
            return {layer: self.source(layer) for layer in each}, True
        return {path: self.source(path)}, False

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names without prefix; gamma and beta of old files are renamed."""
        theirs: dict[str, str] = {}
        for name in tensors:
            # Checkpoints converted from TensorFlow have its names of a norm's parameters.
            bare = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            bare = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", bare)
            for prefix in self.prefixes:
                bare = bare.removeprefix(prefix)
            clash = theirs.setdefault(bare, name)
            if clash != name:
                raise UserError(f"{clash} and {name} name the same tensor; keep one of them.")
        return {name: tensors[original] for name, original in theirs.items()}

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may remain unused."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


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
        BaseMismatchError: tensors are missing, unexpected, of another shape or no floating-point
            numbers; the message names all of them by path and by name, with the shapes that a
            checkpoint has.

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
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        reads.append((*names.sources(path, leaf.shape), leaf))
    parts = _parts(reads)
    for sources, stacked, leaf in reads:
        for own, source in sources.items():
            shape = leaf.shape[1:] if stacked else leaf.shape
            whole = source.shape(shape, parts.get(own, WHOLE))
            for name in source.names(shape):
                label = f"{own} ({name})"
                expected[label] = jax.ShapeDtypeStruct(whole, leaf.dtype)
                used.add(name)
                if name in found:
                    got[label] = found[name]
    got |= {name: t for name, t in found.items() if name not in used and not names.ignores(name)}
    fix = "Is it of this architecture and size?"
    compare_trees("the checkpoint", got, expected, fix, error=BaseMismatchError)
    _check_floats(got)

    def read(sources: Mapping[str, Source], stacked: bool, leaf: Any) -> jax.Array:
        shape = leaf.shape[1:] if stacked else leaf.shape
        arrays = (
            _of(source, found, shape, parts.get(own, WHOLE)) for own, source in sources.items()
        )
        return _stacked(arrays, leaf) if stacked else _placed(next(arrays), leaf)

    return jax.tree_util.tree_unflatten(structure, [read(*each) for each in reads])


def _check_floats(tensors: Mapping[str, Tensor]) -> None:
    """Raises BaseMismatchError for tensors of integers, as quantised checkpoints have them."""
    wrong = [
        f"{k} ({x.dtype})" for k, x in tensors.items() if not jnp.issubdtype(x.dtype, jnp.floating)
    ]
    if wrong:
        raise BaseMismatchError(
            f"the checkpoint holds no floating-point numbers in {first_few(wrong, 12)}; a "
            "quantised base cannot be read: give the one that it was made from."
        )


def _of(
    source: Source, found: Mapping[str, Tensor], shape: tuple[int, ...], span: Span
) -> np.ndarray:
    """Our array of one layer, of their tensors."""
    rows = [source.take(np.asarray(found[name]), span) for name in source.names(shape)]
    return np.stack(rows) if ROW in source.name else rows[0]


def _parts(reads: Iterable[tuple[Mapping[str, Source], bool, Any]]) -> dict[str, Span]:
    """Which part of their tensor each of our arrays is, by our path, where theirs is fused."""
    fused: dict[str, list[tuple[int, str, int]]] = {}
    for sources, stacked, leaf in reads:
        size = math.prod(leaf.shape[1:] if stacked else leaf.shape)
        for own, source in sources.items():
            if source.part:
                fused.setdefault(source.name, []).append((source.part[0], own, size))
    found: dict[str, Span] = {}
    for each in map(sorted, fused.values()):
        found |= zip((own for _, own, _ in each), spans([size for *_, size in each]), strict=True)
    return found


def _stacked(layers: Iterable[np.ndarray], like: Any) -> jax.Array:
    """Stacks layers along a first axis one by one, so that memory holds at most one twice."""
    where = row = getattr(like, "sharding", None)
    if isinstance(where, NamedSharding):
        row = NamedSharding(where.mesh, P(*where.spec[1:]))
    one = jax.ShapeDtypeStruct(like.shape[1:], like.dtype, sharding=row)
    whole = jnp.zeros(like.shape, like.dtype, device=where)
    # Without the wait, JAX would queue the copies of all layers, and hold them at the same time.
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
        UserError: the tree lacks some of the arrays that one of their tensors fuses.

    Example:
        >>> table = NameTable((Rule("query", "q_proj"),), prefixes=("model.",))
        >>> tensors = to_tensors({"query": {"kernel": np.ones((2, 3))}}, table)
        >>> tensors["model.q_proj.weight"].shape
        (3, 2)
    """
    parts: dict[str, list[tuple[Source, np.ndarray]]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array, path = np.asarray(leaf), jax.tree_util.keystr(keys, simple=True, separator="/")
        sources, stacked = names.sources(path, array.shape)
        for own, source in zip(array if stacked else [array], sources.values(), strict=True):
            own_head = source.name.split(".")[0] in names.heads
            prefix = "" if own_head else "".join(names.prefixes[:1])
            rows = own if ROW in source.name else [own]
            for name, row in zip(source.names(own.shape), rows, strict=True):
                parts.setdefault(prefix + name, []).append((source, row))
    return {name: np.ascontiguousarray(_fused(name, each)) for name, each in parts.items()}


def _fused(name: str, parts: Sequence[tuple[Source, np.ndarray]]) -> np.ndarray:
    """Their tensor, of the arrays of ours that it fuses."""
    ordered = sorted(parts, key=lambda each: each[0].part or (0, 1))
    arrays, (source, first) = [array for _, array in ordered], ordered[0]
    count = source.part[1] if source.part else 1
    if len(arrays) != count:
        raise UserError(f"{name} fuses {count} of our arrays, and the tree has {len(arrays)}.")
    return source.theirs(np.concatenate(arrays, axis=-1) if count > 1 else first)
