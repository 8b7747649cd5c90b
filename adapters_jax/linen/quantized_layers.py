"""The call of a linen layer with a quantised weight, which is in floats only meanwhile."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from adapters_jax.weights import linear
from adapters_jax.weights.quantized import is_quantized, once

# Whether the current call is of such a layer's stand-in, which interceptors ignore.
_standing_in = contextvars.ContextVar("standing_in", default=False)


def standing_in() -> bool:
    """Whether the current call is of a stand-in, whose weight is in floats already."""
    return _standing_in.get()


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    token = _standing_in.set(True)
    try:
        yield
    finally:
        _standing_in.reset(token)


def has_quantized(module: Any, call: str, args: Any, kwargs: Any) -> bool:
    """Whether a call is of a linear layer with a quantised weight."""
    found = linear.find(module, call, *args, **kwargs)
    return found is not None and is_quantized(module.scope.get_variable("params", found.weight))


def call_quantized(module: nn.Module, call: str, args: Any, kwargs: Any) -> Any:
    """Calls a stand-in for a layer that has the weight in floats."""
    own = module.variables["params"]
    weights = {name: leaf for name, leaf in own.items() if is_quantized(leaf)}
    params = {n: x for n, x in own.items() if n not in weights and not isinstance(x, Mapping)}
    alone = module.clone(parent=None)

    def run(weights: Any, params: Any, args: Any, kwargs: Any) -> Any:
        with _unseen():
            return alone.apply({"params": {**params, **weights}}, *args, method=call, **kwargs)

    return once(run, weights, params, args, kwargs)
