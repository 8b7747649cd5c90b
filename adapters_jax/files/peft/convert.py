"""Reads and writes adapters of Hugging Face PEFT: those of its methods that are here, and norms.

A directory of PEFT's holds `adapter_config.json` and `adapter_model.safetensors`, or its shards, or
an older release's `adapter_model.bin`; only its tensors are read. Neither torch nor PEFT is needed.

Reference: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.errors import AdapterFileError, UserError, first_few, shown, warn
from adapters_jax.files import directories, hub
from adapters_jax.files.directories import PEFT
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import (
    Leaves,
    ModuleMap,
    Names,
    as_in_file,
    as_in_model,
    find_modules,
    placed,
)
from adapters_jax.files.patterns import shortest
from adapters_jax.files.peft.applied import differences
from adapters_jax.files.peft.checks import doubts, twice_spelt, unsaved, with_targets
from adapters_jax.files.peft.config import KINDS, ROOT, Kind, config_problems
from adapters_jax.files.peft.trained import IN_WRAPPER, read_folded, read_trained, write_trained
from adapters_jax.methods import Method, PromptTuning, Unfreeze
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree

CLASSIFIES = "SEQ_CLS"
_LEAVES = {theirs: ours for kind in KINDS.values() for theirs, ours in kind.leaves.items()}
_KEY = re.compile(rf"(.+)\.({'|'.join(_LEAVES)})(?:\.weight)?")
# The name of the adapter in a model, which PEFT's own files leave out.
_DEFAULT = re.compile(rf"(\.(?:{'|'.join(_LEAVES)}|modules_to_save))\.default(?=\.|$)")
_NAME = re.compile(r"[\w-]+(?:[./][\w-]+)+")  # of a module of theirs, or a path of ours
# The families whose modules begin with these words; an encoder's begin with its family's name.
_FAMILIES = {"model": "llama", "transformer": "gpt2"}
_FAMILIES |= dict.fromkeys(("shared", "encoder", "decoder"), "t5")
_MASK = re.compile(r"(.*\.)?attn\.(masked_)?bias")  # a buffer of old GPT-2s, saved with bias="all"


def load_peft(
    directory: str | Path, names: Names, base: Any, *, revision: str | None = None
) -> tuple[Recipe, dict[str, Any]]:
    """Reads an adapter that PEFT wrote.

    Args:
        directory: has `adapter_config.json`, and `adapter_model.safetensors` or its shards or
            `adapter_model.bin`; or an id on the Hugging Face Hub, from which these are fetched.
        names: the table of the model's family, `models.FAMILIES["llama"].names`, of a classifier
            `models.FAMILIES["roberta"].classifier.names`; or a mapping from PEFT's module names to
            our module paths: `{"encoder.q_proj": "encoder/query"}`. A tuple of paths stands for a
            module of PEFT's that fuses several of ours along its outputs; prompts need the
            attention module's path.
            PEFT's `target_parameters` need the names of parameters, in the order that PyTorch's
            module defines them: `{"mlp.experts.gate_up_proj": "experts/gate_up_proj",
            "mlp.experts.down_proj": "experts/down_proj"}`. Name an embedding that is also the
            output layer twice, the embedding's name first. Only a `NameTable` can state how
            PyTorch's axes lie: that its weights are `(in, out)`, which matters for those that the
            file holds whole, and what a `ParameterRule` says.
            A prefix of PEFT's needs to know how keys turn by their position: decoders of the
            library say that, another model's `NameTable` in its `keys`.
        base: the model's parameters as a tree of arrays (abstract ones suffice) or an NNX module;
            their shapes tell the kinds of layers apart.
        revision: a branch, tag or commit on the Hub.

    Returns:
        The recipe, and the trained leaves as a tree, stacked where the base's layers are scanned.
        For a linen model write `merge_trees(adapters, partition(params, recipe)[1])`; for either
        API pass both to `save_adapter` and load that directory with `load_adapter`.

    Raises:
        AdapterFileError: a file is absent, damaged or more than tensors, a setting is not
            supported, tensors do not fit the base or lack, or layers differ that the base scans as
            one; the message names every problem.
        UserError: `names` does not fit the base.

    Warns:
        AdapterWarning: the configuration names modules that the file has nothing of, or has fields
            that are not of its method; or the base has an output layer that the adapter's had not.

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
        recipe: LoRA, DoRA, LoHa, LoKr, OFT, VeRA, IA3, LlamaAdapter, PromptTuning or PrefixTuning,
            or Unfreeze of norms; all but LlamaAdapter may have Unfreeze beside them.
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
        UserError: PEFT does not support the recipe, PEFT's rules would apply something else of the
            file than this adapter (`fields` may change them), `names` lacks a module, or the
            directory holds something else; the message names every problem.
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
    config, tensors, problems = to_peft(
        recipe, flat, names, base, prefix, {"inference_mode": True, **fields}
    )
    if fields.get("task_type", CLASSIFIES) == CLASSIFIES:
        problems += unpooled(flat, find_modules(names, base))
    if problems:
        raise UserError(f"PEFT cannot load this adapter: {'; '.join(problems)}")
    files = PEFT.content(config, tensors)
    return directories.write(directory, files, beside)


