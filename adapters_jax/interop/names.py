"""The names of tensors in checkpoints, and arrays moved between theirs and our parameter paths.

Each model's names stand beside that model, as a `NameTable`; what every model shares is here.
"""

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
from adapters_jax.errors import UserError, compare_trees
from adapters_jax.transforms.stacking import Stack


class Rule(NamedTuple):
    """One line of a `NameTable`: a pattern over our module paths, their module name, a part.

    `part` is `(index, count)` where their module fuses `count` of ours along its output axis.
    """

    ours: str
    theirs: str
    part: tuple[int, int] | None = None


class Source(NamedTuple):
    """Where one of our arrays comes from: a tensor's name and how its axes differ from ours."""

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape their tensor has when ours has `shape`."""
        if self.part:
            shape = (*shape[:-1], shape[-1] * self.part[1])
        return shape[::-1] if self.transposed else shape

    def take(self, tensor: np.ndarray) -> np.ndarray:
        """Our array, out of their tensor."""
        tensor = tensor.T if self.transposed else tensor
        if self.part:
            index, count = self.part
            tensor = np.split(tensor, count, axis=-1)[index]
        return tensor


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read whenever its array is asked for; `numpy.asarray` does.

    Args:
        shape: known without reading it.
        read: gives the array.

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
    r"""How one model's parameter paths correspond to a checkpoint's tensor names.

    Args:
        rules: the modules, as regular expressions over our paths and templates of their names.
        prefixes: leading words that a checkpoint may have or lack (`"bert."`).
        ignored: patterns of tensors that may be left over: buffers, and heads not asked for.
        fan_in_fan_out: whether linear weights are stored `(in, out)` as ours, not `(out, in)`.
        stack: how the model names its layers unrolled and scanned; None where it cannot be scanned.
            The rules are of unrolled layers.

    Example:
        >>> table = NameTable((Rule(r"layer_(\d+)/query", r"layer.\1.self.q"),))
        >>> table.source("layer_3/query/kernel")
        Source(name='layer.3.self.q.weight', transposed=True, part=None)
    """

    rules: tuple[Rule, ...]
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    stack: Stack | None = None

    def module(self, path: str) -> Source:
        """Their module for ours at `path`, without the leaf (`weight`, `bias`)."""
        for rule in self.rules:
            match = re.fullmatch(rule.ours, path)
            if match:
                return Source(match.expand(rule.theirs), part=rule.part)
        raise UserError(f"no rule gives {path!r} a name in a checkpoint; add one to the table.")

    def source(self, path: str) -> Source:
        """Their tensor for our parameter at `path`."""
        module, _, leaf = path.rpartition("/")
        name, _, part = self.module(module)
        transposed = leaf == "kernel" and not self.fan_in_fan_out
        return Source(f"{name}.{'bias' if leaf == 'bias' else 'weight'}", transposed, part)

    def sources(self, path: str, shape: tuple[int, ...]) -> tuple[dict[str, Source], bool]:
        """Their tensors for our parameter at `path`, by our path of each; whether it is stacked.

        The path of a leaf of scanned layers stands for that of every layer.
        """
        if self.stack and self.stack.holds(path):
            each = (str(self.stack.layer(path, i)) for i in range(shape[0]))
            return {layer: self.source(layer) for layer in each}, True
        return {path: self.source(path)}, False

    def canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by names without prefix, with the oldest files' gamma and beta renamed."""
        theirs: dict[str, str] = {}
        for name in tensors:
            clash = theirs.setdefault(self._canonical_name(name), name)
            if clash != name:
                raise UserError(f"{clash} and {name} name one tensor; keep one of them.")
        return {name: tensors[original] for name, original in theirs.items()}

    def _canonical_name(self, name: str) -> str:
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may be left over."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def from_tensors(tensors: Mapping[str, Tensor], names: NameTable, like: Any) -> Any:
    """Puts a checkpoint's tensors where a model's parameters are.

    Args:
        tensors: the checkpoint's, by name; see `read_tensors`. They are read one by one.
        names: the model's table.
        like: the model's parameters, arrays or abstract; their dtypes and shardings are what comes
            back.

    Returns:
        A tree of `like`'s structure, shapes and dtypes.

    Raises:
        MismatchError: naming every tensor that is missing, unexpected or of another shape (as the
            checkpoint stores it), ours by path and theirs by name.

    Example:
        >>> like = {"query": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
        >>> table = NameTable((Rule("query", "q_proj"),))
        >>> from_tensors({"q_proj.weight": np.ones((3, 2))}, table, like)["query"]["kernel"].shape
        (2, 3)
    """
    found = names.canonical(tensors)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    # An array of ours goes by both names in an error; what is left over has only theirs.
    wanted: dict[str, Any] = {}
    got: dict[str, Any] = {}
    used, places = set(), []
    for keys, leaf in leaves:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        sources, stacked = names.sources(path, leaf.shape)
        places.append((tuple(sources.values()), stacked, leaf))
        for own, source in sources.items():
            label, shape = f"{own} ({source.name})", leaf.shape[1:] if stacked else leaf.shape
            wanted[label] = jax.ShapeDtypeStruct(source.shape(shape), leaf.dtype)
            used.add(source.name)
            if source.name in found:
                got[label] = found[source.name]
    got |= {name: t for name, t in found.items() if name not in used and not names.ignores(name)}
    compare_trees("the checkpoint", got, wanted, "Is it of this architecture and size?")

    def read(sources: Sequence[Source], stacked: bool, leaf: Any) -> jax.Array:
        arrays = (source.take(np.asarray(found[source.name])) for source in sources)
        return _stacked(arrays, leaf) if stacked else _placed(next(arrays), leaf)

    return jax.tree_util.tree_unflatten(structure, [read(*each) for each in places])


def _stacked(layers: Iterable[np.ndarray], like: Any) -> jax.Array:
    """Layers on a first axis, put there one by one: there is never more than one of them twice."""
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
    """An array with one row replaced, in its place."""
    whole = whole.at[i].set(layer)
    return whole if where is None else jax.lax.with_sharding_constraint(whole, where)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """An array with another one's dtype, where that one is."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(array, like.dtype)
    return place(array.astype(like.dtype, copy=False), sharding)


def to_tensors(tree: Any, names: NameTable) -> dict[str, np.ndarray]:
    """A model's parameters as a checkpoint's tensors; the inverse of `from_tensors`.

    Args:
        tree: parameters, also of scanned layers; each is a tensor of its own there, none is fused
            with others.
        names: the model's table; its first prefix is put before every name but the head's.

    Raises:
        ValueError: one of their tensors fuses several of ours.

    Example:
        >>> table = NameTable((Rule("query", "q_proj"),), prefixes=("model.",))
        >>> tensors = to_tensors({"query": {"kernel": np.ones((2, 3))}}, table)
        >>> tensors["model.q_proj.weight"].shape
        (3, 2)
    """
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array, path = np.asarray(leaf), jax.tree_util.keystr(keys, simple=True, separator="/")
        sources, stacked = names.sources(path, array.shape)
        for own, source in zip(array if stacked else [array], sources.values(), strict=True):
            if source.part:
                raise UserError(f"{source.name} fuses parts, which cannot be written one by one.")
            prefix = "" if source.name.startswith("lm_head") else "".join(names.prefixes[:1])
            turned = own.T if source.transposed else own
            tensors[prefix + source.name] = np.ascontiguousarray(turned)
    return tensors
