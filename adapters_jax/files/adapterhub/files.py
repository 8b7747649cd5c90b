"""Reads and writes adapters of AdapterHub: bottlenecks, Compacter, LoRA, LoReFT and heads.

A directory of AdapterHub's holds `adapter_config.json` and `adapter.safetensors`, and for a head
`head_config.json` and `model_head.safetensors`. Neither torch nor AdapterHub is needed. Of a `.bin`
that torch pickled, which AdapterHub writes by default, tensors alone are read.

Reference: Poth et al. 2023, "Adapters", arXiv:2311.11077; https://docs.adapterhub.ml/loading.html
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files import directories, hub
from adapters_jax.files.adapterhub import convert, heads
from adapters_jax.files.adapterhub.architectures import ARCHITECTURES
from adapters_jax.files.adapterhub.blocks import Blocks, find_blocks
from adapters_jax.files.adapterhub.config import VERSION
from adapters_jax.files.directories import ADAPTERHUB, ADAPTERHUB_HEAD
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import (
    Leaves,
    Names,
    as_in_file,
    as_in_model,
    placed,
    shortest,
)
from adapters_jax.methods import Method, Unfreeze
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree

FILES = (*ADAPTERHUB.files, *ADAPTERHUB_HEAD.files)


def load_adapterhub(
    directory: str | Path,
    names: Names,
    base: Any,
    *,
    with_head: bool = True,
    pooling: str | None = None,
    revision: str | None = None,
) -> tuple[Recipe, dict[str, Any]]:
    """Reads an adapter that AdapterHub wrote, and its head.

    Args:
        directory: has `adapter_config.json` and `adapter.safetensors`; or an id on the Hugging Face
            Hub, from which these and a head's two files are fetched.
        names: the table of the model's family, `models.FAMILIES["roberta"].names`, of a classifier
            `models.FAMILIES["roberta"].classifier.names`; or a mapping from the names of PyTorch's
            modules (as the file has them) to our module paths. A mapping needs AdapterHub's
            bottleneck layer (`encoder.layer.0.output`, `h.0.output_adapters`) with the path of the
            module that adds the sublayer's output, its first input, to the residual stream.
        base: the model's parameters as a tree of arrays (abstract ones suffice) or an NNX module.
        with_head: whether to read a head, if there is one.
        pooling: what the model's head reads, "pooler", "cls" or "tokens"; required for a head on
            the first or on each token, because the parameters of one on the mean are the same.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The recipe, and the trained leaves as a tree, stacked where the base's layers are scanned.
        For a linen model write `merge_trees(adapters, partition(params, recipe)[1])`; for either
        API pass both to `save_adapter` and load that directory with `load_adapter`.

    Raises:
        AdapterFileError: a file is absent or damaged, a setting is not supported, tensors do not
            fit the base, or layers differ that the base scans as one; the message names
            every problem.
        UserError: `names` does not fit the base, or has no blocks of a known architecture.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from adapters_jax import LoRA
        >>> params = {"query": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}}
        >>> leaves = {"query": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 4))}}}
        >>> names = {"encoder.layer.0.attention.self.query": "query"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_adapterhub(f"{folder}/a", LoRA("query", 2), leaves, names, params)
        ...     recipe, adapters = load_adapterhub(saved, names, params)
        >>> recipe
        Recipe(
          LoRA(targets=('query',), rank=2, alpha=2, a_init='uniform'),
        )
        >>> adapters["query"]["lora"]["a"].shape
        (6, 2)
    """
    directory = hub.find(directory, revision, FILES)
    blocks = find_blocks(names, base)
    whole, tensors = ADAPTERHUB.read(directory)
    of_head = (*ADAPTERHUB_HEAD.files, ADAPTERHUB_HEAD.pickle)
    try:
        methods, leaves, problems = convert.read(whole, tensors, blocks)
        if with_head and any((directory / name).exists() for name in of_head):
            trained, more = heads.read(*ADAPTERHUB_HEAD.read(directory), blocks, pooling)
            methods += [Unfreeze(shortest(trained, blocks.module_map.base))] if trained else []
            leaves |= trained
            problems += more
        if not problems:
            return as_in_model(methods, leaves, blocks.module_map)
    except AdapterFileError:
        raise
    except ValueError as error:  # a method rejects a number, or layers differ
        problems = [str(error)]
    raise AdapterFileError(
        f"{directory} cannot be converted from AdapterHub: {'; '.join(problems)}"
    )


def save_adapterhub(
    directory: str | Path,
    recipe: Recipe | Method,
    adapters: Tree,
    names: Names,
    base: Any,
    *,
    name: str = "adapter",
    prefix: str | None = None,
    pooling: str | None = None,
    labels: Sequence[str] = (),
    head_type: str | None = None,
    beside: Mapping[str, str] | None = None,
    **fields: Any,
) -> Path:
    """Writes an adapter, and its head if that trains, that AdapterHub loads.

    Bottlenecks on a sublayer's output become AdapterHub's double_seq_bn; those with
    `placement="norm"` on BERT's `**/mlp_norm`, and those on the `**/mlp_sum` of GPT-2 and Llama,
    become seq_bn; those with `placement="parallel"` on a `**/mlp_sum` become par_bn. A recipe that
    needs several configurations becomes a union. AdapterHub loads the directory with
    `model.load_adapter(directory, use_safetensors=True, set_active=True)`.

    Args:
        directory: a new or empty one, or one with an adapter of AdapterHub and nothing else, which
            is replaced; it appears whole or not at all, and its parents are made.
        recipe: Bottleneck, Compacter, LoRA, IA3 and LoReFT, and Unfreeze of the head, or of head
            and pooler, which become a head of two layers.
        adapters: the adapters of a model, as `adapters_of` returns them, or an NNX state.
        names, base: as in `load_adapterhub`. Families that share our paths (BERT, RoBERTa,
            DistilBERT and ELECTRA) differ in their names for AdapterHub alone, so another one's
            table is no error here.
        name: the name of the adapter and of its head.
        prefix: begins the names of all modules but heads in the PyTorch model, such as "roberta.";
            by default the first prefix of the table.
        pooling: as in `load_adapterhub`.
        labels: the names of a head's classes, or of the choices.
        head_type: AdapterHub's kind of the head: "classification", "multilabel_classification",
            "multiple_choice", "tagging" or "question_answering"; by default "tagging" if it reads
            tokens, "classification" if not.
        beside: further texts by file name, such as `{"README.md": aj.model_card(...)}`.
        **fields: of `adapter_config.json` and `head_config.json`, such as `model_name`; by default
            `model_type` and `model_class` are those with this prefix, RobertaAdapterModel for
            "roberta.".

    Returns:
        The directory.

    Raises:
        UserError: AdapterHub does not support the recipe, `names` lacks a module, or the directory
            holds something else; the message names every problem.
        TypeError: `adapters` is not a tree.

    Example:
        >>> import json, tempfile
        >>> import numpy as np
        >>> from adapters_jax import LoRA
        >>> params = {"query": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}}
        >>> leaves = {"query": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 4))}}}
        >>> lora, names = LoRA("query", 2), {"encoder.layer.0.attention.self.query": "query"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_adapterhub(f"{folder}/a", lora, leaves, names, params, name="reviews")
        ...     config = json.loads((saved / "adapter_config.json").read_text())
        >>> config["name"], config["config"]["architecture"], config["config"]["r"]
        ('reviews', 'lora', 2)
    """
    flat = directories.flat_leaves("save_adapterhub", adapters)
    directory = ADAPTERHUB.directory(directory, (*FILES, *(beside or ())))
    blocks = find_blocks(names, base, prefix)
    config, tensors, head, problems = to_adapterhub(
        recipe, flat, blocks, name, pooling, labels, head_type
    )
    if problems:
        raise UserError(f"AdapterHub cannot load this adapter: {'; '.join(problems)}")
    about = _about(blocks, name, prefix) | fields
    whole = {blocks.module_map.full(key): tensor for key, tensor in tensors.items()}
    files = ADAPTERHUB.content(about | {"config": config}, whole)
    if head[0]:
        files |= ADAPTERHUB_HEAD.content(about | {"config": head[0]}, head[1])
    return directories.write(directory, files, beside)


def to_adapterhub(
    recipe: Recipe | Method,
    leaves: Mapping[str, Array],
    blocks: Blocks,
    name: str = "adapter",
    pooling: str | None = None,
    labels: Sequence[str] = (),
    head_type: str | None = None,
) -> tuple[dict[str, Any], Leaves, tuple[dict[str, Any], Leaves], list[str]]:
    """Converts an adapter and its head; see `save_adapterhub`.

    Returns:
        The settings and the tensors, both of a head, which may have none, and a sentence for each
        thing that AdapterHub does not support.
    """
    problems: list[str] = []
    if not name or "." in name:
        problems.append(f"name={name!r}, expected one without dots, such as 'adapter'")
    unrolled, flat = as_in_file(recipe, leaves, blocks.module_map)
    added, trained = placed(unrolled, flat, blocks.module_map, problems)
    config, tensors = convert.write(unrolled, added, flat, blocks, name, problems)
    head = heads.write(trained, blocks, name, pooling, labels, problems, head_type)
    return config, tensors, head, problems


def _about(blocks: Blocks, name: str, prefix: str | None) -> dict[str, Any]:
    """The fields that describe the adapter's model."""
    found = blocks.architecture
    alike = (each for each in ARCHITECTURES if each.stacks == found.stacks)
    own = next((each for each in alike if each.prefix == prefix), found)
    first = blocks.layers[0]
    return {
        "name": name,
        "version": VERSION,
        "model_type": own.model_type,
        "model_class": own.model_class,
        "model_name": None,
        "hidden_size": max(x.width for (n, _), x in blocks.bottlenecks.items() if n == first)
        or None,
    }