def from_peft(
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    names: Names,
    base: Any,
    caller: str = "from_peft",
) -> tuple[Recipe, dict[str, Any]]:
    """Converts the configuration and the tensors of an adapter of PEFT's; see `load_peft`.

    Error messages begin with `caller`.
    """
    module_map = find_modules(names, base)
    problems = config_problems(config)
    if not problems:
        try:
            kind = KINDS[config["peft_type"]]
            shared = {own: tensors[key] for key, own in kind.shared.items() if key in tensors}
            added, plain = split_tensors(tensors, kind, problems)
            module_map = module_map.spelt_like([*added, *plain])
            problems += twice_spelt(added, plain, module_map)
            config = with_targets(config, added, problems)
            every = {**added, "": shared} if kind.shared else added
            methods: list[Method]
            methods, leaves = _code(kind.module).read(config, every, module_map, problems)
            if kind.leaves and not methods and not problems:
                such = " or ".join(kind.leaves)
                problems.append(f"the file has no tensors of {config['peft_type']}: {such}")
            plain, folded = read_folded(config, plain, module_map, problems)
            trained = read_trained(plain, module_map, problems) | folded
            if trained:
                methods.append(Unfreeze(shortest(trained, module_map.base)))
            leaves |= trained
            # PEFT gives the rows of tokens of a tied embedding to all modules that hold it.
            replacing = leaves.keys() - (folded if module_map.tied else {})
            problems += _held_twice(methods, replacing, module_map)
            problems += [] if problems else unsaved(config, plain, module_map)
            if config.get("task_type") == CLASSIFIES:
                problems += unpooled(leaves, module_map)
            if not problems:
                for text in doubts(config, added, module_map):
                    warn(text)
                return as_in_model(methods, leaves, module_map)
        except (ValueError, re.error) as error:  # a method rejects a number, or layers differ
            problems = [str(error)]
    if module_map.table.rules and any("names maps " in each for each in problems):
        problems.append(_other_table(config, tensors, module_map))
    raise AdapterFileError(f"{caller}: {'; '.join(grouped(problems))}")


def grouped(problems: Iterable[str]) -> list[str]:
    """The problems, with one sentence for those that differ in names and numbers alone.

    Example:
        >>> grouped(["names maps h.0.q to no layer", "names maps h.1.q to no layer", "r=0"])
        ['names maps h.0.q to no layer (so for h.1.q)', 'r=0']
    """
    groups: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        form = re.sub(r"\d+", "0", _NAME.sub("x.y", problem)) if _NAME.search(problem) else problem
        groups.setdefault(form, []).append(problem)
    found = []
    for first, *others in groups.values():
        names = [
            next((name for name in _NAME.findall(other) if name not in first), "another")
            for other in others
        ]
        found.append(f"{first} (so for {first_few(names, 3)})" if names else first)
    return found


def _other_table(config: Mapping[str, Any], keys: Iterable[str], module_map: ModuleMap) -> str:
    """What to give where the names of modules are those of another model."""
    words = (key.removeprefix(ROOT).split(".")[0] for key in keys)
    word = next((word for word in words if not module_map.table.is_of_head(word)), "")
    family = repr(_FAMILIES.get(word, word))
    table = f"FAMILIES[{family}]{'' if word in _FAMILIES else '.classifier'}.names"
    base = config.get("base_model_name_or_path")
    return (
        f"give the base that the adapter is of{f', {shown(base, 80)},' if base else ''} and the "
        f"names of its family, such as adapters_jax.finetune.models.{table}"
    )


def to_peft(
    recipe: Recipe | Method,
    leaves: Mapping[str, Array],
    names: Names,
    base: Any,
    prefix: str | None = None,
    own: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Array], list[str]]:
    """Converts an adapter; see `save_peft`. `own` are fields of the caller's.

    Returns:
        The configuration, the tensors, and a sentence for each thing that PEFT does not support.
    """
    own = own or {}
    module_map = find_modules(names, base, prefix)
    recipe, leaves = as_in_file(recipe, leaves, module_map)
    problems = _held_twice(recipe.attached, leaves, module_map)
    added, trained = placed(recipe, leaves, module_map, problems)
    found = {method.kind for method in recipe.attached}
    kinds = [name for name, k in KINDS.items() if len(found) == 1 and found <= set(k.methods)]
    if not found and trained:
        kinds = ["LN_TUNING"]
    if not kinds:
        others = ", ".join(sorted({type(m).__name__ for m in recipe.attached})) or "nothing"
        problems.append(
            f"the recipe adds {others}; PEFT stores one of LoRA, DoRA, ActivatedLoRA, LoHa, "
            "LoKr, OFT, VeRA, IA3, LlamaAdapter, PromptTuning and PrefixTuning, or trained norms"
        )
        return {}, {}, problems
    kind = KINDS[kinds[0]]
    code = _code(kind.writer or kind.module)
    fields, tensors = code.write(recipe, added, leaves, module_map, problems)
    written = {"peft_type": kinds[0], **fields}
    if kind.trains == "nothing":
        problems += [
            f"{path}: PEFT's prompts do not support other trained leaves beside them"
            for path in trained
        ]
    else:
        more, trains = _trained(kinds[0], added, trained, module_map, problems, own)
        written, tensors = written | trains, tensors | more
    config = {**written, **own}
    if not problems:
        split = split_tensors(tensors, kind, problems)
        problems += differences(config, written, *split, module_map)
    return config, tensors, problems


