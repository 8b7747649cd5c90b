"""Reads and writes adapters of Hugging Face PEFT: LoRA, DoRA, LLaMA-Adapter and (IA)^3.

A directory of PEFT's holds `adapter_config.json` and `adapter_model.safetensors`. Neither torch nor
PEFT is needed. A pickled `adapter_model.bin` is never opened, because unpickling runs whatever code
the file holds.

Reference: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.files import directories, hub
from adapters_jax.files.directories import PEFT
from adapters_jax.files.module_map import Names, find_modules
from adapters_jax.files.peft.convert import CLASSIFIES, from_peft, to_peft, unpooled
from adapters_jax.methods import Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree


def load_peft(
    directory: str | Path, names: Names, base: Any, *, revision: str | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """Reads an adapter that PEFT wrote.

    Args:
        directory: has `adapter_config.json` and `adapter_model.safetensors`; or an id on the
            Hugging Face Hub, from which these two files are fetched.
        names: the table of the model's family, `models.FAMILIES["llama"].names`, of a classifier
            `models.FAMILIES["roberta"].classifier.names`; or a mapping from PEFT's module names to
            our module paths: `{"encoder.q_proj": "encoder/query"}`. A tuple of paths stands for a
            module of PEFT's that fuses several of ours along its outputs; prompts need the
            attention module's path.
            PEFT's `target_parameters` need the names of parameters, in the order in which PyTorch's
            module defines them: `{"mlp.experts.gate_up_proj": "experts/gate_up_proj",
            "mlp.experts.down_proj": "experts/down_proj"}`. Name an embedding that is also the
            output layer twice, the embedding's name first. Only a `NameTable` can state how
            PyTorch's axes lie: that its weights are `(in, out)`, which matters for those that the
            file holds whole, and what a `ParameterRule` says.
        base: the model's parameters as a tree of arrays (abstract ones suffice) or an NNX module;
            their shapes tell the kinds of layers apart.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The recipe, and the trained leaves as a tree, stacked where the base's layers are scanned.
        For a linen model write `merge_trees(adapters, partition(params, recipe)[1])`; for either
        API pass both to `save_adapter` and load that directory with `load_adapter`.

    Raises:
        AdapterFileError: a file is absent, damaged or pickled, a setting is not supported, tensors
            do not fit the base, or layers differ that the base scans as one; the message names
            every problem.
        UserError: `names` does not fit the base.

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
    directory = hub.find(directory, revision, PEFT.files)
    config, tensors = PEFT.read(directory)
    return from_peft(config, tensors, names, base, f"{directory} cannot be converted from PEFT")


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

    Where PEFT's module fuses several of ours (GPT-2's `c_attn`) that do not share one A, their
    factors are written side by side, as one pair of a higher rank with the same product. An
    embedding that is also the output layer gets its pair for both, with `ensure_weight_tying`, and
    parameters of modules, such as experts, become `target_parameters` of PEFT 0.20. Ranks and
    alphas that a pattern sets are written for every module by its whole name.

    Args:
        directory: a new or empty one, or one with an adapter of PEFT and nothing else, which is
            replaced; its parents are made.
        recipe: LoRA, DoRA, LlamaAdapter or IA3; all but LlamaAdapter may have Unfreeze beside them.
        adapters: the trained part of a model, as `partition` returns it, or an NNX state.
        names, base: as in `load_peft`. A kernel with several input axes counts as a convolution's.
            Families that share our paths (BERT, RoBERTa, DistilBERT and ELECTRA) differ in their
            names for PEFT alone, so another one's table is no error here. A classifier's head has
            to read the pooler (`pooling="pooler"`): it is an error if the base has none, unless
            `task_type` is another one than "SEQ_CLS".
        prefix: begins the names of all modules but heads in the PyTorch model, such as "roberta.";
            by default the first prefix of the table.
        beside: further texts by file name, such as `{"README.md": aj.model_card(...)}`.
        **fields: of `adapter_config.json`, such as `base_model_name_or_path` and `task_type`.

    Returns:
        The directory.

    Raises:
        UserError: PEFT does not support the recipe, `names` lacks a module, or the directory
            holds something else; the message names every problem.
        TypeError: `adapters` is not a tree.

    Example:
        >>> import json, tempfile
        >>> import numpy as np
        >>> from adapters_jax import LoRA
        >>> params = {"query": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}}
        >>> leaves = {"query": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 4))}}}
        >>> lora, names = LoRA("query", rank=2, alpha=4), {"model.q_proj": "query"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_peft(f"{folder}/a", lora, leaves, names, params, task_type="CAUSAL_LM")
        ...     config = json.loads((saved / "adapter_config.json").read_text())
        >>> [config[field] for field in ("peft_type", "r", "lora_alpha", "task_type")]
        ['LORA', 2, 4, 'CAUSAL_LM']
    """
    flat = directories.flat_leaves("save_peft", adapters)
    directory = PEFT.directory(directory, (*PEFT.files, *(beside or ())))
    config, tensors, problems = to_peft(recipe, flat, names, base, prefix)
    if fields.get("task_type", CLASSIFIES) == CLASSIFIES:
        problems += unpooled(flat, find_modules(names, base))
    if problems:
        raise UserError(f"PEFT cannot load this adapter: {'; '.join(problems)}")
    files = PEFT.content(config | {"inference_mode": True, **fields}, tensors)
    return directories.write(directory, files, beside)
