"""AdapterHub's setups: a directory of several adapters, of their fusion, and how they compose.

`model.save_adapter_setup` writes one: `adapter_setup.json` has the composition, each adapter is in
a directory of its name, and a fusion in one of its members' names with commas between.

Reference: https://docs.adapterhub.ml/adapter_composition.html
"""

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import AdapterFileError, shown
from adapters_jax.files.adapterhub.blocks import Blocks, Point
from adapters_jax.files.adapterhub.config import VERSION
from adapters_jax.files.directories import FUSION
from adapters_jax.files.module_map import Leaves
from adapters_jax.files.untrusted import read_json
from adapters_jax.methods import BatchSplit, Composition, Fusion, Method, Split, Stacked
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join

SETUP = "adapter_setup.json"
_MOST_NODES, _LONGEST = 256, 128
_LEAVES = {
    "query/kernel": "query.weight",
    "query/bias": "query.bias",
    "key/kernel": "key.weight",
    "key/bias": "key.bias",
    "value/kernel": "value.weight",
}
# What AdapterHub's "static" and "dynamic" have in common, and a fusion of ours computes.
_FUSION = {
    **{"key": True, "query": True, "query_before_ln": False, "residual_before": False},
    "temperature": False,
}
_AVERAGE = (
    "AdapterHub divides an average by the number of its adapters once more, so that the average of "
    "two equal adapters is not that adapter; use aj.average here, or a stack"
)

ADDED_AGAIN = (
    "before each adapter of a stack AdapterHub adds the residual, and original_ln_after=False "
    "leaves it in the sum; use adapters with original_ln_after=True, or placement='norm'"
)


class Node(NamedTuple):
    """A composition, or one adapter, in a setup.

    Attributes:
        kind: AdapterHub's name of it; "single" for an adapter.
        name: the name of the adapter; of a fusion, AdapterHub's name of it.
    """

    kind: str
    name: str
    members: tuple["Node", ...] = ()
    sizes: tuple[int, ...] = ()

    def adapters(self) -> list[str]:
        """The names of the adapters in it, in order."""
        return [x for m in self.members for x in m.adapters()] if self.members else [self.name]

    def __iter__(self) -> Iterator["Node"]:  # type: ignore[override]
        """The nodes of the tree, members before what runs them."""
        for member in self.members:
            yield from member
        yield self


def read_setup(directory: Path) -> tuple[Node, str | None]:
    """The composition of a setup, and the name of its head.

    Raises:
        AdapterFileError: it is damaged, or has what we do not support.
    """
    path = directory / SETUP
    data = read_json(path)
    try:
        root = _node(data["adapter_setup"], [_MOST_NODES])
        problems = [*_problems(root)]
        head = data.get("head_setup")
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise AdapterFileError(f"{path} describes no composition: {error!r}") from None
    if not (head is None or isinstance(head, str)):
        problems.append("it has several heads, and a model has one; save it with one")
    if problems:
        raise AdapterFileError(f"{path}: {'; '.join(problems)}")
    return root, head


def _node(data: Mapping[str, Any], left: list[int]) -> Node:
    left[0] -= 1
    if left[0] < 0:
        raise ValueError(f"more than {_MOST_NODES} adapters")
    kind, inside = data["type"], data["children"]
    if kind == "single":
        (name,) = inside
        odd = not isinstance(name, str) or {*name} & {*"/\\\0"} or not name.strip(".")
        if odd or len(name.encode()) > _LONGEST:
            raise ValueError(f"an adapter of the name {shown(name)}")
        return Node(kind, name)
    members = tuple(_node(each, left) for each in inside)
    sizes = data.get("kwargs", {}).get("splits" if kind == "Split" else "batch_sizes", ())
    last = [member.adapters()[-1] for member in members]
    if kind == "Fuse" and len(",".join(last).encode()) > 255:
        raise ValueError("a fusion whose name is too long for a directory")
    if not all(type(size) is int for size in sizes):
        raise ValueError(f"parts of {shown(sizes)}")
    return Node(str(kind), ",".join(last), members, tuple(sizes))


def _problems(root: Node) -> Iterator[str]:
    """Why a setup cannot be read."""
    names = root.adapters()
    if len({*names}) < len(names):
        yield f"{max(names, key=names.count)} stands in it twice"
    for each in root:
        if each.kind == "Average":
            yield _AVERAGE
        elif each.kind not in ("single", "Stack", "Split", "BatchSplit", "Parallel", "Fuse"):
            yield f"{shown(each.kind)} is no composition of ours"


