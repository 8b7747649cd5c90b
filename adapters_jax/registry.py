"""Which contraction a module computes: flax's own layers, and those that users register."""

import inspect
from collections.abc import Callable
from typing import Any

from adapters_jax.contraction import Contraction, from_equation
from adapters_jax.flax_layers import LAYERS

# (class, method) -> (position of the input, builder(module, *args, **kwargs) of the contraction)
_REGISTRY: dict[tuple[type, str], tuple[int, Callable[..., Contraction | None]]] = {
    key: (0, build) for key, build in LAYERS.items()
}
_WEIGHTS = {"kernel", "embedding"}


def register_contraction(
    layer: type, *, weight: str, equation: str | Callable[..., str], input: int = 0
) -> None:
    """Teaches low-rank adaptation a linear layer of another library.

    Args:
        layer: the module class, linen or NNX; subclasses are covered.
        weight: name of its weight parameter.
        equation: the einsum that its `__call__` computes, input first; or a function of the module
            (and, where the layer takes its equation at the call, of the call's arguments).
        input: position of the input among the call's arguments.

    Example:
        >>> from flax import linen as nn
        >>> class Projection(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return x @ self.param("w", nn.initializers.ones, (4, 4))
        >>> register_contraction(Projection, weight="w", equation="...d,df->...f")
    """
    if isinstance(equation, str):
        from_equation(weight, equation)

    def build(module: Any, *args: Any, **kwargs: Any) -> Contraction | None:
        text = equation if isinstance(equation, str) else _ask(equation, module, args, kwargs)
        precision = getattr(module, "precision", None)
        return from_equation(weight, text, precision) if text else None

    _REGISTRY[layer, "__call__"] = (input, build)
    _WEIGHTS.add(weight)


def _ask(equation: Callable[..., str], module: Any, args: Any, kwargs: Any) -> str | None:
    """What a function of the module, and of the call's arguments if it wants them, answers."""
    for arguments, options in ((args, kwargs), ((), {})):
        try:
            inspect.signature(equation).bind(module, *arguments, **options)
        except TypeError:
            continue
        return equation(module, *arguments, **options)
    return None


def find(module: Any, call: str, *args: Any, **kwargs: Any) -> Contraction | None:
    """The contraction that a module's method computes, or None where there is none known."""
    entry = _entry(type(module), call)
    return entry and entry[1](module, *args, **kwargs)


def input_of(module: Any, call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input among a call's arguments, by position or by name; None where there is none."""
    entry = _entry(type(module), call)
    position = entry[0] if entry else 0
    if len(args) > position:
        return args[position]
    names = list(inspect.signature(getattr(type(module), call)).parameters)[1:]
    by_name = (kwargs[name] for name in names[position:] if name in kwargs)
    return next(by_name, next(iter(kwargs.values()), None))


def with_input(
    run: Callable[..., Any], module: Any, call: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], Any]:
    """A call as a function of its input alone, the other arguments as they were given."""
    given = input_of(module, call, args, kwargs)

    def again(x: Any) -> Any:
        new = [x if value is given else value for value in (*args, *kwargs.values())]
        return run(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

    return again


def _entry(cls: type, call: str) -> tuple[int, Callable[..., Contraction | None]] | None:
    keys = ((base, call) for base in cls.__mro__)
    return next((_REGISTRY[key] for key in keys if key in _REGISTRY), None)


def calls(cls: type) -> tuple[str, ...]:
    """The methods of a module class that adapters act on."""
    return ("__call__", "attend") if _entry(cls, "attend") else ("__call__",)


def weight_names() -> frozenset[str]:
    """Names under which known layers keep their weight."""
    return frozenset(_WEIGHTS)


def why_not(module: Any) -> str:
    """Why low-rank factors cannot attach to a module, and the line that may change it."""
    name = type(module).__name__
    if _entry(type(module), "__call__"):
        return f"{name} with groups, a mask, or an equation given only at the call"
    return (
        f"{name} is not a known linear layer; if it is linear, register it: "
        f"aj.register_contraction({name}, weight='<name of its weight>', equation='...d,df->...f')"
    )
