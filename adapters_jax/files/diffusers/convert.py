"""Reads and writes files of Diffusers, kohya's scripts and LyCORIS, for a model of the user's.

They hold LoRA, and those of kohya and LyCORIS also LoHa and LoKr, whose tensors are PEFT's.

The model's modules are found by their names, compared as `spelling` says. Where a name fits several
modules, shapes decide. Neither torch nor Diffusers is needed.

Reference: https://huggingface.co/docs/diffusers/api/loaders/lora
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from safetensors.numpy import save

from adapters_jax.errors import AdapterFileError, AdapterMismatchError, UserError, first_few
from adapters_jax.files.atomic import write_file
from adapters_jax.files.diffusers.lycoris import (
    Made,
    Product,
    Several,
    checked_alpha,
    products,
)
from adapters_jax.files.diffusers.spelling import PARTS, Module, by_part, spelled
from adapters_jax.files.directories import flat_leaves
from adapters_jax.files.layouts import Array, our_factors, rounded
from adapters_jax.files.module_map import ModuleMap, Names, as_in_model, find_modules, in_parts
from adapters_jax.files.peft.config import ROOT, config_problems, factor_keys, number_at
from adapters_jax.files.peft.convert import to_peft
from adapters_jax.files.settings import collecting
from adapters_jax.files.untrusted import not_finite, open_tensors, parse
from adapters_jax.methods import METHODS, DoRA, LoRA, Method
from adapters_jax.recipe import Recipe
from adapters_jax.trees import Tree, flatten

_CONFIG = "lora_adapter_metadata"  # Diffusers' name of PEFT's configuration, among the metadata
_OF_ANOTHER = re.compile(rf"{_CONFIG}|sshs_|ss_network_(dim|alpha|module)")
_OF_A = ".lora_A.weight"
_USUAL = {"peft_type": "LORA", "alora_invocation_tokens": None}  # of PEFT's other adapters
# The ends of the names of A, B and the magnitude in each style.
_STYLES = {
    "kohya": ("lora_down.weight", "lora_up.weight", "dora_scale"),
    "diffusers": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
}
_PREFIXES = {**{part: every[0] for part, every in PARTS.items()}, "transformer": "lora_unet_"}
_Known = dict[tuple[str, ...], list[Several]]  # by the names that `spelled` gives


class _Pair(NamedTuple):
    """LoRA of a module of theirs, called `name` there: A `(r, in, ...)`, B `(out, r, ...)`."""

    name: str
    a: Array
    b: Array
    alpha: float
    magnitude: Array | None
    middle: Array | None

    @property
    def shapes(self) -> str:
        """The shapes of the tensors, for messages."""
        middle = "" if self.middle is None else f", lora_mid {list(self.middle.shape)}"
        return f"lora_down {list(self.a.shape)}, lora_up {list(self.b.shape)}{middle}"

    def at(self, references: Several) -> Made | None:
        """The method and the leaves at each of our modules; None if the pair does not fit."""
        made: Made = {}
        for reference in references:
            a = self.a
            if (middle := self.middle) is not None:
                # LyCORIS's Tucker form: the window is in a third factor, (rank, rank, window).
                (rank, fan_in), window = a.shape[:2], middle.shape[2:]
                is_plain = a.size == rank * fan_in and middle.shape[:2] == (rank, rank)
                if not is_plain or reference.shape[:-1] != (*window, fan_in):
                    return None
                a = np.moveaxis(np.tensordot(middle, a.reshape(rank, fan_in), (1, 0)), -1, 1)
            # Their 1x1 convolution may be a dense layer here.
            if len(reference.shape) == 2 and a.size == math.prod(a.shape[:2]):
                a = a.reshape(a.shape[:2])
            factors = our_factors(reference, a, self.b, self.magnitude)
            if factors is None:
                return None
            factors |= _reduced(factors["a"], factors["b"])
            rank = factors["a"].shape[-1]
            numbers = (("rank", rank), ("alpha", rounded(self.alpha * rank / len(self.a))))
            kind = LoRA if self.magnitude is None else DoRA
            target, node = reference.node("lora")
            own = {f"{node}/{leaf}": x for leaf, x in factors.items()}
            made[target] = (kind.kind, *numbers, ("a_init", "uniform")), own
        return made


def load_diffusers(
    file: str | Path, names: Names | None, base: Any, *, part: str | None = None
) -> tuple[Recipe, Tree, dict[str, int], dict[str, str]]:
    """Reads LoRA, LoCon, DoRA, LoHa or LoKr of a diffusion model.

    Args:
        file: a `.safetensors` file of Diffusers, kohya or LyCORIS, of Stable Diffusion, SDXL, FLUX
            or a model that is named alike.
        names: None to find each module by its name in the model, where `/` and `_` are one. Else as
            in `load_peft`: a table, or a mapping to paths from the names of Diffusers or of the
            original checkpoint: `{"mid_block.attentions.0.proj_in": "middle/proj_in"}`. A tuple of
            paths stands for a module that fuses several of ours.
        base: the parameters, as in `load_peft`, of the part alone: of the UNet or transformer, or
            of one text encoder.
        part: "unet", also for transformers, "text_encoder", "text_encoder_2" or "text_encoder_3",
            where the file has several.

    Returns:
        `(recipe, adapters, others, metadata)`: the first two as from `load_peft`; how many modules
        the file has of each other part, which is not read; and its texts by name.

    Raises:
        AdapterFileError: the file is damaged, or holds other methods, half of a pair, or an alpha
            that is no number above 0.
        AdapterMismatchError: modules are not in the base, or have other shapes there; the message
            names every problem.
        UserError: the file has several parts, or not this one; `names` does not fit the base.

    Example:
        >>> import tempfile
        >>> from adapters_jax import LoRA
        >>> params = {"mid": {"attn_0": {"kernel": np.ones((6, 4))}}}
        >>> leaves = {"mid": {"attn_0": {"lora": {"a": np.ones((6, 2)), "b": np.ones((2, 4))}}}}
        >>> parts = {"unet": (LoRA("**/attn_0", 2, alpha=1), leaves, None, params)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save_diffusers(f"{folder}/lora.safetensors", parts)
        ...     recipe, adapters, others, metadata = load_diffusers(file, None, params)
        >>> recipe
        Recipe(
          LoRA(targets=('mid/attn_0',), rank=2, alpha=1, a_init='uniform'),
        )
        >>> metadata["ss_network_dim"], others
        ('2', {})
    """
    file = Path(file)
    with open_tensors(file) as opened:
        tensors, metadata = opened.read(), dict(opened.metadata)
    parts = by_part(file, tensors)
    part = "unet" if part == "transformer" else part
    if part not in parts and (part or len(parts) != 1):
        held = " and ".join(f"{name!r} ({len(each)} modules)" for name, each in parts.items())
        raise UserError(f"{file} holds {held or 'no tensors'}; give one of them, as part='unet'")
    own = parts.pop(part or next(iter(parts)))
    whole = parse(metadata[_CONFIG].encode(), file) if _CONFIG in metadata else {}
    configs = {
        prefix: {k.removeprefix(prefix): x for k, x in whole.items() if k.startswith(prefix)}
        for prefix in {module.prefix for module in own.values()}
    }
    checked = [{"peft_type": "LORA", **config} for config in configs.values() if config]
    problems = [problem for config in checked for problem in config_problems(config)]
    problems += [
        f"{field}={config[field]!r} is not supported"
        for config in checked
        for field, usual in _USUAL.items()
        if config.get(field, usual) != usual
    ]
    if problems:
        raise AdapterFileError(f"{file}: the configuration in it has {'; '.join(problems)}")
    pairs, module_map = {}, find_modules(_names(names, base), base)
    # Products of numbers that float32 cannot hold are found in the leaves.
    with np.errstate(over="ignore", invalid="ignore"):
        for spelling, module in own.items():
            with collecting(problems):
                pairs[spelling] = _pair(module, tensors, configs[module.prefix])
        if problems:
            raise AdapterFileError(f"{file}: {first_few(problems, joint='; ')}")
        with collecting(problems):  # a method rejects a number, or layers differ
            methods, leaves = _placed(pairs, module_map, problems)
            if not problems:
                made = as_in_model(methods, leaves, module_map)
    if problems:
        raise AdapterMismatchError(f"{file} does not fit: {first_few(problems, joint='; ')}")
    return *made, {name: len(each) for name, each in parts.items()}, metadata


def save_diffusers(
    file: str | Path,
    parts: Mapping[str, tuple[Recipe | Method, Tree, Names | None, Any]],
    *,
    style: str = "kohya",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter of a diffusion model as one file, which appears whole or not at all.

    Args:
        file: its path; an old file is replaced. In a directory, Diffusers looks for
            `pytorch_lora_weights.safetensors`.
        parts: `(recipe, adapters, names, base)` as in `save_peft`, by part: "unet", "transformer",
            "text_encoder", "text_encoder_2", "text_encoder_3". Recipes have LoRA, DoRA, LoHa or
            LoKr. Names may be None where the model's paths are the file's names, with `/` for each
            dot.
        style: "kohya", whose names of SDXL and FLUX are those of the original checkpoints, so give
            these as `names`; Diffusers and others read it too. Or "diffusers", for LoRA and DoRA,
            whose scale is 1 and whose ranks are one: our scale goes into B, and zeros fill up lower
            ranks.
        metadata: further texts, such as `ss_base_model_version`. Rank, alpha and checksums of
            another file are not taken over.

    Returns:
        The path.

    Raises:
        UserError: such files cannot hold the adapter, `names` lacks a module, or two modules get
            one name; the message names every problem.
    """
    if style not in _STYLES or not parts.keys() <= _PREFIXES.keys():
        expected = f"{' or '.join(_STYLES)}, and parts of {', '.join(_PREFIXES)}"
        raise UserError(f"style={style!r} with the parts {', '.join(parts)}, expected {expected}")
    problems, tensors = list[str](), dict[str, Array]()
    for part, (recipe, adapters, names, base) in parts.items():
        flat = flat_leaves("save_diffusers", adapters)
        config, theirs, wrong = to_peft(recipe, flat, _names(names, base), base)
        if config.get("alora_invocation_tokens"):
            wrong.append("such files have no place for the invocation of an ActivatedLoRA")
        several = part == "text_encoder" and {"text_encoder_2", "text_encoder_3"} & parts.keys()
        prefix = "lora_te1_" if several else _PREFIXES[part]
        found = products(config, theirs)
        if found and style != "kohya":
            wrong.append(f"Diffusers has no {config['peft_type']}; write style='kohya'")
        for name, made in {**found, **_their_pairs(config, theirs, style)}.items():
            dotted = style == "diffusers"
            module = f"{part}.{name}" if dotted else prefix + name.replace(".", "_")
            if any(f"{module}.{end}" in tensors for end in made):
                wrong.append(f"{module} is the name of two modules")
            tensors |= {f"{module}.{end}": x for end, x in made.items()}
            if names is None and dotted and re.search(r"(?<!linear)_\d+(\.|$)", name):
                wrong.append(f"{name} may have numbers behind dots there; give names")
            if not dotted and re.match(r"(single_)?transformer_blocks[._]", name):
                fused = "names={'double_blocks.0.img_attn.qkv': (query, key, value)}"
                wrong.append(f"kohya names {name} as FLUX's checkpoint does; give {fused}")
        wrong += [f"{key.removeprefix(ROOT)} is no LoRA of a layer" for key in theirs]
        problems += [f"{part}: {problem}" for problem in wrong]
    if problems or not tensors:
        what = first_few(problems, joint="; ") or "there are no adapters in parts"
        raise UserError(f"{file} cannot hold this adapter: {what}")
    texts = {k: x for k, x in (metadata or {}).items() if not _OF_ANOTHER.match(k)}
    if style == "kohya":  # other programs show these; "Dynamic" is of kohya's own resize_lora.py
        of_rank = (".lora_down.weight", ".hada_w1_b", ".lokr_w2_b")
        ranks = {len(x) for key, x in tensors.items() if key.endswith(of_rank)}
        alphas = {x.item() for key, x in tensors.items() if key.endswith(".alpha")}
        plain = all(key.endswith((".alpha", *_STYLES["kohya"][:2])) for key in tensors)
        texts["ss_network_module"] = "networks.lora" if plain else "lycoris.kohya"
        for key, several in {"ss_network_dim": ranks, "ss_network_alpha": alphas}.items():
            texts[key] = f"{several.pop():g}" if len(several) == 1 else "Dynamic"
    whole = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    write_file(Path(file), save(whole, {**texts, "format": "pt"}))
    return Path(file)


def _their_pairs(
    config: Mapping[str, Any], theirs: dict[str, Array], style: str
) -> dict[str, dict[str, Array]]:
    """Takes LoRA out of PEFT's tensors: those of a style, by module and their end."""
    keys = [key for key in theirs if key.endswith(_OF_A)]
    most = max((len(theirs[key]) for key in keys), default=0)
    made: dict[str, dict[str, Array]] = {}
    for key in keys:
        name = key.removeprefix(ROOT).removesuffix(_OF_A)
        a, b = (theirs.pop(k) for k in factor_keys(name))
        norms = theirs.pop(f"{ROOT}{name}.lora_magnitude_vector", None)
        alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
        alpha *= math.sqrt(len(a)) if config["use_rslora"] else 1
        own = made[name] = {}
        if style == "kohya":
            own["alpha"] = np.asarray(alpha, np.float32)
            norms = None if norms is None else norms.reshape(-1, *(1,) * (a.ndim - 1))
        else:
            # Where ranks differ, Diffusers 0.35 scales all pairs by the rank of the first.
            more = (0, most - len(a))
            b = (b * (alpha / len(a))).astype(b.dtype)
            a = np.pad(a, [more, *[(0, 0)] * (a.ndim - 1)])
            b = np.pad(b, [(0, 0), more, *[(0, 0)] * (b.ndim - 2)])
        ends = zip(_STYLES[style], (a, b, norms), strict=True)
        own |= {end: x for end, x in ends if x is not None}
    return made


def _names(names: Names | None, base: Any) -> Names:
    """The names, or those that the model's own paths are."""
    if names is not None:
        return names
    state = nnx.state(base, nnx.Param) if isinstance(base, nnx.Module) else base
    paths = sorted({path.rpartition("/")[0] for path in flatten(state)} - {""})
    return {path.replace("/", "."): path for path in paths}


def _pair(
    module: Module, tensors: Mapping[str, Array], config: Mapping[str, Any]
) -> _Pair | Product:
    """The factors and the alpha of one module; raises UserError if they are no LoRA."""
    if wrong := [key for key in module.keys.values() if np.iscomplexobj(tensors[key])]:
        raise UserError(f"{wrong[0]} is of {tensors[wrong[0]].dtype}, expected real numbers")
    found = {end: tensors[key].astype(np.float32) for end, key in module.keys.items()}
    if any(end.startswith(("hada", "lokr")) for end in found):
        return Product.of(module, found)
    if lacking := [end for end in ("lora_down", "lora_up") if end not in found]:
        raise UserError(f"{module} lacks its {' and '.join(lacking)}")
    a, b = found["lora_down"], found["lora_up"]
    pair = _Pair(str(module), a, b, 0, None, found.get("lora_mid"))
    if a.ndim < 2 or not a.size or b.size != math.prod(b.shape[:2]) or b.shape[1:2] != a.shape[:1]:
        raise UserError(f"{module} has {pair.shapes}, expected (rank, in) and (out, rank)")
    outputs, rank = b.shape[:2]
    alpha = found.get("alpha", np.float32(rank))
    if config and "alpha" not in found:
        alpha = np.float32(number_at(config, "lora_alpha", module.name))
        alpha = alpha * np.float32(math.sqrt(rank)) if config.get("use_rslora") else alpha
    number = checked_alpha(alpha, module)
    magnitude = found.get("dora_scale", found.get("lora_magnitude_vector"))
    shape = () if magnitude is None else magnitude.shape
    # Of a convolution, LyCORIS has (out, 1, 1, 1) and PEFT (1, out, 1, 1).
    per_input = "dora_scale" in found and shape[:1] != (outputs,)
    if magnitude is not None and (magnitude.size != outputs or per_input):
        raise UserError(
            f"{module} has norms {list(shape)}, expected one for each of its {outputs} outputs "
            "(LyCORIS's wd_on_out=True)"
        )
    return pair._replace(alpha=number, magnitude=magnitude)


def _placed(
    pairs: Mapping[tuple[str, ...], _Pair | Product], module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """A method for all modules of one rank and one alpha, and the leaves of all."""
    leaves: dict[str, Array] = {}
    taken: dict[str, str] = {}
    groups: dict[Any, list[str]] = {}  # targets by the method's class, numbers and form
    for pair, candidates in _matched(pairs, module_map, problems):
        made = [found for each in candidates if (found := pair.at(each))]
        if len(made) != 1:
            shapes = [f"{x.path} {list(x.shape)}" for each in candidates for x in each]
            what = "which fit several," if made else "which do not fit"
            problems.append(f"{pair.name} has {pair.shapes}, {what} {first_few(shapes)}")
            continue
        for target, (method, own) in made[0].items():
            if target in taken:
                problems.append(f"{taken[target]} and {pair.name} both change {target}")
            taken[target] = pair.name
            groups.setdefault(method, []).append(target)
            leaves |= own
    if wrong := not_finite(leaves):
        problems.append(f"numbers are too large for float32 in {wrong}")
    return [
        METHODS[kind](module_map.targets(targets), **dict(fields))
        for (kind, *fields), targets in groups.items()
    ], leaves


def _matched(
    pairs: Mapping[tuple[str, ...], _Pair | Product], module_map: ModuleMap, problems: list[str]
) -> list[tuple[_Pair | Product, list[Several]]]:
    """The pairs with the modules of ours that each may be of."""
    known: _Known = {}
    for name, references in module_map.modules.items():
        for prefix in ("", *module_map.table.prefixes):
            known.setdefault(spelled(prefix + name), []).append(references)
    there = {names: known.get(names) or _fused(names, known) for names in pairs}
    matched = [(pair, there[names]) for names, pair in pairs.items() if there[names]]
    rest = {names: pair for names, pair in pairs.items() if not there[names]}
    for names, several in known.items():
        mine = {
            x: found
            for x in names
            if isinstance(found := rest.get((x,)), _Pair) and found.middle is None
        }
        rest = {x: found for x, found in rest.items() if x not in {(own,) for own in mine}}
        if mine:
            matched.append((_joined(names, mine, several[0]), several))
    if rest:
        problems.append(
            f"{len(rest)} of {len(pairs)} modules are not in the base, "
            f"{first_few([pair.name for pair in rest.values()])}; it has "
            f"{first_few(list(module_map.modules))}; give names, or the base that it is of"
        )
    return matched


def _fused(names: tuple[str, ...], known: _Known) -> list[Several]:
    """The modules of ours that one of theirs fuses; none where the model lacks one of them."""
    each = [known.get((name,), []) for name in names]
    if any(len(several) != 1 or len(several[0]) != 1 for several in each):
        return []
    return [in_parts([several[0][0] for several in each])]


def _joined(names: tuple[str, ...], mine: Mapping[str, _Pair], there: Several) -> _Pair:
    """One pair, of as many times the rank, for a module of ours that fuses several of theirs."""
    (first, *_), widths = mine.values(), {name: len(pair.b) for name, pair in mine.items()}
    label = " and ".join(pair.name for pair in mine.values())
    if len({pair.a.shape[1:] for pair in mine.values()}) > 1:
        raise UserError(f"{label} have different inputs, and {there[0].path} is one weight for all")
    total = sum(math.prod(x.shape) for x in there) // first.a.shape[1]
    # Queries, keys and values are of one width; behind them is FLUX's feed-forward.
    wide = next((widths[x] for x in names[:3] if x in widths), (total - sum(widths.values())) // 3)
    scale, rows = first.alpha / len(first.a), list[Array]()
    for i, name in enumerate(names):
        width = max(widths.get(name, wide if i < 3 else total - 3 * wide), 0)
        row = {own: np.zeros((width, len(pair.a)), np.float32) for own, pair in mine.items()}
        if pair := mine.get(name):
            row[name] = pair.b.reshape(pair.b.shape[:2]) * (pair.alpha / len(pair.a) / scale)
        rows.append(np.concatenate([*row.values()], axis=1))
    norms = [x.ravel() for n in names if n in mine and (x := mine[n].magnitude) is not None]
    # The norms of some parts alone are too few, and then fit nothing.
    magnitude = np.concatenate(norms) if norms else None
    a, b = np.concatenate([x.a for x in mine.values()]), np.concatenate(rows)
    return _Pair(label, a, b, scale * len(a), magnitude, None)


def _reduced(a: Array, b: Array) -> dict[str, Array]:
    """The factors with a rank of at most the inputs and the outputs, which LoRA here requires."""
    inputs, outputs = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
    one = np.eye(min(len(inputs), outputs.shape[1]), dtype=a.dtype)
    if len(b) <= len(one):
        return {"a": a, "b": b}
    shape_a, shape_b = a.shape[:-1], b.shape[1:]
    a, b = (inputs @ outputs, one) if outputs.shape[1] == len(one) else (one, inputs @ outputs)
    return {"a": a.reshape(*shape_a, -1), "b": b.reshape(-1, *shape_b)}
