"""The modules to which AdapterHub attaches bottlenecks and LoRA, and their counterparts of ours."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

from adapters_jax.errors import UserError
from adapters_jax.files.adapterhub.architectures import ARCHITECTURES, Architecture, Stack
from adapters_jax.files.layouts import ModuleReference
from adapters_jax.files.module_map import ModuleMap, Names, find_modules
from adapters_jax.files.names import NameTable
from adapters_jax.trees import join

Point = tuple[int, str]  # the number of a block, and a location in it


class Sublayer(NamedTuple):
    """A sublayer of a block, to which one bottleneck attaches.

    Attributes:
        module: the name of its bottleneck layer, without prefix.
        paths: the paths of our modules by their role in `Placement`.
        width: the width of the residual stream; 0 if names has none of these, as for LoRA alone.
    """

    module: str
    paths: Mapping[str, str]
    width: int


@dataclass(frozen=True)
class Blocks:
    """A model's blocks by AdapterHub's names.

    Attributes:
        layers: the numbers of the blocks, which count on from an encoder's to its decoder's.
        loras: the names of the modules to which LoRA attaches, by matrix; at least one for each.
        names: the blocks' names, which end in a dot, by their numbers.
    """

    architecture: Architecture
    module_map: ModuleMap
    layers: Sequence[int]
    bottlenecks: Mapping[Point, Sublayer]
    loras: Mapping[Point, Mapping[str, Sequence[str]]]
    names: Mapping[int, str]

    def outputs(self) -> dict[int, tuple[str, int]]:
        """The paths of our blocks, and the width of what they return, by number.

        Of a block the path is what those of its projections have in common, if there are several.
        """
        found = {}
        for number, name in self.names.items():
            every = (own for (n, _), own in self.loras.items() if n == number)
            inside = {x for own in every for several in own.values() for x in several}
            paths = [own.path.split("/") for x in inside for own in self.module_map.at(x)]
            same = [*takewhile(lambda at: len({*at}) == 1, zip(*paths, strict=False))]
            path = self.module_map.attention.get(name[:-1]) or "/".join(at[0] for at in same)
            widths = [own.width for (n, _), own in self.bottlenecks.items() if n == number]
            if path and path not in self.module_map.whole:
                found[number] = path, max(widths, default=0)
        return found

    def locations(self, layer: int, kind: str | None) -> set[str]:
        """The locations in a block of LoRA, or of bottlenecks if `kind` is None."""
        points = self.loras if kind else self.bottlenecks
        return {location for number, location in points if number == layer}

    def projections(self, point: Point) -> dict[str, dict[str, ModuleReference | None]]:
        """Our modules for those to which LoRA attaches, by their names and then by matrix.

        Of a module that fuses query, key and value, ours are its parts.
        """
        found: dict[str, dict[str, ModuleReference | None]] = {}
        for matrix, names in self.loras[point].items():
            for name in names:
                there = self.module_map.at(name)
                own = next(iter(there), None)
                if own and own.part:
                    own = replace(there["qkv".index(matrix)], part=None)
                found.setdefault(name, {})[matrix] = own
        return found

    def roles(self) -> dict[str, tuple[Point, str]]:
        """Point and role by path; our models' sublayers have the role "sublayer"."""
        found = {}
        for point, sublayer in self.bottlenecks.items():
            for role, path in sublayer.paths.items():
                found[path] = (point, role)
                # A sublayer of ours has its output.
                if role == "output" and self.module_map.table.rules:
                    found[path.rpartition("/")[0]] = (point, "sublayer")
        return found

    @property
    def paths(self) -> set[str]:
        """The paths of all our modules, against which patterns are tested."""
        own = (each.paths["sum"] for each in self.bottlenecks.values() if "sum" in each.paths)
        found = {*own}
        for path in self.module_map.paths:
            names = path.split("/")
            found |= {"/".join(names[:i]) for i in range(1, len(names) + 1)}
        return found


