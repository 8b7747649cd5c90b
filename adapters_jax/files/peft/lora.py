"""LoRA and DoRA out of PEFT's files: factors, ranks and alphas of every module and parameter.

Three kinds of PEFT's modules have factors: modules, which may fuse several of ours; experts that
are a linear layer each, and rows of one array here; and modules that hold parameters themselves,
for which see `parameters`.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array, ModuleReference, our_factors
from adapters_jax.files.module_map import ModuleMap
from adapters_jax.files.patterns import pattern_of
from adapters_jax.files.peft.config import (
    STARTS,
    Config,
    is_parameter,
    is_target,
    number_at,
    tied_problem,
    value,
)
from adapters_jax.files.peft.parameters import our_pair, parameters_by_key, references_of
from adapters_jax.files.settings import collecting
from adapters_jax.methods import ActivatedLoRA, DoRA, LoRA, Method
from adapters_jax.methods.ranked import exceeds
from adapters_jax.targets import join

Factors = Mapping[str, Array]
_NUMBERS = ("r", "lora_alpha")


def read(
    config: Config, added: Mapping[str, Factors], module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LoRA of any kind for all targets, with patterns where ranks or alphas differ."""
    reader = _Reader(config, module_map)
    rest = _without_tied(config, added, module_map, problems)
    keys = {module_map.bare(key): key for key in rest}
    for path, modules in module_map.rows.items():
        own = {key: rest.pop(key) for module in modules if (key := keys.get(module))}
        if own:
            lacking = [module for module in modules if module not in keys]
            with collecting(problems):
                reader.add_experts(path, own, lacking)
    parameters = parameters_by_key(config, rest, module_map, problems)
    problems += _unmatched(config, rest, parameters.values())
    named = {name: rest[key] for key, name in parameters.items() if name}
    for key, found in rest.items():
        with collecting(problems):
            if key not in parameters:
                reader.add_module(key, found)
            elif (name := parameters[key]) is not None:
                reader.add_parameter(name, named)
    ranks, alphas = reader.ranks, reader.alphas
    if not ranks:
        problems += [] if problems else ["the file has no LoRA factors"]
        return [], reader.leaves
    make: Any = DoRA if config.get("use_dora") else LoRA
    if tokens := config.get("alora_invocation_tokens"):
        make = partial(ActivatedLoRA, invocation=tokens)
    method = make(
        module_map.targets(ranks),
        rank=value(config, "r"),
        alpha=value(config, "lora_alpha"),
        dropout=value(config, "lora_dropout"),
        a_init=STARTS[value(config, "init_lora_weights")],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=pattern_of(ranks, value(config, "r"), reader.beyond),
        alpha_pattern=pattern_of(alphas, value(config, "lora_alpha")),
    )
    return [method], reader.leaves


@dataclass(frozen=True)
class _Reader:
    """Our leaves, and the rank and the alpha of each target, of what was added so far."""

    config: Config
    module_map: ModuleMap
    leaves: dict[str, Array] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    beyond: set[str] = field(default_factory=set)  # the targets whose rank is above their sizes

    def numbers(self, name: str) -> tuple[int, float]:
        """The rank and the alpha; patterns name a parameter by itself, others by their module."""
        if is_parameter(self.config, f"{name}.weight"):
            name = f"{name}.weight"
        return number_at(self.config, "r", name), number_at(self.config, "lora_alpha", name)

    def keep(
        self,
        target: str,
        node: str,
        factors: Factors,
        numbers: tuple[int, float],
        weight: tuple[int, ...],
    ) -> None:
        """Adds the leaves at a node, whose numbers the method has by the path of its target."""
        if exceeds(factors["a"].shape, factors["b"].shape, weight):
            self.beyond.add(target)
        self.leaves.update({f"{node}/{k}": x.astype(np.float32) for k, x in factors.items()})
        self.ranks[target], self.alphas[target] = numbers

    def check(self, name: str, found: Factors, rank: int, stored: int | None = None) -> None:
        """Raises UserError unless the factors are those of the configuration's method and rank."""
        expected = {"a", "b", "magnitude"} if self.config.get("use_dora") else {"a", "b"}
        if found.keys() != expected:
            raise UserError(
                f"{name} has the tensors of {', '.join(sorted(found))}, expected {sorted(expected)}"
            )
        if stored not in (None, rank):
            raise UserError(f"{name} has rank {stored}, expected {rank} by the configuration")

    def add_module(self, module: str, found: Factors) -> None:
        """Adds the factors of a module, which may fuse several of ours."""
        numbers, there = self.numbers(module), self.module_map.at(module)
        self.check(module, found, numbers[0])
        if not there:
            raise UserError(f"names maps {module} to no layer of the base")
        a, b, magnitude = found["a"], found["b"], found.get("magnitude")
        if a.ndim < 2 or b.ndim < 2:
            raise _misfit(module, found, there[0].path, there[0].shape)
        is_embedding = there[0].weight == "embedding"
        if is_parameter(self.config, f"{module}.weight"):
            # As a parameter, an embedding and GPT-2's kernels are (out, in) to PEFT.
            turned = is_embedding or self.module_map.inputs_first(module)
            a, b = (b.T, a.T) if turned else (a, b)
        elif not is_target(self.config, module):
            raise UserError(f"{module} has factors but is not among the target modules")
        self.check(module, found, numbers[0], len(a))
        if is_embedding and magnitude is not None:
            raise UserError(f"{module}: DoRA on an embedding is not supported")
        if is_embedding and self.config.get("alora_invocation_tokens"):
            raise UserError(f"{module}: activated LoRA on an embedding is not supported")
        for reference in there:
            factors = our_factors(reference, a, b, magnitude)
            if factors is None:
                raise _misfit(module, found, reference.path, reference.shape)
            target, node = reference.path, join(reference.path, "lora")
            if _has_several(reference, self.module_map):
                target, node = join(target, reference.weight), join(node, reference.weight)
            self.keep(target, node, factors, numbers, reference.shape)

    def add_parameter(self, name: str, named: Mapping[str, Factors]) -> None:
        """Adds the factors of a parameter that a module holds itself; `named` has those of all."""
        numbers, found, version = self.numbers(name), named[name], self.config.get("peft_version")
        self.check(name, found, numbers[0])
        for reference in references_of(name, named, self.module_map, version):
            pair = our_pair(reference, found, version)
            if len(reference.shape) not in (2, 3) or pair is None:
                raise _misfit(name, found, reference.path, reference.shape)
            self.check(name, found, numbers[0], pair["a"].shape[-1])
            target, node = reference.path, _node(reference.path)
            if self.module_map.is_alone(target):  # then a recipe has the module
                target = target.rpartition("/")[0]
                node = join(target, "lora")
            self.keep(target, node, pair, numbers, reference.shape)

    def add_experts(self, path: str, found: Mapping[str, Factors], lacking: Sequence[str]) -> None:
        """Adds the factors of experts, one pair with the experts on its first axis."""
        _, inputs, outputs = weight = self.module_map.base[path].shape
        (first, *_), wrong = found, []
        rank, _ = numbers = self.numbers(first)
        expected = {"a": (rank, inputs), "b": (outputs, rank)}
        for module, own in found.items():
            shapes = {name: array.shape for name, array in own.items()}
            if shapes != expected:
                wrong.append(f"{module} has factors of {shapes}, expected {expected}")
            if (each := self.numbers(module)) != numbers:
                wrong.append(
                    f"{module} has rank and alpha {each}, and {first} {numbers}; ours are alike"
                )
            if not is_target(self.config, module):
                wrong.append(f"{module} has factors but is not among the target modules")
        if lacking:
            wrong.append(f"{path}: the file has no factors of {', '.join(lacking[:4])}")
        if wrong:
            raise UserError("; ".join(wrong))
        pair = {k: np.stack([own[k].T for own in found.values()]) for k in ("a", "b")}
        self.keep(path, _node(path), pair, numbers, weight)


