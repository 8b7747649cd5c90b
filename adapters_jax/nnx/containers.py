"""Plain lists, tuples and dictionaries in an NNX model whose weights are adapted or quantised.

Such a container becomes a module, `PlainList`, `PlainTuple` or `PlainDict`, so that adapters can be
beside its weights under the paths that these have. Code that reads it from the module around it
gets a container of the original type, in which the weights are the changed ones: a copy, so that a
function of the model can give the container other parts only by assigning it anew.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx


class PlainDict(nnx.Dict):
    """A dictionary."""

    key_type: ClassVar[type] = str


class NumberedDict(PlainDict):
    """A dictionary whose keys are numbers."""

    key_type: ClassVar[type] = int
    _pytree__has_int_keys = True


class AddedDict(PlainDict):
    """A dictionary that only adapters are in: those of a linen module without parameters."""


class PlainList(nnx.List):
    """A list."""


class PlainTuple(nnx.List):
    """A tuple."""


_LISTS: dict[type, type] = {list: PlainList, tuple: PlainTuple}


def as_module(value: Any) -> nnx.Module | None:
    """A module or plain container as a module; None for what is neither."""
    if isinstance(value, nnx.Module):
        return value
    if type(value) in _LISTS:
        return _LISTS[type(value)](map(nnx.data, value))
    for cls in (PlainDict, NumberedDict) if type(value) is dict else ():
        if all(type(name) is cls.key_type for name in value):
            return cls({str(name): nnx.data(part) for name, part in value.items()})
    return None


def names_of(module: Any) -> list[str]:
    """The names of the attributes of a module, without those of flax and of adapters."""
    held = vars(module).get("adapter_methods", ())
    own = {"adapter_methods", "adapter_recipe", "_adapter_calls"}
    own |= {each.method.slot for each in held}
    return [n for n in vars(module) if n not in own and not n.startswith("_pytree__")]


def standing(module: Any) -> list[str]:
    """The names of a module's attributes with modules in the place of plain containers."""
    return [name for name in names_of(module) if has_modules(vars(module)[name])]


def has_modules(value: Any, keep: Callable[[Any], bool] = lambda module: True) -> bool:
    """Whether a value is, or a container has in it, a module in the place of a plain container.

    Args:
        keep: which of these modules count.
    """
    if isinstance(value, PlainDict | PlainList | PlainTuple):
        inside = [vars(value)[name] for name in names_of(value)]
        return keep(value) or any(has_modules(part, keep) for part in inside)
    parts = value.values() if isinstance(value, dict) else value
    return type(value) in (dict, *_LISTS) and any(has_modules(part, keep) for part in parts)


def plain(value: Any, read: Callable[[Any, str], Any] = getattr) -> Any:
    """A value with plain containers in place of the modules that stand for them.

    Args:
        read: gives an attribute of such a module: as code sees it, or as it is stored.
    """
    if isinstance(value, PlainDict):
        own = [name for name in names_of(value) if not isinstance(vars(value)[name], AddedDict)]
        return {type(value).key_type(name): plain(read(value, name), read) for name in own}
    if isinstance(value, PlainList | PlainTuple):
        parts = [plain(read(value, str(i)), read) for i in range(len(value))]
        return parts if isinstance(value, PlainList) else tuple(parts)
    if not has_modules(value):
        return value
    if isinstance(value, dict):
        return {name: plain(part, read) for name, part in value.items()}
    return type(value)(plain(part, read) for part in value)
