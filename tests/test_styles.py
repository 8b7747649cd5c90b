"""Styles of models: whatever a model does with its weights, adapted it is the merged model.

Each style is run in both APIs, adapted and merged, and compared with a plain formula in float64.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from jax.sharding import PartitionSpec

import adapters_jax as aj
from adapters_jax.linen import reads_of
from adapters_jax.trace.inputs import Inputs
from adapters_jax.trees import flatten, unflatten

RANK, ALPHA = 2, 3.0
X, IDS, KEY = drawn((3, 4), 1), np.array([[0, 6, 2], [2, 5, 6]]), jax.random.key(0)


def changed(weight, a, b, shared=(), inputs=(0,), rank=RANK):
    """weight + alpha/r * A B in float64, by one einsum over the rank."""
    w = "abcdefg"[: np.ndim(weight)]
    s, i = ("".join(w[axis] for axis in axes) for axes in (shared, inputs))
    o = "".join(c for c in w if c not in s + i)
    product = np.einsum(f"{s}{i}r,{s}r{o}->{w}", double(a), double(b))
    return double(weight) + ALPHA / rank * product


class Raw(nn.Module):
    """A module with parameters of its own and a function of them."""

    shapes: Any
    run: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return self.run({name: self.param(name, zeros, s) for name, s in self.shapes.items()}, x)


class RawNnx(nnx.Module):
    """The same."""

    def __init__(self, shapes, run):
        self.names, self.run = tuple(shapes), run
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x):
        return self.run({name: getattr(self, name)[...] for name in self.names}, x)


@dataclass
class Style:
    """A model of one style.

    Attributes:
        shapes: the shapes of its weights.
        run: its output, given its weights and its input.
        formula: the same in numpy.
        roles: for each weight that is adapted, the path of its factors, its shared axes and its
            input axes.
        x: its input.
        how: how the weights are read, where not in products alone; perhaps by path.
        targets: the targets of LoRA.
        left: what a warning says of the weights that it leaves out.
        linen: the linen model, if it is not one of raw parameters.
        nnx: a function that makes the NNX model, likewise.
    """

    shapes: dict[str, Any]
    run: Any
    formula: Any
    roles: dict[str, Any]
    x: Any = None
    how: Any = "product"
    targets: Any = "**"
    left: Any = ()
    linen: Any = None
    nnx: Any = None

    def __post_init__(self):
        self.x = X if self.x is None else self.x
        self.linen = self.linen or Raw(self.shapes, self.run)
        self.nnx = self.nnx or (lambda: RawNnx(self.shapes, self.run))

    @property
    def recipe(self):
        return aj.Recipe(aj.LoRA(self.targets, RANK, ALPHA))

    @contextlib.contextmanager
    def warned(self):
        """Around an adaptation that leaves weights out."""
        if not self.left:
            yield
            return
        with pytest.warns(aj.AdapterWarning) as caught:
            yield
        (text,) = (str(warning.message) for warning in caught)
        assert [datum for datum in self.left if datum not in text] == [], text

    def weights(self):
        """Weights, drawn."""
        return {path: drawn(shape, i) for i, (path, shape) in enumerate(self.shapes.items())}

    def expected(self, flat):
        """The output by the formula, given all parameters by path."""
        weights = {path: double(flat[path]) for path in self.shapes}
        for path, (node, shared, inputs) in self.roles.items():
            weights[path] = changed(
                weights[path], flat[f"{node}/a"], flat[f"{node}/b"], shared, inputs
            )
        return self.formula(weights, double(self.x) if self.x.dtype != int else self.x)


@jax.custom_vjp
def straight_through(w):
    """A function with a gradient of its own: signs forwards, the identity backwards."""
    return jnp.sign(w)


straight_through.defvjp(lambda w: (jnp.sign(w), None), lambda _, g: (g,))


@jax.custom_vjp
def product(x, w):
    """A product with a gradient of its own."""
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))


def in_shards(w, x):
    specs = {"in_specs": (PartitionSpec(), PartitionSpec()), "out_specs": PartitionSpec()}
    mesh = jax.make_mesh((1,), ("data",))
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs)(w, x)


def standardised(w, of=np):
    return (w - w.mean((0, 1))) / of.sqrt(w.var((0, 1)) + 1e-3)


def convolution(x, w):
    """A convolution without padding, by its definition."""
    n = len(w)
    windows = [x[:, i : i + n] for i in range(x.shape[1] - n + 1)]
    return np.stack([np.einsum("bwi,wio->bo", window, w) for window in windows], 1)


def lax_convolution(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )


class StandardisedConv(nn.Conv):
    """A subclass that standardises its kernel, as BiT's."""

    def param(self, name, *args, **kwargs):
        weight = super().param(name, *args, **kwargs)
        return standardised(weight, jnp) if name == "kernel" else weight


