"""The base's own parameters that train beside a method: biases, heads, `modules_to_save`."""

import math
import re
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from adapters_jax.errors import UserError, shown
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Leaves, ModuleMap, as_in_base, our_leaves, their_leaves
from adapters_jax.files.patterns import in_order
from adapters_jax.files.peft.config import ROOT, Config, is_target, number_at, tied_problem
from adapters_jax.files.settings import collecting
from adapters_jax.methods import Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

# Where PEFT keeps a module that trains; the second word is the name of the adapter.
IN_WRAPPER = re.compile(r"\.modules_to_save(\.default)?(?=\.|$)")
NORM = re.compile(r"(.+)\.ln_tuning_layers(?:\.default)?\.(weight|bias)")
_ROWS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta")
_GROWN = (
    "if the vocabulary grew in PEFT, resize the base first: model.resize_token_embeddings(n) and "
    "model.save_pretrained(directory) of transformers, and load that directory here"
)
_BIAS = re.compile(r"(.+)\.lora_B\.bias")
# The heads that PEFT saves whole with an adapter of a classifier's, whether they trained or not.
_CLASSIFIES, _HEADS = ("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")


def read(
    config: Config, added: Any, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], Leaves]:
    """Returns nothing: a file of LN_TUNING or TRAINABLE_TOKENS has parameters of the base alone."""
    return [], {}


def read_folded(
    config: Config, plain: Mapping[str, Array], module_map: ModuleMap, problems: list[str]
) -> tuple[Leaves, Leaves]:
    """Returns the other tensors, and the base's parameters with what PEFT adds to them folded in.

    These are the biases of factors (`lora_bias`), s b for a bias b of B and the scale s; and
    embeddings with rows of their own (`trainable_token_indices`), which replace the base's. Norms
    of LN_TUNING are tensors like others.
    """
    rest, leaves = dict(plain), Leaves()
    rows = {match[1]: x for key, x in plain.items() if (match := _ROWS.fullmatch(key))}
    for key, tensor in plain.items():
        with collecting(problems):
            if match := _BIAS.fullmatch(key):
                del rest[key]
                own = rest.pop(f"{match[1]}.base_layer.bias", None)
                leaves |= _with_bias(config, match[1], tensor, own, module_map)
            elif match := _ROWS.fullmatch(key):
                del rest[key]
                if not _is_copy(match[1], rows, module_map):
                    leaves |= _with_rows(config, match[1], tensor, module_map)
            elif match := NORM.fullmatch(key):
                rest[f"{match[1]}.{match[2]}"] = rest.pop(key)
                if config["peft_type"] != "LN_TUNING" or not is_target(config, match[1]):
                    problems.append(f"{key} is of none of the target_modules of LN_TUNING")
    given = _tokens(config)
    lacking = [each for each in given if not any(_ends(name, each) for name in rows)]
    problems += [
        f"the file has no rows of {each!r} for the tokens {given[each]}" for each in lacking
    ]
    if config.get("lora_bias") and not any(map(_BIAS.fullmatch, plain)):
        problems.append("lora_bias=True, but the file has no lora_B.bias")
    return rest, leaves


def _tokens(config: Config) -> Mapping[str, Any]:
    """The tokens with rows of their own, by the end of an embedding's name, "" for any."""
    given = config.get("trainable_token_indices") or config.get("token_indices") or {}
    return given if isinstance(given, dict) else {"": given}


def _ends(module: str, name: str) -> bool:
    return not name or f".{module}".endswith(f".{name}")


def _with_bias(
    config: Config, module: str, tensor: Array, own: Array | None, module_map: ModuleMap
) -> Leaves:
    """The biases of our modules with the scaled bias of B; `own` is theirs where it trains."""
    there = module_map.at(module)
    if not config.get("lora_bias"):
        raise UserError(f"{module}.lora_B.bias: expected lora_bias=True in the configuration")
    if not there or any("bias" not in reference.leaves for reference in there):
        raise UserError(
            f"{module}.lora_B.bias: the module has no bias in this base to add it to; train it in "
            "PEFT with lora_bias=False"
        )
    problems: list[str] = []
    if own is None:
        own = their_leaves(there, ["bias"], {}, module_map.base, False, problems)["bias"]
    rank, alpha = (number_at(config, name, module) for name in ("r", "lora_alpha"))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if tensor.shape != own.shape:
        problems.append(f"{module}.lora_B.bias is {list(tensor.shape)}, expected {list(own.shape)}")
        raise UserError("; ".join(problems))
    found = our_leaves(module, "bias", own + scale * tensor, there, False, problems)
    if problems:
        raise UserError("; ".join(problems))
    return {path: x.astype(module_map.base[path].dtype) for path, x in found.items()}