def entries_of(root: Node) -> tuple[list[Method], dict[str, str]]:
    """The compositions of a setup as entries of a recipe, and our names of its adapters."""
    names: dict[str, str] = {}
    for name in root.adapters():
        names[name] = _free(re.sub(r"[^A-Za-z0-9_]", "_", name)[:64], names.values())
    made: list[Method] = []
    of: dict[int, str] = {}
    for each in root:
        members = tuple(of.get(id(m)) or names[m.name] for m in each.members)
        if not members or (each.kind == "Stack" and len(members) == 1):
            of[id(each)] = members[0] if members else names[each.name]
            continue
        own = _free(each.kind.lower(), {*names.values(), *of.values()})
        of[id(each)] = "" if each is root else own
        fields: dict[str, Any] = {"members": members, "name": of[id(each)]}
        if each.kind == "Fuse":
            made.append(Fusion(**fields))
        elif each.kind == "Stack":
            made.append(Stacked(**fields))
        else:
            cls = Split if each.kind == "Split" else BatchSplit
            made.append(cls(**fields, sizes=each.sizes))
    return made, names


def _free(name: str, taken: Collection[str]) -> str:
    """The name, with a number behind it if others have it."""
    numbered = (f"{name[:60]}_{n}" for n in itertools.count())
    return name if name not in taken else next(each for each in numbered if each not in taken)


def named(methods: Sequence[Method], leaves: Leaves, name: str) -> tuple[list[Method], Leaves]:
    """An adapter's methods and leaves as entries of another name; "" for none."""
    new: dict[Method, Method] = {}
    for method in methods:
        own = method.slot is not None
        new[method] = replace(method, name=name) if own else method
    moved = {}
    for path, owner in Recipe(*methods).owners(leaves).items():
        held = replace(owner.method, name=name).path_of(
            join(owner.module, new[owner.method].slot, owner.node), owner.name
        )
        moved[path] = held
    return list(new.values()), {moved.get(path, path): leaf for path, leaf in leaves.items()}


def read_fusion(
    directory: Path, node: Node, method: Fusion, blocks: Blocks, where: Mapping[Point, str]
) -> tuple[Fusion, Leaves, list[str]]:
    """A fusion of a setup: the entry, its leaves, and a sentence for each problem."""
    config, tensors = FUSION.read(directory / node.name)
    own = config["config"] if isinstance(config["config"], Mapping) else {}
    if odd := [key for key, x in _FUSION.items() if own.get(key, x) != x]:
        what = ", ".join(f"{key}={shown(own[key])}" for key in odd)
        return method, {}, [f"the fusion {node.name} has {what}, which we do not support"]
    dropout = own.get("dropout_prob") or 0.0
    method = replace(method, value=bool(own.get("value", True)), dropout=dropout)
    leaves: Leaves = {}
    problems: list[str] = []
    left = {blocks.module_map.bare(key): tensor for key, tensor in tensors.items()}
    for point, path in where.items():
        module = f"{blocks.bottlenecks[point].module}.adapter_fusion_layer.{node.name}"
        d = blocks.bottlenecks[point].width
        for leaf in method.leaf_names:
            tensor = left.pop(f"{module}.{_LEAVES[leaf]}", None)
            if tensor is None or tensor.shape != ((d, d) if "kernel" in leaf else (d,)):
                got = "nothing" if tensor is None else f"{list(tensor.shape)}"
                problems.append(f"{module}.{_LEAVES[leaf]} is {got}, expected sizes of {d}")
            else:
                leaves[f"{path}/{method.slot}/{leaf}"] = tensor.T.astype(np.float32)
    problems += [f"{key} belongs to no adapted module" for key in left]
    return method, leaves, problems


