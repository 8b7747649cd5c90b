"""What an NNX module keeps of its adapters: their placements, and their Variables.

Every trained parameter is an `AdapterParam`, so `nnx.split`, `nnx.DiffState` and
`nnx.Optimizer(wrt=AdapterParam)` select what trains.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array

from adapters_jax.methods import Method
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.nnx.graph import own_params
from adapters_jax.placement import Placement

STACKED = "adapters_stacked"  # the mark of a bank's model


class AdapterParam(nnx.Param):
    """A parameter that the recipe trains: an adapter's own, or one of the base that is unfrozen.

    An adapter's own is float32; an unfrozen one keeps its dtype, and its own class beside this.
    As a filter of NNX it selects what trains.

    Args: as in `nnx.Param`.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> nnx.to_pure_dict(nnx.state(adapted, AdapterParam))["lora"]["b"].shape
        (2, 3)
    """

    adapted_from: ClassVar[type[nnx.Param]] = nnx.Param


@functools.cache
def trained_class(cls: type[Any]) -> type[AdapterParam]:
    """The `AdapterParam` that is also an instance of a parameter's own class."""
    if issubclass(cls, AdapterParam):
        return cls
    if cls is nnx.Param:
        return AdapterParam
    about = {"adapted_from": cls, "__module__": cls.__module__}
    return type(f"Adapter{cls.__name__}", (AdapterParam, cls), about)


def holds(module: Any) -> tuple[Placement, ...]:
    """The methods on a module, each with its placement."""
    return getattr(module, "adapter_methods", ())


def point_of(module: Any, placed: Placement, **fields: Any) -> AttachmentPoint:
    """The attachment point of a method on a module, as the module is now."""
    own = {name: tuple(x.shape) for name, x in own_params(module).items()}
    return placed.point(own, precision=getattr(module, "precision", None), **fields)


def original(cls: type[Any]) -> type[Any]:
    """The class that the author of a model gave a module or Variable of this class."""
    while hasattr(cls, "adapted_from"):
        cls = cls.adapted_from
    return cls


def read(child: Any, method: Method) -> dict[str, Array]:
    """A method's arrays by name, read from the node that holds them."""
    return {name: _step(child, name.split("/"))[...] for name in method.leaf_names}


def _step(node: Any, names: Iterable[str]) -> Any:
    """The node that is reached by names."""
    for name in names:
        node = node[name] if isinstance(node, nnx.Dict) else getattr(node, name)
    return node


def key_of(child: Any) -> Array | None:
    """A key for dropout; None in evaluation and where there is no dropout."""
    drop = getattr(child, "dropout", None)
    return None if drop is None or drop.deterministic else drop.rngs()


def node_of(module: Any, placed: Placement) -> Any:
    """The node that holds a method's arrays."""
    return _step(module, placed.nodes)


def leaves_of(module: Any, placed: Placement) -> dict[str, Array]:
    """The arrays of a method that is attached to a module, by name.

    Args:
        module: an adapted NNX module.
        placed: the method, as `adapted_points` gives it beside the module.

    Returns:
        The arrays by the names of the method, such as `a` of shape (in, r) and `b` of (r, out) of
        LoRA, or `down/kernel` of a bottleneck.

    Example:
        >>> import adapters_jax as aj
        >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> adapted = aj.adapt(model, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))
        >>> ((module, placed, _),) = aj.nnx.adapted_points(adapted)
        >>> leaves_of(module, placed)["b"].tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    return read(node_of(module, placed), placed.method)
