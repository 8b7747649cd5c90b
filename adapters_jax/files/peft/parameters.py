"""LoRA on parameters that a module holds itself, such as stacked experts: `target_parameters`.

PEFT wraps the module once for each of its parameters, in the order that the module defines
them, and the wrappers nest: the last one's factors are `experts.lora_A.weight`, those of the one
before are `experts.base_layer.lora_A.weight`. The file does not say whose they are.

For a parameter of n experts and rank r, A is `(n * r, p)`, where the rank runs faster than the
expert, and B is `(q, r * n)`, where the expert runs faster. Which of the parameter's last two axes
p is depends on PEFT's version and on the attribute `is_transposed` of the module; the change is the
same whichever it is. Ours are A `(n, in, r)` and B `(n, r, out)`. Where a parameter fuses several
of ours along its outputs, as `gate_up_proj` does in transformers 5, these share A.

Reference: `ParamWrapper` in https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array, ParameterReference, joined
from adapters_jax.files.module_map import ModuleMap
from adapters_jax.files.peft.config import Config, is_parameter

Pair = tuple[Array, Array]
Factors = Mapping[str, Array]
INNER = ".base_layer"
WRITTEN = "0.20.0"  # the first version with today's order of axes


def parameters_by_key(
    config: Config, keys: Iterable[str], module_map: ModuleMap, problems: list[str]
) -> dict[str, str | None]:
    """The parameter, by its name in the file, of each key that holds a parameter's factors.

    Keys are the names before `.lora_A`, without PEFT's root. The parameter is None, and a problem,
    where a module has factors of more or fewer parameters than its targets are.
    """
    modules = {key: re.sub(rf"({re.escape(INNER)})+$", "", key) for key in keys}
    counts, found = Counter(modules.values()), dict[str, str | None]()
    for module, count in counts.items():
        names = _targeted(config, module, module_map)
        if names and len(names) != count:
            problems.append(
                f"{module} has factors of {count} parameters, but names has {len(names)} of its "
                f"target_parameters: {', '.join(names)}"
            )
            found |= dict.fromkeys(key for key, own in modules.items() if own == module)
        elif names:
            found |= dict(zip(nested(module, count), names, strict=True))
    return found


def nested(module: str, count: int) -> list[str]:
    """The keys of a module's parameters, in the order that it defines them.

    Example:
        >>> nested("experts", 2)
        ['experts.base_layer', 'experts']
    """
    return [module + INNER * depth for depth in reversed(range(count))]


def _targeted(config: Config, module: str, module_map: ModuleMap) -> list[str]:
    """The target parameters of a module, by their names in the file."""
    every = {**module_map.parameters, **module_map.stacked}
    own = [name for name in every if module_of(name) == module_map.bare(module)]
    names = [f"{module}.{name.rpartition('.')[2]}" for name in own]
    return [name for name in names if is_parameter(config, name)]


def references_of(
    name: str, named: Mapping[str, Mapping[str, Array]], module_map: ModuleMap, version: str | None
) -> tuple[ParameterReference, ...]:
    """Our parameters for one of theirs, as the model has it that a file's adapter was made on.

    Args:
        named: the factors of every parameter in the file.
        module_map: the model's, which may have it as transformers 4 and as 5 do.
        version: that of PEFT that wrote the file.

    Raises:
        UserError: a square stack's axes differ between these, and no other stack of the file tells.
    """

    def both(name: str) -> list[tuple[ParameterReference, ...]]:
        plain, bare = module_map.parameters, module_map.bare(name)
        own = [module_map.at_parameter(name), *([plain[bare]] if bare in plain else [])]
        return own if len({_along_inputs(each[0], version) for each in own}) > 1 else own[:1]

    found = both(name)
    if len(found) == 1 or found[0][0].shape[-2] != found[0][0].outputs:
        return found[0]  # widths tell their axes apart
    for other, factors in named.items():
        of_other = both(other)
        inputs, outputs = of_other[0][0].shape[-2], of_other[0][0].outputs
        if len(of_other) > 1 and inputs != outputs:
            said = factors["a"].shape[-1] == inputs
            return found[said != _along_inputs(of_other[0][0], version)]
    raise UserError(
        f"{name} is square, and its A is along other axes in transformers 4 than in 5, which the "
        "file does not say; adapt another parameter of its module as well"
    )


def module_of(name: str) -> str:
    """The name of the module that holds a parameter."""
    return name.rpartition(".")[0]


def our_pair(
    reference: ParameterReference, found: Mapping[str, Array], version: str | None
) -> dict[str, Array] | None:
    """Converts PEFT's A and B of one parameter to ours; returns None if they do not fit.

    The version is that of PEFT that wrote them, None for those that did not say it.

    Example:
        >>> import numpy as np
        >>> experts = ParameterReference("experts/up", (3, 4, 6), False, True)
        >>> pair = our_pair(experts, {"a": np.ones((6, 4)), "b": np.ones((6, 6))}, WRITTEN)
        >>> pair["a"].shape, pair["b"].shape
        ((3, 4, 2), (3, 2, 6))
    """
    a, b, (*stack, inputs, _) = found["a"], found["b"], reference.shape
    outputs = reference.outputs
    count = math.prod(stack)
    if a.ndim != 2 or b.ndim != 2 or len(a) % count or b.shape[1] != len(a):
        return None
    rank = len(a) // count
    first = a.reshape(count, rank, a.shape[1]).transpose(0, 2, 1)
    last = b.reshape(len(b), rank, count).transpose(2, 1, 0)
    widths = (a.shape[1], len(b))
    if widths not in ((inputs, outputs), (outputs, inputs)):
        return None
    as_ours = _along_inputs(reference, version) if inputs == outputs else widths[0] == inputs
    if not as_ours:
        first, last = last.transpose(0, 2, 1), first.transpose(0, 2, 1)
    a, b = first.reshape(*stack, inputs, rank), last.reshape(*stack, rank, outputs)
    return {"a": a, "b": reference.part.of(b)}  # type: ignore[dict-item]


def fused_pair(parts: Sequence[tuple[tuple[int, ...], Factors | None]], blocks: int = 1) -> Pair:
    """Our A and B of a weight that fuses several of ours, from those of the parts.

    Each part is its shape, and its factors if it has some. Parts that do not share A get their own
    columns of it, and B has zeros for the columns of the others. See `Span` for `blocks`.

    Example:
        >>> import numpy as np
        >>> gate = {"a": np.full((2, 3, 1), 2.0), "b": np.ones((2, 1, 4))}
        >>> a, b = fused_pair([((2, 3, 4), gate), ((2, 3, 4), None)])
        >>> a.shape, b.shape
        ((2, 3, 1), (2, 1, 8))
    """
    present = [found["a"] for _, found in parts if found]
    shared = all(np.array_equal(a, present[0]) for a in present)
    whole = present[0] if shared else np.concatenate(present, -1)
    rows, start = [], 0
    for shape, found in parts:
        row = np.zeros((*shape[:-2], whole.shape[-1], shape[-1]), whole.dtype)
        if found:
            rank = found["a"].shape[-1]
            row[..., start : start + rank, :] = found["b"]
            start += 0 if shared else rank
        rows.append(row)
    return whole, joined(rows, blocks)


def their_pair(reference: ParameterReference, a: Array, b: Array) -> Pair:
    """Converts our A and B of one parameter to those that PEFT reads; the inverse of `our_pair`."""
    *stack, inputs, _ = reference.shape
    count, rank = math.prod(stack), a.shape[-1]
    a, b = a.reshape(count, inputs, rank), b.reshape(count, rank, reference.outputs)
    if not _along_inputs(reference, WRITTEN):
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    rows = a.transpose(0, 2, 1).reshape(count * rank, a.shape[1])
    return rows, b.transpose(2, 1, 0).reshape(b.shape[2], rank * count)


def release_of(version: Any) -> tuple[int, int]:
    """The release of PEFT that wrote a file; one before 0.18, if it does not say it.

    Example:
        >>> release_of("0.20.1.dev0"), release_of(None)
        ((0, 20), (0, 17))
    """
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 17)


def _along_inputs(reference: ParameterReference, version: str | None) -> bool:
    """Whether PEFT's A is along our inputs. It is along the last axis of a matrix; of a stack:

    along the first of the two in PEFT up to 0.18, along the last one in 0.19 if the module has
    `is_transposed`, and since then if it does not have it.
    """
    release = release_of(version)
    if len(reference.shape) == 2:
        last = True
    elif release < (0, 20):
        last = reference.is_transposed and release == (0, 19)
    else:
        last = not reference.is_transposed
    return last == reference.swapped
