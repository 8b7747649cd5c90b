"""The input among the arguments of a module's call."""

import inspect
from collections.abc import Callable
from typing import Any


def input_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None for a call without any."""
    if args:
        return args[0]
    names = list(inspect.signature(type(module).__call__).parameters)[1:]
    by_name = (kwargs[name] for name in names if name in kwargs)
    return next(by_name, next(iter(kwargs.values()), None))


def with_input(
    run: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Any], Any]:
    """A call as a function of its input, with all other arguments fixed."""
    old = input_of(module, args, kwargs)

    def again(x: Any) -> Any:
        new = [x if value is old else value for value in (*args, *kwargs.values())]
        return run(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

    return again
