"""AdapterHub's invertible adapters, on the embeddings of encoders.

They are settings of a bottleneck's configuration, `inv_adapter` and `inv_adapter_reduction_factor`,
and have its activation. A language model of AdapterHub undoes them before its output embedding,
which no method here does; a classifier does not.
"""

from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks
from adapters_jax.files.adapterhub.config import ACTIVATIONS, Config
from adapters_jax.files.module_map import Added, Leaves
from adapters_jax.methods import Invertible, Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placements

INVERTIBLE = "invertible_adapters"
_NAMES = {
    f"{ours}/{side}/{kind}": f"{theirs}.{number}.{name}"
    for ours, theirs in (("first", "F"), ("second", "G"))
    for side, number in (("down", 0), ("up", 2))
    for kind, name in (("kernel", "weight"), ("bias", "bias"))
}


def _embeddings(blocks: Blocks) -> tuple[str, int] | None:
    """The path of our module of embeddings and its width; None where a model is no encoder."""
    own = blocks.module_map.at("embeddings.LayerNorm") if blocks.architecture.post_norm else ()
    if not own:
        return None
    return own[0].path.rpartition("/")[0], own[0].width


def read(
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns the invertible adapter of a configuration, if it has one, and adds its leaves."""
    if not config.get("inv_adapter"):
        return []
    where, got = _embeddings(blocks), found.pop(INVERTIBLE, {})
    if where is None:
        problems.append(
            "inv_adapter is supported on encoders alone; a decoder undoes it before its output"
        )
        return []
    path, width = where
    factor = config.get("inv_adapter_reduction_factor") or 2
    activation = ACTIVATIONS[config["non_linearity"].lower()]
    method = Invertible(path, reduction_factor=factor, activation=activation)
    specs = method.leaves(AttachmentPoint("output", path, width=width))
    expected = {_NAMES[leaf]: list(spec.shape[::-1]) for leaf, spec in specs.items()}
    shapes = {name: list(tensor.shape) for name, tensor in got.items()}
    if shapes != expected:
        problems.append(f"{INVERTIBLE} has {shapes or 'no tensors'}, expected {expected}")
        return []
    for leaf in method.leaf_names:
        leaves[f"{path}/{method.slot}/{leaf}"] = got[_NAMES[leaf]].T.astype(np.float32)
    return [method]


def write(
    added: Placements, flat: Leaves, blocks: Blocks, tensors: Added, problems: list[str]
) -> tuple[dict[str, Any], str]:
    """Returns the settings of the invertible adapter and its activation, and adds its tensors."""
    own = [each for each in added if each.method.kind == "invertible"]
    if not own:
        return {}, ""
    where, each = _embeddings(blocks), own[0]
    if where is None or len(own) > 1 or each.path != where[0]:
        problems.append(
            f"{', '.join(x.path for x in own)}: AdapterHub has an invertible adapter on the "
            f"embeddings of encoders{f', {where[0]}' if where else ''}"
        )
        return {}, ""
    tensors[INVERTIBLE] = {_NAMES[leaf]: array.T for leaf, array in each.leaves(flat).items()}
    factor = each.method.reduction_factor
    return {"inv_adapter": "nice", "inv_adapter_reduction_factor": factor}, each.method.activation
