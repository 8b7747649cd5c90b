"""Pairs of factors in the parameter trees of openpi, gemma, qwix, tunix, MaxText and flax.nnx.

| library | the factors of a weight | factor on their product |
|---|---|---|
| openpi | `lora_a` beside `w`; `linear_lora_a` beside `linear` | alpha / r; none in feed-forwards |
| gemma | `_LoRAEinsum_0/lora/a` beside `w`, `_LoRAEinsum_linear/lora/a`, `lora/a` | none |
| flax.nnx | `lora/lora_a` beside `kernel` | none |
| qwix, tunix | `w_lora_a` beside `w` | alpha / r |
| MaxText | as qwix; `lora_a.kernel` beside `kernel` in its older code | alpha / r |

The rank is A's last axis. Of an einsum A has the weight's axes that the input has, and B the rank
and the other axes; of a product of qwix these are one axis each. Both have the axes of layers.
openpi's A is the weight with its last axis replaced by the rank, and B with the one before, so that
each head has a pair; but an einsum that sums over the heads sums over those of B by themselves.

Read in openpi 15a9616a, gemma 3.3.0, qwix 0.1.8, tunix 0.1.7, MaxText e591f30c.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adapters_jax.errors import (
    AdapterFileError,
    AdapterMismatchError,
    UserError,
    first_few,
    shortened,
)
from adapters_jax.files.checkpoint import OF_ORBAX
from adapters_jax.trees import Tree, flatten, unflatten
from adapters_jax.weights.axes import Axes, Shape
from adapters_jax.weights.factors import RANK, Factor
from adapters_jax.weights.quantized import unboxed

Flat = Mapping[str, Any]  # leaves by path
_FACTORS = (
    ("gemma", r"_LoRAEinsum_(?P<weight>\w+)/lora/(?P<factor>[ab])"),
    ("gemma", r"lora/(?P<factor>[ab])"),
    ("flax.nnx", r"lora/lora_(?P<factor>[ab])"),
    ("MaxText", r"lora_(?P<factor>[ab])\.kernel"),
    ("openpi", r"lora_(?P<factor>[ab])"),
    ("qwix", r"(?P<weight>\w+)_lora_(?P<factor>[ab])"),
)
_UNSCALED = ("gemma", "flax.nnx")
_FEED_FORWARD = ("gating_einsum", "linear")  # openpi's, whose code leaves the scale out
_SUMMED = "attn_vec_einsum"  # openpi's einsums over the heads


@dataclass(frozen=True)
class Layout:
    """How two factors lie in their tree.

    Attributes:
        axes: the roles of the weight's axes; each factor has its axes in the weight's order.
        before: how many of B's axes are before the rank.
        flat: the inputs are one axis of A, and the outputs one axis of B.
        summed: inputs that B has as well, and that its own values are summed over.
    """

    axes: Axes
    before: int = 0
    flat: bool = False
    summed: Shape = ()

    def a(self) -> list[Shape]:
        """The weight's axes in each axis of A."""
        return [*self._groups(self.axes.inputs, self.axes.shared), (RANK,)]

    def b(self) -> list[Shape]:
        """The weight's axes in each axis of B."""
        groups = self._groups(self.axes.outputs, (*self.axes.shared, *self.summed))
        return [*groups[: self.before], (RANK,), *groups[self.before :]]

    def _groups(self, own: Shape, both: Shape) -> list[Shape]:
        ordered = sorted((*both, *own))
        if not self.flat:
            return [(axis,) for axis in ordered]
        return [own if axis == own[0] else (axis,) for axis in ordered if axis not in own[1:]]

    def fits(self, weight: Shape, a: Shape, b: Shape) -> bool:
        """Whether factors of these shapes can lie like this."""
        size = {RANK: a[-1], **dict(enumerate(weight))}
        shapes = [tuple(math.prod(size[i] for i in g) for g in own) for own in (self.a(), self.b())]
        return shapes == [a, b]


