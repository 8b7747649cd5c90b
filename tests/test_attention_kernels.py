"""Attention by kernels: the values and gradients of dense attention; the choice of one."""

import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.distributed import devices as described
from adapters_jax.distributed.program import Program
from adapters_jax.errors import UserError
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.encoder.families.modernbert import ModernBertConfig
from adapters_jax.finetune.models.encoder.model import Encoder
from adapters_jax.finetune.models.parts import attention
from adapters_jax.finetune.models.parts.attention import Attend, attention_function
from adapters_jax.finetune.models.parts.kernels import Cudnn, Problem, Splash
from adapters_jax.finetune.models.t5 import T5, T5Config
from adapters_jax.methods.mixed import mapping
from adapters_jax.trace.masks import Mask

LENGTH = 151  # neither even nor a multiple of a block
RNG = np.random.default_rng(0)
AT = np.arange(LENGTH)
LEFT = np.array([[0], [37]]) <= AT  # rows padded on the left
RIGHT = np.array([[151], [101]]) > AT
TEXTS = np.stack([AT // 70, AT // 111])
MASKS = {
    "all": Mask(),
    "causal": Mask(causal=True),
    "padded on the left": Mask(LEFT, causal=True),
    "padded on the right, both directions": Mask(RIGHT),
    "packed": Mask(RIGHT, TEXTS, causal=True),
    "window": Mask(causal=True, window=40),
    "window in both directions": Mask(LEFT, window=70),
    "prefix": Mask(LEFT, causal=True, prefix=5),
    "prefix and window": Mask(causal=True, window=20, prefix=5),
}


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def array(mask):
    """A mask as an array, by its definition for each pair."""
    at = np.arange(-mask.prefix, LENGTH)
    back, front = AT[:, None] - at, np.broadcast_to(at < 0, (LENGTH, len(at)))
    seen = np.ones((2, *back.shape), bool)
    seen &= (not mask.causal) | (back >= 0)
    seen &= np.abs(back) < (mask.window or np.inf)
    tokens = np.ones((2, LENGTH), bool) if mask.tokens is None else mask.tokens
    texts = np.ones((2, LENGTH)) if mask.segments is None else mask.segments
    seen &= tokens[:, None, at] & (texts[:, :, None] == texts[:, None, at])
    return (seen | front)[:, None]


def formula(query, key, value, seen, cap=None):
    """The attention in plain words, with each key head repeated for its group of queries."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def check(kernel, mask, cap=None):
    """Compares outputs and gradients at the queries that see a key."""
    query, key, value = normal(2, LENGTH, 4, 8), *normal(2, 2, LENGTH + mask.prefix, 2, 8)
    seen = array(mask)
    used = seen.any(-1)[:, 0, :, None, None]
    weight = normal(*query.shape) * used

    def both(attend):
        def weighed(*inputs):
            y = attend(*inputs)
            return (y * weight).sum(), y * used

        return jax.jit(jax.grad(weighed, (0, 1, 2), has_aux=True))(query, key, value)

    got = both(lambda *inputs: kernel(*inputs, jax.tree.map(jnp.asarray, mask), cap))
    expected = both(lambda *inputs: formula(*inputs, seen, cap))
    for ours, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


@pytest.mark.witness("causal")
@pytest.mark.parametrize("name", MASKS)
def test_splash_attention_gives_what_the_formula_gives(name):
    check(Splash(interpret=True), MASKS[name])


@pytest.mark.slow
def test_splash_attention_bounds_the_scores():
    check(Splash(interpret=True), Mask(causal=True), 1.5)


@pytest.mark.witness("all", "causal", "packed", "padded on the left", "prefix and window")
@pytest.mark.parametrize("name", MASKS)
def test_cudnn_is_asked_for_what_the_formula_gives(name):
    """JAX's own attention takes the same arguments on a CPU."""
    check(Cudnn("xla"), MASKS[name])


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_as_an_array(name):
    mask = MASKS[name]
    dense = jax.tree.map(jnp.asarray, mask).dense(LENGTH, LENGTH + mask.prefix)
    np.testing.assert_array_equal(np.broadcast_to(dense, array(mask).shape), array(mask))


@dataclass(frozen=True)
class Interpreted(Attend):
    """Splash attention, which a CPU interprets."""

    choice: str = "flash"

    def _kernel(self, problem):
        kernel = Splash(interpret=True)
        assert kernel.why_not(problem) is None
        return kernel, None


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
DECODER = DecoderConfig(17, **SMALL, num_attention_heads=4, num_key_value_heads=2)
GEMMA = DecoderConfig(
    17,
    **SMALL,
    num_attention_heads=4,
    num_key_value_heads=2,
    model_type="gemma2",
    sliding_window=3,
    layer_types=("sliding_attention", "full_attention"),
    attn_logit_softcapping=2.0,
)
IDS = jnp.asarray(RNG.integers(0, 17, (2, 9)), jnp.int32)
SEEN = jnp.asarray(np.arange(9) >= np.array([[0], [3]])).astype(jnp.int32)
PACKED = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 3, 3, 3, 3, 3]])