def find_blocks(names: Names, base: Any, prefix: str | None = None) -> Blocks:
    """Finds the blocks of a model by AdapterHub's names.

    Args:
        names: the model's table, or a mapping from PyTorch's module names to our paths. A mapping
            needs the name of AdapterHub's bottleneck layer (BERT's `...output`, for others
            `...output_adapters`) with the path of the module that adds the sublayer's output to
            the residual stream.
        base: the parameters as a tree of arrays (abstract ones suffice) or an NNX module.
        prefix: begins the names of all modules but heads in files; by default the names' own.

    Raises:
        UserError: there are no blocks of a known architecture, or names do not fit the base.
    """
    sums: dict[str, str] = {}
    if not isinstance(names, NameTable):
        sums = {k: v for k, v in names.items() if _is_bottleneck(k) and isinstance(v, str)}
        names = {k: v for k, v in names.items() if k not in sums}
    else:
        names = names.of_version(4)  # AdapterHub's models are those of transformers 4
    module_map = find_modules(names, base, prefix)
    ours = bool(module_map.table.rules)
    own = module_map.table.prefixes[:1]
    for architecture in sorted(ARCHITECTURES, key=lambda each: each.prefix not in own):
        every = ((stack, name) for stack in architecture.stacks for name in module_map.modules)
        matches = ((stack, re.fullmatch(stack.pattern, name)) for stack, name in every)
        if found := [(stack, match) for stack, match in matches if match]:
            break
    else:
        known = ", ".join(each.model_type for each in ARCHITECTURES)
        raise UserError(
            f"names has no blocks of an architecture that is supported; expected one of {known}"
        )
    if not ours:
        theirs = found[0][1][1]
        module_map = replace(
            module_map,
            modules={name.removeprefix(theirs): x for name, x in module_map.modules.items()},
            table=replace(module_map.table, prefixes=(theirs,) if theirs else ()),
            prefix=theirs if prefix is None else prefix,
        )
        sums = {name.removeprefix(theirs): path for name, path in sums.items()}
    layers = _layers(architecture, found)
    blocks = {n: f"{stack.block}.{number}." for n, (stack, number) in layers.items()}
    bottlenecks = {
        (n, location): _sublayer([blocks[n] + name for name in layer], module_map, sums, ours)
        for n, (stack, _) in layers.items()
        for location, layer in stack.bottlenecks.items()
    }
    loras = {
        (n, location): {m: _present(blocks[n], each, module_map) for m, each in modules.items()}
        for n, (stack, _) in layers.items()
        for location, modules in stack.loras.items()
    }
    return Blocks(architecture, module_map, list(layers), bottlenecks, loras, blocks)


def _sublayer(
    names: Sequence[str], module_map: ModuleMap, sums: Mapping[str, str], ours: bool
) -> Sublayer:
    """The sublayer of a bottleneck layer, given its name, its projection's and its norm's."""
    module, *others = names
    there = dict(zip(("output", "norm"), map(module_map.at, others), strict=True))
    # Our models have a projection and its dropout in one module.
    output, norm = (own[0].path.removesuffix("/dense") if own else None for own in there.values())
    total = sums.get(module)
    if ours and norm:  # in our models a sum is beside its norm: mlp_sum, mlp_norm
        parent, _, name = norm.rpartition("/")
        total = join(parent, name.replace("norm", "sum"))
    roles = {"output": output, "sum": total, "norm": norm}
    paths = {role: path for role, path in roles.items() if path is not None}
    return Sublayer(module, paths, next((own[0].width for own in there.values() if own), 0))


def _present(block: str, names: Sequence[str], module_map: ModuleMap) -> list[str]:
    """Those of the modules of a matrix that a model has, or else the first of them."""
    whole = [block + name for name in names]
    return [name for name in whole if module_map.at(name)] or whole[:1]


def _layers(
    architecture: Architecture, found: Sequence[tuple[Stack, re.Match[str]]]
) -> dict[int, tuple[Stack, int]]:
    """The blocks by their number through all stacks: each one's stack, and its number there.

    Raises:
        UserError: there are blocks of a decoder alone, which are numbered after the encoder's.
    """
    numbers: dict[str, tuple[Stack, set[int]]] = {}
    for stack, match in found:
        numbers.setdefault(stack.block, (stack, set()))[1].add(int(match[2]))
    lacking = [each.block for each in architecture.stacks[:-1] if each.block not in numbers]
    if lacking:
        raise UserError(
            f"names has no modules of {lacking[0]}, after whose blocks AdapterHub numbers those of "
            f"{architecture.stacks[-1].block}; add them"
        )
    layers: dict[int, tuple[Stack, int]] = {}
    for stack, own in numbers.values():
        first = 1 + max(layers, default=-1)
        layers |= {first + number: (stack, number) for number in sorted(own)}
    return layers


def _is_bottleneck(name: str) -> bool:
    """Whether a name is that of a bottleneck layer."""
    return any(
        re.fullmatch(rf"(.*\.)?{re.escape(stack.block)}\.\d+\.{re.escape(layer.bottleneck)}", name)
        for architecture in ARCHITECTURES
        for stack in architecture.stacks
        for layer in stack.bottlenecks.values()
    )
