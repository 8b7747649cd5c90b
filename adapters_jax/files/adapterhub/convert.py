"""Converts AdapterHub's configuration and tensors to our methods and leaves, and back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.files.adapterhub import invertible, loras, reft
from adapters_jax.files.adapterhub.blocks import Blocks
from adapters_jax.files.adapterhub.config import (
    ACTIVATIONS,
    DEFAULTS,
    LOCATIONS,
    PHM,
    POST_NORM,
    PRE_NORM,
    THEIRS,
    Config,
    children,
    placement,
    tensor_names,
)
from adapters_jax.files.adapterhub.loras import Own, Settings, points
from adapters_jax.files.layouts import Array, rounded
from adapters_jax.files.module_map import Added, Leaves
from adapters_jax.files.patterns import shortest
from adapters_jax.methods import Bottleneck, Compacter, Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

_LEGACY = [f"{a}_text_{b}_adapters" for a in ("attention", "layer") for b in ("task", "lang")]
_SHARED = "shared_parameters"


def read(
    whole: Config, tensors: Mapping[str, Array], blocks: Blocks
) -> tuple[list[Method], dict[str, Array], list[str]]:
    """Returns the methods, their leaves by path, and a sentence for each problem."""
    configs, problems = children(whole)
    if problems:
        return [], {}, problems
    found = _sorted(tensors, str(whole["name"]), blocks, problems)
    methods: list[Method] = []
    leaves: dict[str, Array] = {}
    # AdapterHub applies LoRA before the bottleneck, so LoRA comes first in the recipe.
    for config in sorted(configs, key=lambda config: config["architecture"] is None):
        readers = {None: _our_bottlenecks, "lora": loras.read, "reft": reft.read}
        if config["architecture"] is None:
            methods += invertible.read(config, found, blocks, leaves, problems)
        methods += readers[config["architecture"]](config, found, blocks, leaves, problems)
    problems += [
        f"{module} has tensors, but the configuration does not adapt it" for module in found
    ]
    return methods, leaves, problems


def _sorted(tensors: Mapping[str, Array], name: str, blocks: Blocks, problems: list[str]) -> Added:
    """The tensors by module, with `.adapters`, `.loras` or `.refts` behind, and by their own name.

    Those that modules share are there under `shared_parameters`.
    """
    found: Added = {}
    for key, tensor in tensors.items():
        modern = key  # the first versions had other names for adapters of tasks and of languages
        for legacy in _LEGACY:
            modern = modern.replace(legacy, "adapters")
        for kind in ("adapters", "loras", "refts", _SHARED, invertible.INVERTIBLE):
            module, mark, rest = f".{modern}".partition(f".{kind}.{name}.")
            if mark:
                of_model = kind in (_SHARED, invertible.INVERTIBLE)
                own = kind if of_model else f"{blocks.module_map.bare(module[1:])}.{kind}"
                found.setdefault(own, {})[rest] = tensor
                break
        else:
            problems.append(f"{key} belongs to no bottleneck, LoRA or ReFT of the adapter {name!r}")
    return found


def _our_bottlenecks(
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns one Bottleneck for each reduction factor, and adds its leaves."""
    sublayers = {point: blocks.bottlenecks[point] for point in points(config, blocks.bottlenecks)}
    mine = {point: found.pop(f"{own.module}.adapters", {}) for point, own in sublayers.items()}
    if config["cross_adapter"] and not any(
        name == "cross_adapter" for _, name in blocks.bottlenecks
    ):
        problems.append("cross_adapter=True, but the base has no attention to an encoder")
    kind = placement(config, blocks.architecture.post_norm)
    if isinstance(kind, str):
        problems.append(kind)
        return []
    role, where = kind
    groups: dict[float, list[str]] = {}
    fields: dict[str, Any] = {
        "placement": where,
        "scale": config["scaling"],
        "activation": ACTIVATIONS[config["non_linearity"].lower()],
        "norm_before": config["ln_before"],
        "norm_after": config["ln_after"],
    }
    make: type[Bottleneck] = Bottleneck
    if config.get("phm_layer"):
        make = Compacter
        given = {ours: config.get(theirs, default) for theirs, (ours, default) in PHM.items()}
        fields |= {**given, "full": not given["full"]}
    shared = found.pop(_SHARED, {}) if make is Compacter else {}
    for point, (module, paths, width) in sublayers.items():
        path, factor = paths.get(role), _our_factor(config, point[0])
        if factor is None:
            problems.append(f"reduction_factor has neither layer {point[0]} nor a default")
        elif path is None or not width:
            problems.append(
                f"names has no path for the {role} of {module}, or for the projection before it"
            )
        else:
            method = make(path, reduction_factor=factor, **fields)
            new = _leaves(method, path, width, {**mine[point], **shared}, module, problems)
            prefix = f"{path}/{method.slot}"
            leaves |= {method.path_of(prefix, name): x for name, x in new.items()}
            groups.setdefault(factor, []).append(path)
    if len(groups) > 1 and shared:
        problems.append(
            f"reduction_factor={config['reduction_factor']!r} with shared_phm_rule or shared_W_phm "
            "is not supported, since adapters of one width share them"
        )
    return [
        make(shortest(paths, blocks.paths), reduction_factor=factor, **fields)
        for factor, paths in groups.items()
    ]


