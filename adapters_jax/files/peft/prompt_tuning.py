"""Prompt tuning in PEFT's files: one tensor of no module, and the heads that train beside it.

PEFT puts the prompt in front of what the embedding of tokens returns. It finds that embedding by
its name or by the size of the vocabulary; here it is the one that the names of the base call so.
An encoder-decoder has the prompt in front of what its encoder reads. By default PEFT stores another
one for its decoder (`num_transformer_submodules=2`), which it neither trains nor reads.

Reference: https://huggingface.co/docs/peft/package_reference/prompt_tuning
"""

from typing import Any

import numpy as np

from adapters_jax.errors import first_few
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import shortest
from adapters_jax.files.peft.config import KINDS, Config
from adapters_jax.methods import Method, PromptTuning
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

((_KEY, _LEAF),) = KINDS["PROMPT_TUNING"].shared.items()
_WORDS = ("embed_tokens", "word_embeddings", "tok_embeddings", "wte", "shared")
_SCALED = (
    "this family multiplies its embeddings, which transformers 4 does behind PEFT's prompts and "
    "transformers 5 before, so that the file means one of two"
)


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns the method and its leaf."""
    path, length = _embedding(module_map, problems), config.get("num_virtual_tokens", 0)
    prompt = added[""].get(_LEAF)
    if path is None or prompt is None:
        problems += [] if prompt is not None else [f"the file has no {_KEY}"]
        return [], {}
    width, prompts = module_map.base[f"{path}/embedding"].shape[-1], 1
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        prompts = config.get("num_transformer_submodules") or 2
    elif config.get("num_transformer_submodules") == 2:
        problems.append(
            "num_transformer_submodules=2 belongs to task_type='SEQ_2_SEQ_LM', but this is "
            f"{config.get('task_type')!r}; expected 1"
        )
        return [], {}
    if prompt.shape != (prompts * length, width):
        problems.append(
            f"{_KEY} is {list(prompt.shape)}, expected num_virtual_tokens={length}"
            f"{' twice' if prompts == 2 else ''} by the {width} of {path}"
        )
        return [], {}
    prompt = prompt[:length]
    method = PromptTuning(shortest([path], module_map.paths), length=length)
    return [method], {f"{path}/{method.slot}/{_LEAF}": prompt.astype(np.float32)}


def _embedding(module_map: ModuleMap, problems: list[str]) -> str | None:
    """The path of our embedding of tokens."""
    tables = {
        bare: parts[0].path
        for bare, parts in module_map.modules.items()
        if parts[0].weight == "embedding"
    }
    named = {bare: path for bare, path in tables.items() if bare.rpartition(".")[2] in _WORDS}
    found = {*(named or tables).values()}
    if module_map.table.scales_embedding:
        problems.append(_SCALED)
    elif len(found) == 1:
        return found.pop()
    else:
        problems.append(
            f"names has {first_few(sorted(named or tables)) or 'no embedding'}, expected one "
            "embedding of tokens, such as 'embed_tokens'"
        )
    return None


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields and the prompt."""
    path = _embedding(module_map, problems)
    if [each.path for each in added] != [path] and path is not None:
        wrong = first_few(sorted({each.path for each in added} - {path})) or "none"
        problems.append(f"PEFT has one prompt, of {path}; this adapter has prompts at {wrong}")
    prompts = [each.leaves(leaves)[_LEAF] for each in added]
    fields = {
        "num_virtual_tokens": len(prompts[0]) if prompts else 0,
        "token_dim": prompts[0].shape[-1] if prompts else 0,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
    return fields, {_KEY: np.ascontiguousarray(prompts[0])} if prompts else {}