RECIPES = {
    "lora": aj.lora(2, targets="**/attention/{query,key,value,output}/kernel"),
    "llama adapter": aj.LlamaAdapter("**/attention", 3),
    "prefix": aj.PrefixTuning("**/attention", 3),
}


def noise(tree):
    """Parameters that are not zero, so that gates are open and factors have gradients."""
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * generator.normal(size=x.shape), x.dtype), tree)


def outcome(config, recipe, choice, options, *inputs):
    """Hidden states of the tokens, and the gradients of all parameters."""
    model = Decoder(config, attention=choice, rngs=nnx.Rngs(0), **options)
    model = aj.adapt(model, recipe, rngs=nnx.Rngs(1), example_inputs=(IDS,))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        hidden = nnx.merge(graphdef, params, rest).hidden(*inputs)
        hidden = hidden * (1 if inputs[1] is None else inputs[1][..., None])
        return jnp.sin(hidden).sum(), hidden

    return jax.jit(jax.grad(loss, has_aux=True))(noise(params))


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("method", "config", "inputs"),
    [
        ("lora", DECODER, (IDS, SEEN)),
        ("lora", GEMMA, (IDS, None, None, PACKED)),
        ("llama adapter", GEMMA, (IDS, SEEN)),
        ("prefix", GEMMA, (IDS, SEEN)),
    ],
)
def test_a_decoder_by_a_kernel_is_the_dense_one(method, config, inputs):
    options = {"remat": True, "scan": config is DECODER}
    got, expected = (
        outcome(config, RECIPES[method], choice, options, *inputs)
        for choice in (Interpreted(), "dense")
    )
    for ours, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BertConfig, {}),
        (ModernBertConfig, {"local_attention": 8, "global_attn_every_n_layers": 2}),
    ],
)
def test_an_encoder_by_a_kernel_is_the_dense_one(kind, settings):
    config = kind(17, **SMALL, num_attention_heads=2, **settings)
    params = noise(Encoder(config).init(jax.random.key(0), IDS))

    @jax.jit
    def hidden(params):
        found = (Encoder(config, attention=each) for each in (Interpreted(), "dense"))
        return [model.apply(params, IDS, SEEN) * SEEN[..., None] for model in found]

    np.testing.assert_allclose(*hidden(params), atol=2e-5)


QUERY = jnp.ones((2, 600, 2, 8), jnp.bfloat16)


@pytest.fixture
def on(monkeypatch):
    """Makes the choice believe in a device, by its platform and kind."""

    class Device:
        def __init__(self, platform, device_kind):
            self.platform, self.device_kind = platform, device_kind

    return lambda *names: monkeypatch.setattr(attention, "_device", lambda: Device(*names))


def taken(choice, **changes):
    """The kernel that a choice takes, and why what it takes cannot run."""
    return Attend(choice)._kernel(Problem(QUERY, QUERY, Mask(causal=True))._replace(**changes))


def test_masks_that_are_arrays_are_dense_while_mapped_over_adapters(on):
    """JAX cannot map cuDNN's call with such a mask; splash attention has no such masks."""
    tokens = Mask(tokens=jnp.ones(QUERY.shape[:2], bool), causal=True)
    on("gpu", "NVIDIA H100")
    assert isinstance(taken("auto", mask=tokens)[0], Cudnn)
    with mapping():
        assert taken("auto", mask=tokens) == (None, None)
        assert isinstance(taken("auto")[0], Cudnn)
        with raises(UserError, "cannot map", "attention='auto'"):
            taken("flash", mask=tokens)
    on("tpu", "TPU v5")
    with mapping():
        assert isinstance(taken("flash", mask=tokens)[0], Splash)


