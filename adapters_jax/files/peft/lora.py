"""LoRA and DoRA in PEFT's files: factors, ranks and alphas of every module and parameter.

Three kinds of PEFT's modules have factors: modules, which may fuse several of ours; experts that
are a linear layer each, and rows of one array here; and modules that hold parameters themselves,
for which see `parameters`.

Reference: https://huggingface.co/docs/peft/package_reference/lora
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import (
    Array,
    ModuleReference,
    our_factors,
    rounded,
    their_factors,
)
from adapters_jax.files.module_map import Added, ModuleMap, in_order, shortest
from adapters_jax.files.peft.config import (
    NOT_ON_PARAMETERS,
    ROOT,
    STARTS,
    TIED,
    Config,
    is_parameter,
    is_target,
    number_at,
    value,
)
from adapters_jax.files.peft.parameters import (
    WRITTEN,
    module_of,
    nested,
    our_pair,
    parameters_by_key,
    their_pair,
)
from adapters_jax.methods import DoRA, LoRA, Method
from adapters_jax.methods.leaf import axes_of
from adapters_jax.placement import in_tree
from adapters_jax.recipe import Recipe
from adapters_jax.targets import join
from adapters_jax.weights.axes import Axes

Factors = Mapping[str, Array]
_NUMBERS = ("r", "lora_alpha")
_THEIR_STARTS = {"gaussian_rank": "gaussian"}


def read(
    config: Config, added: Mapping[str, Factors], module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LoRA or DoRA for all targets, with patterns where ranks or alphas differ."""
    reader = _Reader(config, module_map)
    rest = _without_tied(config, added, module_map, problems)
    keys = {module_map.bare(key): key for key in rest}
    for path, modules in module_map.rows.items():
        own = {key: rest.pop(key) for module in modules if (key := keys.get(module))}
        if own:
            lacking = [module for module in modules if module not in keys]
            _collect(problems, reader.add_experts, path, own, lacking)
    parameters = parameters_by_key(config, rest, module_map, problems)
    problems += _unmatched(config, rest, parameters.values())
    for key, found in rest.items():
        if key not in parameters:
            _collect(problems, reader.add_module, key, found)
        elif (name := parameters[key]) is not None:
            _collect(problems, reader.add_parameter, name, found)
    ranks, alphas = reader.ranks, reader.alphas
    if not ranks:
        problems += [] if problems else ["the file has no LoRA factors"]
        return [], reader.leaves
    method = (DoRA if config.get("use_dora") else LoRA)(
        shortest(ranks, [*module_map.paths, *module_map.base]),
        rank=value(config, "r"),
        alpha=value(config, "lora_alpha"),
        dropout=value(config, "lora_dropout"),
        a_init=STARTS[value(config, "init_lora_weights")],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=_pattern(ranks, value(config, "r")),
        alpha_pattern=_pattern(alphas, value(config, "lora_alpha")),
    )
    return [method], reader.leaves


def _collect(problems: list[str], add: Callable[..., None], *arguments: Any) -> None:
    """Calls a function, and keeps the problem that it raises, so that a file has all in one."""
    try:
        add(*arguments)
    except UserError as problem:
        problems.append(str(problem))


