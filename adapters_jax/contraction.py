"""How a weight meets its input, for every layer kind that low-rank factors can attach to.

A linear layer computes `y = einsum(equation, x, weight)`. A factor pair follows from the equation
alone: the weight's letters that the input shares go to A, with the rank appended; the others go to
B, with the rank in front. `btd,dnh->btnh` becomes `btd,dr->btr` and `btr,rnh->btnh`: two
contractions through the rank, never a product of the weight's size. Convolutions and embeddings
reach their hidden state differently, but their factors have the same form.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jaxtyping import Array, Float

from adapters_jax.errors import RecipeError

_RANK = "Z"


@dataclass(frozen=True)
class Contraction:
    """A linear layer as low-rank adaptation sees it.

    Attributes:
        weight: name of the layer's weight.
        ndim: number of axes of the weight, without the layer axes of stacked modules.
        inputs: the axes of the weight that go to A, in order; the others go to B.
        project: `(x, a) -> hidden`, where `hidden` ends in the rank or holds it as the einsum says.
        expand: `(hidden, b) -> y`.
        lookup: the layer reads rows (an embedding), so A starts at zero and B random.
    """

    weight: str
    ndim: int
    inputs: tuple[int, ...]
    project: Callable[[Array, Array], Array]
    expand: Callable[[Array, Array], Array]
    lookup: bool = False

    def split_shape(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The parts of a weight's shape that go to A and to B.

        Raises:
            RecipeError: the weight has another number of axes than the equation says.
        """
        if len(shape) != self.ndim:
            raise RecipeError(
                f"{self.weight} has the shape {shape}, and the equation of its layer wants "
                f"{self.ndim} axes; correct the equation in aj.register_contraction"
            )
        outputs = (axis for axis in range(self.ndim) if axis not in self.inputs)
        return tuple(shape[i] for i in self.inputs), tuple(shape[i] for i in outputs)

    def product(self, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
        """A times B in the weight's own layout, under any leading layer axes."""
        letters = "abcdefghijklmnopqrstuvwxy"[: self.ndim]
        left = "".join(letters[i] for i in self.inputs)
        right = "".join(c for i, c in enumerate(letters) if i not in self.inputs)
        form = f"...{left}{_RANK},...{_RANK}{right}->...{letters}"
        return jnp.einsum(form, a, b, precision="highest")


def from_equation(weight: str, equation: str, precision: Any = None) -> Contraction:
    """The contraction of `einsum(equation, x, weight)`.

    Args:
        weight: the weight's name in the layer.
        equation: an explicit einsum of two operands, the input first; `...` is allowed in the
            input and output.
        precision: as in `jnp.einsum`.

    Raises:
        RecipeError: the equation is not of that form.

    Example:
        >>> c = from_equation("kernel", "btd,dnh->btnh")
        >>> c.split_shape((768, 12, 64))
        ((768,), (12, 64))
    """
    left, arrow, output = equation.replace(" ", "").partition("->")
    x, comma, w = left.partition(",")
    if not arrow or not comma or "," in w or "." in w or _RANK in equation or len(set(w)) != len(w):
        raise RecipeError(
            f"equation {equation!r} is not an explicit einsum of an input and a weight; "
            f"write for example '...d,df->...f' (the letter {_RANK} is taken)"
        )
    inputs = tuple(i for i, letter in enumerate(w) if letter in x)
    a = "".join(w[i] for i in inputs)
    b = "".join(letter for letter in w if letter not in x)
    contracted = {letter for letter in a if letter not in output}
    hidden = "".join(letter for letter in x if letter not in contracted) + _RANK

    def einsum(form: str) -> Callable[[Array, Array], Array]:
        return lambda left, right: jnp.einsum(form, left, right, precision=precision)

    return Contraction(
        weight,
        len(w),
        inputs,
        einsum(f"{x},{a}{_RANK}->{hidden}"),
        einsum(f"{hidden},{_RANK}{b}->{output}"),
    )


def _dense_general(axis: Any, batch: Iterable[int], features: int) -> str:
    """The equation of a DenseGeneral: contracted axes first in the weight, features last.

    `axis=(-2, -1), features=1` gives `...ba,bac->...c`. The weight has them in the order of the
    input, however they were listed.
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


def _size(features: Any) -> int:
    return 1 if isinstance(features, int) else len(tuple(features))


def _conv(module: Any) -> Contraction | None:
    """A convolution: A keeps the window and its input channels, B mixes the rank into outputs.

    Factors of a grouped or masked kernel would not fold back into it, so there are none.
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


def _embed_lookup(module: Any) -> Contraction:
    return Contraction(
        "embedding", 2, (0,), lambda ids, a: jnp.take(a, ids, axis=0), jnp.matmul, lookup=True
    )


def _embed_attend(module: Any) -> Contraction:
    """The tied output layer: the same factors, met from the other side."""
    return Contraction(
        "embedding",
        2,
        (0,),
        lambda query, a: (query, a),  # type: ignore[arg-type, return-value]
        lambda pair, b: (pair[0] @ b.T) @ pair[1].T,
        lookup=True,
    )


# (class, method) -> (position of the input, builder(module, *args, **kwargs) of the contraction)
_REGISTRY: dict[tuple[type, str], tuple[int, Callable[..., Contraction | None]]] = {}
_WEIGHTS = {"kernel", "embedding"}


def register_contraction(
    layer: type, *, weight: str, equation: str | Callable[..., str], input: int = 0
) -> None:
    """Teaches low-rank adaptation a linear layer of another library.

    Args:
        layer: the module class, linen or NNX; subclasses are covered.
        weight: name of its weight parameter.
        equation: the einsum that its `__call__` computes, input first; or a function of the module
            (and, where the layer takes its equation at the call, of the call's arguments).
        input: position of the input among the call's arguments.

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
        text = equation if isinstance(equation, str) else _ask(equation, module, args, kwargs)
        precision = getattr(module, "precision", None)
        return from_equation(weight, text, precision) if text else None

    _REGISTRY[layer, "__call__"] = (input, build)
    _WEIGHTS.add(weight)


def _ask(equation: Callable[..., str], module: Any, args: Any, kwargs: Any) -> str | None:
    """What a function of the module, and of the call's arguments if it wants them, answers."""
    for arguments, options in ((args, kwargs), ((), {})):
        try:
            inspect.signature(equation).bind(module, *arguments, **options)
        except TypeError:
            continue
        return equation(module, *arguments, **options)
    return None


def find(module: Any, call: str, *args: Any, **kwargs: Any) -> Contraction | None:
    """The contraction that a module's method computes, or None where there is none known."""
    entry = _entry(type(module), call)
    return entry and entry[1](module, *args, **kwargs)


def input_of(module: Any, call: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input among a call's arguments, by position or by name; None where there is none."""
    entry = _entry(type(module), call)
    position = entry[0] if entry else 0
    if len(args) > position:
        return args[position]
    names = list(inspect.signature(getattr(type(module), call)).parameters)[1:]
    by_name = (kwargs[name] for name in names[position:] if name in kwargs)
    return next(by_name, next(iter(kwargs.values()), None))


def _entry(cls: type, call: str) -> tuple[int, Callable[..., Contraction | None]] | None:
    keys = ((base, call) for base in cls.__mro__)
    return next((_REGISTRY[key] for key in keys if key in _REGISTRY), None)


def calls(cls: type) -> tuple[str, ...]:
    """The methods of a module class that adapters act on."""
    return ("__call__", "attend") if _entry(cls, "attend") else ("__call__",)


def weight_names() -> frozenset[str]:
    """Names under which known layers keep their weight."""
    return frozenset(_WEIGHTS)


def why_not(module: Any) -> str:
    """Why low-rank factors cannot attach to a module, and the line that may change it."""
    name = type(module).__name__
    if _entry(type(module), "__call__"):
        return f"{name} with groups, a mask, or an equation given only at the call"
    return (
        f"{name} is not a known linear layer; if it is linear, register it: "
        f"aj.register_contraction({name}, weight='<name of its weight>', equation='...d,df->...f')"
    )


def _fixed(equation: Callable[[Any], str]) -> tuple[int, Callable[..., Contraction | None]]:
    return 0, lambda m, *_, **__: from_equation("kernel", equation(m), m.precision)


def _einsum(module: Any, *args: Any, **kwargs: Any) -> Contraction | None:
    """An Einsum layer takes its equation from the constructor or from the call."""
    at_call = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
    equation = at_call or module.einsum_str
    return from_equation("kernel", equation, module.precision) if equation else None


_REGISTRY.update(
    {
        (linen.Dense, "__call__"): _fixed(lambda m: "...a,ab->...b"),
        (nnx.Linear, "__call__"): _fixed(lambda m: "...a,ab->...b"),
        (linen.DenseGeneral, "__call__"): _fixed(
            lambda m: _dense_general(m.axis, m.batch_dims, _size(m.features))
        ),
        (nnx.LinearGeneral, "__call__"): _fixed(
            lambda m: _dense_general(m.axis, m.batch_axis, _size(m.out_features))
        ),
        (linen.Einsum, "__call__"): (0, _einsum),
        (nnx.Einsum, "__call__"): (0, _einsum),
        (linen.Conv, "__call__"): (0, lambda m, *_, **__: _conv(m)),
        (nnx.Conv, "__call__"): (0, lambda m, *_, **__: _conv(m)),
        (linen.Embed, "__call__"): (0, lambda m, *_, **__: _embed_lookup(m)),
        (nnx.Embed, "__call__"): (0, lambda m, *_, **__: _embed_lookup(m)),
        (linen.Embed, "attend"): (0, lambda m, *_, **__: _embed_attend(m)),
        (nnx.Embed, "attend"): (0, lambda m, *_, **__: _embed_attend(m)),
    }
)