def _is_copy(module: str, rows: Mapping[str, Array], module_map: ModuleMap) -> bool:
    """Whether rows are those of a tied embedding once more, under another of its weight's names."""
    if module_map.tied is None or module_map.at(module):
        return False
    bare, (head, embedding) = module_map.bare(module), module_map.tied
    first = next((x for name, x in rows.items() if module_map.bare(name) == embedding), None)
    names_it = bare == head or module_map.table.ignores(f"{bare}.weight")
    return names_it and first is not None and np.array_equal(rows[module], first)


def _with_rows(config: Config, module: str, rows: Array, module_map: ModuleMap) -> Leaves:
    """An embedding, or an output layer, with other rows for some tokens."""
    tokens = next((found for name, found in _tokens(config).items() if _ends(module, name)), None)
    there = module_map.at(module)
    if len(there) != 1:
        raise UserError(f"names maps {module} to no embedding of the base")
    path, in_columns = f"{there[0].path}/{there[0].weight}", there[0].weight == "kernel"
    base = module_map.base[path]
    size, width = there[0].shape[::-1] if in_columns else there[0].shape
    fits = isinstance(tokens, list) and rows.shape == (len(tokens), width)
    if not fits or not all(type(n) is int and 0 <= n < size for n in tokens or ()):
        raise UserError(
            f"{module} has {list(rows.shape)} for the tokens {shown(tokens, 80)}, expected rows of "
            f"{width} for tokens below {size}; {_GROWN}"
        )
    if not hasattr(base, "__array__"):
        raise UserError(f"{path} is saved in part: give a base with values, not only shapes")
    whole = np.array(base)
    whole[(slice(None), tokens) if in_columns else tokens] = rows.T if in_columns else rows
    return {path: whole}


def read_trained(plain: Mapping[str, Array], module_map: ModuleMap, problems: list[str]) -> Leaves:
    """Returns the base's own parameters that the file holds, by path."""
    leaves: Leaves = {}
    for key, tensor in _without_tied(plain, module_map, problems).items():
        name, _, kind = key.rpartition(".")
        module = name.removesuffix(".base_layer")
        there = module_map.at(module)
        if not there:
            problems.append(f"{key}: names maps {module} to no module of the base")
        new = our_leaves(key, kind, tensor, there, module_map.inputs_first(module), problems)
        if there and not new and there[0].weight == "embedding":
            problems.append(_GROWN)
        if not (key.endswith(".base_layer.weight") and as_in_base(new, module_map)):
            leaves |= {p: x.astype(module_map.base[p].dtype) for p, x in new.items()}
    return leaves


def _without_tied(plain: Mapping[str, Array], module_map: ModuleMap, problems: list[str]) -> Leaves:
    """The tensors without those of a tied output layer, which repeat the embedding's."""
    rest = dict(plain)
    for inner in ("", ".base_layer") if module_map.tied else ():
        pair = [f"{name}{inner}.weight" for name in module_map.tied or ()]
        keys = [next((k for k in plain if module_map.bare(k) == each), None) for each in pair]
        reference = module_map.at(pair[1].removesuffix(f"{inner}.weight"))[0]
        path = f"{reference.path}/{reference.weight}"
        found = [plain[key] for key in keys if key is not None]
        alike = len(found) == 2 and np.array_equal(found[0], found[1])
        if not alike and not all(as_in_base({path: x}, module_map) for x in found):
            head, embedding = ((keys[n] or pair[n]).removesuffix(f"{inner}.weight") for n in (0, 1))
            problems.append(tied_problem(embedding, head, module_map.table.held_twice))
        if keys[0] is not None:
            del rest[keys[0]]
    return rest