@dataclass(frozen=True)
class _Reader:
    """Our leaves, and the rank and the alpha of each target, of what was added so far."""

    config: Config
    module_map: ModuleMap
    leaves: dict[str, Array] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def numbers(self, name: str) -> tuple[int, float]:
        """The rank and the alpha; patterns name a parameter by itself, others by their module."""
        if is_parameter(self.config, f"{name}.weight"):
            name = f"{name}.weight"
        return number_at(self.config, "r", name), number_at(self.config, "lora_alpha", name)

    def keep(self, target: str, node: str, factors: Factors, numbers: tuple[int, float]) -> None:
        """Adds the leaves at a node, whose numbers the method has by the path of its target."""
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
            turned = is_embedding or self.module_map.fan_in_fan_out
            a, b = (b.T, a.T) if turned else (a, b)
        elif not is_target(self.config, module):
            raise UserError(f"{module} has factors but is not among the target modules")
        self.check(module, found, numbers[0], len(a))
        if is_embedding and magnitude is not None:
            raise UserError(f"{module}: DoRA on an embedding is not supported")
        made = [our_factors(reference, a, b, magnitude) for reference in there]
        for reference, factors in zip(there, made, strict=True):
            if factors is None or None in made:
                raise _misfit(module, found, reference.path, reference.shape)
            target, node = reference.path, join(reference.path, "lora")
            if _has_several(reference, self.module_map):
                target, node = join(target, reference.weight), join(node, reference.weight)
            self.keep(target, node, factors, numbers)

    def add_parameter(self, name: str, found: Factors) -> None:
        """Adds the factors of a parameter that a module holds itself."""
        numbers = self.numbers(name)
        self.check(name, found, numbers[0])
        reference = self.module_map.parameters[self.module_map.bare(name)]
        pair = our_pair(reference, found, self.config.get("peft_version"))
        if len(reference.shape) not in (2, 3) or pair is None:
            raise _misfit(name, found, reference.path, reference.shape)
        self.check(name, found, numbers[0], pair["a"].shape[-1])
        self.keep(reference.path, _node(reference.path), pair, numbers)

    def add_experts(self, path: str, found: Mapping[str, Factors], lacking: Sequence[str]) -> None:
        """Adds the factors of experts, one pair with the experts on its first axis."""
        _, inputs, outputs = self.module_map.base[path].shape
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
        self.keep(path, _node(path), pair, numbers)


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
        problems.append(TIED.format(*names))
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
                f"target_parameters={[target]}: names has no such parameter with factors in the "
                "file; add it, as 'layers.0.mlp.experts.down_proj'"
            )


def _has_several(reference: ModuleReference, module_map: ModuleMap) -> bool:
    """Whether a module of ours has several weights, which then are targets by their own path."""
    weights = [n for n, x in reference.leaves.items() if n != "bias" and len(x.shape) > 1]
    others = (own.path.rpartition("/")[0] for own in module_map.parameters.values())
    return len(weights) > 1 or reference.path in others


def _misfit(name: str, found: Factors, path: str, shape: tuple[int, ...]) -> UserError:
    """The error that names the shapes of factors and weight."""
    names = {"a": "A", "b": "B", "magnitude": "magnitude"}
    shapes = ", ".join(f"{names[own]} {list(x.shape)}" for own, x in found.items())
    return UserError(f"{name} has {shapes}, which do not fit {path} of {list(shape)}")


def _pattern(numbers: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Patterns of modules for each number that differs from the usual one."""
    others = sorted({number for number in numbers.values() if number != usual})
    groups = {n: [path for path, number in numbers.items() if number == n] for n in others}
    return {pattern: n for n in others for pattern in shortest(groups[n], numbers)}


def write(
    recipe: Recipe,
    added: Added,
    leaves: Mapping[str, Array],
    module_map: ModuleMap,
    problems: list[str],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Returns the fields, and the factors of every module and parameter."""
    methods: list[Any] = list(recipe.attached)
    if len({(m.dropout, m.rank_stabilized) for m in methods}) > 1:
        problems.append(
            "PEFT has one dropout and one rank_stabilized for all modules; these differ"
        )
    if any(m.a_init == "pissa" for m in methods):
        problems.append(
            "a_init='pissa' changed the base's weights, but PEFT adapts the original base"
        )
    pairs = _pairs(recipe, added, leaves, module_map, problems)
    writer = _Writer(module_map, pairs, methods[0].rank_stabilized, problems)
    writer.add_modules()
    writer.add_experts()
    modules = set(writer.ranks)
    writer.add_parameters()
    parameters = sorted(writer.ranks.keys() - modules, key=in_order)
    unknown = sorted(pair.target for pair in pairs.values())
    problems += [f"names has no name for {path}; add it" for path in unknown]
    fields = _fields(methods, writer, sorted(modules, key=in_order))
    if parameters:
        fields |= {"target_parameters": parameters, "peft_version": WRITTEN}
        problems += [
            f"{parameters[0]}: PEFT does not support {field}={fields[field]!r} on parameters"
            for field in NOT_ON_PARAMETERS
            if fields[field]
        ]
    if module_map.tied and module_map.full(module_map.tied[0]) in modules:
        fields["ensure_weight_tying"] = True
    return fields, writer.tensors


def _fields(methods: Sequence[Any], writer: "_Writer", modules: Sequence[str]) -> dict[str, Any]:
    """Returns the configuration: the commonest rank and alpha, and patterns for the others."""
    ranks, alphas = writer.ranks, writer.alphas
    (rank, _), *_ = Counter(ranks.values()).most_common(1) or [(methods[0].rank, 0)]
    (alpha, _), *_ = Counter(alphas.values()).most_common(1) or [(rank, 0)]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": methods[0].dropout,
        "use_rslora": methods[0].rank_stabilized,
        "use_dora": methods[0].name == "dora",
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": list(modules),
        "fan_in_fan_out": writer.module_map.fan_in_fan_out,
        "init_lora_weights": _THEIR_STARTS.get(methods[0].a_init, True),
    }


