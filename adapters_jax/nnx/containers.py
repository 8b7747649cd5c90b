"""Plain lists, tuples and dictionaries in an NNX model whose weights are adapted or quantised.

Such a container becomes a module, `PlainList`, `PlainTuple` or `PlainDict`, so that adapters can be
beside its weights under the paths that these have. Code that reads it from the module around it
gets a container of the original type, in which the weights are the changed ones.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx


class PlainDict(nnx.Dict):
    """A dictionary."""


class PlainList(nnx.List):
    """A list."""


class PlainTuple(nnx.List):
    """A tuple."""


_PLAIN: dict[type, type] = {dict: PlainDict, list: PlainList, tuple: PlainTuple}


def as_module(value: Any) -> nnx.Module | None:
    """A module or container as a module; None for what is neither, or has other names than text."""
    if isinstance(value, nnx.Module):
        return value
    cls = _PLAIN.get(type(value))
    if cls is None or (cls is PlainDict and not all(isinstance(name, str) for name in value)):
        return None
    if cls is PlainDict:
        return cls({name: nnx.data(part) for name, part in value.items()})
    return cls(map(nnx.data, value))


def names_of(module: Any) -> list[str]:
    """The names of the attributes of a module, without those of flax and of adapters."""
    held = getattr(module, "adapter_methods", ())
    own = {"adapter_methods", "adapter_recipe", *(each.node[0] for each in held)}
    return [n for n in vars(module) if n not in own and not n.startswith("_pytree__")]


def has_modules(value: Any, keep: Callable[[Any], bool] = lambda module: True) -> bool:
    """Whether a value is, or a container has in it, a module in the place of a plain container.

    Args:
        value: the value.
        keep: which of these modules count.
    """
    if isinstance(value, PlainDict | PlainList | PlainTuple):
        inside = [vars(value)[name] for name in names_of(value)]
        return keep(value) or any(has_modules(part, keep) for part in inside)
    parts = value.values() if isinstance(value, dict) else value
    return type(value) in _PLAIN and any(has_modules(part, keep) for part in parts)


def plain(value: Any, read: Callable[[Any, str], Any] = getattr) -> Any:
    """A value with plain containers in place of the modules that stand for them.

    Args:
        value: the value.
        read: gives an attribute of such a module: as code sees it, or as it is stored.
    """
    if isinstance(value, PlainDict):
        return {name: plain(read(value, name), read) for name in names_of(value)}
    if isinstance(value, PlainList | PlainTuple):
        parts = [plain(read(value, str(i)), read) for i in range(len(value))]
        return parts if isinstance(value, PlainList) else tuple(parts)
    if not has_modules(value):
        return value
    if isinstance(value, dict):
        return {name: plain(part, read) for name, part in value.items()}
    return type(value)(plain(part, read) for part in value)