def _heads(trained: Mapping[str, Array], module_map: ModuleMap, task_type: str | None) -> set[str]:
    """The heads that PEFT saves whole, with all layers that they have.

    These are the ones that train, and those of the task. PEFT finds them by the ends of names, so
    DistilBERT's `pre_classifier` is saved with its `classifier`.
    """
    tasks = _HEADS if task_type in _CLASSIFIES else ()
    heads, found = set[str](), set[str]()
    for bare, parts in module_map.modules.items():
        head, *layers = bare.split(".")
        if not module_map.table.is_of_head(head):
            continue
        heads.add(head)
        own = [leaf for part in parts for leaf in part.leaves if f"{part.path}/{leaf}" in trained]
        if head in tasks or set(own) - {"bias"} or (layers and own):
            found.add(head)
    return {head for head in heads if any(head.endswith(end) for end in found)}


def write_trained(
    trained: Leaves,
    adapted_modules: Container[str],
    module_map: ModuleMap,
    problems: list[str],
    task_type: str | None = None,
) -> tuple[Leaves, dict[str, Any]]:
    """Returns tensors and fields of the base's own parameters: biases alone, or whole modules."""
    tensors: Leaves = {}
    saved, biases, unknown = list[str](), set(), set(trained)
    heads = _heads(trained, module_map, task_type)
    for bare, parts in module_map.modules.items():
        paths = {f"{reference.path}/{name}" for reference in parts for name in reference.leaves}
        unknown -= paths
        mine, head = paths & trained.keys(), bare.split(".")[0]
        if not mine and head not in heads:
            continue
        adapted = any(reference.path in adapted_modules for reference in parts)
        alone = (
            head not in heads
            and all(path.endswith("/bias") for path in mine)
            and len(paths) > len(mine)
        )
        if adapted and not alone:
            problems.append(
                f"{bare} has factors and its weight trains as well, which PEFT does not support"
            )
            continue
        name = module_map.full(bare)
        biases |= {adapted} if alone else set()
        whole_head = head if head in heads else name
        saved += [] if alone or whole_head in saved else [whole_head]
        leaves, inner = ["bias"] if alone else parts[0].leaves, ".base_layer" if adapted else ""
        turned = module_map.inputs_first(bare)
        found = their_leaves(parts, leaves, trained, module_map.base, turned, problems)
        tensors |= {f"{ROOT}{name}{inner}.{kind}": x for kind, x in found.items()}
        if module_map.tied and bare == module_map.tied[1]:  # PEFT ties the weights of these two
            tied = module_map.full(module_map.tied[0])
            saved.append(tied)
            tensors[f"{ROOT}{tied}.weight"] = tensors[f"{ROOT}{name}.weight"]
    problems += [*map(module_map.unnamed, sorted(unknown))]
    bias = "none" if not biases else "all" if False in biases else "lora_only"
    fields: dict[str, Any] = {"bias": bias, "modules_to_save": sorted(saved, key=in_order) or None}
    if module_map.tied and module_map.full(module_map.tied[0]) in saved:
        fields["ensure_weight_tying"] = True
    return tensors, fields


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields and the tensors of norms that train alone, LN_TUNING; heads are apart."""
    tensors, names = Leaves(), list[str]()
    for bare, parts in module_map.modules.items():
        mine = [f"{parts[0].path}/{name}" for name in parts[0].leaves]
        if not leaves.keys() & mine or module_map.table.is_of_head(bare):
            continue
        if parts[0].weight in ("kernel", "embedding"):
            problems.append(
                f"{mine[0]}: PEFT's LN_TUNING trains norms alone; add a LoRA to the recipe, beside "
                "which other parameters train"
            )
            continue
        name = module_map.full(bare)
        names.append(name)
        found = their_leaves(parts, parts[0].leaves, leaves, module_map.base, False, problems)
        tensors |= {f"{ROOT}{name}.ln_tuning_layers.{kind}": x for kind, x in found.items()}
    return {"target_modules": sorted(names, key=in_order)}, tensors
