"""The modules to which AdapterHub attaches bottlenecks and LoRA, and their counterparts of ours."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.files.adapterhub.architectures import ARCHITECTURES, Architecture, Layer, Stack
from adapters_jax.files.module_map import ModuleMap, Names, find_modules
from adapters_jax.files.names import NameTable
from adapters_jax.trees import join


@dataclass(frozen=True)
class Blocks:
    """A model's blocks by AdapterHub's names.

    Attributes:
        architecture: the names of the architecture.
        module_map: the modules that have parameters.
        sums: our modules that add a sublayer to the residual stream, by their bottleneck layer.
        layers: by the number of a block, which counts on from an encoder's to its decoder's: its
            stack, and its number there.
        ours: whether this is one of our models, where a sublayer's module contains its output.
    """

    architecture: Architecture
    module_map: ModuleMap
    sums: Mapping[str, str]
    layers: Mapping[int, tuple[Stack, int]]
    ours: bool

    def name(self, layer: int, rest: str) -> str:
        """The name of a module in a block, without prefix."""
        stack, number = self.layers[layer]
        return f"{stack.block}.{number}.{rest}"

    def locations(self, layer: int, kind: str | None) -> set[str]:
        """The locations in a block of LoRA, or of bottlenecks if `kind` is None."""
        return {*(self.layers[layer][0].loras if kind else self.bottlenecks(layer))}

    def bottlenecks(self, layer: int) -> Mapping[str, Layer]:
        """The bottleneck layers of a block by their location."""
        return self.layers[layer][0].bottlenecks

    def bottleneck(self, layer: int, location: str) -> str:
        """The name of a bottleneck layer, without prefix."""
        return self.name(layer, self.bottlenecks(layer)[location].bottleneck)

    def loras(self, layer: int, location: str) -> dict[str, list[str]]:
        """The names of the modules to which LoRA attaches, by matrix; at least one for each."""
        found = {}
        for matrix, modules in self.layers[layer][0].loras[location].items():
            names = [self.name(layer, module) for module in modules]
            found[matrix] = [name for name in names if self.module_map.at(name)] or names[:1]
        return found

    def path(self, layer: int, location: str, role: str) -> str | None:
        """The path of our module for a `role` of `Placement`; None if there is none."""
        bottleneck, dense, norm = self.bottlenecks(layer)[location]
        if role == "sum":
            return self.sums.get(self.name(layer, bottleneck))
        there = self.module_map.at(self.name(layer, dense if role == "output" else norm))
        # Our models have a projection and its dropout in one module.
        return there[0].path.removesuffix("/dense") if there else None

    def width(self, layer: int, location: str) -> int:
        """The width of the residual stream; 0 if names has neither module, as for LoRA alone."""
        _, *modules = self.bottlenecks(layer)[location]
        there = [
            reference
            for module in modules
            for reference in self.module_map.at(self.name(layer, module))
        ]
        return there[0].width if there else 0

    def roles(self) -> dict[str, tuple[int, str, str]]:
        """Layer, location and role by path; our models' sublayers have the role "sublayer"."""
        found = {}
        for layer in self.layers:
            for location in self.bottlenecks(layer):
                for role in ("output", "sum", "norm"):
                    path = self.path(layer, location, role)
                    if path is not None:
                        found[path] = (layer, location, role)
                        if role == "output" and self.ours:
                            found[path.rpartition("/")[0]] = (layer, location, "sublayer")
        return found

    @property
    def paths(self) -> set[str]:
        """The paths of all our modules, against which patterns are tested."""
        found = {*self.sums.values()}
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
    ours, module_map = isinstance(names, NameTable), find_modules(names, base, prefix)
    own = names.prefixes[:1] if isinstance(names, NameTable) else ()
    for architecture in sorted(ARCHITECTURES, key=lambda each: each.prefix not in own):
        if found := _matches(architecture, module_map):
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
            prefixes=(theirs,) if theirs else (),
            prefix=theirs if prefix is None else prefix,
        )
        sums = {name.removeprefix(theirs): path for name, path in sums.items()}
    _check_stacks(architecture, {stack.block for stack, _ in found})
    blocks = Blocks(architecture, module_map, sums, _layers(found), ours)
    return replace(blocks, sums=_sums(blocks)) if ours else blocks


def _matches(
    architecture: Architecture, module_map: ModuleMap
) -> list[tuple[Stack, re.Match[str]]]:
    """The modules of an architecture's stacks, as their patterns match them."""
    each = ((stack, name) for stack in architecture.stacks for name in module_map.modules)
    matches = ((stack, re.fullmatch(stack.pattern, name)) for stack, name in each)
    return [(stack, match) for stack, match in matches if match]


def _check_stacks(architecture: Architecture, found: Container[str]) -> None:
    """Raises UserError for blocks of a decoder alone, which are numbered after the encoder's."""
    lacking = [stack.block for stack in architecture.stacks[:-1] if stack.block not in found]
    if lacking:
        raise UserError(
            f"names has no modules of {lacking[0]}, after whose blocks AdapterHub numbers those of "
            f"{architecture.stacks[-1].block}; add them"
        )


def _layers(found: Sequence[tuple[Stack, re.Match[str]]]) -> dict[int, tuple[Stack, int]]:
    """The blocks by their number through all stacks."""
    numbers: dict[str, tuple[Stack, set[int]]] = {}
    for stack, match in found:
        numbers.setdefault(stack.block, (stack, set()))[1].add(int(match[2]))
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


def _sums(blocks: Blocks) -> dict[str, str]:
    """The residual sums of our models; each is beside its norm, `mlp_sum` beside `mlp_norm`."""
    sums = {}
    for layer in blocks.layers:
        for location in blocks.bottlenecks(layer):
            norm = blocks.path(layer, location, "norm")
            if norm is not None:
                parent, _, name = norm.rpartition("/")
                sums[blocks.bottleneck(layer, location)] = join(parent, name.replace("norm", "sum"))
    return sums
