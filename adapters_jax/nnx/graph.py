"""An NNX model as modules and parameters by path."""

from typing import Any

from flax import nnx


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


def copy(model: Any) -> Any:
    """A model, or another NNX object, with Variables of its own that hold the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)
