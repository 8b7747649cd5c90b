"""A quantised weight in an NNX model: its Variable, and the class of the layer that reads it."""

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar

from flax import nnx

from adapters_jax.nnx.attachment import adapted_class
from adapters_jax.nnx.graph import modules_of
from adapters_jax.weights import linear
from adapters_jax.weights.quantized import Quantized, is_quantized, once, opened


class QuantizedParam(nnx.Param):
    """A frozen weight in few bits; reading it gives floats."""

    quantized_from: ClassVar[type[nnx.Param]] = nnx.Param

    def get_value(self, *, index: Any = ...) -> Any:
        """The weight in floats."""
        value = self.get_raw_value()
        value = value.unbox() if is_quantized(value) else value
        return value if index is ... else value[index]

    def set_value(self, value: Any, *, index: Any = ...) -> None:
        """Raises TypeError: the weight is frozen."""
        raise TypeError("a quantised weight is frozen; write to the model that aj.dequantize gives")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.get_raw_value().shape


@functools.cache
def quantized_param(cls: type[nnx.Param]) -> type[QuantizedParam]:
    """The `QuantizedParam` that is also an instance of a parameter's own class."""
    if cls is nnx.Param:
        return QuantizedParam
    about = {"quantized_from": cls, "__module__": cls.__module__}
    return type(f"Quantized{cls.__name__}", (QuantizedParam, cls), about)


@functools.cache
def quantized_layer(cls: type[Any]) -> type[Any]:
    """The subclass of a layer's class whose calls have the weight in floats only meanwhile."""

    def frozen(name: str) -> Callable[..., Any]:
        call = getattr(cls, name)

        @functools.wraps(call)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _call(call, self, args, kwargs)

        return method

    body = {name: frozen(name) for name in linear.calls(cls)}
    about = {"quantized_from": cls, "__module__": cls.__module__}
    return type(f"Quantized{cls.__name__}", (cls,), {**body, **about})


def _call(call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """Calls a stand-in for a layer that has the weight in floats."""
    own = {name: x for name, x in vars(module).items() if isinstance(x, nnx.Param)}
    weights = {name: x.get_raw_value() for name, x in own.items() if isinstance(x, QuantizedParam)}
    params = {name: x.get_raw_value() for name, x in own.items() if name not in weights}

    def run(weights: Any, params: Any, args: Any, kwargs: Any) -> Any:
        alone = copy.copy(module)
        vars(alone).update({name: nnx.Param(x) for name, x in {**params, **weights}.items()})
        return call(alone, *args, **kwargs)

    return once(run, weights, params, args, kwargs)


def quantized_in_place(module: Any, name: str, value: Quantized) -> None:
    """Replaces a layer's weight, in place, by a quantised one; its adapters stay."""
    variable = getattr(module, name)
    variable.__class__ = quantized_param(type(variable))  # type: ignore[arg-type]
    variable.set_raw_value(value)
    _change_class(module, lambda cls: quantized_layer(cls))  # type: ignore[arg-type]


def float_again(model: nnx.Module) -> None:
    """Restores the float weights and the layers' classes of a model, in place."""
    for module in list(modules_of(model).values()):
        own = [x for x in vars(module).values() if isinstance(x, QuantizedParam)]
        for variable in own:
            value = variable.get_raw_value()
            variable.__class__ = type(variable).quantized_from  # type: ignore[assignment]
            variable.set_raw_value(opened(value))
        if own:
            _change_class(module, lambda cls: cls.quantized_from)


def _change_class(module: Any, change: Callable[[type[Any]], type[Any]]) -> None:
    """Changes a layer's own class and keeps the class of its adapters around it."""
    adapted = getattr(type(module), "adapted_from", None)
    changed = change(adapted or type(module))
    module.__class__ = adapted_class(changed) if adapted else changed  # type: ignore[arg-type]