def test_the_kernel_of_the_device_is_taken_where_it_can_be(on):
    for device, kernel in ((("tpu", "TPU v5"), Splash), (("gpu", "NVIDIA H100"), Cudnn)):
        on(*device)
        assert isinstance(taken("auto")[0], kernel) and isinstance(taken("flash")[0], kernel)
        assert taken("dense") == (None, None)
        assert taken("auto", key=QUERY[:, :500]) == (None, None)  # it is short
        assert isinstance(taken("flash", key=QUERY[:, :500])[0], kernel)
    on("gpu", "AMD Instinct MI300X")
    assert taken("auto") == (None, None) and "MI300X" in taken("flash")[1]


@pytest.mark.parametrize(
    ("device", "changes", "data"),
    [
        (("tpu", "TPU v5"), {"query": QUERY.astype(jnp.float16)}, ("float16", "bfloat16")),
        (("tpu", "TPU v5"), {"mask": Mask(None, TEXTS, prefix=3)}, ("prefix", "segments")),
        (("tpu", "TPU v5"), {"mask": jnp.ones((1, 1, 600, 600), bool)}, ("mask", "array")),
        (("tpu", "TPU v5"), {"query": QUERY[0]}, ("(600, 2, 8)",)),
        (("gpu", "NVIDIA H100"), {"biased": True}, ("bias",)),
        (("gpu", "NVIDIA H100"), {"drops": True}, ("drop",)),
        (("tpu", "TPU v5"), {"sunk": True}, ("sinks",)),
        (("tpu", "TPU v5"), {"wider": True}, ("wider",)),
        (("gpu", "NVIDIA H100"), {"softcap": 30.0}, ("cap", "30.0")),
        (("gpu", "NVIDIA H100"), {"query": QUERY.astype(jnp.float32)}, ("float32", "bfloat16")),
        (("gpu", "NVIDIA H100"), {"query": jnp.ones((1, 9, 1, 12), jnp.bfloat16)}, ("8", "12")),
    ],
)
def test_what_a_kernel_cannot_compute_is_dense_or_refused(on, device, changes, data):
    on(*device)
    assert taken("auto", **changes) == (None, None)
    with raises(UserError, "flash", "auto", *data):
        taken("flash", **changes)


def test_a_kernel_gets_values_as_wide_as_keys(monkeypatch):
    """As those of latent attention, which are narrower."""
    shapes = []

    class Dense:
        def runs_on(self, device):
            return True

        def why_not(self, problem):
            return "wide" if problem.wider else None

        def __call__(self, query, key, value, mask, cap):
            shapes.append(value.shape)
            return attention_function("dense")(query, key, value, mask=mask, softcap=cap)

    monkeypatch.setattr(attention, "KERNELS", (Dense(),))
    query, value = QUERY[:, :4].astype(jnp.float32), QUERY[:, :4, :, :3].astype(jnp.float32)
    flash, dense = attention_function("flash"), attention_function("dense")
    found = flash(query, query, value, mask=Mask(causal=True))
    assert shapes == [query.shape]
    np.testing.assert_allclose(found, dense(query, query, value, mask=Mask(causal=True)), atol=1e-6)
    with raises(UserError, "wide"):
        flash(value, value, query)


def test_flash_without_a_kernel_has_shapes_but_no_program():
    flash, dense = attention_function("flash"), attention_function("dense")
    query = QUERY[:, :4].astype(jnp.float32)

    def loss(query):
        return flash(query, query, query, mask=Mask(causal=True)).sum()

    rows = jax.eval_shape(jax.vmap(jax.grad(loss)), query[None])
    assert rows.shape == (1, *query.shape)
    for run in (loss, jax.jit(jax.grad(loss)), jax.jit(jax.vmap(loss))):
        with raises(UserError, "flash", "cpu", "auto"):
            run(query[None] if run is not loss else query)
    auto = attention_function("auto")(query, query, query)
    np.testing.assert_array_equal(auto, dense(query, query, query))


