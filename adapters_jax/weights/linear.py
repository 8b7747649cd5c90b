"""Which contraction a linear layer computes: flax's own layers, and registered ones."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array

from adapters_jax.weights.contraction import Contraction, from_equation


def dense_general_equation(axis: Any, batch: Iterable[int], features: int) -> str:
    """The equation of a DenseGeneral: contracted axes first in the weight, features last.

    `axis=(-2, -1), features=1` gives `...ba,bac->...c`. The weight has the axes in the order of the
    input, whatever the order of `axis`.
    """
    axes = (axis,) if isinstance(axis, int) else sorted(axis, key=lambda a: (a < 0, a))
    letters = iter("abcdefghijklmnopqrstuvwxy")
    head = {i: next(letters) for i in range(max([-1, *(a for a in axes if a >= 0), *batch]) + 1)}
    tail = {-i: next(letters) for i in range(1, max([0, *(-a for a in axes if a < 0)]) + 1)}
    names = {**head, **dict(sorted(tail.items()))}
    shared, contracted = [names[i] for i in sorted(batch)], [names[a] for a in axes]
    out = [next(letters) for _ in range(features)]

    def kept(side: dict[int, str]) -> str:
        return "".join(c for c in side.values() if c not in contracted and c not in shared)

    ordered_tail = dict(sorted(tail.items()))
    x = "".join(head.values()) + "..." + "".join(ordered_tail.values())
    w = "".join(shared + contracted + out)
    y = "".join(shared) + kept(head) + "..." + kept(ordered_tail) + "".join(out)
    return f"{x},{w}->{y}"


def dense(module: Any, *_: Any, **__: Any) -> Contraction:
    """The contraction of a dense layer: a matrix on the last axis."""
    return from_equation("kernel", "...a,ab->...b", module.precision)


def dense_general(module: Any, *_: Any, **__: Any) -> Contraction:
    """The contraction of a weight over several axes; linen and NNX name its fields differently."""
    is_linen = isinstance(module, linen.Module)
    batch = module.batch_dims if is_linen else module.batch_axis
    features = module.features if is_linen else module.out_features
    count = 1 if isinstance(features, int) else len(tuple(features))
    equation = dense_general_equation(module.axis, batch, count)
    return from_equation("kernel", equation, module.precision)


def conv(module: Any, *_: Any, **__: Any) -> Contraction | None:
    """The contraction of a convolution: A has the window and the input channels, B the outputs.

    Factors cannot be merged into a grouped or masked kernel, so such a layer has none.
    """
    if module.feature_group_count != 1 or module.mask is not None:
        return None
    window = (
        (module.kernel_size,) if isinstance(module.kernel_size, int) else tuple(module.kernel_size)
    )
    n = len(window)
    return Contraction(
        "kernel",
        n + 2,
        tuple(range(n + 1)),
        lambda x, a: _convolve(module, window, x, a),
        lambda hidden, b: jnp.matmul(hidden, b, precision=module.precision),
        features=(n,),
    )


def _convolve(module: Any, window: tuple[int, ...], x: Array, kernel: Array) -> Array:
    """The convolution of a flax Conv module, channels last, with another kernel."""
    n = len(window)

    def each(value: Any) -> tuple[int, ...]:
        return (value or 1,) * n if value is None or isinstance(value, int) else tuple(value)

    dilation = each(module.kernel_dilation)
    reach = [(size - 1) * step for size, step in zip(window, dilation, strict=True)]
    padding = module.padding
    batch, flat = x.shape[: -(n + 1)], x.reshape(-1, *x.shape[-(n + 1) :])
    if padding in ("CIRCULAR", "REFLECT"):
        sides = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        flat = jnp.pad(flat, sides, mode="wrap" if padding == "CIRCULAR" else "reflect")
        padding = "VALID"
    elif padding == "CAUSAL":
        padding = [(reach[0], 0)]
    elif isinstance(padding, int):
        padding = [(padding, padding)] * n
    elif not isinstance(padding, str):
        padding = [(p, p) if isinstance(p, int) else p for p in padding]
    spatial = "".join(chr(ord("0") + i) for i in range(n))
    y = jax.lax.conv_general_dilated(
        flat,
        kernel,
        each(module.strides),
        padding,
        lhs_dilation=each(module.input_dilation),
        rhs_dilation=dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        precision=module.precision,
    )
    return y.reshape(*batch, *y.shape[1:])


def embed_lookup(*_: Any, **__: Any) -> Contraction:
    """The contraction of an embedding's lookup: rows of A, times B."""
    return Contraction(
        "embedding", 2, (0,), lambda ids, a: jnp.take(a, ids, axis=0), jnp.matmul, lookup=True
    )


