"""Gates: what a step of every method may hold, write and compute, by the compilers of accelerators.

Each is compiled for a device that this machine need not have; see `aj.devices`. A method that is
registered and not here fails the first test.
"""

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from helpers.floor import products
from helpers.gates import (
    FLOATS,
    HIDDEN,
    MATRICES,
    MODELS,
    TOKENS,
    VOCAB,
    WIDTH,
    D,
    compiled,
    copies,
    exchanged,
    floor_of,
    stored,
    written,
)

import adapters_jax as aj
from adapters_jax import methods
from adapters_jax.distributed import devices as described
from adapters_jax.training.losses import cross_entropy
from adapters_jax.weights import kernel, packed

slow = pytest.mark.slow
tpu = pytest.mark.skipif(
    described._installed("libtpu") is None, reason="needs libtpu: pip install 'adapters-jax[tpu]'"
)
cuda = pytest.mark.skipif(
    described._installed("jax-cuda13-plugin") is None,
    reason="needs the CUDA compiler: pip install 'adapters-jax[cuda]'",
)
pytestmark = pytest.mark.usefixtures("optimized")

RECIPES = {
    "bottleneck": aj.houlsby(8),
    "compacter": aj.compacter(8),
    "loreft": aj.Recipe(aj.LoReFT("**/mlp/output", 4, suffix_positions=2)),
    "lora": aj.lora(4),
    "dora": aj.Recipe(aj.DoRA("**/{query,value}", 4)),
    "loha": aj.loha(4),
    "lokr": aj.lokr(4),
    "oft": aj.oft(8, terms=5),
    "vera": aj.vera(4),
    "adalora": aj.adalora(4),
    "activated_lora": aj.lora(4, invocation=(5, 6)),
    "ia3": aj.ia3(),
    "llama_adapter": aj.Recipe(aj.LlamaAdapter("**/attention", 4)),
    "prefix": aj.Recipe(aj.PrefixTuning("**/attention", 4)),
    "prompt_tuning": aj.Recipe(aj.PromptTuning("embeddings{|/word}", 4)),
    "invertible": aj.Recipe(methods.Invertible("embeddings", reduction_factor=4.0)),
    "unfreeze": aj.layer_norms(),
}
# DoRA's norms depend on parameters alone, and in a scanned linen model on those of all layers:
# they are taken in front of the loop, where a quantised base is in floats on the way. So are OFT's
# rotations, whose small blocks a TPU stores in tiles that are 16 times as large.
AT_ONCE = {("linen", True, "dora"), ("linen", True, "oft")}
# LoHa and LoKr form the sum of one weight at a time, in float32.
FORMED = ("loha", "lokr")
# XLA takes the sums in the gradients of VeRA's scales into other products.
FEWER = {"vera": 0.999, "compacter": 0.9999}  # and some thin sums of Compacter's kernels


def test_every_method_that_is_registered_has_a_gate():
    named = vars(methods).values()  # unlike those of doctests
    known = {name: each for name, each in methods.METHODS.items() if each in named}
    # A composition computes what its members do.
    single = {n for n, each in known.items() if not issubclass(each, methods.Composition)}
    assert single == set(RECIPES)


DTYPES = ("bf16", "int8", "int4")
FORMS = [(api, scan) for api in MODELS for scan in (False, True)]
# Each program takes 5 to 20 seconds to compile. With every change, two methods have each form of
# model and of base; the others a scanned linen model, and an NNX one in int4, which is as int8 but
# for its unpacking. Once a week these have all bases, and some methods the other two forms.
EVERY = ("bottleneck", "lora")
WEEKLY = ("dora", "ia3", "llama_adapter", "prefix", "unfreeze")


def often(method, api, scan):
    """The dtypes of the bases that a method's step is compiled with when anything changes."""
    if method in EVERY:
        return DTYPES
    if scan != (api == "linen"):
        return ()
    if not scan:
        return ("int4",)
    return ("bf16",) if (api, scan, method) in AT_ONCE else ("bf16", "int4")


def weekly(method, api, scan):
    """The dtypes that are left for once a week."""
    left = [dtype for dtype in DTYPES if dtype not in often(method, api, scan)]
    return left if method in WEEKLY or scan == (api == "linen") else []


def steps(chosen):
    """Those of all steps for which `chosen` gives dtypes, with them."""
    return [
        pytest.param(method, api, scan, found, id=f"{method}-{api}-{'scan' if scan else 'plain'}")
        for method in RECIPES
        for api, scan in FORMS
        if (found := chosen(method, api, scan))
    ]


def check_step(method, api, scan, dtypes):
    """The base is no output, is copied nowhere and never in floats as a whole; no product is done
    that a gradient of the adapters can do without."""
    state, loss = MODELS[api](RECIPES[method], scan, "bf16")
    base, (needed, recomputed) = stored(state.base), floor_of(state, loss)
    for dtype in dtypes:
        state, loss = MODELS[api](RECIPES[method], scan, dtype)
        step = compiled(state, loss)
        program, trained = step.program, stored((state.adapters, state.opt_state))
        assert program.outputs - program.aliased < 10_000, dtype  # the metrics
        assert trained <= program.aliased, dtype
        least = FEWER.get(method, 1.0) * needed
        assert least <= products(step.text) <= 1.01 * (needed + recomputed), dtype
        if (api, scan, method) not in AT_ONCE:
            if method not in FORMED:
                assert copies(step.text, scan, dtype == "bf16") == [], dtype
            if scan:
                assert program.total - program.arguments < base / 4, dtype