def test_a_choice_that_is_none():
    for build in (
        lambda: Decoder(DECODER, attention="fast", rngs=nnx.Rngs(0)),
        lambda: T5(T5Config(), attention="fast", rngs=nnx.Rngs(0)),
        lambda: Bert(BertConfig(17, **SMALL, num_attention_heads=2), attention="fast").init(
            jax.random.key(0), IDS
        ),
    ):
        with raises(UserError, "'fast'", "auto, dense, flash"):
            jax.eval_shape(build)


def test_the_default_device_decides_where_no_mesh_does():
    with jax.default_device("cpu"):
        assert attention._device().platform == "cpu"
    with jax.default_device(jax.devices()[0]):
        assert attention._device() == jax.devices()[0]


@pytest.mark.weekly
def test_each_device_has_its_rows_and_heads():
    """A row and two heads for each of eight devices."""
    code = """
import jax, jax.numpy as jnp, numpy as np, adapters_jax as aj
from adapters_jax.trace.masks import Mask
from adapters_jax.finetune.models.parts.kernels import Splash
from adapters_jax.weights.meshes import on_mesh

query, key, value = (
    jax.random.normal(jax.random.key(i), (4, 130, heads, 8)) for i, heads in enumerate((4, 2, 2))
)
tokens = jnp.arange(130) >= jnp.array([[0], [3], [9], [40]])
mask, kernel = Mask(tokens, jnp.ones((1, 130), int), causal=True), Splash(interpret=True)
def loss(*inputs):
    y = kernel(*inputs, mask, None) * tokens[..., None, None]
    return jnp.sin(y).sum(), y

whole = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
with on_mesh(aj.make_mesh("data=2,fsdp=2,model=2")):
    split = jax.jit(lambda *x: jax.grad(loss, (0, 1, 2), has_aux=True)(*x))(query, key, value)
assert split[1].sharding.shard_shape(split[1].shape) == (1, 130, 2, 8), split[1].sharding
for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
"""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


# What follows compiles for accelerators.


def program(device, choice, mesh="data=1", packed=False, length=1023):
    """The program of a step of a decoder with grouped heads of 64."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = DecoderConfig(256, **sizes, num_attention_heads=4, num_key_value_heads=2)
    options = {"param_dtype": jnp.bfloat16, "attention": choice}

    def build():
        model = Decoder(config, rngs=nnx.Rngs(0), **options)
        return aj.adapt(model, aj.lora(4), rngs=nnx.Rngs(1), example_inputs=(IDS,))

    def loss(model, batch, key):
        return model.hidden(batch, segments=batch if packed else None).astype(jnp.float32).mean()

    mesh = aj.make_mesh(mesh, aj.devices(device))
    state = aj.shard(aj.abstract_state(nnx.eval_shape(build), tx=optax.sgd(0.1)), mesh)
    batch = aj.shard_batch(jax.ShapeDtypeStruct((8, length), jnp.int32), mesh)
    step = aj.make_train_step(loss).jitted
    return Program.of(step.lower(state.replace(base=None), state.base, batch).compile())


SCORES = 8 * 4 * 1023 * 1023 * 2  # bytes of those of the layer, in bfloat16
have = described._installed
tpu = pytest.mark.skipif(not have("libtpu"), reason="needs libtpu: pip install 'adapters-jax[tpu]'")
cuda = pytest.mark.skipif(
    not have("jax-cuda13-plugin"), reason="needs CUDA's compiler: pip install 'adapters-jax[cuda]'"
)


def check_program(device, kernel, parts):
    dense, auto = (program(device, choice) for choice in ("dense", "auto"))
    assert not dense.kernels and dense.temporaries > SCORES
    assert sum(auto.kernels.values()) >= 2 and all(kernel in name for name in auto.kernels)
    assert auto.temporaries < dense.temporaries - SCORES / 2
    packed = program(device, "flash", packed=True)
    assert packed.kernels and packed.temporaries < dense.temporaries - SCORES / 4
    split = program(device + parts, "flash", "data=2,fsdp=2,model=2")
    assert split.kernels and split.temporaries < SCORES / 4
    assert not program(device, "auto", length=100).kernels


@tpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_tpu_gets_splash_attention():
    check_program("v5e", "tpu_custom_call", ":2x4")


@cuda
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_gpu_gets_the_attention_of_cudnn():
    check_program("h100", "fmha", ":8")