def _our_factor(config: Config, layer: int) -> float | None:
    """The reduction factor of a layer."""
    factor = config["reduction_factor"]
    if isinstance(factor, Mapping):
        return factor.get(str(layer), factor.get("default"))
    return factor


def _leaves(
    method: Bottleneck, path: str, width: int, got: Leaves, module: str, problems: list[str]
) -> Leaves:
    """Our leaves of one bottleneck; adds a problem if the tensors do not fit the settings."""
    # AdapterHub stores the norm before a bottleneck under two names.
    for kind in ("weight", "bias") if method.norm_before else ():
        twin = got.pop(f"adapter_down.0.{kind}", None)
        if twin is None:
            continue
        if not np.array_equal(got.setdefault(f"adapter_norm_before.{kind}", twin), twin):
            problems.append(f"{module}: adapter_down.0 and adapter_norm_before differ")
    names = tensor_names(method)
    own = method.leaves(AttachmentPoint("output", path, width=width))
    expected = {
        names[leaf]: list(_theirs(leaf, np.broadcast_to(np.float32(0), spec.shape)).shape)
        for leaf, spec in own.items()
    }
    shapes = {name: list(tensor.shape) for name, tensor in got.items()}
    if shapes != expected:
        problems.append(f"{module} has {shapes or 'no tensors'}, expected {expected}")
        return {}
    arrays = {leaf: got[name].astype(np.float32) for leaf, name in names.items()}
    return {
        leaf: x.T if leaf.endswith("kernel") else x.reshape(own[leaf].shape)
        for leaf, x in arrays.items()
    }


