"""AdaLoRA out of PEFT's files, as the LoRA with the same change.

PEFT stores `lora_A` (r, in), `lora_E` (r, 1) and `lora_B` (out, r) of the ranks that are left,
and in `rank_pattern` which of the initial ones these are. Its forward divides by the initial rank
and 1e-5, whatever rank a module has in the end.

Reference: https://huggingface.co/docs/peft/package_reference/adalora
"""

from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.peft import lora
from adapters_jax.files.peft.config import Config, value
from adapters_jax.files.settings import collecting
from adapters_jax.files.untrusted import not_finite
from adapters_jax.methods import Method


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one LoRA for all modules that have a rank left, and its leaves."""
    scale = value(config, "lora_alpha") / (value(config, "init_r") + 1e-5)
    pairs: dict[str, Leaves] = {}
    for module, found in added.items():
        with collecting(problems):
            numbers, a, b = _checked(config, module, found), found["a"], found["b"]
            there = module_map.at(module)
            shape = there[0].shape if there and there[0].weight == "kernel" else ()
            if len(shape) == 4 and a.shape[1] == np.prod(shape[:-1]):  # they flatten a window
                a, b = a.reshape(len(a), shape[-2], *shape[:-2]), b[..., None, None]
            if len(a):
                with np.errstate(over="ignore", invalid="ignore"):
                    scaled = a * (scale * numbers).reshape(-1, *(1,) * (a.ndim - 1))
                    pairs[module] = {"a": scaled.astype(np.float32), "b": b}
                if not_finite(pairs[module]):
                    problems.append(f"{module} times lora_alpha is too large for float32")
    ranks = {module: len(pair["a"]) for module, pair in pairs.items()}
    rank = max(ranks.values(), default=1)
    # PEFT finds a key at the end of a name, where it does not begin with "^".
    patterns: Any = {f"^{module}": r for module, r in ranks.items() if r != rank}
    as_lora = {
        **{name: found for name, found in config.items() if name not in ("use_rslora", "bias")},
        **{"peft_type": "LORA", "init_lora_weights": True, "r": rank, "lora_alpha": rank},
        **{"rank_pattern": patterns, "alpha_pattern": patterns},
    }
    return lora.read(as_lora, pairs, module_map, problems)


def _checked(config: Config, module: str, found: Leaves) -> Array:
    """The singular values of a module; raises UserError unless its tensors fit each other."""
    if found.keys() != {"a", "lambda", "b"}:
        raise UserError(f"{module} has the tensors of {', '.join(sorted(found))}, expected A, E, B")
    a, numbers, b = found["a"], found["lambda"], found["b"]
    pattern = config.get("rank_pattern") or {}
    kept = next((own for key, own in pattern.items() if _module(key) == module), None)
    rank = value(config, "init_r") if kept is None else sum(map(bool, kept))
    if a.ndim != 2 or b.ndim != 2 or {len(a), numbers.size, b.shape[1]} != {rank}:
        shapes = ", ".join(
            f"{n} {list(x.shape)}" for n, x in zip("AEB", (a, numbers, b), strict=True)
        )
        raise UserError(f"{module} has {shapes}, expected rank {rank} by init_r and rank_pattern")
    return numbers


def _module(key: str) -> str:
    """The module of a key of `rank_pattern`, which may have the name of the adapter behind it.

    Example:
        >>> _module("layers.0.q.lora_E"), _module("base_model.model.layers.0.q.lora_E.default")
        ('layers.0.q', 'layers.0.q')
    """
    return key.removeprefix("base_model.model.").partition(".lora_E")[0]
