"""Adapters of Hugging Face PEFT, read and written: LoRA, DoRA, LLaMA-Adapter and (IA)^3.

A directory of theirs holds `adapter_config.json` and `adapter_model.safetensors`. Neither torch nor
PEFT is needed. A pickled `adapter_model.bin` is never opened, because unpickling runs whatever code
the file holds.

Reference: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.interop import directories
from adapters_jax.interop.layouts import Array
from adapters_jax.interop.module_map import Names, as_in_file, as_in_model, find_modules
from adapters_jax.interop.peft import kinds
from adapters_jax.interop.peft.config import config_problems
from adapters_jax.io import hub
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PICKLE_ADVICE = (
    f"a pickled {PICKLE} is never opened, since unpickling runs code: convert it where you trust "
    "it, with PEFT's PeftModel.from_pretrained(BASE, DIR).save_pretrained(NEW_DIR)"
)


def load_peft(
    directory: str | Path, names: Names, base: Any, *, revision: str | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """Reads an adapter that PEFT wrote.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`, or an id on the
            Hugging Face Hub, of which these two are fetched.
        names: the `NAMES` that stands beside a model (`models.bert`, `models.bert.classifier`,
            `models.gpt2`, `models.llama`), or a mapping from PEFT's module names to our
            module paths: `{"encoder.q_proj": "encoder/query"}`, with a tuple of paths where their
            module is several of ours, fused along its outputs, and an attention module's path for
            prompts. Only a `NameTable` can say that weights are `(in, out)` in PyTorch as well,
            which matters where such a weight is saved whole.
        base: the model's parameters as a tree of arrays, also abstract ones, or an NNX module;
            their shapes say which layer is of which kind.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The recipe, and the trained leaves as a tree, stacked where the base's layers are scanned:
        for `merge_trees(adapters, params)` after taking out the base's leaves that train too
        (`partition(params, recipe)`), or for `save_adapter`, whose directory `load_adapter` puts
        onto linen and NNX models alike.

    Raises:
        AdapterFileError: files are absent, damaged or pickled, a setting is not supported, or
            tensors do not fit the base, whose layers are all alike where they are scanned;
            everything is named at once.
        ValueError: `names` does not fit the base.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> params = {"query": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}}
        >>> leaves = {"query": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 4))}}}
        >>> from adapters_jax import LoRA
        >>> names = {"q_proj": "query"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_peft(f"{folder}/a", LoRA("query", 2), leaves, names, params)
        ...     recipe, adapters = load_peft(saved, names, params)
        >>> recipe
        Recipe(
          LoRA(targets=('query',), rank=2, alpha=2, a_init='uniform'),
        )
        >>> adapters["query"]["lora"]["a"].shape
        (6, 2)
    """
    directory = hub.find(directory, revision, (CONFIG, TENSORS))
    config, tensors = _read(directory)
    places = find_modules(names, base)
    problems = config_problems(config)
    if not problems:
        try:
            methods, leaves, problems = kinds.read(config, tensors, places)
            if not problems:
                return as_in_model(methods, leaves, names, places)
        except (ValueError, re.error) as error:  # a method refuses a number, layers are not alike
            problems = [str(error)]
    raise AdapterFileError(f"{directory} cannot be read as it is meant: {'; '.join(problems)}")


def save_peft(
    directory: str | Path,
    recipe: Recipe | Method,
    adapters: Tree,
    names: Names,
    base: Any,
    *,
    prefix: str | None = None,
    beside: Mapping[str, str] | None = None,
    **fields: Any,
) -> Path:
    """Writes an adapter that PEFT loads; the directory appears whole or not at all.

    Where PEFT's module is several of ours (GPT-2's `c_attn`), those without an A in common get one
    each, side by side in a pair of factors of a higher rank, with the same product. A pattern's
    ranks and alphas are written for every module by its whole name.

    Args:
        directory: a new or empty one; its parents are made.
        recipe: LoRA, DoRA, LlamaAdapter or IA3, and Unfreeze beside all but LlamaAdapter.
        adapters: the trained part of a model, as `partition` gives, or an NNX state.
        names, base: as in `load_peft`. A kernel with several input axes is taken for a
            convolution's.
        prefix: what stands before the names of all modules but heads in the PyTorch model, such as
            "roberta."; by default the first prefix of the table.
        beside: further texts by file name, such as `{"README.md": aj.model_card(...)}`.
        **fields: of `adapter_config.json`, such as `base_model_name_or_path` and `task_type`.

    Returns:
        The directory.

    Raises:
        ValueError: PEFT has no such thing as the recipe says, a leaf has no name, or the directory
            holds something; everything is named at once.
        TypeError: `adapters` is not a tree.
    """
    flat = directories.flat_leaves("save_peft", adapters)
    directory = directories.empty_directory(directory)
    places = find_modules(names, base)
    unrolled = as_in_file(recipe, flat, names, places)
    config, tensors, problems = kinds.write(*unrolled, places, prefix)
    if problems:
        raise UserError(f"PEFT cannot load this adapter: {'; '.join(problems)}")
    config |= {"inference_mode": True, **fields}
    files = directories.pair((CONFIG, config), (TENSORS, tensors))
    return directories.write(directory, files, beside)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The configuration and the tensors of a directory."""
    config, tensors = directories.read_pair(directory, CONFIG, TENSORS, PICKLE, PICKLE_ADVICE)
    if "peft_type" not in config:
        raise AdapterFileError(
            f"{directory / CONFIG} has no peft_type, so PEFT did not write it; what "
            "save_adapter wrote is for load_adapter"
        )
    return config, tensors