@tpu
@slow
@pytest.mark.witness("lora-NNX-plain", "lora-linen-scan", "bottleneck-NNX-scan")
@pytest.mark.witness("llama_adapter-linen-scan", "dora-NNX-plain")
@pytest.mark.parametrize(("method", "api", "scan", "dtypes"), steps(often))
def test_a_step_holds_its_base_once_and_computes_what_it_must(method, api, scan, dtypes):
    check_step(method, api, scan, dtypes)


@tpu
@pytest.mark.weekly
@pytest.mark.parametrize(("method", "api", "scan", "dtypes"), steps(weekly))
def test_so_do_the_other_forms_of_models_and_bases(method, api, scan, dtypes):
    check_step(method, api, scan, dtypes)


@tpu
@slow
def test_full_fine_tuning_computes_every_gradient_and_returns_no_copy():
    for api, model in MODELS.items():
        state, loss = model(aj.full(), False, "bf16")
        step, (needed, _) = compiled(state, loss), floor_of(state, loss)
        assert needed <= products(step.text) <= 1.01 * needed, api
        assert step.program.outputs - step.program.aliased < 10_000, api
        (lora, _) = floor_of(*model(RECIPES["lora"], False, "bf16"))
        assert needed > 1.4 * lora, api


PER_LAYER = {
    "NNX": Counter({(D, D): 2, (D, WIDTH): 2, (D, HIDDEN): 2, (HIDDEN, D): 1}),
    "linen": Counter({(D, D): 4, (D, HIDDEN): 1, (HIDDEN, D): 1}),
}
# Backward, a linen encoder gathers query, key and value once to compute them again, and once for
# the gradient of their input.
TWICE = {"NNX": Counter(), "linen": Counter({(D, D): 3})}


@tpu
@slow
@pytest.mark.parametrize(("api", "mesh"), [("NNX", "fsdp=4"), ("linen", "data=2,fsdp=2")])
def test_devices_exchange_weights_and_gradients_of_adapters_alone(api, mesh):
    """A layer's weights are gathered at most once forward and once backward, and rows stay split.

    There are so many rows that activations are larger than weights; with fewer, XLA rightly
    exchanges activations.
    """
    state, loss = MODELS[api](RECIPES["lora"], True, "bf16", 6)
    step = compiled(state, loss, "v5e:2x2", mesh, 16)
    found = list(exchanged(step.text))
    gathered = Counter(shape for rounds, _, shape in found if rounds == 6 and shape in MATRICES)
    assert gathered and gathered <= PER_LAYER[api] + PER_LAYER[api] + TWICE[api]
    activations = [shape for _, _, shape in found if TOKENS in shape and len(shape) > 2]
    assert not activations
    sums = step.program.collectives.get("all-reduce", 0)
    looked_up = 2 * TOKENS * D  # positions, from a split table
    assert 0 < sums <= stored(state.adapters) + (looked_up if api == "linen" else 1000)