def _node(path: str) -> str:
    """The path of the leaves at one of our parameters."""
    module, _, own = path.rpartition("/")
    return join(module, "lora", own)


def _without_tied(
    config: Config, added: Mapping[str, Factors], module_map: ModuleMap, problems: list[str]
) -> dict[str, Factors]:
    """The factors without those of a tied output layer, which repeat the embedding's."""
    if module_map.tied is None:
        return dict(added)
    bare = {module_map.bare(key): key for key in added}
    head, embedding = (bare.get(name) for name in module_map.tied)
    rest = {key: found for key, found in added.items() if key != head}
    alike = head and embedding and _alike(config, added, head, embedding)
    if (head or embedding) and not alike:
        names = (embedding or module_map.tied[1], head or module_map.tied[0])
        problems.append(tied_problem(*names, module_map.table.held_twice))
        rest.pop(embedding or "", None)
    return rest


def _alike(config: Config, added: Mapping[str, Factors], head: str, embedding: str) -> bool:
    """Whether an output layer's factors are the embedding's the other way round, as PEFT ties."""
    one, other = added[head], added[embedding]
    return (
        all(number_at(config, n, head) == number_at(config, n, embedding) for n in _NUMBERS)
        and one.keys() == other.keys() == {"a", "b"}
        and np.array_equal(one["a"], other["b"].T)
        and np.array_equal(one["b"], other["a"].T)
    )


def _unmatched(
    config: Config, added: Iterable[str], parameters: Iterable[str | None]
) -> Iterator[str]:
    """A sentence for each target parameter whose factors the file does not have."""
    names = {*filter(None, parameters), *(f"{module}.weight" for module in added)}
    for target in config.get("target_parameters") or ():
        if not any(is_parameter({"target_parameters": [target]}, name) for name in names):
            yield (
                f"target_parameters={[target]}: names lists no parameter that matches this and has "
                "factors in the file; add it, as 'layers.0.mlp.experts.down_proj'"
            )


def _has_several(reference: ModuleReference, module_map: ModuleMap) -> bool:
    """Whether a module of ours has several weights, which then are targets by their own path."""
    weights = [n for n, x in reference.leaves.items() if n != "bias" and len(x.shape) > 1]
    others = (own.path for parts in module_map.parameters.values() for own in parts)
    return len(weights) > 1 or reference.path in (path.rpartition("/")[0] for path in others)


def _misfit(name: str, found: Factors, path: str, shape: tuple[int, ...]) -> UserError:
    """The error that names the shapes of factors and weight."""
    names = {"a": "A", "b": "B", "magnitude": "magnitude"}
    shapes = ", ".join(f"{names[own]} {list(x.shape)}" for own, x in found.items())
    return UserError(f"{name} has {shapes}, which do not fit {path} of {list(shape)}")
