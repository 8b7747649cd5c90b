"""Which attention modules are known, and how each passes query, key and value to `attention_fn`.

Prompts change that call: after what the module does to its query (rotary embedding, norms) and
before its output projection. flax's attention modules are known, and so are this library's. Others
need no registration where their softmax can be seen; see `watch`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flax import linen, nnx
from jaxtyping import Array

AttentionFn = Callable[..., Array]


@dataclass(frozen=True)
class Attention:
    """The sizes of an attention module.

    Attributes:
        width: d, the width of the key projection's input.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: the width of a head.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Names:
    """The names that an attention module has for its parts."""

    query: str = "query"
    key: str = "key"
    value: str = "value"
    attention_fn: str = "attention_fn"
    head_dim: str = "head_dim"
    heads: str | None = None


_REGISTRY: dict[type, Names] = {
    linen.MultiHeadDotProductAttention: Names(),
    nnx.MultiHeadAttention: Names(),
}


def register_attention(
    module: type,
    *,
    query: str = "query",
    key: str = "key",
    value: str = "value",
    attention_fn: str = "attention_fn",
    head_dim: str = "head_dim",
    heads: str | None = None,
) -> None:
    """Makes an attention module known whose attention function is a kernel, not seen into.

    A softmax between two products is found without this. The module must call
    `self.<attention_fn>(query, key, value, ...)` with heads and head width as the last two axes, as
    flax's attention modules do, and its projections must be submodules. Adapting compares this with
    what the module computes for example inputs, which an NNX model needs for it.

    Args:
        module: the module class, linen or NNX; subclasses are covered.
        query: name of the query projection.
        key: name of the key projection.
        value: name of the value projection.
        attention_fn: name of the field that holds the attention function.
        head_dim: NNX: name of the field that holds the width of a head, where the projections
            return heads side by side on one axis.
        heads: NNX: name of the field that holds the number of query heads, where the query
            projection computes more than queries.

    Example:
        >>> from flax import linen as nn
        >>> class ZooAttention(nn.Module):
        ...     attend: object = nn.dot_product_attention
        >>> register_attention(ZooAttention, key="k_proj", value="v_proj", attention_fn="attend")
    """
    _REGISTRY[module] = Names(query, key, value, attention_fn, head_dim, heads)


def needs_check(module: Any) -> bool:
    """Whether a registration is to be compared with what the module computes: not flax's, ours."""
    known = next((cls for cls in type(module).__mro__ if cls in _REGISTRY), None)
    return known is not None and known.__module__.partition(".")[0] not in ("flax", "adapters_jax")


def names_of(module: Any) -> Names | None:
    """The names of a module's parts; None where its call is not that of a known class."""
    for cls in type(module).__mro__:
        if cls in _REGISTRY:
            return _REGISTRY[cls]
        if "__call__" in vars(cls) and not getattr(vars(cls)["__call__"], "calls_base", False):
            return None
    return None


def why_not(names: Names) -> str:
    """Why the call of a known attention module's function shows no attention."""
    return (
        f"did not call its {names.attention_fn} on what its {names.query}, {names.key} and "
        f"{names.value} return; correct their names in aj.register_attention"
    )


def calls_base(call: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the `__call__` of a class that this library derives, which calls the base's."""
    call.calls_base = True  # type: ignore[attr-defined]
    return call


@contextlib.contextmanager
def replaced(module: Any, name: str, wrap: Callable[..., Array]) -> Iterator[None]:
    """Replaces the attention function of a module while its body runs.

    Args:
        name: the field that holds its function.
        wrap: is called instead, as `wrap(function, query, key, value, ...)`.
    """
    function = getattr(module, name)

    @functools.wraps(function)  # flax passes only the arguments that the signature names
    def wrapped(*args: Any, **kwargs: Any) -> Array:
        return wrap(function, *args, **kwargs)

    # Modules reject assignments outside of their constructor; this one is undone below.
    object.__setattr__(module, name, wrapped)
    try:
        yield
    finally:
        object.__setattr__(module, name, function)


@contextlib.contextmanager
def noted(module: Any, check: Callable[[Names, Any], None]) -> Iterator[list[str]]:
    """Notes, while its body runs, the calls of a known attention module's function.

    Args:
        check: gets the names of its parts and the arguments of each call.
    """
    names, seen = names_of(module), list[str]()
    if names is None or not hasattr(module, names.attention_fn):
        yield seen
        return

    def attend(function: AttentionFn, *args: Any, **kwargs: Any) -> Array:
        seen.append(names.attention_fn)
        check(names, args)
        return function(*args, **kwargs)

    with replaced(module, names.attention_fn, attend):
        yield seen