@dataclass(frozen=True)
class Pair:
    """Two factors of theirs, as they lie in the tree; `alpha` is as of our LoRA, once known."""

    weight: str
    shape: Shape
    paths: tuple[str, str]
    arrays: tuple[Any, Any]
    layout: Layout
    unscaled: bool  # their product is added as it is
    alpha: float = 0.0
    rank_stabilized: bool = False

    @property
    def rank(self) -> int:
        """The rank."""
        return self.arrays[0].shape[-1]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def factors(self) -> tuple[Factor, Factor]:
        """A and B in float32, as our LoRA has them."""
        layout, (a, b) = self.layout, self.arrays
        b = self._moved(b, layout.b(), (*layout.summed, *layout.axes.b))
        summed = Factor(b.sum(range(len(layout.summed))), layout.axes.b)
        return Factor(self._moved(a, layout.a(), layout.axes.a), layout.axes.a), summed

    def _moved(self, array: Any, groups: list[Shape], order: Shape) -> jax.Array:
        axes = [axis for group in groups for axis in group]
        sizes = [self.rank if axis == RANK else self.shape[axis] for axis in axes]
        array = jnp.asarray(array, jnp.float32).reshape(sizes)
        return array.transpose([axes.index(axis) for axis in order])


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves by path of a nested mapping, NNX state or module, or a directory of orbax."""
    if isinstance(tree, str | Path):
        tree = _restored(Path(tree))
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, nnx.Param)
    # MaxText has None for what has no LoRA; orbax keeps `value` of NNX's Variables as a name.
    flat = {path: leaf for path, leaf in flatten(tree).items() if leaf is not None}
    if flat and all(path.endswith("/value") for path in flat):
        flat = {path.removesuffix("/value"): leaf for path, leaf in flat.items()}
    while flat and all(path.startswith("params/") for path in flat):
        flat = {path.removeprefix("params/"): leaf for path, leaf in flat.items()}
    return flat


def _restored(directory: Path) -> Any:
    import orbax.checkpoint as ocp  # takes a second

    if not (directory / "_METADATA").is_file():
        raise AdapterFileError(
            f"{directory} is no tree that orbax wrote, since it lacks _METADATA; give the "
            "directory of the parameters, such as 100/params or 100/model_params"
        )
    directory, host = directory.resolve(), ocp.RestoreArgs(restore_type=np.ndarray)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(directory).item_metadata.tree
            args = jax.tree.map(lambda _: host, found)  # else onto the devices of the past
            return checkpointer.restore(directory, restore_args=args)
    except OF_ORBAX as problem:
        raise AdapterFileError(
            f"{directory} is damaged, or no tree that orbax wrote: {shortened(str(problem))}"
        ) from problem


def nested(leaves: Flat, *trees: Any) -> Tree:
    """The nested mapping of leaves by path, with the keys of trees, such as numbers of layers."""
    states = [nnx.state(x, nnx.Param) if isinstance(x, nnx.Module) else x for x in trees]
    pure = [nnx.to_pure_dict(x) if isinstance(x, nnx.State) else x for x in states]
    return unflatten(leaves, *(x for x in pure if isinstance(x, Mapping)))


def find_pairs(flat: Flat, base: Flat) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs in a tree, without their alphas; and its other leaves by path.

    Args:
        base: those of a base beside the tree, if there is one.

    Raises:
        UserError: there are no pairs.
        AdapterMismatchError: names every half of a pair, weight that has several pairs, is not in
            the base or is of other shapes, and leaf of LoRA that belongs to no pair.
    """
    groups: dict[str, dict[str, list[tuple[str, str]]]] = {}
    rest = dict(flat)
    for path in flat:
        if found := _factor(path):
            library, weight, factor = found
            groups.setdefault(weight, {"a": [], "b": []})[factor].append((library, path))
            del rest[path]
    if not groups:
        raise UserError(
            "the tree holds no LoRA of openpi, gemma, qwix, tunix, MaxText or flax.nnx, such as "
            f"w_lora_a; it has {first_few(list(flat)) or 'no leaves'}"
        )
    leaves = {path: unboxed(leaf) for path, leaf in {**rest, **base, **flat}.items()}
    problems = [f"{path} is LoRA, in the base" for path in base if _factor(path)]
    problems += [
        f"{path} belongs to no pair" for path in rest if "lora" in path.lower() and path not in base
    ]
    pairs, openpi = [], _from_openpi(groups, leaves)
    for weight, factors in groups.items():
        libraries, paths = zip(*factors["a"], *factors["b"], strict=True)
        if len(paths) > 2:
            problems.append(f"{weight} has several pairs, at {first_few(paths)}, and one scale")
        elif not factors["a"] or len(paths) < 2 or len(set(libraries)) > 1:
            problems.append(f"{paths[0]} is half of a pair")
        elif weight not in leaves:
            problems.append(f"{paths[0]}: the base has no {weight}")
        else:
            a, b = (leaves[path] for path in paths)
            shape, name = tuple(leaves[weight].shape), weight.rpartition("/")[2]
            own = openpi and libraries[0] in ("openpi", "qwix")
            layout = _layout(weight, shape, tuple(a.shape), tuple(b.shape), own)
            if isinstance(layout, str):
                problems.append(layout)
            else:
                unscaled = libraries[0] in _UNSCALED or (own and name in _FEED_FORWARD)
                pairs.append(Pair(weight, shape, paths, (a, b), layout, unscaled))
    if problems:
        raise AdapterMismatchError(
            f"the LoRA does not fit its base: {first_few(problems, joint='; ')}"
        )
    return pairs, rest


