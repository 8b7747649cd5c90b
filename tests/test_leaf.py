"""Low-rank factors on every kind of layer: adapted, it is itself with weight + scale * A B."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn, drawn_like

import adapters_jax as aj
from adapters_jax.trees import flatten

RANK, ALPHA = 2, 3.0
RECIPE = aj.Recipe(aj.LoRA("**", RANK, ALPHA))


@dataclass
class Layer:
    """One layer in both forms, and which axes of its weight are inputs."""

    linen: nn.Module
    nnx: Any
    x: Any
    inputs: tuple[int, ...]
    shared: tuple[int, ...] = ()
    weight: str = "kernel"
    args: tuple[Any, ...] = ()
    call: str = "__call__"

    def changed(self, weight, a, b):
        """weight + alpha/r * A B in float64, by one einsum over the rank."""
        w = "abcdefg"[: np.ndim(weight)]
        shared, inputs = ("".join(w[i] for i in axes) for axes in (self.shared, self.inputs))
        outputs = "".join(c for c in w if c not in shared + inputs)
        product = np.einsum(f"{shared}{inputs}r,{shared}r{outputs}->{w}", double(a), double(b))
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
        new.get("shared", ()),
    )


def batched(batch_dims):
    """A linen layer with a kernel for each index of two axes."""
    module = nn.DenseGeneral(5, axis=-1, batch_dims=batch_dims)
    return Layer(module, None, drawn((2, 3, 4), 1), (2,), (0, 1))


def einsum(equation, kernel, shape, inputs, shared=(), at_call=False):
    """An Einsum layer that has its equation, or is called with it."""
    own, args = (None, (equation,)) if at_call else (equation, ())
    return Layer(
        nn.Einsum(kernel, own, use_bias=False),
        lambda rngs: built_einsum(equation, kernel, at_call, rngs),
        drawn(shape, 1),
        inputs,
        shared,
        args=args,
    )


def built_einsum(equation, kernel, at_call, rngs):
    layer = nnx.Einsum(equation, kernel, rngs=rngs)
    layer.einsum_str = None if at_call else equation
    return layer


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
    "general_batch": dense(
        5,
        (2, 3, 4),
        {"inputs": 4, "batch": {0: 2}, "kernel": (1,), "shared": (0,)},
        axis=(-1,),
        batch_dims=(0,),
    ),
    "general_two_batches": batched((0, 1)),
    "general_batches_turned": batched((1, 0)),
    "einsum": einsum("btd,df->btf", (4, 5), (2, 3, 4), (0,)),
    "einsum_dots": einsum("...d,df->...f", (4, 5), (2, 3, 4), (0,)),
    "einsum_heads": einsum("btd,dnh->btnh", (4, 2, 5), (2, 3, 4), (0,)),
    "einsum_outputs_first": einsum("btd,ndh->btnh", (2, 4, 5), (2, 3, 4), (1,)),
    "einsum_square_turned": einsum("bd,fd->bf", (4, 4), (2, 4), (1,)),
    "einsum_many_in": einsum("btnh,nhd->btd", (2, 5, 4), (2, 3, 2, 5), (0, 1)),
    "einsum_shared": einsum("btnd,ndh->btnh", (2, 4, 5), (2, 3, 2, 4), (1,), (0,)),
    "einsum_experts": einsum("ecd,edf->ecf", (3, 4, 5), (3, 2, 4), (1,), (0,)),
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
    "conv_grouped": conv((3,), (2, 9, 4), 6, feature_group_count=2),
    "conv_masked": conv((3,), (2, 9, 4), 6, mask=drawn((3, 4, 6), 9)),
    "embed": Layer(
        nn.Embed(7, 5), lambda rngs: nnx.Embed(7, 5, rngs=rngs), IDS, (0,), weight="embedding"
    ),
    "attend": Layer(
        nn.Embed(7, 5),
        lambda rngs: nnx.Embed(7, 5, rngs=rngs),
        drawn((2, 3, 5), 1),
        (0,),
        weight="embedding",
        call="attend",
    ),
}


def as_linen(layer):
    """Functions (parameters, x) of the adapted layer and the base, parameters, and them merged."""
    abstract = jax.eval_shape(
        lambda x: layer.linen.init(jax.random.key(0), x, *layer.args, method=layer.call)["params"],
        layer.x,
    )
    model = aj.adapt(layer.linen, RECIPE)
    start = (IDS,) if layer.call == "attend" else (layer.x, *layer.args)
    params = drawn_like(aj.init_adapters(model, abstract, jax.random.key(1), *start))

    def run(module):
        return lambda p, x: module.apply({"params": p}, x, *layer.args, method=layer.call)

    return run(model), run(layer.linen), params, aj.merge(model, params, *start)


def as_nnx(layer, params):
    """The same functions for the NNX layer, which read the same parameters."""

    def run(module):
        graphdef, state, rest = nnx.split(module, nnx.Param, ...)

        def call(params, x):
            values = flatten(params)
            filled = [
                (path, variable.replace(values["/".join(path)]))
                for path, variable in nnx.to_flat_state(state)
            ]
            module = nnx.merge(graphdef, nnx.from_flat_state(filled), rest)
            return getattr(module, layer.call)(x, *layer.args)

        return call

    base = nnx.eval_shape(lambda: layer.nnx(nnx.Rngs(0)))
    inputs = (layer.x, *layer.args) if layer.args else None  # flax's own layers need no inputs
    adapted = aj.adapt(base, RECIPE, rngs=nnx.Rngs(1), example_inputs=inputs)
    if isinstance(base, nnx.Conv):  # an array that is no parameter
        base.mask = adapted.mask = layer.linen.mask
    return run(adapted), run(base)


@pytest.mark.witness(
    "dense",
    "dense_one_axis",
    "attend",
    "embed",
    "conv",
    "conv2",
    "conv_grouped",
    "conv_same_lower",
    "conv_circular",
    "conv_strides",
    "conv_input_dilation",
    "general_out",
    "general_batch",
    "general_two_batches",
    "general_turned",
    "einsum",
    "einsum_heads",
    "einsum_experts",
    "einsum_shared",
    "einsum_at_call",
)
@pytest.mark.parametrize("name", LAYERS)
def test_adapted_is_the_layer_with_the_changed_weight(name):
    layer = LAYERS[name]
    adapted, base, params, folded = as_linen(layer)
    changed = dict(params)
    factors = {path[-1]: leaf for path, leaf in flatten(changed.pop("lora")).items()}
    changed[layer.weight] = layer.changed(params[layer.weight], **factors)
    np.testing.assert_allclose(folded[layer.weight], changed[layer.weight], rtol=1e-5, atol=1e-5)
    pairs = [(adapted, base)] + ([as_nnx(layer, params)] if layer.nnx else [])
    *outputs, before = jax.jit(
        lambda p, q, x: [*((f(p, x), g(q, x)) for f, g in pairs), base(p, x)]
    )(params, changed, layer.x)
    for got, expected in outputs:
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got, outputs[0][0], rtol=1e-4, atol=1e-4)
        assert np.abs(double(got) - double(before)).mean() > 0.5


def test_dense_by_hand():
    adapted, _, params, _ = as_linen(LAYERS["dense"])
    x, kernel, bias = map(double, (LAYERS["dense"].x, params["kernel"], params["bias"]))
    a, b = double(params["lora"]["a"]), double(params["lora"]["b"])
    expected = x @ kernel + bias + 1.5 * (x @ a @ b)
    np.testing.assert_allclose(adapted(params, LAYERS["dense"].x), expected, rtol=1e-4, atol=1e-5)