def _theirs(leaf: str, x: Array) -> Array:
    """A leaf of a bottleneck as AdapterHub's tensor: kernels (out, in), and biases of one axis."""
    return x.T if leaf.endswith("kernel") else x.reshape(-1) if leaf.endswith("bias") else x


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, blocks: Blocks, problems: list[str]
) -> tuple[dict[str, Any], Added]:
    """Returns the settings and the tensors as `_sorted` has them, and adds the problems."""
    tensors: Added = {}
    configs: list[dict[str, Any]] = []
    for kind, convert in ((None, _their_bottlenecks), ("lora", loras.write)):
        kinds = ("lora", "ia3") if kind else ("bottleneck", "compacter")
        mine = [each for each in added if each.method.kind in kinds]
        own = {each.path: each for each in mine}
        twice = [each.path for each in mine if own[each.path] is not each]
        problems += [f"two adapters of {path}, and AdapterHub supports one" for path in twice]
        settings = convert(own, leaves, blocks, tensors, problems)
        configs += _configs(kind, settings, blocks)
    fields, activation = invertible.write(added, leaves, blocks, tensors, problems)
    bottlenecks = [each for each in configs if "reduction_factor" in each]
    if fields and {each["non_linearity"] for each in bottlenecks} != {THEIRS[activation]}:
        problems.append(
            f"AdapterHub's invertible adapter has the activation of the bottlenecks beside it, "
            f"expected some with activation={activation!r}"
        )
    for each in bottlenecks[:1]:
        each |= fields
    configs += reft.write(added, leaves, blocks, tensors, problems)
    known = ("bottleneck", "compacter", "lora", "ia3", "loreft", "invertible")
    others = {type(m).__name__ for m in recipe.attached if m.kind not in known}
    if others or not recipe.attached:
        what = ", ".join(sorted(others)) or "nothing"
        problems.append(
            f"the recipe adds {what}; AdapterHub's files support Bottleneck, Compacter, "
            "Invertible, LoRA, IA3 and LoReFT"
        )
    if sum(config.get("architecture") == "lora" for config in configs) > 1:
        problems.append(
            "AdapterHub supports one LoRA in an adapter, with one rank, alpha and dropout, on the "
            "same projections of each layer"
        )
    union = {"architecture": "union", "configs": configs}
    return configs[0] if len(configs) == 1 else union, tensors


def _their_bottlenecks(
    own: Own, flat: Leaves, blocks: Blocks, tensors: Added, problems: list[str]
) -> Settings:
    """Returns the bottlenecks' settings by layer and location, and adds their tensors."""
    settings: Settings = {}
    roles = blocks.roles()
    for path, each in own.items():
        method, leaves = each.method, each.leaves(flat)
        point, role = roles.get(path, ((0, ""), ""))
        fields = _fields(method, role, blocks)
        if isinstance(fields, str):
            problems.append(f"{path}: {fields}")
            continue
        if point in settings:
            problems.append(f"{path}: AdapterHub supports one bottleneck in each sublayer")
        sublayer = blocks.bottlenecks[point]
        specs = method.leaves(AttachmentPoint("output", path, width=sublayer.width))
        if any(leaves[leaf].shape != spec.shape for leaf, spec in specs.items()):
            problems.append(f"{path}: its leaves do not fit one layer of this base")
            continue
        factor = _their_factor(method, sublayer.width, method.width(sublayer.width))
        settings[point] = fields | {"reduction_factor": factor}, ()
        module, names = f"{sublayer.module}.adapters", tensor_names(method)
        for leaf, x in leaves.items():
            at = tensors.setdefault(_SHARED if leaf in method.shared_leaves else module, {})
            tensor = at.setdefault(names[leaf], _theirs(leaf, x))
            if not np.array_equal(tensor, _theirs(leaf, x)):
                problems.append(f"{path}: AdapterHub supports one {leaf} for all of its adapters")
        if method.norm_before:  # AdapterHub stores the norm under two names
            for leaf, kind in (("scale", "weight"), ("bias", "bias")):
                tensors[module][f"adapter_down.0.{kind}"] = leaves[f"norm_before/{leaf}"]
    return settings