@tpu
@slow
def test_a_loss_in_chunks_gathers_a_split_head_once():
    """Forward and backward need it at the same time, in each chunk."""
    state, _ = MODELS["NNX"](RECIPES["lora"], True, "bf16", 2)

    def loss(model, ids, key):
        hidden = model.hidden(ids[:, :-1])
        return cross_entropy(hidden, model.logits, ids[:, 1:], chunk=TOKENS // 3)

    found = exchanged(compiled(state, loss, "v5e:2x2", "fsdp=4", 16).text)
    heads = [each for each in found if sorted(each[2]) == sorted((D, VOCAB))]
    assert sorted(heads) == [
        (1, "all-gather", (D, VOCAB)),
        (1, "all-gather", (VOCAB, D)),  # the embeddings
    ]


@tpu
@slow
def test_a_base_that_is_widened_or_copied_does_not_pass():
    """A loss that turns a matrix around in float32, and one that turns a stack as it is stored."""

    def turns(loss, kernel_of, dtype):
        def turned(model, ids, key):
            kernel = kernel_of(model).kernel[...].astype(dtype)
            kernel = jax.lax.optimization_barrier(jnp.flip(kernel, 0))
            return loss(model, ids, key) + kernel.ravel()[0].astype(jnp.float32)

        return turned

    for scan, kernel_of, dtype, expected in (
        (False, lambda model: model.layers[0].mlp.up, jnp.float32, f"f32[{D}, {HIDDEN}]"),
        (True, lambda model: model.layers.mlp.up, jnp.bfloat16, f"bf16[1000, {D}, {HIDDEN}]"),
    ):
        state, loss = MODELS["NNX"](RECIPES["lora"], scan, "bf16")
        found = copies(compiled(state, turns(loss, kernel_of, dtype)).text, scan, True)
        assert any(each.startswith(expected) for each in found), found


# What a layer and a head have of a base; with the numbers in blocks of 64, and turned around.
WEIGHTS = {(D, D), (D, HIDDEN), (HIDDEN, D), (D, VOCAB), (VOCAB, D), (D // 64, 64, HIDDEN)}


def in_floats(text):
    """The shapes of what a program writes in floats."""
    return {shape for dtype, shape, _ in written(text) if dtype in FLOATS}


@tpu
@slow
@pytest.mark.parametrize("dtype", ["int4", "nf4"])
def test_one_tpu_writes_no_weight_in_blocks_in_floats(dtype, monkeypatch):
    """Nor is a table whose rows are looked up; nor would it pass if they were."""
    state, loss = MODELS["NNX"](RECIPES["lora"], False, dtype)
    step = compiled(state, loss)
    assert not WEIGHTS & in_floats(step.text)
    # Seven products of both layers and the head, forward and backward; but the input of the first
    # layer needs no gradient from its three projections.
    assert step.program.kernels["tpu_custom_call"] == 2 * (7 * 2 + 1) - 3
    monkeypatch.setattr(packed.Packed, "platforms", ())
    assert {(D, HIDDEN), (HIDDEN, D), (D, VOCAB)} <= in_floats(compiled(state, loss).text)


@tpu
@slow
def test_several_tpus_take_wide_weights_block_by_block(monkeypatch):
    """XLA cannot split the kernel that one TPU has."""
    state, loss = MODELS["NNX"](RECIPES["lora"], False, "int4")
    monkeypatch.setattr(packed, "OUTPUTS", 0)  # the widths are a toy's
    step = compiled(state, loss, "v5e:2x2", "data=4", 4)
    assert not step.program.kernels
    assert not {(D, HIDDEN), (D, VOCAB)} & in_floats(step.text)
    monkeypatch.setattr(packed, "OUTPUTS", VOCAB)
    assert (D, HIDDEN) in in_floats(compiled(state, loss, "v5e:2x2", "data=4", 4).text)


SHAPES = [  # rows, the weight, its block, and the dtype of the input
    ("v5e", 2048, (4096, 14336), 64, jnp.bfloat16),
    ("v5p", 2047, (4096, 128256), 64, jnp.bfloat16),
    ("v6e", 300, (2560, 10240), 128, jnp.bfloat16),
    ("v5e", 1024, (2560, 262_208), 64, jnp.bfloat16),  # Gemma 3's head: no tile divides it
    ("v5e", 1, (576, 1536), 64, jnp.float32),
    ("v5p", 33, (200, 130), 8, jnp.float32),
]


@tpu
@slow
@pytest.mark.witness("v5p-2047-shape1-64-bfloat16", "v6e-300-shape2-128-bfloat16")
@pytest.mark.parametrize(("device", "rows", "shape", "block", "dtype"), SHAPES)
def test_the_kernel_compiles_for_every_tpu(device, rows, shape, block, dtype):
    there = jax.sharding.SingleDeviceSharding(aj.devices(device)[0])
    kinds = ("int4", "nf4", "int8")
    for qtype, along, contracted in itertools.product(kinds, (0, 1), (0, 1)):
        weight = shape[::-1] if along else shape
        sizes = (rows, weight[contracted]), weight, (shape[0] // block, shape[1])
        numbers = jnp.dtype("uint4" if qtype == "nf4" else qtype)
        pairs = zip(sizes, (dtype, numbers, jnp.float32), strict=True)
        given = [jax.ShapeDtypeStruct(*each, sharding=there) for each in pairs]
        run = functools.partial(kernel.product, along=along, contracted=contracted, qtype=qtype)
        text = jax.jit(run).lower(*given).compile().as_text()
        assert "tpu_custom_call" in text and weight not in in_floats(text)


@cuda
@slow
def test_a_gpu_writes_no_weight_of_int8_in_floats(monkeypatch):
    state, loss = MODELS["NNX"](RECIPES["lora"], False, "int8")
    whole = {(D, HIDDEN), (HIDDEN, D), (D, VOCAB), (VOCAB, D)}
    assert not whole & in_floats(compiled(state, loss, "h100").text)
    monkeypatch.setattr(packed.Packed, "platforms", ())
    assert (D, HIDDEN) in in_floats(compiled(state, loss, "h100").text)


@cuda
@slow
@pytest.mark.parametrize("scan", [False, True], ids=["plain", "scan"])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_a_step_on_a_gpu_holds_its_base_once(dtype, method, scan):
    """As on a TPU, but for the products, which are calls of cuBLAS."""
    state, loss = MODELS["NNX"](RECIPES[method], scan, dtype)
    step = compiled(state, loss, "h100")
    assert step.program.outputs - step.program.aliased < 10_000
    floats = dtype == "bf16" and not scan  # a GPU copies each layer out of its stack
    assert not copies(step.text, scan, floats)
    if scan:  # otherwise the activations are as large as the base
        assert step.program.total - step.program.arguments < stored(state.base) / 3
