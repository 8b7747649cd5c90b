"""A quantised weight in an NNX model: its Variable."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from flax import nnx
from flax.nnx import reprlib

from adapters_jax.nnx.adapted import module_at, refresh_all
from adapters_jax.nnx.graph import param_class, params_of
from adapters_jax.weights.quantized import Quantized, is_quantized, opened


class QuantizedParam(nnx.Param):
    """A frozen weight in few bits; reading it gives floats. `adapters_jax.quantize` makes it.

    Its shape and dtype are those of the weight in floats; `get_raw_value()` is the `Quantized` with
    the integers and their scales.

    Args: as in `nnx.Param`.

    Raises:
        TypeError: something is written to the weight.

    Example:
        >>> import adapters_jax as aj
        >>> small = aj.quantize(nnx.Linear(64, 4, rngs=nnx.Rngs(0)), dtype="int8")
        >>> isinstance(small.kernel, QuantizedParam), small.kernel[...].dtype.name
        (True, 'float32')
        >>> small.kernel.get_raw_value().array.qvalue.dtype.name
        'int8'
    """

    adapted_from: ClassVar[type[nnx.Param]] = nnx.Param

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

    def __nnx_repr__(self) -> Iterator[reprlib.Object | reprlib.Attr]:
        """What flax prints: the integers and scales; in a model it shows only their shapes."""
        yield reprlib.Object(type=type(self).__name__)
        yield reprlib.Attr("value", self.get_raw_value())


def quantized_in_place(model: Any, values: Mapping[str, Quantized]) -> None:
    """Replaces weights of a model by quantised ones, by path, in place; adapters stay.

    `adapters_jax.quantize` does this to a copy of a model.

    Args:
        model: an NNX model.
        values: the quantised weights by path; each has the shape of the weight that it replaces.

    Raises:
        RecipeError: a weight is in a container that cannot become a module.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
        >>> small = aj.quantize(model, dtype="int8")
        >>> quantized_in_place(model, {"kernel": small.kernel.get_raw_value()})
        >>> type(model.kernel).__name__, bool((model.kernel[...] == small.kernel[...]).all())
        ('QuantizedParam', True)
    """
    for path, value in values.items():
        module, _, name = path.rpartition("/")
        variable = vars(module_at(model, module, path))[name]
        variable.__class__ = param_class(QuantizedParam, type(variable))  # type: ignore[arg-type]
        variable.set_raw_value(value)
    refresh_all(model)


def float_again(model: nnx.Module) -> None:
    """Restores the float weights and the modules' classes of a model, in place.

    `adapters_jax.dequantize` does this to a copy of a model. Each weight is what its quantised form
    says, in its own float dtype; what the quantisation rounded stays rounded.

    Args:
        model: an NNX model with quantised weights; without any, nothing changes.

    Example:
        >>> import adapters_jax as aj
        >>> small = aj.quantize(nnx.Linear(64, 4, rngs=nnx.Rngs(0)), dtype="int8")
        >>> weight = small.kernel[...]
        >>> float_again(small)
        >>> type(small.kernel).__name__, bool((small.kernel[...] == weight).all())
        ('Param', True)
    """
    for variable in params_of(model).values():
        if isinstance(variable, QuantizedParam):
            value = variable.get_raw_value()
            variable.__class__ = type(variable).adapted_from  # type: ignore[assignment]
            variable.set_raw_value(opened(value))
    refresh_all(model)