def _trained(
    peft_type: str,
    added: Placements,
    trained: Leaves,
    module_map: ModuleMap,
    problems: list[str],
    own: Mapping[str, Any],
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and fields of the base's own parameters that train beside a method."""
    kind = KINDS[peft_type]
    if kind.trains == "norms":  # which are written already
        norms = {
            reference.path
            for bare, parts in module_map.modules.items()
            for reference in parts
            if not module_map.table.is_of_head(bare)
        }
        trained = {p: x for p, x in trained.items() if p.rpartition("/")[0] not in norms}
    adapted = {each.module for each in added}
    more, trains = write_trained(trained, adapted, module_map, problems, own.get("task_type"))
    if kind.trains != "biases" and trains.pop("bias") != "none":
        paths = ", ".join(path for path in trained if path.endswith("/bias"))
        problems.append(f"{paths}: PEFT's {peft_type} does not support trained biases beside it")
    if kind.trains == "modules" and trains.pop("ensure_weight_tying", False):
        problems.append(
            f"PEFT's {peft_type} does not support a trained embedding with a tied output layer"
        )
    return {f"{kind.root}{key.removeprefix(ROOT)}": x for key, x in more.items()}, trains


def _code(module: str) -> Any:
    """The module with the functions of a kind; a process imports only those that it needs."""
    return import_module(f"adapters_jax.files.peft.{module}")


def split_tensors(
    tensors: Mapping[str, Array], kind: Kind, problems: list[str]
) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
    """Splits tensors into the added ones, by module and our leaf's name, and the base's own."""
    added: dict[str, dict[str, Array]] = {}
    plain: dict[str, Array] = {}
    keys: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key in kind.shared:
            continue
        if not key.startswith(kind.root):
            problems.append(f"{key} does not begin with {kind.root}")
            continue
        name = _DEFAULT.sub(r"\1", key.removeprefix(kind.root))
        if keys.setdefault(name, key) != key:
            problems.append(f"{key} and {keys[name]} are the same tensor; remove one of them")
        match = _KEY.fullmatch(name)
        if match and match[2] in kind.leaves:
            added.setdefault(match[1], {})[_LEAVES[match[2]]] = tensor
        elif match:
            problems.append(f"{key} is a tensor of another peft_type")
        # PEFT saves the original of a `modules_to_save` beside the trained one.
        elif ".original_module." not in name and not _MASK.fullmatch(name):
            plain[name] = tensor
    return added, _once(plain, problems)


def _once(plain: Mapping[str, Array], problems: list[str]) -> dict[str, Array]:
    """The tensors by their names without PEFT's wrapper.

    With bias="all", PEFT saves the biases of a head twice, under the name in the wrapper as well.
    """
    found: dict[str, Array] = {}
    for key, tensor in plain.items():
        name = IN_WRAPPER.sub("", key)
        if not np.array_equal(found.setdefault(name, tensor), tensor):
            problems.append(
                f"{key} is not the {name} that the file has as well; remove one of them"
            )
    return found


def _held_twice(
    methods: Iterable[Method], leaves: Iterable[str], module_map: ModuleMap
) -> list[str]:
    """The problems of leaves at modules whose replacement by PEFT changes nothing."""
    theirs = module_map.table.held_twice
    prompts = {method.slot for method in methods if isinstance(method, PromptTuning)}
    replacing = [leaf for leaf in leaves if prompts.isdisjoint(leaf.split("/"))]
    ours = {reference.path: name for name in theirs for reference in module_map.at(name)}
    return [
        f"{path}: PEFT's adapter of {name!r} has no effect, since the model calls that module "
        "under another name; adapt other modules"
        for path, name in ours.items()
        if any(leaf.startswith(f"{path}/") for leaf in replacing)
    ]


def unpooled(leaves: Iterable[str], module_map: ModuleMap) -> list[str]:
    """The problem of a head in a model without the pooler that transformers' classifier has."""
    if not any(leaf.startswith("head/") for leaf in leaves):
        return []
    paths, places = [*module_map.base, *leaves], {path.split("/")[0] for path in module_map.base}
    return [
        f"the head: there is no {place}/pooler, which transformers' classifier reads; build ours "
        "with pooling='pooler', load its base with pooler=True, or, if the head reads every "
        "token, give task_type='TOKEN_CLS'"
        for place in sorted(places)
        if any(rule.ours.startswith(f"{place}/pooler/") for rule in module_map.table.rules)
        and not any(path.startswith(f"{place}/pooler/") for path in paths)
    ]