def _fields(method: Bottleneck, role: str, blocks: Blocks) -> dict[str, Any] | str:
    """A bottleneck's fields without its width, or why AdapterHub does not support it."""
    if method.dropout:
        return (
            f"dropout={method.dropout} acts between the projections, AdapterHub's after them; "
            "write the recipe with dropout=0.0, which changes no prediction"
        )
    if method.output is not None:
        return f"output={method.output!r}, AdapterHub adapts modules that return one array"
    if method.activation not in THEIRS:
        return f"activation={method.activation!r}, AdapterHub supports {', '.join(THEIRS)}"
    if role == "sublayer":  # sequential acts at its output, parallel at the sum
        parallel = method.placement == "parallel" and blocks.architecture.post_norm
        role = "output" if method.placement == "sequential" else "sum" if parallel else role
    fields = {
        "non_linearity": THEIRS[method.activation],
        "scaling": float(method.scale),
        "ln_before": method.norm_before,
        "ln_after": method.norm_after,
    }
    if isinstance(method, Compacter):
        given = {theirs: getattr(method, ours) for theirs, (ours, _) in PHM.items()}
        fields |= given | {"phm_layer": True, "factorized_phm_W": not method.full}
        fields |= {"phm_c_init": method.rule_init, "phm_init_range": method.init_std}
    if (role, method.placement) == ("sum", "parallel"):
        return fields | {"is_parallel": True, "original_ln_before": False}
    for row in POST_NORM if blocks.architecture.post_norm else PRE_NORM:
        if row[:2] == (role, method.placement):
            return fields | dict(zip(row._fields[2:], row[2:], strict=True))
    norm = "norm's, with placement='norm'" if blocks.architecture.post_norm else "sum"
    return (
        f"AdapterHub supports no {method.placement} bottleneck here: target a sublayer's output, "
        f"its {norm}, or its sum with placement='parallel'"
    )


def _their_factor(method: Bottleneck, width: int, m: int) -> float:
    """A reduction factor from which AdapterHub computes the width `m` again."""
    if method.reduction_factor is not None:
        return method.reduction_factor
    # AdapterHub computes int(width // factor), which misses m for some quotients.
    exact = rounded(width / m)
    return exact if int(width // exact) == m else width / (m + 0.5)


def _configs(kind: str | None, settings: Settings, blocks: Blocks) -> list[dict[str, Any]]:
    """Groups settings into few configurations, each of some locations in some layers."""
    groups: dict[str, tuple[dict[str, Any], list[str], tuple[str, ...], dict[int, Any]]] = {}
    together: dict[str, set[str]] = {}
    for (_, location), (fields, _) in settings.items():
        together.setdefault(_but_factor(fields), set()).add(location)
    for layer in blocks.layers:
        mine: dict[str, list[Any]] = {}
        for location in LOCATIONS[kind]:
            if (layer, location) in settings:
                fields, matrices = settings[layer, location]
                each = mine.setdefault(repr(sorted(fields.items())), [fields, [], ()])
                each[1].append(location)
                each[2] += matrices
        even = len(mine) > 1  # otherwise one configuration maps layers to factors
        for fields, locations, matrices in mine.values():
            factor = fields.get("reduction_factor")
            kept = repr(sorted(fields.items())) if even else _but_factor(fields)
            # A layer without some location, as an encoder's, has the others of its configuration.
            every = together[_but_factor(fields)]
            if set(locations) == every & blocks.locations(layer, kind):
                locations = [location for location in LOCATIONS[kind] if location in every]
            key = repr((kept, locations, matrices))
            group = groups.setdefault(key, (fields, locations, matrices, {}))
            group[3][layer] = factor
    return [_config(kind, *each, blocks) for each in groups.values()]


def _but_factor(fields: Mapping[str, Any]) -> str:
    """What tells settings from others that may differ in the reduction factor."""
    return repr(sorted((k, v) for k, v in fields.items() if k != "reduction_factor"))


def _config(
    kind: str | None,
    fields: Mapping[str, Any],
    locations: list[str],
    matrices: tuple[str, ...],
    factors: Mapping[int, Any],
    blocks: Blocks,
) -> dict[str, Any]:
    """One configuration, with all fields that have a default."""
    fields = {**DEFAULTS[kind], **fields, "architecture": kind}
    fields |= {location: location in locations for location in LOCATIONS[kind]}
    fields["leave_out"] = [n for n in blocks.layers if n not in factors]
    if kind is None:
        several = len(set(factors.values())) > 1
        by_layer = {str(layer): factor for layer, factor in factors.items()}
        fields["reduction_factor"] = by_layer if several else next(iter(factors.values()))
        fields.pop("architecture")
    elif "selfattn_lora" in locations:
        fields["attn_matrices"] = list(matrices)
    return fields