class _Pair(NamedTuple):
    """The factors of one of our weights, with its inputs before its outputs.

    Attributes:
        method: the LoRA or DoRA.
        target: the path of its target, by which the method has its scale.
        leaves: its leaves by name.
    """

    method: Any
    target: str
    leaves: Factors

    @property
    def scale(self) -> float:
        return self.method.scale_at(self.target)


def _pairs(
    recipe: Recipe,
    added: Added,
    leaves: Mapping[str, Array],
    module_map: ModuleMap,
    problems: list[str],
) -> dict[str, _Pair]:
    """The factors of each weight, by its path; only those of `added`, which are complete."""
    owners = {path: owner for path in leaves if (owner := recipe.owner(path))}
    complete = {path: leaves[path] for path, owner in owners.items() if owner.path in added}
    shapes = {path: tuple(x.shape) for path, x in {**module_map.base, **complete}.items()}
    pairs = {}
    for each in in_tree(recipe, shapes):
        own = _inputs_first(each.method, axes_of(each.point), each.leaves(leaves))
        if own is None:
            shape = list(each.point.weight_shape)
            problems.append(f"{each.point.path}: PEFT cannot take the axes of its weight {shape}")
            continue
        path = join(each.module, each.point.weight)
        pairs[path] = _Pair(each.method, each.point.path, own)
    return pairs


def _inputs_first(method: Any, axes: Axes, leaves: Factors) -> Factors | None:
    """Leaves as of a weight whose inputs come before its outputs; None where that cannot be.

    A weight whose outputs come first has the same change with A and B the other way round.
    """
    every, n = tuple(range(axes.ndim)), len(axes.shared)
    if (*axes.shared, *axes.inputs, *axes.outputs) == every:
        return leaves
    backwards = (*axes.shared, *axes.outputs, *axes.inputs) == every
    if not backwards or method.slices or leaves.keys() != {"a", "b"}:
        return None
    return {"a": np.moveaxis(leaves["b"], n, -1), "b": np.moveaxis(leaves["a"], -1, n)}


