"""LoRA on experts that PyTorch has as a linear layer each, and we as rows of one array.

PEFT adapts each expert as a module of its own, `experts.3.up_proj`; ours is one pair of factors
with the experts on its first axis.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import ModuleMap
from adapters_jax.files.names import ROW
from adapters_jax.files.peft.config import Config, is_target, number_at

Factors = Mapping[str, Array]


@dataclass(frozen=True)
class Experts:
    """The factors of all experts of one of our parameters.

    Attributes:
        rank: their rank.
        alpha: their alpha.
        pair: A `(experts, in, rank)` and B `(experts, rank, out)`.
    """

    rank: int
    alpha: float
    pair: dict[str, Array]


def modules_of(name: str, count: int) -> list[str]:
    """The names of the modules of a parameter's experts.

    Example:
        >>> modules_of("experts.{}.up_proj.weight", 2)
        ['experts.0.up_proj', 'experts.1.up_proj']
    """
    return [name.replace(ROW, str(i)).removesuffix(".weight") for i in range(count)]


def gathered(
    config: Config, added: Mapping[str, Factors], module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Factors], dict[str, Experts]]:
    """Returns the factors of all other modules, and those of experts by our parameter's path."""
    keys = {module_map.bare(key): key for key in added}
    rest, found = dict(added), dict[str, Experts]()
    for name, reference in module_map.parameters.items():
        modules = modules_of(name, reference.shape[0]) if ROW in name else []
        present = [keys[module] for module in modules if module in keys]
        if not present:
            continue
        own = [rest.pop(key) for key in present]
        lacking = [module for module in modules if module not in keys]
        wrong = [*_misfits(config, present, own, reference.shape)]
        if lacking:
            wrong.append(f"{reference.path}: the file has no factors of {', '.join(lacking[:4])}")
        problems += wrong
        if not wrong:
            pair = {k: np.stack([each[k].T for each in own]) for k in ("a", "b")}
            alpha = number_at(config, "lora_alpha", "alpha_pattern", present[0])
            found[reference.path] = Experts(pair["a"].shape[-1], alpha, pair)
    return rest, found


def _misfits(
    config: Config, keys: Sequence[str], factors: Sequence[Factors], shape: Sequence[int]
) -> Iterator[str]:
    """A sentence for each expert whose factors are not those of the others' kind."""
    numbers = [
        (
            number_at(config, "r", "rank_pattern", k),
            number_at(config, "lora_alpha", "alpha_pattern", k),
        )
        for k in keys
    ]
    expected = {"a": (numbers[0][0], shape[1]), "b": (shape[2], numbers[0][0])}
    for key, own, each in zip(keys, factors, numbers, strict=True):
        shapes: dict[str, Any] = {name: array.shape for name, array in own.items()}
        if shapes != expected:
            yield f"{key} has factors of {shapes}, expected {expected}"
        if each != numbers[0]:
            yield f"{key} has rank and alpha {each}, and {keys[0]} {numbers[0]}; ours are alike"
        if not is_target(config, key):
            yield f"{key} has factors but is not among the target modules"
