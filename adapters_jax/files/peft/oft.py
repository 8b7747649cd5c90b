"""OFT in PEFT's files: the skew-symmetric blocks of every module.

PEFT's exact rotation is `(I - Q) (I + Q)^-1`, and its series, the default, one of
`(I + Q) (I - Q)^-1`; ours is the latter in both cases.

Reference: https://huggingface.co/docs/peft/package_reference/oft
"""

from typing import Any

import numpy as np

from adapters_jax.errors import UserError
from adapters_jax.files.layouts import Array
from adapters_jax.files.module_map import Added, Leaves, ModuleMap
from adapters_jax.files.patterns import in_order
from adapters_jax.files.peft.checks import adapted, references
from adapters_jax.files.peft.config import ROOT, Config, value
from adapters_jax.files.peft.parameters import release_of
from adapters_jax.files.settings import collecting
from adapters_jax.methods import OFT, Method
from adapters_jax.placement import Placements
from adapters_jax.recipe import Recipe

KEY = "oft_R"
SINCE = "0.18.0"  # the version of PEFT whose series counts the last term once


def read(
    config: Config, added: Added, module_map: ModuleMap, problems: list[str]
) -> tuple[list[Method], dict[str, Array]]:
    """Returns one OFT for each size of blocks, and the leaves by path."""
    leaves: dict[str, Array] = {}
    groups: dict[int, list[str]] = {}
    series, share = bool(value(config, "use_cayley_neumann")), bool(config.get("block_share"))
    if series and release_of(config.get("peft_version")) < release_of(SINCE):
        problems.append(
            f"peft_version={config.get('peft_version')!r} has another series than {SINCE} on; load "
            "it in that version, merge it, and save the base"
        )
    for module, found in added.items():
        with collecting(problems):
            skew = found["skew"]
            block = _size(skew.shape[-1]) if skew.ndim == 2 else 0
            # Parts of one module have its inputs, and so its rotation.
            for reference in references(config, module, module_map):
                shape = reference.shape
                inputs = [int(np.prod(shape[:n])) for n in range(1, len(shape))]
                fits = reference.weight == "kernel" and len(shape) < 4
                blocks = [n // block for n in inputs if block and n % block == 0]
                blocks = [1] if share and blocks else blocks
                if not (fits and block and len(skew) in blocks):
                    raise UserError(
                        f"{module} has blocks of {list(skew.shape)}, which do not fit "
                        f"{reference.path} of {list(shape)}"
                    )
                own = skew if series else -skew
                leaves[f"{reference.path}/oft/skew"] = own.astype(np.float32)
                groups.setdefault(block, []).append(reference.path)
    terms = value(config, "num_cayley_neumann_terms")
    # PEFT's series of three terms is that of four.
    counted = max(terms, 4) if series and terms > 2 else terms if series else None
    return [
        OFT(module_map.targets(paths), block, counted, share) for block, paths in groups.items()
    ], leaves


def _size(entries: int) -> int:
    """The k of k (k - 1) / 2 entries; 0 where there is none."""
    k = (1 + int((1 + 8 * entries) ** 0.5)) // 2
    return k if k * (k - 1) // 2 == entries and k > 1 else 0


def write(
    recipe: Recipe, added: Placements, leaves: Leaves, module_map: ModuleMap, problems: list[str]
) -> tuple[dict[str, Any], Leaves]:
    """Returns the fields, and the blocks of every module."""
    tensors = dict[str, Array]()
    methods: list[Any] = list(recipe.attached)
    if len({(m.block, m.terms, m.share) for m in methods}) > 1:
        problems.append("its entries have several values of block, terms or share; PEFT has one")
    if methods[0].terms == 3:
        problems.append("terms=3, and PEFT's series of 3 terms has 4; write terms=2 or terms=4")
    method, names = methods[0], list[str]()
    for bare, parts, mine in adapted(added, module_map, problems):
        own = [each.leaves(leaves)["skew"] for each in mine if each]
        if len(own) < len(parts) or any(not np.array_equal(own[0], x) for x in own[1:]):
            problems.append(f"{bare}: its parts are turned differently, and PEFT turns its input")
            continue
        name = module_map.full(bare)
        names.append(name)
        skew = own[0].reshape(-1, own[0].shape[-1])
        tensors[f"{ROOT}{name}.{KEY}.weight"] = -skew if method.terms is None else skew
    fields = {
        "peft_version": SINCE,
        "target_modules": sorted(names, key=in_order),
        "r": 0,
        "oft_block_size": method.block,
        "block_share": method.share,
        "use_cayley_neumann": method.terms is not None,
        "num_cayley_neumann_terms": method.terms or 5,
        "module_dropout": 0.0,
        "coft": False,
        "fan_in_fan_out": module_map.table.fan_in_fan_out,
        "bias": "none",
        "init_weights": True,
    }
    return fields, tensors
