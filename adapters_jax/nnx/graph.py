"""An NNX model as modules and parameters by path."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from adapters_jax.methods.base import Frozen


def variable_path(path: tuple[Any, ...]) -> str:
    """An NNX graph path as names joined by slashes."""
    return "/".join(map(str, path))


def modules_of(model: nnx.Module) -> dict[str, Any]:
    """Every module by path, the model itself under the empty one.

    A module that is reached by several paths has the first of them.

    Args:
        model: an NNX model.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))
        >>> sorted(modules_of(model))
        ['', 'layers', 'layers/0', 'layers/1']
    """
    return {variable_path(path): module for path, module in nnx.iter_modules(model)}


def params_of(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by path, those of adapters among them.

    A parameter that is tied to another one has the path of the first.

    Args:
        model: an NNX model.

    Returns:
        The `nnx.Param` Variables themselves, so that a write changes the model.

    Example:
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> {path: (x.shape, x.dtype.name) for path, x in params_of(model).items()}
        {'bias': ((3,), 'float32'), 'kernel': ((4, 3), 'float32')}
    """
    nodes = nnx.iter_graph(model)
    return {variable_path(path): node for path, node in nodes if isinstance(node, nnx.Param)}


def own_params(module: Any) -> dict[str, Any]:
    """The parameters of a module itself by name, without those of its submodules.

    Args:
        module: an NNX module.

    Returns:
        The `nnx.Param` Variables themselves.

    Example:
        >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> sorted(own_params(layer)), own_params(nnx.Sequential(layer))
        (['bias', 'kernel'], {})
    """
    # `isinstance` asks the metaclass of Variables, which takes ten times as long.
    return {name: x for name, x in vars(module).items() if issubclass(type(x), nnx.Param)}


def frozen_of(module: Any) -> Frozen:
    """A module's own parameters by name."""

    def frozen(name: str) -> Array | None:
        variable = getattr(module, name, None)
        return variable[...] if isinstance(variable, nnx.Variable) else None

    return frozen


def copy(model: Any) -> Any:
    """A model, or another NNX object, with Variables of its own that hold the same arrays.

    Args:
        model: an NNX model, `nnx.Rngs`, or another object of NNX.

    Returns:
        An object of the same class. A write to it leaves the given one as it is, and no array is
        copied.

    Example:
        >>> layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> other = copy(layer)
        >>> same = other.kernel[...] is layer.kernel[...]
        >>> other.bias[...] += 1
        >>> same, other.bias[...].tolist(), layer.bias[...].tolist()
        (True, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    return nnx.merge(*nnx.split(model), copy=True)
