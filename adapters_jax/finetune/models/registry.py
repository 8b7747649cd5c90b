"""The registry of families. A new family is a folder beside the others and a line here."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adapters_jax.errors import UserError, shown
from adapters_jax.finetune.models import decoder, t5, whisper
from adapters_jax.finetune.models.encoder import families as encoders
from adapters_jax.finetune.models.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (*encoders.FAMILIES, *decoder.FAMILIES, *t5.FAMILIES, *whisper.FAMILIES)
}

KNOWN: dict[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    name: partial(family.shape, config)
    for family in FAMILIES.values()
    for name, config in family.known.items()
}
"""Published shapes by name: each value, called with options of the model's class, returns a model
and example inputs.

No parameters are allocated. The shapes of a linen model's parameters are
`jax.eval_shape(model.init, key, *inputs)`; an NNX model is abstract: every Variable holds a
`jax.ShapeDtypeStruct`.
"""


def family_of(values: Mapping[str, Any], name: str) -> Family:
    """Returns the family that reads a checkpoint with these values of `config.json`.

    Raises:
        UserError: no family reads this `model_type`, or that of a multimodal checkpoint's
            `text_config`.

    Example:
        >>> family_of({"model_type": "xlm-roberta"}, "mine").name
        'roberta'
        >>> family_of({"model_type": "bart"}, "mine")
        Traceback (most recent call last):
        adapters_jax.errors.UserError: 'mine' has model_type='bart'; expected one of bert, ...
    """
    found = values.get("model_type")  # any JSON value: the file is not checked yet
    if found is None and "base_sha256" in values:
        raise UserError(
            f"{name!r} is a run, expected a base; write the run's: {shown(values.get('model'))}"
        )
    try:
        own = decoder.text_of(values).get("model_type")
    except UserError as error:
        raise UserError(f"{name!r}: {error}") from error
    for family in FAMILIES.values():
        if isinstance(own, str) and own in family.prefixes:
            return family
    types = [each for family in FAMILIES.values() for each in family.prefixes]
    near = difflib.get_close_matches(found, types, 1, 0.7) if isinstance(found, str) else []
    nearest = f" (nearest: {near[0]!r})" if near else ""
    every = ", ".join(dict.fromkeys(types))  # a multimodal type may be of several families
    raise UserError(f"{name!r} has model_type={found!r}; expected one of {every}{nearest}")
