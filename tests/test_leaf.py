"""Low-rank factors on every layer kind: adapted, a layer is itself with kernel + scale * A B."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.trees import flatten
from adapters_jax.weights import linear as layers
from adapters_jax.weights.contraction import from_equation

RANK, ALPHA = 2, 3.0
RECIPE = aj.Recipe(aj.LoRA("**", RANK, ALPHA))


@dataclass
class Layer:
    """One layer in both forms, and which axes of its weight are inputs."""

    linen: nn.Module
    nnx: Any
    x: Any
    inputs: tuple[int, ...]
    weight: str = "kernel"
    args: tuple[Any, ...] = ()
    call: str = "__call__"

    def changed(self, weight, a, b):
        """weight + alpha/r * A B in float64, by nothing but a matrix product and a transpose."""
        a, b = double(a), double(b)
        product = a.reshape(-1, RANK) @ b.reshape(RANK, -1)
        outputs = [i for i in range(np.ndim(weight)) if i not in self.inputs]
        order = np.argsort([*self.inputs, *outputs])
        product = product.reshape(a.shape[:-1] + b.shape[1:]).transpose(order)
        return (double(weight) + ALPHA / RANK * product).astype(np.float32)


def dense(features, shape, args=None, **fields):
    new = args or {}
    return Layer(
        nn.DenseGeneral(features, **fields),
        lambda rngs: nnx.LinearGeneral(
            new["inputs"],
            features,
            axis=fields.get("axis", -1),
            batch_axis=dict(new.get("batch", {})),
            rngs=rngs,
        ),
        drawn(shape, 1),
        new["kernel"],
    )


def einsum(equation, kernel, shape, inputs, at_call=False):
    """An Einsum layer that has its equation, or is called with it."""
    own, args = (None, (equation,)) if at_call else (equation, ())
    return Layer(
        nn.Einsum(kernel, own, use_bias=False),
        None if at_call else lambda rngs: nnx.Einsum(equation, kernel, rngs=rngs),
        drawn(shape, 1),
        inputs,
        args=args,
    )


def conv(window, shape=(2, 9, 3), features=4, **fields):
    n = len(window)
    return Layer(
        nn.Conv(features, window, **fields),
        lambda rngs: nnx.Conv(shape[-1], features, window, rngs=rngs, **fields),
        drawn(shape, 1),
        tuple(range(n + 1)),
    )


IDS = np.array([[0, 6, 2], [2, 5, 6]])
LAYERS = {
    "dense": Layer(
        nn.Dense(5), lambda rngs: nnx.Linear(4, 5, rngs=rngs), drawn((2, 3, 4), 1), (0,)
    ),
    "dense_one_axis": Layer(
        nn.Dense(5), lambda rngs: nnx.Linear(4, 5, rngs=rngs), drawn((4,), 1), (0,)
    ),
    "general": dense(5, (2, 3, 4), {"inputs": 4, "kernel": (0,)}),
    "general_out": dense((5, 2), (2, 3, 4), {"inputs": 4, "kernel": (0,)}),
    "general_in": dense(5, (2, 3, 4), {"inputs": (3, 4), "kernel": (0, 1)}, axis=(-2, -1)),
    "general_turned": dense(5, (2, 4, 4), {"inputs": (4, 4), "kernel": (0, 1)}, axis=(-1, -2)),
    "general_first": dense((5, 2), (3, 2, 4), {"inputs": 3, "kernel": (0,)}, axis=0),
    "general_apart": dense(5, (3, 2, 4), {"inputs": (3, 4), "kernel": (0, 1)}, axis=(0, 2)),
    "general_mixed": dense(5, (3, 2, 4), {"inputs": (3, 4), "kernel": (0, 1)}, axis=(0, -1)),
    "general_middle": dense(5, (3, 2, 4), {"inputs": 2, "kernel": (0,)}, axis=-2),
    "einsum": einsum("btd,df->btf", (4, 5), (2, 3, 4), (0,)),
    "einsum_dots": einsum("...d,df->...f", (4, 5), (2, 3, 4), (0,)),
    "einsum_heads": einsum("btd,dnh->btnh", (4, 2, 5), (2, 3, 4), (0,)),
    "einsum_outputs_first": einsum("btd,ndh->btnh", (2, 4, 5), (2, 3, 4), (1,)),
    "einsum_square_turned": einsum("bd,fd->bf", (4, 4), (2, 4), (1,)),
    "einsum_many_in": einsum("btnh,nhd->btd", (2, 5, 4), (2, 3, 2, 5), (0, 1)),
    "einsum_shared": einsum("btnd,ndh->btnh", (2, 4, 5), (2, 3, 2, 4), (0, 1)),
    "einsum_spaces": einsum(" btd, d f -> b f t", (4, 5), (2, 3, 4), (0,)),
    "einsum_summed": einsum("btd,df->bf", (4, 5), (2, 3, 4), (0,)),
    "einsum_at_call": einsum("btd,ndh->btnh", (2, 4, 5), (2, 3, 4), (1,), at_call=True),
    "conv": conv((3,)),
    "conv_strides": conv((3,), strides=2),
    "conv_dilation": conv((3,), kernel_dilation=2),
    "conv_input_dilation": conv((3,), input_dilation=2, padding=(1,)),
    "conv_valid": conv((3,), padding="VALID"),
    "conv_same_lower": conv((4,), padding="SAME_LOWER"),
    "conv_circular": conv((4,), padding="CIRCULAR", kernel_dilation=2),
    "conv_causal": conv((3,), padding="CAUSAL", kernel_dilation=2, strides=2),
    "conv_reflect": conv((4,), padding="REFLECT"),
    "conv_int": conv((3,), padding=2),
    "conv_pair": conv((3,), padding=((2, 0),)),
    "conv_no_batch": conv((3,), (9, 3)),
    "conv_more_batch": conv((3,), (2, 2, 9, 3), padding="CIRCULAR"),
    "conv2": conv((3, 2), (2, 6, 5, 3), strides=(2, 1), padding=((1, 0), 2)),
    "conv2_circular": conv((3, 2), (2, 6, 5, 3), padding="CIRCULAR", kernel_dilation=(1, 2)),
    "conv2_ints": conv((3, 2), (6, 5, 3), padding=(1, 2), input_dilation=(1, 2)),
    "embed": Layer(nn.Embed(7, 5), lambda rngs: nnx.Embed(7, 5, rngs=rngs), IDS, (0,), "embedding"),
    "attend": Layer(
        nn.Embed(7, 5),
        lambda rngs: nnx.Embed(7, 5, rngs=rngs),
        drawn((2, 3, 5), 1),
        (0,),
        "embedding",
        call="attend",
    ),
}


def as_linen(layer):
    """Functions (parameters, x) of the adapted layer and of the base, and drawn parameters."""
    abstract = jax.eval_shape(
        lambda x: layer.linen.init(jax.random.key(0), x, *layer.args, method=layer.call)["params"],
        layer.x,
    )
    model = aj.adapt(layer.linen, RECIPE)
    start = (IDS,) if layer.call == "attend" else (layer.x, *layer.args)
    params = drawn_like(aj.init_adapters(model, abstract, jax.random.key(1), *start))

    def run(module):
        return lambda p, x: module.apply({"params": p}, x, *layer.args, method=layer.call)

    return run(model), run(layer.linen), params


def as_nnx(layer, params):
    """The same functions for the NNX layer, which read the same parameters."""

    def run(module):
        graphdef, state = nnx.split(module)

        def call(params, x):
            values = flatten(params)
            filled = [
                (path, variable.replace(values["/".join(path)]))
                for path, variable in nnx.to_flat_state(state)
            ]
            module = nnx.merge(graphdef, nnx.from_flat_state(filled))
            return getattr(module, layer.call)(x, *layer.args)

        return call

    base = nnx.eval_shape(lambda: layer.nnx(nnx.Rngs(0)))
    return run(nnx.eval_shape(lambda: aj.adapt(base, RECIPE, rngs=nnx.Rngs(1)))), run(base)


@pytest.mark.parametrize("name", LAYERS)
def test_adapted_is_the_layer_with_the_changed_weight(name):
    layer = LAYERS[name]
    adapted, base, params = as_linen(layer)
    changed = dict(params)
    factors = changed.pop("lora")
    changed[layer.weight] = layer.changed(params[layer.weight], factors["a"], factors["b"])
    pairs = [(adapted, base)] + ([as_nnx(layer, params)] if layer.nnx else [])
    outputs = jax.jit(lambda p, q, x: [(f(p, x), g(q, x)) for f, g in pairs])(
        params, changed, layer.x
    )
    before = jax.jit(base)(params, layer.x)
    for got, expected in outputs:
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got, outputs[0][0], rtol=1e-4, atol=1e-4)
        assert np.abs(double(got) - double(before)).mean() > 0.5


def test_dense_by_hand():
    adapted, _, params = as_linen(LAYERS["dense"])
    x, kernel, bias = map(double, (LAYERS["dense"].x, params["kernel"], params["bias"]))
    a, b = double(params["lora"]["a"]), double(params["lora"]["b"])
    expected = x @ kernel + bias + 1.5 * (x @ a @ b)
    np.testing.assert_allclose(adapted(params, LAYERS["dense"].x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "kernel"), [((0,), (2, 4, 5)), ((0, 1), (2, 3, 4, 5)), ((1, 0), (2, 3, 4, 5))]
)
def test_batch_dims_belong_to_a(batch, kernel):
    layer = Layer(
        nn.DenseGeneral(5, axis=-1, batch_dims=batch),
        None,
        drawn((2, 3, 4), 1),
        tuple(range(len(kernel) - 1)),
    )
    adapted, base, params = as_linen(layer)
    assert params["kernel"].shape == kernel
    changed = params["kernel"], params["lora"]["a"], params["lora"]["b"]
    changed = {"kernel": layer.changed(*changed), "bias": params["bias"]}
    np.testing.assert_allclose(
        adapted(params, layer.x), base(changed, layer.x), rtol=1e-4, atol=1e-4
    )


def test_batch_axes_in_nnx():
    layer = dense(5, (2, 3, 4), {"inputs": 4, "batch": {0: 2}, "kernel": (0, 1)}, axis=(-1,))
    params = {
        "kernel": drawn((2, 4, 5), 2),
        "bias": drawn((2, 5), 3),
        "lora": {"a": drawn((2, 4, 2), 4), "b": drawn((2, 5), 5)},
    }
    adapted, base = as_nnx(layer, params)
    factors = params["lora"]
    changed = params | {"kernel": layer.changed(params["kernel"], factors["a"], factors["b"])}
    np.testing.assert_allclose(
        adapted(params, layer.x), base(changed, layer.x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("equation", "shape", "parts"),
    [
        ("btd,dnh->btnh", (8, 2, 4), ((8,), (2, 4))),
        ("btd,ndh->btnh", (2, 8, 4), ((8,), (2, 4))),
        ("btnh,nhd->btd", (2, 4, 8), ((2, 4), (8,))),
        ("bnd,ndh->bnh", (2, 8, 4), ((2, 8), (4,))),
    ],
)
def test_the_parts_of_a_weight(equation, shape, parts):
    layer = from_equation("w", equation)
    assert layer.split_shape(shape) == parts
    a, b = drawn((3, *parts[0], RANK)), drawn((3, RANK, *parts[1]), 1)
    stacked = layer.product(a, b)
    assert stacked.shape == (3, *shape)
    np.testing.assert_allclose(stacked[1], layer.product(a[1], b[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "equation", ["bd,df", "bd->bf", "bd,df,f->bf", "b...d,...df->bf", "bZ,Zf->bf", "bd,dd->b", ""]
)
def test_equations_of_another_form(equation):
    with raises(aj.RecipeError, repr(equation), "'...d,df->...f'"):
        from_equation("w", equation)


def test_a_weight_with_other_axes_than_the_equation():
    with raises(aj.RecipeError, "w ", "(2, 3, 4)", "2 axes", "aj.register_contraction"):
        from_equation("w", "bd,df->bf").split_shape((2, 3, 4))


def refusal(module, x):
    """The message of the error when LoRA cannot attach to a module."""

    def attach():
        if isinstance(module, nn.Module):
            return aj.init_adapters(aj.adapt(module, RECIPE), {}, jax.random.key(0), x)
        return aj.adapt(module, RECIPE, rngs=nnx.Rngs(0))

    with pytest.raises(aj.TargetError) as error:
        attach()
    return str(error.value)


def test_grouped_and_masked_convolutions_are_refused():
    x, mask = drawn((1, 5, 4)), np.ones((3, 4, 6), np.float32)
    for more in ({"feature_group_count": 2}, {"mask": mask}):
        for conv in (nn.Conv(6, (3,), **more), nnx.Conv(4, 6, (3,), rngs=nnx.Rngs(0), **more)):
            message = refusal(conv, x)
            assert message.startswith("LoRA: target '**'")
            assert "(the model itself) (Conv " in message and "register" not in message


def test_an_nnx_einsum_that_gets_its_equation_at_the_call_is_refused():
    class Late(nnx.Module):
        def __init__(self, rngs):
            self.late = nnx.Einsum("bd,df->bf", (4, 5), rngs=rngs)
            self.late.einsum_str = None

    message = refusal(Late(nnx.Rngs(0)), None)
    assert "late (Einsum " in message and "register_contraction(Einsum" not in message


class Raw(nn.Module):
    """A linear layer of some other library: a raw parameter and an equation."""

    equation: str = "bd,ndh->bnh"

    @nn.compact
    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.param("w", nn.initializers.ones, (2, 4, 5)))


class RawNnx(nnx.Module):
    def __init__(self, rngs=None, equation="bd,ndh->bnh"):
        self.w, self.equation = nnx.Param(drawn((2, 4, 5))), equation

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Late(nn.Module):
    """The same with the equation first among the arguments of its call."""

    @nn.compact
    def __call__(self, equation, x, scale=1.0):
        return scale * jnp.einsum(equation, x, self.param("w", nn.initializers.ones, (2, 4, 5)))


class LateNnx(RawNnx):
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


@pytest.fixture
def registry(monkeypatch):
    """The registry of layers, as it was after the test."""
    monkeypatch.setattr(layers, "_REGISTRY", dict(layers._REGISTRY))
    monkeypatch.setattr(layers, "_WEIGHTS", set(layers._WEIGHTS))


def test_the_error_for_an_unregistered_layer_has_the_line_that_registers_it(registry):
    for cls in (Raw, RawNnx):
        line = (
            f"aj.register_contraction({cls.__name__}, weight='<name of its weight>', "
            "equation='...d,df->...f')"
        )
        message = refusal(cls(), drawn((3, 4)))
        assert f"({cls.__name__} " in message and f"{line})" in message
        line = line.replace("<name of its weight>", "w").replace("...d,df->...f", "bd,ndh->bnh")
        eval(line, {"aj": aj, cls.__name__: cls})
    check_raw(Raw(), drawn((3, 4), 1))


def check_raw(module, *args, **options):
    """A registered linen layer of the weight (2, 4, 5), called with these arguments."""
    x = options.get("x", args[-1] if args else None)
    model = aj.adapt(module, RECIPE)
    params = {"w": drawn((2, 4, 5))}
    params = drawn_like(aj.init_adapters(model, params, jax.random.key(0), *args, **options))
    assert shapes(params) == {"w": (2, 4, 5), "lora": {"a": (4, 2), "b": (2, 2, 5)}}
    changed = Layer(None, None, x, (1,)).changed(params["w"], **params["lora"])
    expected = np.einsum("bd,ndh->bnh", double(x), double(changed))
    got = model.apply({"params": params}, *args, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    folded = aj.merge(model, params, *args, **options)
    np.testing.assert_allclose(folded["w"], changed, rtol=1e-5, atol=1e-5)


def check_raw_nnx(cls):
    model = aj.adapt(cls(), RECIPE, rngs=nnx.Rngs(0))
    model.lora["b"][...] = drawn((2, 2, 5), 2)
    x = drawn((3, 4), 1)
    changed = Layer(None, None, x, (1,)).changed(
        model.w[...], model.lora["a"][...], model.lora["b"][...]
    )
    expected = np.einsum("bd,ndh->bnh", double(x), double(changed))
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("equation", ["bd,ndh->bnh", lambda m: m.equation])
def test_a_registered_layer(registry, equation):
    aj.register_contraction(Raw, weight="w", equation=equation)
    aj.register_contraction(RawNnx, weight="w", equation=equation)
    assert "w" in layers.weight_names()
    check_raw(Raw(), drawn((3, 4), 1))
    check_raw(type("Sub", (Raw,), {})(), x=drawn((3, 4), 1))
    check_raw_nnx(RawNnx)
    check_raw_nnx(type("Sub", (RawNnx,), {}))


def test_a_registered_layer_that_gets_its_equation_at_the_call(registry):
    for cls in (Late, LateNnx):
        aj.register_contraction(
            cls, weight="w", equation=lambda m, equation, x, **_: equation, input=1
        )
    x, equation = drawn((3, 4), 1), "bd,ndh->bnh"
    check_raw(Late(), equation, x)
    check_raw(Late(), equation, x=x)
    check_raw(Late(), scale=1.0, x=x, equation=equation)
    message = refusal(LateNnx(), None)
    assert "(LateNnx " in message and "register" not in message


def test_an_nnx_layer_whose_equation_has_a_default(registry):
    class Defaulted(RawNnx):
        def __call__(self, x, equation="bd,ndh->bnh"):
            return jnp.einsum(equation, x, self.w[...])

    equation = lambda m, x=None, equation="bd,ndh->bnh": equation  # noqa: E731
    aj.register_contraction(Defaulted, weight="w", equation=equation)
    check_raw_nnx(Defaulted)


def test_a_registered_layer_without_that_weight_or_with_another_shape(registry):
    x = drawn((3, 4))
    key = jax.random.key(0)
    aj.register_contraction(Raw, weight="kernel", equation="bd,ndh->bnh")
    with raises(aj.RecipeError, "Raw", "'kernel'", "weight=", "aj.register_contraction"):
        aj.init_adapters(aj.adapt(Raw(), RECIPE), {}, key, x)
    aj.register_contraction(Raw, weight="w", equation="bd,df->bf")
    with raises(aj.RecipeError, "w ", "(2, 4, 5)", "2 axes"):
        aj.init_adapters(aj.adapt(Raw(), RECIPE), {}, key, x)
    with raises(aj.RecipeError, "'bd'"):
        aj.register_contraction(Raw, weight="w", equation="bd")
    aj.register_contraction(Raw, weight="w", equation=lambda m: "bd")
    with raises(aj.RecipeError, "'bd'"):
        aj.init_adapters(aj.adapt(Raw(), RECIPE), {}, key, x)


def test_the_input_is_found_among_the_arguments():
    class Module:
        def __call__(self, x, scale=1.0, *, mask=None):
            pass

    def found(*args, **kwargs):
        return layers.input_of(Module(), "__call__", args, kwargs)

    assert found(1, 2) == found(x=1) == found(scale=2, x=1) == found(mask=3, scale=2, x=1) == 1
    assert found() is None
    layer = nn.Einsum((4, 4))
    assert layers.input_of(layer, "__call__", (), {"einsum_str": "a", "inputs": 1}) == 1