def embed_attend(*_: Any, **__: Any) -> Contraction:
    """The contraction of a tied output layer: the factors of the embedding, transposed."""
    return Contraction(
        "embedding",
        2,
        (0,),
        lambda query, a: (query, a),  # type: ignore[arg-type, return-value]
        lambda pair, b: (pair[0] @ b.T) @ pair[1].T,
        lookup=True,
    )


def einsum(module: Any, *args: Any, **kwargs: Any) -> Contraction | None:
    """The contraction of an Einsum layer, by the equation of its constructor or of the call."""
    at_call = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
    equation = at_call or module.einsum_str
    return from_equation("kernel", equation, module.precision) if equation else None


LAYERS = {
    (linen.Dense, "__call__"): dense,
    (nnx.Linear, "__call__"): dense,
    (linen.DenseGeneral, "__call__"): dense_general,
    (nnx.LinearGeneral, "__call__"): dense_general,
    (linen.Einsum, "__call__"): einsum,
    (nnx.Einsum, "__call__"): einsum,
    (linen.Conv, "__call__"): conv,
    (nnx.Conv, "__call__"): conv,
    (linen.Embed, "__call__"): embed_lookup,
    (nnx.Embed, "__call__"): embed_lookup,
    (linen.Embed, "attend"): embed_attend,
    (nnx.Embed, "attend"): embed_attend,
}


# (class, method) -> (position of the input, builder(module, *args, **kwargs) of the contraction)
_REGISTRY: dict[tuple[type, str], tuple[int, Callable[..., Contraction | None]]] = {
    key: (0, build) for key, build in LAYERS.items()
}
_WEIGHTS = {"kernel", "embedding"}


def register_contraction(
    layer: type, *, weight: str, equation: str | Callable[..., str], input: int = 0
) -> None:
    """Makes a linear layer of another library known to LoRA, DoRA and (IA)^3.

    Args:
        layer: the module class, linen or NNX; subclasses are covered.
        weight: name of its weight parameter.
        equation: the einsum that its `__call__` computes, input first; or a function that returns
            it for the module (and for the call's arguments, where the equation depends on them).
        input: position of the input among the call's arguments.

    Raises:
        RecipeError: `equation` is not an explicit einsum of an input and a weight.

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
        text = equation if isinstance(equation, str) else _equation(equation, module, args, kwargs)
        precision = getattr(module, "precision", None)
        return from_equation(weight, text, precision) if text else None

    _REGISTRY[layer, "__call__"] = (input, build)
    _WEIGHTS.add(weight)


def _equation(equation: Callable[..., str], module: Any, args: Any, kwargs: Any) -> str | None:
    """The equation of a module by its function, which may take the call's arguments as well."""
    for arguments, options in ((args, kwargs), ((), {})):
        try:
            inspect.signature(equation).bind(module, *arguments, **options)
        except TypeError:
            continue
        return equation(module, *arguments, **options)
    return None


def find(module: Any, call: str, *args: Any, **kwargs: Any) -> Contraction | None:
    """The contraction that a module's function computes; None where it is not known."""
    entry = _entry(type(module), call)
    return entry and entry[1](module, *args, **kwargs)


def input_of(module: Any, call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input among a call's arguments, by position or by name; None for a call without any."""
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
    """A call as a function of its input, with all other arguments fixed."""
    old = input_of(module, call, args, kwargs)

    def again(x: Any) -> Any:
        new = [x if value is old else value for value in (*args, *kwargs.values())]
        return run(*new[: len(args)], **dict(zip(kwargs, new[len(args) :], strict=True)))

    return again


def _entry(cls: type, call: str) -> tuple[int, Callable[..., Contraction | None]] | None:
    keys = ((base, call) for base in cls.__mro__)
    return next((_REGISTRY[key] for key in keys if key in _REGISTRY), None)


def calls(cls: type) -> tuple[str, ...]:
    """The functions of a module class that adapters act on."""
    return ("__call__", "attend") if _entry(cls, "attend") else ("__call__",)


def weight_names() -> frozenset[str]:
    """The names that known layers have for their weight."""
    return frozenset(_WEIGHTS)


def why_not(module: Any) -> str:
    """Why low-rank factors cannot attach to a module, and the line that may register it."""
    name = type(module).__name__
    if _entry(type(module), "__call__"):
        return f"{name} has groups, a mask, or an equation that only the call has"
    return (
        f"{name} is not a known linear layer; if it is linear, register it: "
        f"aj.register_contraction({name}, weight='<name of its weight>', equation='...d,df->...f')"
    )
