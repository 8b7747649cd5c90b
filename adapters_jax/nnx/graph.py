"""An NNX model as modules and parameters by path."""

from typing import Any

from flax import nnx
from jaxtyping import Array

from adapters_jax.methods.base import Frozen


def variable_path(path: tuple[Any, ...]) -> str:
    """An NNX graph path as names joined by slashes."""
    return "/".join(map(str, path))


def modules_of(model: nnx.Module) -> dict[str, Any]:
    """Every module by path, the model itself under the empty one."""
    return {variable_path(path): module for path, module in nnx.iter_modules(model)}


def params_of(model: nnx.Module) -> dict[str, Any]:
    """Every parameter by path."""
    nodes = nnx.iter_graph(model)
    return {variable_path(path): node for path, node in nodes if isinstance(node, nnx.Param)}


def own_params(module: Any) -> dict[str, Any]:
    """The parameters of a module itself by name."""
    # `isinstance` asks the metaclass of Variables, which takes ten times as long.
    return {name: x for name, x in vars(module).items() if issubclass(type(x), nnx.Param)}


def frozen_of(module: Any) -> Frozen:
    """A module's own parameters by name."""

    def frozen(name: str) -> Array | None:
        variable = getattr(module, name, None)
        return variable[...] if isinstance(variable, nnx.Variable) else None

    return frozen


def copy(model: Any) -> Any:
    """A model, or another NNX object, with Variables of its own that hold the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)