def _factor(path: str) -> tuple[str, str, str] | None:
    """The library, the weight's path and the factor (a or b) of a leaf; None if it is none."""
    for library, pattern in _FACTORS:
        if found := re.fullmatch(f"(?P<module>(?:.+/)?){pattern}", path):
            name = found.groupdict().get("weight") or ("w" if library == "openpi" else "kernel")
            # gemma numbers its wrappers, and names them where a module has several weights.
            name = "w" if library == "gemma" and name.isdecimal() else name
            return library, f"{found['module']}{name}", found["factor"]
    return None


def _from_openpi(groups: Mapping[str, Mapping[str, Any]], leaves: Flat) -> bool:
    """Whether names that openpi and qwix share are openpi's, whose factors keep all axes."""
    return any(
        library == "openpi"
        or (
            weight.endswith("gating_einsum")
            and weight in leaves
            and len(leaves[path].shape) == len(leaves[weight].shape)
        )
        for weight, factors in groups.items()
        for library, path in (*factors["a"], *factors["b"])
    )


def _layout(path: str, weight: Shape, a: Shape, b: Shape, openpi: bool) -> Layout | str:
    """The one layout that fits; a sentence where none does, or several do."""
    found: dict[Any, Layout] = {}
    for layout in _openpi(path, len(weight)) if openpi else _layouts(len(weight)):
        if layout.fits(weight, a, b):
            # The roles of axes of size one make no difference.
            roles = (layout.axes.inputs, layout.axes.outputs, layout.axes.shared)
            wide = tuple(tuple(i for i in own if weight[i] > 1) for own in roles)
            found.setdefault(wide, layout)
    fitting = list(found.values())
    if len(weight) == 2 or path.endswith("kernel"):
        # Their inputs are before their outputs, and a square weight does not tell.
        fitting = [x for x in fitting if max(x.axes.inputs) < min(x.axes.outputs)] or fitting
    shapes = f"{path} of {list(weight)} has factors of {list(a)} and {list(b)}"
    if not fitting:
        return f"{shapes}, which do not fit"
    texts = " or ".join(each.axes.text for each in fitting)
    several = f"{shapes}, and sizes do not tell which axes are inputs>outputs, {texts}"
    return fitting[0] if len(fitting) == 1 else several


def _openpi(path: str, ndim: int) -> Iterator[Layout]:
    front, (inputs, outputs) = tuple(range(ndim - 2)), (ndim - 2, ndim - 1)
    if _SUMMED in path and front:
        axes = Axes((front[-1], inputs), (outputs,), front[:-1])
        yield Layout(axes, before=len(front), summed=front[-1:])
    else:
        yield Layout(Axes((inputs,), (outputs,), front), before=len(front))


def _layouts(ndim: int) -> Iterator[Layout]:
    """All layouts of einsums and products; of several with the same roles, the usual one first."""
    for roles in itertools.product("ios", repeat=ndim):
        inputs, outputs, shared = (
            tuple(i for i, role in enumerate(roles) if role == own) for own in "ios"
        )
        if not inputs or not outputs:
            continue
        # B has the rank after the shared axes that lead the weight; where the rank equals the
        # number of layers, its place does not follow from the shapes.
        leading = next(i for i, role in enumerate(roles) if role != "s")
        positions = sorted(range(len(shared) + 1), key=lambda i: i != leading)
        for flat, before in itertools.product((False, True), positions):
            yield Layout(Axes(inputs, outputs, shared), before, flat)
