"""Rotary settings of a `config.json`, of transformers 4 and 5, and back."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from adapters_jax.errors import UserError
from adapters_jax.finetune.models.parts.rotary import RopeScaling

_SCALING = {field.name: field.default for field in fields(RopeScaling)}
_BESIDE = ("rope_theta", "partial_rotary_factor", "type")  # in the same object
_ALIASES = {"su": "longrope"}


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `config.json` with rotary settings where transformers 4 has them.

    transformers 5 has them in `rope_parameters`, of each kind of layer if these differ.

    Example:
        >>> flat({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}})
        {'rope_theta': 500.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}
    """
    values = dict(values)
    rope = values.pop("rope_parameters", None)
    if not rope:
        return values
    rope = _mapping("rope_parameters", rope)
    if "full_attention" in rope:
        local = _mapping("rope_parameters", rope.get("sliding_attention") or {})
        if local.get("rope_type", "default") != "default":
            raise UserError(
                f"rope_parameters scales sliding_attention (rope_type={local['rope_type']!r}), "
                "expected 'default' there."
            )
        if "rope_theta" in local:
            values["rope_local_base_freq"] = local["rope_theta"]
        rope = _mapping("rope_parameters", rope["full_attention"])
    beside = {name: x for name, x in rope.items() if name in _BESIDE[:2]}
    scaling = {name: x for name, x in rope.items() if name not in beside}
    if scaling.get("rope_type") == "proportional":  # where the rest is a rotation by nothing
        scaling["proportion"] = beside.pop("partial_rotary_factor", 1.0)
        scaling.setdefault("factor", 1.0)
    return {**values, **beside, "rope_scaling": scaling}


def read_scaling(values: Mapping[str, Any], longest: int) -> RopeScaling | None:
    """The scaling of the values of a `config.json`.

    Args:
        values: see `flat`.
        longest: the `max_position_embeddings`.

    Raises:
        UserError: it is not supported; the message names what is not.
    """
    given = values.get("rope_scaling")
    if given is None or given == {}:
        return None
    found = {k: x for k, x in _mapping("rope_scaling", given).items() if x is not None}
    kind = found.get("rope_type", found.get("type"))
    kind = _ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind == "default":
        return None
    unknown = found.keys() - _SCALING.keys() - set(_BESIDE)
    if unknown:
        raise UserError(
            f"rope_scaling has {', '.join(sorted(unknown))}, expected among {', '.join(_SCALING)}."
        )
    original = values.get("original_max_position_embeddings") or longest
    if kind == "longrope":
        found.setdefault("factor", longest / original)
    if kind in ("dynamic", "yarn", "longrope"):
        found.setdefault("original_max_position_embeddings", original)
    found["rope_type"] = kind
    known: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x for k, x in found.items() if k in _SCALING
    }
    return RopeScaling(**known)


def write_scaling(scaling: RopeScaling | None, key: str) -> dict[str, Any]:
    """The values of a `config.json`; `key` is what `rope_scaling` calls the type there."""
    if scaling is None:
        return {"rope_scaling": None}
    own = {name: x for name, x in asdict(scaling).items() if x != _SCALING[name]}
    written: dict[str, Any] = {key: own.pop("rope_type")}
    longest = own.get("original_max_position_embeddings")
    # transformers takes these from elsewhere, and some of its classes allow no other key.
    elsewhere = {
        "dynamic": ("original_max_position_embeddings",),
        "longrope": ("original_max_position_embeddings", "factor"),
    }.get(scaling.rope_type, ())
    written |= {name: x for name, x in own.items() if name not in elsewhere}
    beside = {"original_max_position_embeddings": longest}
    return {"rope_scaling": written, **(beside if scaling.rope_type == "longrope" else {})}


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name}={value!r}, expected an object with rope_type.")
    return dict(value)
