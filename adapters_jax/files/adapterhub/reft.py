"""LoReFT in AdapterHub's files.

An orthonormal R is there as torch's `parametrizations.orthogonal` has it: `base`, an orthogonal
matrix of the model's width, and `original`, which holds Householder reflections and signs.
"""

from typing import Any

import numpy as np

from adapters_jax.files.adapterhub.blocks import Blocks
from adapters_jax.files.adapterhub.config import ACTIVATIONS, DEFAULTS, THEIRS, Config
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves
from adapters_jax.files.patterns import shortest
from adapters_jax.methods import LoReFT, Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placements

# Our fields by AdapterHub's.
_FIELDS = {
    **{"r": "rank", "prefix_positions": "prefix_positions", "suffix_positions": "suffix_positions"},
    **{"tied_weights": "tied", "orthogonality": "orthogonal", "dropout": "dropout"},
}
_TURNED = "projection.parametrizations.weight"


def read(
    config: Config, found: Added, blocks: Blocks, leaves: Leaves, problems: list[str]
) -> list[Method]:
    """Returns one LoReFT, and adds its leaves."""
    fields = {ours: config[theirs] for theirs, ours in _FIELDS.items()}
    given = config["non_linearity"]
    fields["activation"] = ACTIVATIONS[given.lower()] if given else "identity"
    outputs, paths = blocks.outputs(), []
    for number in blocks.layers if config["layers"] == "all" else config["layers"]:
        name = blocks.names.get(number, f"layer {number}")
        tensors = found.pop(f"{name}reft_layer.refts", {})
        if number not in outputs:
            problems.append(f"names has no path for {name.rstrip('.')}, a whole layer")
            continue
        path, width = outputs[number]
        method = LoReFT(path, **fields)
        new = _leaves(method, width, tensors)
        if isinstance(new, str):
            problems.append(f"{name}reft_layer {new}")
            continue
        leaves |= {f"{path}/{method.slot}/{leaf}": x for leaf, x in new.items()}
        paths.append(path)
    return [LoReFT(shortest(paths, blocks.paths), **fields)] if paths else []


def _leaves(method: LoReFT, d: int, got: Leaves) -> Leaves | str:
    """Our leaves of one layer of width d, or what is wrong with the tensors."""
    r = method.rank
    one: dict[str, tuple[int, ...]] = {"projection.weight": (r, d)}
    if method.orthogonal:
        one = {f"{_TURNED}.original": (r, d), f"{_TURNED}.0.base": (d, d)}
    one |= {"learned_source.weight": (r, d), "learned_source.bias": (r,)}
    numbers = range(1 if method.tied else 2)
    expected = {f"units.{i}.{name}": shape for i in numbers for name, shape in one.items()}
    shapes = {name: tensor.shape for name, tensor in got.items()}
    if shapes != expected or (method.orthogonal and r >= d):
        return f"has {shapes or 'no tensors'}, expected {expected} with r below {d}"
    leaves: Leaves = {}
    for unit in method.units:  # AdapterHub has both, also where one has no positions
        at = f"units.{1 if unit == 'suffix' and not method.tied else 0}"
        projection = (
            _turned(got[f"{at}.{_TURNED}.original"], got[f"{at}.{_TURNED}.0.base"])
            if method.orthogonal
            else got[f"{at}.projection.weight"].T
        )
        leaves |= {
            f"{unit}/kernel": got[f"{at}.learned_source.weight"].T,
            f"{unit}/bias": got[f"{at}.learned_source.bias"],
            f"{unit}/projection": projection,
        }
    return {name: x.astype(np.float32) for name, x in leaves.items()}


def _turned(original: Array, base: Array) -> Array:
    """R (d, r) of torch's parametrisation: the base's first axes, reflected and with signs."""
    wide = original.astype(np.float64).T
    d, r = wide.shape
    made = np.eye(d, r)
    for i in reversed(range(r)):
        axis = np.concatenate([np.zeros(i), [1.0], wide[i + 1 :, i]])
        made -= 2 / (axis @ axis) * np.outer(axis, axis @ made)
    # Torch has the signs as whole numbers, cut off towards zero.
    return base.astype(np.float64) @ (made * np.trunc(np.diagonal(wide)))


def write(
    added: Placements, flat: Leaves, blocks: Blocks, tensors: Added, problems: list[str]
) -> list[dict[str, Any]]:
    """Returns the configuration, if there is one, and adds its tensors."""
    own = [each for each in added if each.method.kind == "loreft"]
    layers = {path: (number, width) for number, (path, width) in blocks.outputs().items()}
    found: list[dict[str, Any]] = []
    numbers = []
    for each in own:
        method, leaves = each.method, each.leaves(flat)
        number, width = layers.get(each.path, (-1, 0))
        specs = method.leaves(AttachmentPoint("output", each.path, width=max(width, method.rank)))
        if any(leaves[leaf].shape != spec.shape for leaf, spec in specs.items()):
            problems.append(f"{each.path}: AdapterHub's LoReFT is on the output of whole layers")
        elif method.output is not None or method.activation not in THEIRS:
            problems.append(
                f"{each.path}: output={method.output!r} and activation={method.activation!r}, "
                f"AdapterHub supports None and {', '.join(THEIRS)}"
            )
        elif not method.subtract:
            problems.append(
                f"{each.path}: subtract=False, which AdapterHub's files do not hold (it saves its "
                "DiReft without, and then loads it as NoReft)"
            )
        elif method.orthogonal and method.rank == width:
            problems.append(f"{each.path}: rank={width}, expected less than the width")
        else:
            fields = {theirs: getattr(method, ours) for theirs, ours in _FIELDS.items()}
            fields["tied_weights"] = len(method.units) == 1  # else AdapterHub has a unit too many
            plain = method.activation == "identity"
            fields["non_linearity"] = None if plain else THEIRS[method.activation]
            found += [] if fields in found else [fields]
            numbers.append(number)
            at = tensors.setdefault(f"{blocks.names[number]}reft_layer.refts", {})
            for i, unit in enumerate(method.units):
                new = _theirs(method, {k: leaves[f"{unit}/{k}"] for k in _PARTS})
                at |= {f"units.{i}.{key}": x for key, x in new.items()}
    if len(found) > 1:
        problems.append("AdapterHub supports one LoReFT in an adapter, with the same settings")
    chosen = "all" if sorted(numbers) == sorted(blocks.layers) else sorted(numbers)
    return [{**DEFAULTS["reft"], **fields, "layers": chosen} for fields in found]


_PARTS = ("kernel", "bias", "projection")


def _theirs(method: LoReFT, leaves: Leaves) -> Leaves:
    """The tensors of a unit."""
    made = {
        "learned_source.weight": np.asarray(leaves["kernel"]).T,
        "learned_source.bias": np.asarray(leaves["bias"]),
    }
    projection = np.asarray(leaves["projection"], np.float64)
    if not method.orthogonal:
        return made | {"projection.weight": projection.T.astype(np.float32)}
    r = projection.shape[1]
    base, upper = np.linalg.qr(projection, mode="complete")
    base[:, :r] *= np.where(np.diagonal(upper) < 0, -1.0, 1.0)
    original = -np.eye(r, len(base), dtype=np.float32)
    return made | {f"{_TURNED}.original": original, f"{_TURNED}.0.base": base.astype(np.float32)}
