"""Prefix tuning in PEFT's files: one tensor with the keys and values of all layers.

PEFT fills the cache of a model with them, so that the positions of the text count from behind the
prefix; here they count from 0. Where positions are rotations, the scores depend on distances
alone, and keys that are turned back by the length of the prefix have the same. The MLP of
`prefix_projection` is in no file: PEFT writes what it made.

Reference: https://huggingface.co/docs/peft/package_reference/prefix_tuning
"""

from typing import Any

import numpy as np

from adapters_jax.errors import first_few
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.names import Keys
from adapters_jax.files.patterns import in_order, shortest
from adapters_jax.files.peft.config import KINDS, Config
from adapters_jax.methods import Method, PrefixTuning
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

((_KEY, _LEAF),) = KINDS["PREFIX_TUNING"].shared.items()
_UNKNOWN = (
    "the base does not say how its keys turn by their position, which is needed since PEFT counts "
    "the text's positions from behind the prefix; give a decoder of the library with rotary "
    "positions, or NameTable(..., keys=...). A model that adds embeddings or biases of positions "
    "cannot have PEFT's prefix"
)


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns the method, and a key and a value for each layer."""
    layers, rows = _layers(module_map, problems), added[""].get(_LEAF)
    if rows is None:
        problems.append(f"the file has no {_KEY}")
    if not layers or rows is None:
        return [], {}
    length, (heads, width, *_) = config.get("num_virtual_tokens", 0), next(iter(layers.values()))
    meant = {"num_layers": len(layers), "num_attention_heads": heads, "token_dim": heads * width}
    problems += [
        f"{field}={found}, but this base has {expected}"
        for field, expected in meant.items()
        if (found := config.get(field, expected)) != expected
    ]
    if rows.shape != (length, 2 * len(layers) * heads * width):
        problems.append(
            f"{_KEY} is {list(rows.shape)}, expected num_virtual_tokens={length} by keys and "
            f"values of {len(layers)} layers with {heads} heads of {width}"
        )
        return [], {}
    pairs = rows.reshape(length, len(layers), 2, heads, width).astype(np.float32)
    method = PrefixTuning(shortest(layers, module_map.attention.values()), length=length)
    leaves: dict[str, Array] = {}
    for i, (path, keys) in enumerate(layers.items()):
        leaves[f"{path}/{method.slot}/key"] = turned(pairs[:, i, 0], keys, -length)
        leaves[f"{path}/{method.slot}/value"] = pairs[:, i, 1]
    return [method], leaves


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields and the tensor."""
    layers, here = _layers(module_map, problems), {each.path: each for each in added}
    fields: dict[str, Any] = {"num_transformer_submodules": 1}
    if layers and here.keys() != layers.keys():
        unlike = first_few(sorted(here.keys() ^ layers.keys(), key=in_order))
        problems.append(f"PEFT has a prefix in every layer; {unlike} differ")
    own = [here[path].leaves(leaves) for path in layers if path in here]
    lengths = sorted({len(each["key"]) for each in own})
    if len(lengths) > 1:
        problems.append(f"PEFT expects prefixes of one length; these have {lengths}")
    if problems:
        return fields, {}
    (length,), (heads, width, *_) = lengths, next(iter(layers.values()))
    pairs = [
        np.stack([turned(each["key"], keys, length), each["value"]], axis=1)
        for each, keys in zip(own, layers.values(), strict=True)
    ]
    fields |= {"num_virtual_tokens": length, "num_layers": len(layers), "prefix_projection": False}
    fields |= {"token_dim": heads * width, "num_attention_heads": heads}
    return fields, {_KEY: np.stack(pairs, axis=1).reshape(length, -1).astype(np.float32)}


def _layers(module_map: ModuleMap, problems: list[str]) -> dict[str, Keys]:
    """The keys of each attention module of ours, in order; empty if a prefix is not theirs."""
    keys, paths = module_map.table.keys, sorted(module_map.attention.values(), key=in_order)
    if isinstance(keys, str):
        problems.append(f"PREFIX_TUNING is not supported on this base: {keys or _UNKNOWN}")
        return {}
    if len(keys) != len(paths):
        problems.append(f"the base has keys of {len(keys)} layers, and attention in {len(paths)}")
        return {}
    return dict(zip(paths, keys, strict=True))


def turned(key: Array, keys: Keys, positions: int) -> Array:
    """Keys (..., width), rotated by as many positions as are given; back by negative ones.

    Example:
        >>> quarter = Keys(1, 3, (np.pi / 2,))
        >>> turned(np.array([1.0, 0.0, 5.0]), quarter, 1).round(3).tolist()
        [0.0, 1.0, 5.0]
    """
    half = len(keys.frequencies)
    first, second = slice(0, half), slice(half, 2 * half)
    if keys.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    angles = positions * np.asarray(keys.frequencies, np.float64)
    cos, sin, found = np.cos(angles), np.sin(angles), np.array(key)
    found[..., first] = key[..., first] * cos - key[..., second] * sin
    found[..., second] = key[..., second] * cos + key[..., first] * sin
    return found