@dataclass(frozen=True)
class _Writer:
    """PEFT's tensors, and the rank and the alpha of every module and parameter, added so far.

    What is added leaves `pairs`, which has the rest by the paths of our weights.
    """

    module_map: ModuleMap
    pairs: dict[str, _Pair]
    rank_stabilized: bool
    problems: list[str]
    tensors: dict[str, Array] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def number(self, name: str, rank: int, scale: float) -> None:
        """Adds the numbers of a module or a parameter."""
        self.ranks[name] = rank
        self.alphas[name] = rounded(scale * (math.sqrt(rank) if self.rank_stabilized else rank))

    def factors(self, key: str, a: Array, b: Array, of_embedding: bool = False) -> None:
        """Adds A and B, which are weights of layers in PEFT, or bare parameters of an embedding."""
        for name, factor in (("A", a), ("B", b)):
            end = f"lora_embedding_{name}" if of_embedding else f"lora_{name}.weight"
            self.tensors[f"{ROOT}{key}.{end}"] = factor

    def add_modules(self) -> None:
        """Adds the factors of PEFT's modules, which may fuse several of ours."""
        module_map, problems = self.module_map, self.problems
        for bare, parts in module_map.modules.items():
            mine = [self.pairs.pop(join(each.path, each.weight), None) for each in parts]
            present = [pair for pair in mine if pair]
            both = list(zip(parts, mine, strict=True))
            wrong = [part for part, pair in both if pair and not _fits(part, pair)]
            problems += [
                f"{p.path}: its factors do not fit its weight {list(p.shape)}" for p in wrong
            ]
            if wrong or not present:
                continue
            name, is_dora = module_map.full(bare), present[0].method.name == "dora"
            a, b, scale = _fused(both)
            self.number(name, len(a), scale)
            self.factors(name, a, b, of_embedding=parts[0].weight == "embedding")
            if is_dora and len(present) < len(parts):
                problems.append(f"{bare}: PEFT's DoRA adapts all parts of a module or none")
                continue
            if is_dora:
                whole = np.concatenate([pair.leaves["magnitude"].ravel() for pair in present])
                # The magnitudes of a convolution lie along its second axis.
                shape = (-1,) if a.ndim == 2 else (1, -1, *(1,) * (a.ndim - 2))
                self.tensors[f"{ROOT}{name}.lora_magnitude_vector"] = whole.reshape(shape)
            if module_map.tied and bare == module_map.tied[1]:
                if is_dora:
                    problems.append(f"{parts[0].path}: PEFT's DoRA does not adapt a tied embedding")
                head = module_map.full(module_map.tied[0])
                self.number(head, len(a), scale)
                self.factors(head, b.T, a.T)

    def add_experts(self) -> None:
        """Adds the factors of experts, each of which is a module of PEFT's."""
        for path, modules in self.module_map.rows.items():
            pair = self.pairs.pop(path, None)
            if pair is None:
                continue
            if pair.method.slices or pair.leaves.keys() != {"a", "b"}:
                self.problems.append(f"{path}: PEFT's files of experts have LoRA without slices")
                continue
            a, b = pair.leaves["a"], pair.leaves["b"]
            for i, module in enumerate(modules):
                name = self.module_map.full(module)
                self.number(name, a.shape[-1], pair.scale)
                self.factors(name, a[i].T, b[i].T)

    def add_parameters(self) -> None:
        """Adds the factors of parameters, of which PEFT nests those of one module."""
        parameters = self.module_map.parameters
        mine = [name for name, own in parameters.items() if own.path in self.pairs]
        for module in dict.fromkeys(map(module_of, mine)):
            names = [name for name in mine if module_of(name) == module]
            full = self.module_map.full(module)
            if full in self.ranks:
                paths = ", ".join(parameters[name].path for name in names)
                self.problems.append(f"{paths}: PEFT adapts {full} or parameters in it, not both")
            for key, name in zip(nested(full, len(names)), names, strict=True):
                reference = parameters[name]
                pair = self.pairs.pop(reference.path)
                a, b, shape = pair.leaves["a"], pair.leaves["b"], reference.shape
                fits = (*a.shape[:-1], b.shape[-1]) == shape and len(shape) in (2, 3) and module
                if not fits or pair.method.slices:
                    self.problems.append(
                        f"{reference.path} of {list(shape)} has factors {list(a.shape)} and "
                        f"{list(b.shape)}; PEFT adapts whole parameters of modules, (in, out) or "
                        "(experts, in, out)"
                    )
                    continue
                self.factors(key, *their_pair(reference, a, b))
                self.number(f"{full}.{name.rpartition('.')[2]}", a.shape[-1], pair.scale)


def _fits(reference: ModuleReference, pair: _Pair) -> bool:
    """Whether factors fit one weight; those of stacked layers do not."""
    inputs, outputs = pair.leaves["a"].shape[:-1], pair.leaves["b"].shape[1:]
    sliced = pair.method.slices
    return inputs + outputs == reference.shape or (sliced and inputs == reference.shape[:-1])


def _fused(
    parts: Sequence[tuple[ModuleReference, _Pair | None]],
) -> tuple[Array, Array, float]:
    """Returns A, B and the scale of one of PEFT's modules, which may fuse several of ours.

    If all parts share one A, it is written once and their Bs are stacked. Otherwise each part gets
    its own rows of A, and B has zeros for the rows of the others.
    """
    scale = next(pair.scale for _, pair in parts if pair)
    made: list[tuple[int, tuple[Array, Array] | None]] = []
    for reference, pair in parts:
        if pair is None:
            made.append((reference.width, None))
            continue
        a, b = their_factors(reference, pair.leaves, pair.method.slices)
        made.append((reference.width, (a, b if pair.scale == scale else b * (pair.scale / scale))))
    present = [factors for _, factors in made if factors]
    if len(made) == 1:
        return *present[0], scale
    shared = all(np.array_equal(a, present[0][0]) for a, _ in present)
    a = present[0][0] if shared else np.concatenate([a for a, _ in present])
    rows, start = [], 0
    for width, factors in made:
        block = np.zeros((width, len(a)), a.dtype)
        if factors:
            block[:, start : start + len(factors[0])] = factors[1]
            start += 0 if shared else len(factors[0])
        rows.append(block)
    return a, np.concatenate(rows), scale
