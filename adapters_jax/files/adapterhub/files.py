"""Reads and writes adapters of AdapterHub: bottlenecks, Compacter, LoRA, LoReFT and heads.

A directory of AdapterHub's holds `adapter_config.json` and `adapter.safetensors`, and for a head
`head_config.json` and `model_head.safetensors`. Neither torch nor AdapterHub is needed. Of a `.bin`
that torch pickled, which AdapterHub writes by default, tensors alone are read.

Reference: Poth et al. 2023, "Adapters", arXiv:2311.11077; https://docs.adapterhub.ml/loading.html
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.errors import AdapterFileError, AdapterWarning, UserError, shown
from adapters_jax.files import directories, hub
from adapters_jax.files.adapterhub import convert, heads, setups
from adapters_jax.files.adapterhub.architectures import ARCHITECTURES
from adapters_jax.files.adapterhub.blocks import Blocks, find_blocks
from adapters_jax.files.adapterhub.config import VERSION, children
from adapters_jax.files.destinations import empty_directory
from adapters_jax.files.directories import ADAPTERHUB, ADAPTERHUB_HEAD, FUSION
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Names, as_in_file, as_in_model, placed
from adapters_jax.files.patterns import shortest
from adapters_jax.files.untrusted import read_json
from adapters_jax.methods import Fusion, Method, Unfreeze
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree

FILES = (*ADAPTERHUB.files, *ADAPTERHUB_HEAD.files)
_Read = tuple[list[Method], dict[str, Array], list[str]]


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
    read = _setup if (directory / setups.SETUP).is_file() else _single
    try:
        methods, leaves, problems = read(directory, blocks, with_head, pooling)
        if not problems:
            return as_in_model(methods, leaves, blocks.module_map)
    except AdapterFileError:
        raise
    except ValueError as error:  # a method rejects a number, or layers differ
        problems = [str(error)]
    raise AdapterFileError(
        f"{directory} cannot be converted from AdapterHub: {'; '.join(problems)}"
    )


def _single(directory: Path, blocks: Blocks, with_head: bool, pooling: str | None) -> _Read:
    """One adapter: its methods, its leaves by path, and a sentence for each problem."""
    if (directory / FUSION.config).is_file() and not (directory / ADAPTERHUB.config).is_file():
        raise AdapterFileError(
            f"{directory} has a fusion without the adapters that it fuses; save them together, "
            "with AdapterHub's model.save_adapter_setup(directory, Fuse(...))"
        )
    methods, leaves, problems = convert.read(*ADAPTERHUB.read(directory), blocks)
    if with_head and _has_head(directory):
        trained, more = heads.read(*ADAPTERHUB_HEAD.read(directory), blocks, pooling)
        methods += [Unfreeze(shortest(trained, blocks.module_map.base))] if trained else []
        leaves |= trained
        problems += more
    return methods, leaves, problems


def _has_head(directory: Path) -> bool:
    of_head = (*ADAPTERHUB_HEAD.files, ADAPTERHUB_HEAD.pickle)
    return any((directory / name).exists() for name in of_head)


def _setup(directory: Path, blocks: Blocks, with_head: bool, pooling: str | None) -> _Read:
    """Several adapters and their composition; of their heads, that which AdapterHub makes active.

    Warns:
        AdapterWarning: others have heads.
    """
    root, head = setups.read_setup(directory)
    compositions, names = setups.entries_of(root)
    methods, leaves, problems = list[Method](), dict[str, Array](), list[str]()
    ends: list[Method] = []
    last = root.members[-1] if root.kind == "Stack" else root
    chosen = head or ("" if last.members else last.name)
    for name, ours in names.items():
        own = with_head and name == chosen
        each, arrays, wrong = _single(directory / name, blocks, own, pooling)
        ends += [method for method in each if method.slot is None]
        each, arrays = setups.named([m for m in each if m.slot is not None], arrays, ours)
        methods, leaves = methods + each, leaves | arrays
        problems += [f"{name}: {problem}" for problem in wrong]
    if with_head and head and head not in names:
        problems.append(
            f"its head {shown(head)} is in a separate directory, which is not read; save it under "
            "the name of an adapter, or load with with_head=False"
        )
    unread = [name for name in names if name != chosen and _has_head(directory / name)]
    if with_head and unread:
        warnings.warn(
            f"{directory}: the heads of {', '.join(unread)} are not read, since a model has one",
            AdapterWarning,
            stacklevel=4,
        )
    where, wrong = setups.check_members(Recipe(methods, compositions), leaves, blocks)
    configs = [read_json(directory / name / ADAPTERHUB.config) for name in names]
    parts = [part for config in configs for part in children(config)[0]]
    stacks = any(each.kind == "Stack" and len(each.members) > 1 for each in root)
    if stacks and not all(part.get("original_ln_after", True) for part in parts):
        wrong = [*dict.fromkeys([*wrong, setups.ADDED_AGAIN])]
    fusions = iter([each for each in root if each.kind == "Fuse"])
    for i, entry in enumerate(compositions):
        if isinstance(entry, Fusion):
            made, arrays, more = setups.read_fusion(directory, next(fusions), entry, blocks, where)
            compositions[i], leaves, wrong = made, leaves | arrays, wrong + more
    return [*methods, *compositions, *ends], leaves, problems + wrong


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
            is replaced; it appears whole or not at all, and its parents are made. A new or empty
            one for a recipe with a composition (`aj.stack`, `aj.split`, `aj.batch_split`,
            `aj.fuse`), which `model.load_adapter_setup` loads.
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
    several = any(method.members for method in Recipe(recipe))
    if several:
        directory = empty_directory(directory)
    else:
        directory = ADAPTERHUB.directory(directory, (*FILES, *(beside or ())))
    blocks = find_blocks(names, base, prefix)
    about = _about(blocks, name, prefix) | fields
    files, problems = contents(Recipe(recipe), flat, blocks, about, pooling, labels, head_type)
    if problems:
        raise UserError(f"AdapterHub cannot load this adapter: {'; '.join(problems)}")
    return directories.write(directory, files, beside)


def contents(
    recipe: Recipe,
    leaves: Mapping[str, Array],
    blocks: Blocks,
    about: Mapping[str, Any],
    pooling: str | None = None,
    labels: Sequence[str] = (),
    head_type: str | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """The files of an adapter, or of a composition of several, and a sentence for each problem."""
    head = (pooling, labels, head_type)
    if not any(method.members for method in recipe):
        return _single_files(recipe, leaves, blocks, about, *head)
    unrolled, flat = as_in_file(recipe, leaves, blocks.module_map)
    ends = {path: x for path, x in leaves.items() if recipe.owner(path) is None}
    files, last, problems = setups.written(unrolled, flat, blocks, about, bool(ends))
    for name in dict.fromkeys(m.name for m in recipe.attached if m.name and not m.members):
        entries = recipe[name]
        own = {path: x for path, x in leaves.items() if entries.owner(path) is not None}
        methods, own = setups.named(entries.methods, own, "")
        if name == last:
            methods, own = methods + [m for m in recipe if m.slot is None], own | ends
        of = {**about, "name": name}
        more, wrong = _single_files(Recipe(*methods), own, blocks, of, *head)
        files |= {f"{name}/{file}": data for file, data in more.items()}
        problems += [f"{name}: {problem}" for problem in wrong]
    return files, problems


def _single_files(
    recipe: Recipe,
    leaves: Mapping[str, Array],
    blocks: Blocks,
    about: Mapping[str, Any],
    pooling: str | None,
    labels: Sequence[str],
    head_type: str | None,
) -> tuple[dict[str, bytes], list[str]]:
    """The files of one adapter, and a sentence for each problem."""
    name, problems = about["name"], list[str]()
    if not name or "." in name:
        problems.append(f"name={name!r}, expected one without dots, such as 'adapter'")
    unrolled, flat = as_in_file(recipe, leaves, blocks.module_map)
    added, trained = placed(unrolled, flat, blocks.module_map, problems)
    config, tensors = convert.write(unrolled, added, flat, blocks, problems)
    head, of_head = heads.write(trained, blocks, name, pooling, labels, problems, head_type)
    if problems:
        return {}, problems
    whole = {
        blocks.module_map.full(f"{module}.{name}.{rest}"): tensor
        for module, own in tensors.items()
        for rest, tensor in own.items()
    }
    files = ADAPTERHUB.content({**about, "config": config}, whole)
    if head:
        files |= ADAPTERHUB_HEAD.content({**about, "config": head}, of_head)
    return files, []


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