def check_members(
    recipe: Recipe, leaves: Leaves, blocks: Blocks
) -> tuple[dict[Point, str], list[str]]:
    """Where named bottlenecks are, and why AdapterHub computes them differently in a composition.

    Returns:
        Our module's path for each point, and a sentence for each problem.
    """
    where: dict[Point, str] = {}
    found: dict[Point, set[tuple[str, str]]] = {}
    problems: list[str] = []
    roles = blocks.roles()
    for owner in recipe.owners(leaves).values():
        if owner.method.kind not in ("bottleneck", "compacter") or owner.module not in roles:
            continue
        point, role = roles[owner.module]
        where[point] = owner.module
        found.setdefault(point, set()).add((role, owner.method.placement))
    for point, forms in found.items():
        if len(forms) > 1:
            problems.append(
                f"layer {point[0]} has bottlenecks at {' and '.join(sorted(r for r, _ in forms))}; "
                "AdapterHub runs all of a composition at one place"
            )
        if any(placement == "parallel" for _, placement in forms):
            problems.append(
                f"layer {point[0]} has a parallel bottleneck, and AdapterHub loses its branch "
                "in a composition; use sequential ones"
            )
    entries = [m for m in recipe if m.members]
    inner = {m.name for m in entries if m.name}
    used = {name for m in entries for name in m.members}
    firsts = {m.members[0] for m in entries if m.kind == "stack" and m.name not in used}
    problems += [
        f"{m.name} has an invertible adapter, and AdapterHub applies that of the first adapter "
        "alone, to all rows; have one in the first adapter of a stack"
        for m in recipe.attached
        if entries and m.kind == "invertible" and m.name not in firsts
    ]
    if len({m.name for m in recipe.attached if m.kind == "lora"}) > 1:
        problems.append(
            "several adapters have LoRA; AdapterHub's stack gives each one what the one before "
            "adds, and adds only the last; use one"
        )
    around = [m for m in entries if m.kind != "stack" and not inner.isdisjoint(m.members)]
    roles_of = {role for forms in found.values() for role, _ in forms}
    if around and roles_of - {"output"}:
        problems.append(
            f"the {around[0].kind} has another composition in it, where AdapterHub adds the "
            "residual once more; use bottlenecks on the sublayers' outputs"
        )
    again = any(form == ("norm", "sequential") for forms in found.values() for form in forms)
    if again and any(m.kind == "stack" for m in entries):
        problems.append(ADDED_AGAIN)
    return where, problems


def written(
    recipe: Recipe, leaves: Leaves, blocks: Blocks, about: Mapping[str, Any], head: bool
) -> tuple[dict[str, bytes], str, list[str]]:
    """The files of a composition but for its adapters' own.

    Returns:
        `adapter_setup.json` and the fusions' files by name, the name of the adapter whose directory
        has the head, and a sentence for each problem.
    """
    compositions = {m.name: m for m in recipe if isinstance(m, Composition)}
    used = {name for m in compositions.values() for name in m.members}
    roots = [m for m in compositions.values() if m.name not in used or not m.name]
    loose = [m for m in recipe.attached if m.name not in used and not m.members]
    where, problems = check_members(recipe, leaves, blocks)
    if len(roots) > 1 or loose:
        what = " and ".join(type(m).__name__ for m in [*roots[1:], *loose])
        problems.append(f"AdapterHub has one composition of all adapters, and {what} is beside it")
    files: dict[str, bytes] = {}

    def of(method: Composition) -> Node:
        inner = ((name, compositions.get(name)) for name in method.members)
        members = tuple(of(own) if own else Node("single", name) for name, own in inner)
        name = ",".join(member.adapters()[-1] for member in members)
        sizes: tuple[Any, ...] = getattr(method, "sizes", ())
        if None in sizes or (method.kind == "split" and not sizes):
            problems.append(f"{method.kind}: AdapterHub needs sizes=, a number for each adapter")
        kinds = {"stack": "Stack", "split": "Split", "fuse": "Fuse"}
        kind = kinds.get(method.kind, "BatchSplit" if sizes else "Parallel")
        if method.kind == "average":
            problems.append(_AVERAGE)
        return Node(kind, name, members, tuple(size or 0 for size in sizes))

    root = of(roots[0])
    for method in [m for m in compositions.values() if isinstance(m, Fusion)]:
        fused = of(method)
        tensors = {}
        for point, path in where.items():
            module = f"{blocks.bottlenecks[point].module}.adapter_fusion_layer.{fused.name}"
            for leaf in method.leaf_names:
                tensors[f"{module}.{_LEAVES[leaf]}"] = leaves[f"{path}/{method.slot}/{leaf}"].T
        whole = {blocks.module_map.full(key): tensor for key, tensor in tensors.items()}
        config: dict[str, Any] = {**_FUSION, "value_before_softmax": True}
        config |= dict.fromkeys(("value", "value_initialized", "regularization"), method.value)
        config["dropout_prob"] = method.dropout or None
        text = {**about, "name": fused.name, "config": config}
        text["adapter_names"] = fused.name.split(",")
        content = FUSION.content(text, whole)
        files |= {f"{fused.name}/{name}": data for name, data in content.items()}
    last = root.adapters()[-1]
    setup = {"adapter_setup": _json(root), "head_setup": last if head else None, "version": VERSION}
    files[SETUP] = (json.dumps(setup, indent=2) + "\n").encode()
    return files, last, problems


def _json(node: Node) -> dict[str, Any]:
    if not node.members:
        return {"type": "single", "children": [node.name]}
    found: dict[str, Any] = {"type": node.kind, "children": [_json(each) for each in node.members]}
    if node.sizes:
        key = "splits" if node.kind == "Split" else "batch_sizes"
        found["kwargs"] = {key: list(node.sizes)}
    return found