class StandardisedConvNnx(nnx.Conv):
    def __call__(self, x):
        return lax_convolution(x, standardised(self.kernel[...], jnp))


class PositiveDense(nn.Dense):
    """A subclass that transforms its kernel."""

    def param(self, name, *args, **kwargs):
        weight = super().param(name, *args, **kwargs)
        return nn.relu(weight) if name == "kernel" else weight


class PositiveLinear(nnx.Linear):
    def __call__(self, x):
        return x @ nnx.relu(self.kernel[...]) + self.bias[...]


class Reader(nn.Module):
    """Reads the kernel of a layer that it never calls."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, use_bias=False, name="layer")
        if self.is_initializing():
            layer(x)
        return x @ layer.variables["params"]["kernel"]


class ReaderNnx(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return x @ self.layer.kernel[...]


class Equation(nn.Module):
    """A layer of another library that gets its equation with its input."""

    shape: Any

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.zeros, self.shape))


class EquationNnx(nnx.Module):
    def __init__(self, shape):
        self.w = nnx.Param(jnp.zeros(shape))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = Equation((2, 4, 5), name="heads")("bd,ndh->bnh", x)
        return Equation((2, 5, 4), name="out")("bnh,nhd->bd", heads)


class HeadsNnx(nnx.Module):
    def __init__(self):
        self.heads, self.out = EquationNnx((2, 4, 5)), EquationNnx((2, 5, 4))

    def __call__(self, x):
        return self.out("bnh,nhd->bd", self.heads("bd,ndh->bnh", x))


SIZES = np.array([2, 0, 3, 1])


def ragged(w, x):
    """Rows in groups, each of which has a matrix."""
    return np.concatenate(
        [part @ m for part, m in zip(np.split(x, np.cumsum(SIZES)[:-1]), w, strict=True)]
    )


STYLES = {
    "tied_head": Style(
        {"embedding": (7, 5)},
        lambda w, ids: jnp.tanh(w["embedding"][ids]) @ w["embedding"].T,
        lambda w, ids: np.tanh(w["embedding"][ids]) @ w["embedding"].T,
        {"embedding": ("lora", (), (0,))},
        IDS,
        {"lookup", "product"},
    ),
    "rows_outside_of_a_table": Style(
        {"table": (7, 5)},
        lambda w, ids: w["table"].at[ids].get(mode="fill", fill_value=2.0),
        lambda w, ids: np.append(w["table"], np.full((1, 5), 2.0), 0)[np.minimum(ids, 7)],
        {"table": ("lora", (), (0,))},
        np.array([[0, 9, 2], [7, 5, 6]]),
        "lookup",
    ),
    "rows_that_are_nan_outside": Style(
        {"table": (7, 5)},
        lambda w, ids: jnp.nan_to_num(jnp.take(w["table"], ids, 0), nan=2.0),
        lambda w, ids: np.append(w["table"], np.full((1, 5), 2.0), 0)[np.minimum(ids, 7)],
        {"table": ("lora", (), (0,))},
        np.array([[0, 9, 2], [7, 5, 6]]),
        "lookup",
    ),
    "rounded_on_the_fly": Style(
        {"w": (4, 5)},
        lambda w, x: x @ w["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32),
        lambda w, x: x @ double(w["w"].astype(jnp.float8_e4m3fn)),
        {"w": ("lora", (), (0,))},
    ),
    "standardised_convolution": Style(
        {"kernel": (3, 4, 6)},
        None,
        lambda w, x: convolution(x, standardised(w["kernel"])),
        {"kernel": ("lora", (), (0, 1))},
        drawn((2, 6, 4), 1),
        "sum",
        linen=StandardisedConv(6, (3,), padding="VALID", use_bias=False),
        nnx=lambda: StandardisedConvNnx(4, 6, (3,), use_bias=False, rngs=nnx.Rngs(0)),
    ),
    "transformed_dense": Style(
        {"kernel": (4, 5), "bias": (5,)},
        None,
        lambda w, x: x @ np.maximum(w["kernel"], 0) + w["bias"],
        {"kernel": ("lora", (), (0,))},
        how="sum",
        linen=PositiveDense(5),
        nnx=lambda: PositiveLinear(4, 5, rngs=nnx.Rngs(0)),
    ),
    "read_not_called": Style(
        {"layer/kernel": (4, 5)},
        None,
        lambda w, x: x @ w["layer/kernel"],
        {"layer/kernel": ("layer/lora", (), (0,))},
        linen=Reader(),
        nnx=ReaderNnx,
    ),
    "two_raw_weights": Style(
        {"up": (4, 6), "down": (6, 4)},
        lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"],
        lambda w, x: np.tanh(x @ w["up"]) @ w["down"],
        {"up": ("lora/up", (), (0,)), "down": ("lora/down", (), (0,))},
    ),
    "indexed": Style(
        {"w": (2, 4, 4)},
        lambda w, x: jnp.tanh(x @ w["w"][0]) @ w["w"][1],
        lambda w, x: np.tanh(x @ w["w"][0]) @ w["w"][1],
        {"w": ("lora", (0,), (1,))},
    ),
    "experts": Style(
        {"w": (3, 4, 5)},
        lambda w, x: jnp.einsum("ecd,edf->ecf", x, w["w"]),
        lambda w, x: np.einsum("ecd,edf->ecf", x, w["w"]),
        {"w": ("lora", (0,), (1,))},
        drawn((3, 2, 4), 1),
    ),
    "square_turned": Style(
        {"kernel": (4, 4)},
        lambda w, x: x @ w["kernel"].T,
        lambda w, x: x @ w["kernel"].T,
        {"kernel": ("lora/:1>0", (), (1,))},
    ),
    "outputs_first": Style(
        {"kernel": (5, 4)},
        lambda w, x: x @ w["kernel"].T,
        lambda w, x: x @ w["kernel"].T,
        {"kernel": ("lora", (), (1,))},
    ),
    "equation_at_the_call": Style(
        {"heads/w": (2, 4, 5), "out/w": (2, 5, 4)},
        None,
        lambda w, x: np.einsum("bd,ndh,nhe->be", x, w["heads/w"], w["out/w"]),
        {"heads/w": ("heads/lora", (), (1,)), "out/w": ("out/lora", (), (0, 1))},
        linen=Heads(),
        nnx=HeadsNnx,
    ),
    "fused_and_split": Style(
        {"qkv": (4, 12)},
        lambda w, x: jnp.multiply(*jnp.split(x @ w["qkv"], 3, -1)[:2]) + x @ w["qkv"][:, 8:],
        lambda w, x: (x @ w["qkv"][:, :4]) * (x @ w["qkv"][:, 4:8]) + x @ w["qkv"][:, 8:],
        {"qkv": ("lora", (), (0,))},
    ),
    "split_before_use": Style(
        {"qkv": (4, 12)},
        lambda w, x: (lambda q, k, v: (x @ q) * (x @ k) + x @ v)(*jnp.split(w["qkv"], 3, -1)),
        lambda w, x: (x @ w["qkv"][:, :4]) * (x @ w["qkv"][:, 4:8]) + x @ w["qkv"][:, 8:],
        {"qkv": ("lora", (), (0,))},
    ),
    "reshaped": Style(
        {"kernel": (4, 6)},
        lambda w, x: jnp.einsum("bd,dnh->bnh", x, w["kernel"].reshape(4, 2, 3)),
        lambda w, x: (x @ w["kernel"]).reshape(3, 2, 3),
        {"kernel": ("lora", (), (0,))},
    ),
    "scanned": Style(
        {"w": (3, 4, 4)},
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w["w"])[0],
        lambda w, x: np.tanh(np.tanh(np.tanh(x @ w["w"][0]) @ w["w"][1]) @ w["w"][2]),
        {"w": ("lora", (0,), (1,))},
    ),
    "one_weight_in_every_step": Style(
        {"w": (4, 4)},
        lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w["w"]), None), x, None, 2)[0],
        lambda w, x: np.tanh(np.tanh(x @ w["w"]) @ w["w"]),
        {"w": ("lora", (), (0,))},
    ),
    "checkpointed": Style(
        {"w": (4, 5)},
        lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w["w"], x),
        lambda w, x: np.tanh(x @ w["w"]),
        {"w": ("lora", (), (0,))},
    ),
    "vmapped": Style(
        {"w": (3, 4, 5)},
        lambda w, x: jax.vmap(lambda w, x: jnp.tanh(x @ w))(w["w"], x),
        lambda w, x: np.tanh(np.einsum("ed,edf->ef", x, w["w"])),
        {"w": ("lora", (0,), (1,))},
    ),
    "conditional": Style(
        {"w": (4, 5)},
        lambda w, x: jax.lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: 2 * (x @ w), w["w"]),
        lambda w, x: 2 * (x @ w["w"]),
        {"w": ("lora", (), (0,))},
    ),
    "switched": Style(
        {"w": (3, 4, 5)},
        lambda w, x: jax.lax.switch(1, [lambda i=i: x @ w["w"][i] for i in range(3)]),
        lambda w, x: x @ w["w"][1],
        {"w": ("lora", (0,), (1,))},
    ),
    "repeated_until": Style(
        {"w": (4, 4)},
        lambda w, x: jax.lax.while_loop(
            lambda state: state[0] < 2, lambda state: (state[0] + 1, state[1] @ w["w"]), (0, x)
        )[1],
        lambda w, x: x @ w["w"] @ w["w"],
        {"w": ("lora", (), (0,))},
    ),
    "counted_loop": Style(
        {"w": (4, 4)},
        lambda w, x: jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w["w"]), x),
        lambda w, x: np.tanh(np.tanh(x @ w["w"]) @ w["w"]),
        {"w": ("lora", (), (0,))},
    ),
    "gradient_of_its_own": Style(
        {"w": (4, 5)},
        lambda w, x: x @ straight_through(w["w"]),
        lambda w, x: x @ np.sign(w["w"]),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "product_with_a_gradient_of_its_own": Style(
        {"w": (4, 5)},
        lambda w, x: product(x, w["w"]),
        lambda w, x: x @ w["w"],
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "in_shards": Style(
        {"w": (4, 5)},
        lambda w, x: in_shards(w["w"], x),
        lambda w, x: x @ w["w"],
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "number_by_number": Style(
        {"w": (5, 4)},
        lambda w, x: (x[:, None] * w["w"]).sum(-1),
        lambda w, x: x @ w["w"].T,
        {"w": ("lora", (), (1,))},
        how="sum",
    ),
    "equations": Style(
        {"w": (4, 4)},
        lambda w, x: jnp.linalg.solve(w["w"] + 3 * jnp.eye(4), x.T),
        lambda w, x: np.linalg.solve(w["w"] + 3 * np.eye(4), x.T),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "dropped_connections": Style(
        {"w": (4, 5)},
        lambda w, x: x @ (w["w"] * jax.random.bernoulli(KEY, 0.5, (4, 5))),
        lambda w, x: x @ (w["w"] * np.asarray(jax.random.bernoulli(KEY, 0.5, (4, 5)))),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "unstacked": Style(
        {"qkv": (4, 3, 5)},
        lambda w, x: (lambda q, k, v: (x @ q) * (x @ k) + x @ v)(*jnp.unstack(w["qkv"], axis=1)),
        lambda w, x: (x @ w["qkv"][:, 0]) * (x @ w["qkv"][:, 1]) + x @ w["qkv"][:, 2],
        {"qkv": ("lora", (1,), (0,))},
    ),
    "stacked_on_the_fly": Style(
        {"v": (4, 4), "w": (4, 4)},
        lambda w, x: jax.lax.scan(lambda h, w: (h @ w, None), x, jnp.stack([w["v"], w["w"]]))[0],
        lambda w, x: x @ w["v"] @ w["w"],
        {"v": ("lora/v", (), (0,)), "w": ("lora/w", (), (0,))},
        how="sum",
    ),
    "stacked_as_outputs": Style(
        {"v": (4, 5), "w": (4, 5)},
        lambda w, x: jnp.einsum("bd,dnf->bnf", x, jnp.stack([w["v"], w["w"]], 1)),
        lambda w, x: np.stack([x @ w["v"], x @ w["w"]], 1),
        {"v": ("lora/v", (), (0,)), "w": ("lora/w", (), (0,))},
        how="sum",
    ),
    "inputs_joined": Style(
        {"v": (3, 5), "w": (1, 5)},
        lambda w, x: x @ jnp.concatenate([w["v"], w["w"]]),
        lambda w, x: x @ np.concatenate([w["v"], w["w"]]),
        {"v": ("lora", (), (0,))},
        how="sum",
    ),
    "padded": Style(
        {"w": (4, 5)},
        lambda w, x: x @ jnp.pad(w["w"], ((0, 0), (0, 2))),
        lambda w, x: x @ np.pad(w["w"], ((0, 0), (0, 2))),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "behind_another_weight": Style(
        {"up": (4, 3), "down": (3, 5)},
        lambda w, x: x @ (w["up"] @ w["down"]),
        lambda w, x: x @ w["up"] @ w["down"],
        {"up": ("lora/up", (), (1,)), "down": ("lora/down", (), (0,))},
        how={"up": {"product", "sum"}, "down": "sum"},
    ),
    "mixture_of_bases": Style(
        {"of": (2,), "w": (2, 4, 5)},
        lambda w, x: x @ jnp.tensordot(w["of"], w["w"], 1),
        lambda w, x: x @ np.tensordot(w["of"], w["w"], 1),
        {"w": ("lora", (), (1,))},
        how="sum",
    ),
    "table_that_is_added": Style(
        {"pos": (3, 4), "w": (4, 5)},
        lambda w, x: (x + w["pos"]) @ w["w"],
        lambda w, x: (x + w["pos"]) @ w["w"],
        {"w": ("lora", (), (0,))},
        left=(" 1 path ", "pos (", "read by add"),
    ),
    "scale_with_two_axes": Style(
        {"scale": (3, 4), "w": (4, 5)},
        lambda w, x: (x * w["scale"]) @ w["w"],
        lambda w, x: (x * w["scale"]) @ w["w"],
        {"w": ("lora", (), (0,))},
        left=(" 1 path ", "scale (", "read by mul"),
    ),
    "biases_with_two_axes": Style(
        {"kernel": (4, 2, 3), "bias": (2, 3)},
        lambda w, x: jnp.einsum("bd,dnh->bnh", x, w["kernel"]) + w["bias"],
        lambda w, x: np.einsum("bd,dnh->bnh", x, w["kernel"]) + w["bias"],
        {"kernel": ("lora", (), (0,))},
    ),
    "one_row": Style(
        {"pos": (3, 4), "w": (4, 5)},
        lambda w, x: (x + jnp.take(w["pos"], 1, axis=0)) @ w["w"],
        lambda w, x: (x + w["pos"][1]) @ w["w"],
        {"w": ("lora", (), (0,))},
    ),
    "one_kind": Style(
        {"kind": (1, 4), "w": (4, 5)},
        lambda w, x: (x + w["kind"][jnp.asarray(x[:, 0] > 9, int)]) @ w["w"],
        lambda w, x: (x + w["kind"][0]) @ w["w"],
        {"w": ("lora", (), (0,))},
    ),
    "ragged": Style(
        {"w": (4, 4, 5)},
        lambda w, x: jax.lax.ragged_dot(x, w["w"], jnp.asarray(SIZES)),
        lambda w, x: ragged(w["w"], x),
        {"w": ("lora", (0,), (1,))},
        drawn((6, 4), 1),
    ),
    "positions": Style(
        {"pos": (1, 4), "w": (4, 5)},
        lambda w, x: (x[:1] + w["pos"]) @ w["w"],
        lambda w, x: (x[:1] + w["pos"]) @ w["w"],
        {"w": ("lora", (), (0,))},
    ),
    "masked": Style(
        {"w": (4, 4)},
        lambda w, x: x @ (w["w"] * jnp.tril(jnp.ones((4, 4)))),
        lambda w, x: x @ np.tril(w["w"]),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "scaled_by_a_parameter": Style(
        {"w": (4, 5), "gain": (5,)},
        lambda w, x: x @ (w["gain"] * w["w"] / jnp.linalg.norm(w["w"], axis=0)),
        lambda w, x: x @ (w["gain"] * w["w"] / np.linalg.norm(w["w"], axis=0)),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "times_an_input": Style(
        {"w": (3, 4)},
        lambda w, x: (x * w["w"]).T @ x,
        lambda w, x: (x * w["w"]).T @ x,
        {"w": ("lora/w", (), (0,))},
        how="sum",
        targets="w",
    ),
    "times_a_number": Style(
        {"w": (4, 5)},
        lambda w, x: x @ (-2.0 * w["w"] / np.sqrt(5)),
        lambda w, x: x @ (-2.0 * w["w"] / np.sqrt(5)),
        {"w": ("lora", (), (0,))},
    ),
    "negated": Style(
        {"w": (4, 5)},
        lambda w, x: x @ -w["w"],
        lambda w, x: -x @ w["w"],
        {"w": ("lora", (), (0,))},
    ),
    "over_a_weight": Style(
        {"w": (4, 5)},
        lambda w, x: x @ (3.0 / (w["w"] ** 2 + 1)),
        lambda w, x: x @ (3.0 / (w["w"] ** 2 + 1)),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "concatenated": Style(
        {"w": (4, 5), "v": (4, 3)},
        lambda w, x: x @ jnp.concatenate([w["w"], w["v"]], 1),
        lambda w, x: np.concatenate([x @ w["w"], x @ w["v"]], 1),
        {"w": ("lora/w", (), (0,)), "v": ("lora/v", (), (0,))},
        how="sum",
    ),
    "twice_in_a_row": Style(
        {"w": (4, 4)},
        lambda w, x: x @ (w["w"] @ w["w"]),
        lambda w, x: x @ w["w"] @ w["w"],
        {"w": ("lora/:1>0", (), (1,))},
        how={"product", "sum"},
    ),
    "dynamic_index": Style(
        {"w": (3, 4, 5)},
        lambda w, x: x @ jax.lax.dynamic_index_in_dim(w["w"], jnp.int32(1), 0, keepdims=False),
        lambda w, x: x @ w["w"][1],
        {"w": ("lora", (0,), (1,))},
    ),
    "normalised_rows": Style(
        {"w": (4, 5)},
        lambda w, x: x @ (w["w"] / jnp.linalg.norm(w["w"], axis=0)),
        lambda w, x: x @ (w["w"] / np.linalg.norm(w["w"], axis=0)),
        {"w": ("lora", (), (0,))},
        how="sum",
    ),
    "added_to_another": Style(
        {"w": (4, 5), "v": (4, 5)},
        lambda w, x: x @ (w["w"] + w["v"]),
        lambda w, x: x @ (w["w"] + w["v"]),
        {"w": ("lora/w", (), (0,)), "v": ("lora/v", (), (0,))},
        how="sum",
    ),
    "gathered_experts": Style(
        {"w": (5, 4, 3)},
        lambda w, x: jnp.einsum("bd,bdf->bf", x, w["w"][jnp.array([4, 0, 4])]),
        lambda w, x: np.einsum("bd,bdf->bf", x, w["w"][[4, 0, 4]]),
        {"w": ("lora", (0,), (1,))},
    ),
}


@pytest.mark.parametrize("name", STYLES)
def test_adapted_is_merged_is_the_formula(name):
    style = STYLES[name]
    base = unflatten(style.weights())
    model = aj.adapt(style.linen, style.recipe)
    with style.warned():
        params = drawn_like(aj.init_adapters(model, base, KEY, style.x), 7)
    flat = flatten(params)
    added = {path.rpartition("/")[0] for path in flat.keys() - style.shapes.keys()}
    assert added == {node for node, *_ in style.roles.values()}
    expected = style.expected(flat)
    before = style.formula({path: double(flat[path]) for path in style.shapes}, style.x)
    assert np.abs(expected - before).mean() > 0.05
    merged = aj.merge(model, params, style.x)
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(model.apply({"params": params}, style.x), expected, **close)
    np.testing.assert_allclose(style.linen.apply({"params": merged}, style.x), expected, **close)

    with style.warned():
        other = aj.adapt(style.nnx(), style.recipe, rngs=nnx.Rngs(0), example_inputs=(style.x,))
    nnx.update(other, params)
    np.testing.assert_allclose(other(style.x), expected, **close)
    np.testing.assert_allclose(aj.merge(other)(style.x), expected, **close)


@pytest.mark.parametrize("name", STYLES)
def test_the_record_says_how_each_weight_is_read(name):
    style = STYLES[name]
    variables = {"params": unflatten(jax.eval_shape(lambda: style.weights()))}
    reads, _ = reads_of(style.linen, variables, Inputs((style.x,), {}))
    for path in style.roles:
        how = style.how[path] if isinstance(style.how, dict) else style.how
        found = {read.how for read in reads[path].reads}
        assert found == (how if isinstance(how, set) else {how}), path


@pytest.mark.parametrize(
    ("name", "computed"),
    {
        "rows_outside_of_a_table": "0 of 1",
        "rows_that_are_nan_outside": "1 of 1",
        "rounded_on_the_fly": "0 of 1",
        "concatenated": "2 of 2",
        "stacked_on_the_fly": "2 of 2",
        "stacked_as_outputs": "2 of 2",
        "unstacked": "1 of 1",
        "repeated_until": "1 of 1",
        "inputs_joined": "0 of 1",
        "product_with_a_gradient_of_its_own": "0 of 1",
        "in_shards": "0 of 1",
        "number_by_number": "0 of 1",
        "equations": "0 of 1",
    }.items(),
)
def test_the_audit_says_what_is_computed_thin(name, computed):
    style = STYLES[name]
    model, base = aj.adapt(style.linen, style.recipe), unflatten(style.weights())
    params = aj.init_adapters(model, base, KEY, style.x)
    said = aj.audit(model, params, inputs=(style.x,)).computed()
    assert said[0] == f"computed thin: {computed} changed weights"
    assert all(("sum" in line) == computed.startswith("0") for line in said[1:])


class Memory(nnx.Module):
    """A recurrent cell over a sequence."""

    def __init__(self, cell):
        self.rnn = nnx.RNN(cell(4, 3, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return self.rnn(x)


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"])
def test_every_kernel_of_a_recurrent_cell_trains(name):
    x, lora = drawn((2, 3, 4), 1), aj.LoRA("**", RANK, ALPHA)
    base = nn.RNN(getattr(nn, name)(3))
    model, params = aj.adapt(base, lora), base.init(KEY, x)["params"]
    kernels = {path for path in flatten(params) if path.endswith("/kernel")}
    params = drawn_like(aj.init_adapters(model, params, KEY, x), 7)
    assert {path for path in flatten(params) if path.endswith("/lora/a")} == {
        path.replace("kernel", "lora/a") for path in kernels
    }
    run = lambda params: model.apply({"params": params}, x)  # noqa: E731
    merged = aj.merge(model, params, x)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(run(params), base.apply({"params": merged}, x), **close)
    slopes = flatten(jax.grad(lambda params: jnp.square(run(params)).sum())(params))
    assert all(np.abs(slope).max() > 1e-5 for slope in slopes.values())
    assert "thin: 0" not in repr(aj.audit(model, params, inputs=(x,)))

    other = aj.adapt(Memory(getattr(nnx, name)), lora, rngs=nnx.Rngs(0), example_inputs=(x,))
    nnx.update(other, drawn_like(nnx.state(other, nnx.Param), 7))
    paths = flatten(nnx.state(other, nnx.Param))
    assert sum(path.endswith("/a") for path in paths) == sum(path.endswith("l") for path in paths)
    np.testing.assert_allclose(other(x), aj.merge(other)(x), **close)
