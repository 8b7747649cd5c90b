"""Published shapes by name: ids of the Hugging Face Hub, their last parts, and tuned variants.

A tuned model has the shape of its base, so `-instruct`, `-it` and the like do not count.
"""

import difflib
from collections.abc import Collection, Iterator
from typing import Any

from adapters_jax.finetune.models.family import Family
from adapters_jax.finetune.models.registry import FAMILIES

_TUNED = {"instruct", "it", "chat", "hf", "pt"}
_NEARLY = {True: 0.9, False: 0.85}  # the least likeness of a misspelt name, with an owner or not


def find_known(name: str) -> tuple[Family, Any] | None:
    """The family and the configuration of a published shape; None for another name.

    Example:
        >>> family, config = find_known("llama-3.2-1b-instruct")
        >>> family.name, config.hidden_size, find_known("llama-3.2-1000b")
        ('llama', 2048, None)
    """
    for theirs, family, config in _every():
        if name == theirs:
            return family, config
    for theirs, family, config in _every():
        # The base of BERT is a size, that of a decoder is the model before it was tuned.
        ignored = _TUNED | ({"base"} if family.kind == "decoder" else set())
        same = (_plain(theirs, ignored), _plain(theirs.rpartition("/")[2], ignored))
        if _plain(name, ignored) in same:
            return family, config
    return None


def near_known(name: str) -> list[str]:
    """The names of published shapes that a misspelt name may mean; empty for any other name.

    Example:
        >>> near_known("meta-llama/Llama-3.2-2B")[0], near_known("me/Llama-3.2-1B")
        ('meta-llama/Llama-3.2-3B', [])
    """
    owner = "/" in name
    names = {_plain(x if owner else x.rpartition("/")[2]): x for x, *_ in _every()}
    near = difflib.get_close_matches(_plain(name), names, 3, _NEARLY[owner])
    return [names[each] for each in near if not owner or _owner(names[each]) == _owner(name)]


def _every() -> Iterator[tuple[str, Family, Any]]:
    for family in FAMILIES.values():
        for name, config in family.known.items():
            yield name, family, config


def _owner(name: str) -> str:
    return name.rpartition("/")[0].lower()


def _plain(name: str, ignored: Collection[str] = _TUNED) -> str:
    """A name in lower case, without the parts that say how a model was tuned."""
    return "-".join(part for part in name.lower().split("-") if part not in ignored)
