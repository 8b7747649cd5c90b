"""The registry of methods, by their kind, which is their name in the JSON of recipes."""

import dataclasses
from importlib.metadata import entry_points
from typing import TypeVar

from adapters_jax.errors import RecipeError, full_name
from adapters_jax.methods.base import Method, missing_members

METHODS: dict[str, type[Method]] = {}
GROUP = "adapters_jax.methods"
M = TypeVar("M", bound=type[Method])


def register_method(cls: M) -> M:
    """Registers a class as a method for recipes and their JSON; a decorator.

    So that the command line and files find the methods of a package without an import, the package
    lists them in its `pyproject.toml` by their `kind`:

        [project.entry-points."adapters_jax.methods"]
        shift = "their_package.shift:Shift"

    Args:
        cls: a frozen dataclass derived from `adapters_jax.Method`.

    Returns:
        The class.

    Raises:
        TypeError: `cls` is another kind of class, or lacks members; the message names all of them.
        RecipeError: another method has its kind or slot.

    Example:
        >>> @register_method  # the example of `Method` is a whole class
        ... @dataclasses.dataclass(frozen=True)
        ... class Gain(Method):
        ...     '''Multiplies every output by a trained number.'''
        ...     kind, slot, leaf_names = "gain", "gain", ("scale",)
        Traceback (most recent call last):
        TypeError: register_method: Gain lacks leaves, count, forward; help(aj.Method) ...
    """
    owner = getattr(cls, "__name__", repr(cls))
    if not (isinstance(cls, type) and issubclass(cls, Method) and _is_own_dataclass(cls)):
        raise TypeError(
            f"register_method: {owner} is not a frozen dataclass derived from aj.Method; write "
            "@aj.register_method above @dataclass(frozen=True) above class NAME(aj.Method)"
        )
    lacking = missing_members(cls)
    if lacking:
        raise TypeError(
            f"register_method: {owner} lacks {', '.join(lacking)}; help(aj.Method) describes them"
        )
    for what, value in (("kind", cls.kind), ("slot", cls.slot)):
        if (what, value) != ("slot", None) and not (
            isinstance(value, str) and value.isidentifier()
        ):
            raise TypeError(
                f"register_method: {owner} has {what}={value!r}, expected an identifier such as "
                "'shift'"
            )
    for other in METHODS.values():
        # A module that registers its class may be imported by its user and by its entry point.
        if other is cls:
            return cls
        # Those derived from LoRA share its slot: no module has two, and files of one are near to
        # those of the others.
        related = _first_of_slot(cls) is _first_of_slot(other)
        taken = cls.slot is not None and other.slot == cls.slot and not related
        what = "kind" if other.kind == cls.kind else "slot" * taken
        if what:
            raise RecipeError(
                f"register_method: the {what} {getattr(cls, what)!r} of {full_name(cls)} is taken "
                f"by {full_name(other)}; choose another {what}"
            )
    METHODS[cls.kind] = cls
    return cls


def _first_of_slot(cls: type[Method]) -> type:
    """The class from which a method has its slot."""
    return next(base for base in reversed(cls.__mro__) if getattr(base, "slot", None) == cls.slot)


def _is_own_dataclass(cls: type) -> bool:
    return "__dataclass_params__" in vars(cls) and dataclasses.is_dataclass(cls)


def method_named(name: str) -> type[Method]:
    """The method of a name; an entry point of an installed package is imported for it.

    Args:
        name: its name in the JSON of recipes.

    Raises:
        RecipeError: no method has the name.

    Example:
        >>> method_named("lora").__name__
        'LoRA'
    """
    if name not in METHODS:
        for point in entry_points(group=GROUP, name=name):
            register_method(point.load())
    if name not in METHODS:
        raise RecipeError(
            f"method {name!r} is not registered; registered are {', '.join(METHODS)}. Import the "
            "package that defines it, or write @aj.register_method above its class"
        )
    return METHODS[name]


def every_method() -> dict[str, type[Method]]:
    """All methods by name, with those that installed packages list as entry points.

    Example:
        >>> {"bottleneck", "dora", "ia3"} <= every_method().keys()
        True
    """
    for point in entry_points(group=GROUP):
        register_method(point.load())
    return dict(METHODS)
