"""Prompts in attention: values of a plain formula, with gates that are open."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.models.decoder import LLAMA_7B, Decoder, DecoderConfig
from adapters_jax.finetune.models.parts.attention import attention_function
from adapters_jax.finetune.models.parts.functions import dot_product_attention
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.trace import registry

B, T, D, HEADS, WIDTH, K = 2, 5, 16, 4, 4, 3
CAUSAL = np.tril(np.ones((T, T), bool))[None, None]
LAYERS = 3
TINY = DecoderConfig(
    vocab_size=17,
    hidden_size=D,
    intermediate_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
)
rng = np.random.default_rng(0)
X = rng.standard_normal((B, T, D)).astype(np.float32)
IDS = rng.integers(0, 17, (B, T)).astype(np.int32)


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(query, key, value, mask=None):
    """Attention over (length, heads, width) in float64, a head at a time."""
    out = np.zeros_like(query)
    group = query.shape[-2] // key.shape[-2]
    for b in range(len(query)):
        for h in range(query.shape[-2]):
            scores = query[b, :, h] @ key[b, :, h // group].T / np.sqrt(query.shape[-1])
            if mask is not None:
                scores = np.where(mask[0, 0], scores, -np.inf)
            out[b, :, h] = softmax(scores) @ value[b, :, h // group]
    return out


def project(x, layer):
    return np.einsum("...d,dhk->...hk", x, layer["kernel"]) + layer["bias"]


def formula(params, method, x=X):
    """The adapted flax attention: two softmaxes for the gated prompt, one for the prefix."""
    p = double(params)
    names = ("query", "key", "value")
    query, key, value = (project(x.astype(np.float64), p[name]) for name in names)
    if isinstance(method, aj.LlamaAdapter):
        prompt = p["prompt"]["embedding"]
        ahead = [np.stack([project(prompt, p[name])] * B) for name in names[1:]]
        gate = p["prompt"]["gate"][:, None]
        gate = np.tanh(gate) if method.gate_activation == "tanh" else gate
        mixed = attend(query, key, value, CAUSAL) + gate * attend(query, *ahead)
    else:
        key = np.concatenate([np.stack([p["prefix"]["key"]] * B), key], axis=1)
        value = np.concatenate([np.stack([p["prefix"]["value"]] * B), value], axis=1)
        seen = np.concatenate([np.ones((1, 1, T, K), bool), CAUSAL], axis=-1)
        mixed = attend(query, key, value, seen)
    return np.einsum("bthk,hkd->btd", mixed, p["out"]["kernel"]) + p["out"]["bias"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, mask=jnp.asarray(CAUSAL))


class Nnx(nnx.Module):
    def __init__(self):
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.attention(x, mask=jnp.asarray(CAUSAL))


def noise(tree, seed=1):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.5 * generator.standard_normal(x.shape), jnp.float32), tree
    )


METHODS = {
    "heads, tanh": aj.LlamaAdapter("attention", K),
    "heads, identity": aj.LlamaAdapter("attention", K, gate_activation="identity"),
    "layer, tanh": aj.LlamaAdapter("attention", K, gate="layer"),
    "prefix": aj.PrefixTuning("attention", K),
}


@pytest.mark.witness("heads, tanh", "prefix")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_flax_attention_computes_the_formula(method):
    shapes = jax.eval_shape(lambda: Linen().init(jax.random.key(0), X)["params"])
    model = aj.adapt(Linen(), method)
    params = noise(aj.init_adapters(model, shapes, jax.random.key(0), X))
    expected = formula(params["attention"], method)
    np.testing.assert_allclose(model.apply({"params": params}, X), expected, rtol=1e-6, atol=2e-6)

    other = aj.adapt(Nnx(), method, rngs=nnx.Rngs(0))  # no example inputs are needed
    nnx.update(other, params)
    np.testing.assert_allclose(other(X), expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.witness("head")
@pytest.mark.parametrize("gate", ["head", "layer"])
def test_llama_adds_the_prompt_to_rotated_queries_and_grouped_heads(gate):
    """Each layer's attention function is watched; what it gives and gets are put together here."""
    calls = []

    def watched(query, key, value, **kwargs):
        mixed = nnx.dot_product_attention(query, key, value, **kwargs)
        calls.append((query, mixed))
        return mixed

    def open_gates(model):
        nnx.update(model, noise(nnx.state(model, aj.nnx.AdapterParam), seed=2))
        return model

    def build(attention_fn):
        return Decoder(TINY, attention=attention_fn, rngs=nnx.Rngs(0))

    recipe = aj.llama_adapter(K, last=2, num_layers=LAYERS, gate=gate)
    model = open_gates(aj.adapt(build(watched), recipe, rngs=nnx.Rngs(1)))
    layer = model.layers[1].attention
    outputs = []
    layer.output = lambda x: outputs.append(x) or jnp.zeros((B, T, D))
    model(IDS)
    query, mixed = double(calls[1 - LAYERS])  # the first call runs the model abstractly before
    prompt = double(layer.prompt["embedding"][...])
    key, value = (
        np.stack([(prompt @ double(child.kernel[...])).reshape(K, 2, WIDTH)] * B)
        for child in (layer.key, layer.value)
    )
    gates = np.tanh(double(layer.prompt["gate"][...]))[:, None]
    expected = mixed + gates * attend(query, key, value)
    np.testing.assert_allclose(outputs[-1], expected.reshape(B, T, D), atol=2e-6)
    assert not hasattr(model.layers[0].attention, "prompt")
    assert layer.attention_fn == attention_function(watched)


@pytest.mark.slow
def test_the_prompt_has_no_position_and_hides_behind_no_mask():
    model = aj.adapt(Decoder(TINY, rngs=nnx.Rngs(0)), aj.llama_adapter(K), rngs=nnx.Rngs(1))
    nnx.update(model, noise(nnx.state(model, nnx.Param)))
    model = nnx.jit(model)
    near = model(IDS, positions=jnp.arange(T)[None])
    far = model(IDS, positions=100 + jnp.arange(T)[None])
    assert np.abs(near - far).max() > 1e-2  # rotated queries against keys that are not
    padded = model(IDS, jnp.asarray([[0, 0, 1, 1, 1]] * B))
    alone = model(IDS[:, 2:])
    np.testing.assert_allclose(padded[:, 2:], alone, atol=1e-5)


@pytest.mark.slow
def test_llama_7b_has_the_published_counts_without_allocating():
    base = nnx.eval_shape(lambda: Decoder(LLAMA_7B, rngs=nnx.Rngs(0)))
    for gate, count in (("head", 1_229_760), ("layer", 1_228_830)):
        recipe = aj.llama_adapter(last=30, num_layers=32, gate=gate)
        model = aj.adapt(base, recipe, rngs=nnx.Rngs(0))
        audit = aj.audit(model)
        assert audit.adapter_parameters == audit.trainable_parameters == count
        assert len(audit.entries) == 30
    assert audit.entries[0].formula == "10*4096 + 1"


@pytest.mark.slow
def test_lora_on_the_key_projection_also_projects_the_prompt():
    recipe = aj.llama_adapter(K) + aj.LoRA("layers/*/attention/key", 2)
    model = aj.adapt(Decoder(TINY, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    nnx.update(model, noise(nnx.state(model, aj.nnx.AdapterParam)))
    base = Decoder(TINY, rngs=nnx.Rngs(0))
    folded = aj.adapt(base, aj.LoRA("layers/*/attention/key", 2), rngs=nnx.Rngs(1))
    for here, there in zip(model.layers, folded.layers, strict=True):
        nnx.update(there.attention.key, nnx.state(here.attention.key))
    prompts = aj.adapt(aj.merge(folded), aj.llama_adapter(K), rngs=nnx.Rngs(1))
    for here, there in zip(model.layers, prompts.layers, strict=True):
        nnx.update(there.attention.prompt, nnx.state(here.attention.prompt))
    np.testing.assert_allclose(model(IDS), prompts(IDS), atol=1e-5)


class ZooAttention(nn.Module):
    """An attention of another library: its own names, heads side by side, a bias in its call."""

    attend: object = nn.dot_product_attention

    def setup(self):
        self.q_proj, self.k_proj, self.v_proj = (nn.Dense(D) for _ in range(3))

    def __call__(self, x):
        heads = (*x.shape[:-1], HEADS, WIDTH)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.attend(query, key, value, jnp.zeros((1, 1, 1, T))).reshape(x.shape)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


class Zoo(nn.Module):
    @nn.compact
    def __call__(self, x):
        return ZooAttention(name="attention")(x)


def zoo(method):
    model = aj.adapt(Zoo(), method)
    base = jax.eval_shape(lambda: Zoo().init(jax.random.key(0), X)["params"])
    return model, noise(aj.init_adapters(model, base, jax.random.key(0), X))


@jax.custom_vjp
def kernel(query, key, value, bias=None):
    """An attention function that cannot be seen into."""
    return nn.dot_product_attention(query, key, value, bias)


kernel.defvjp(lambda *args: (kernel(*args), args), lambda args, change: args)


@pytest.mark.slow
@pytest.mark.parametrize("registered", [False, True])
def test_an_attention_of_another_library(known, registered):
    """The softmax is found; what is registered computes the same by its attention function."""
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_fn": "attend"}
    if registered:
        aj.register_attention(ZooAttention, **names)
    model, params = zoo(aj.LlamaAdapter("attention", K))
    p = double(params["attention"])
    query, key, value = (
        (X @ p[name]["kernel"] + p[name]["bias"]).reshape(B, T, HEADS, WIDTH)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    prompt = p["prompt"]["embedding"]
    ahead = (
        np.stack([(prompt @ p[n]["kernel"] + p[n]["bias"]).reshape(K, HEADS, WIDTH)] * B)
        for n in ("k_proj", "v_proj")
    )
    gates = np.tanh(p["prompt"]["gate"])[:, None]
    expected = attend(query, key, value) + gates * attend(query, *ahead)
    np.testing.assert_allclose(
        model.apply({"params": params}, X), expected.reshape(X.shape), atol=2e-6
    )


@pytest.mark.slow
def test_a_kernel_needs_a_registration(known):
    class KernelZoo(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ZooAttention(attend=kernel, name="attention")(x)

    model = aj.adapt(KernelZoo(), aj.PrefixTuning("attention", K))
    with raises(aj.TargetError, "attention (ZooAttention", "no softmax between two products"):
        model.init(jax.random.key(0), X)
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention_fn": "attend"}
    aj.register_attention(ZooAttention, **names)
    params = noise(model.init(jax.random.key(0), X)["params"])
    seen, expected = zoo(aj.PrefixTuning("attention", K))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    np.testing.assert_allclose(
        model.apply({"params": params}, X), seen.apply({"params": params}, X), atol=2e-6
    )


def test_a_wrong_name_in_a_registration_is_named(known):
    names = {"query": "q_proj", "key": "keys", "value": "v_proj", "attention_fn": "attend"}
    aj.register_attention(ZooAttention, **names)
    with raises(aj.RecipeError, "'keys'", "'k_proj'", "aj.register_attention"):
        zoo(aj.LlamaAdapter("attention", K))


def test_projections_in_the_wrong_places_of_a_registration_are_named(known):
    names = {"query": "q_proj", "key": "v_proj", "value": "k_proj", "attention_fn": "attend"}
    aj.register_attention(ZooAttention, **names)
    with raises(aj.RecipeError, "ZooAttention", "attend", "key", "'k_proj'", "'v_proj'"):
        zoo(aj.LlamaAdapter("attention", K))

    class Swapped(nnx.MultiHeadAttention):
        """An attention whose projections have other names than flax's."""

    def call(self, x):
        one, two, three = (f(x) for f in (self.query, self.value, self.key))
        return self.out(self.attention_fn(one, two, three))

    Swapped.__call__ = call
    aj.register_attention(Swapped)
    model = NnxAround()
    model.attention = Swapped(HEADS, D, decode=False, rngs=nnx.Rngs(0))
    with raises(aj.TargetError, "attention (Swapped is registered; pass example_inputs"):
        aj.adapt(model, aj.LlamaAdapter("attention"), rngs=nnx.Rngs(0))
    with raises(aj.RecipeError, "Swapped", "key", "'attention/value'", "'attention/key'"):
        aj.adapt(model, aj.LlamaAdapter("attention"), rngs=nnx.Rngs(0), example_inputs=(X,))


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: aj.LlamaAdapter("**", 0), "prompt_length=0 1"),
        (lambda: aj.PrefixTuning("**", 0), "PrefixTuning: length=0 1"),
        (lambda: aj.LlamaAdapter("**", gate="token"), "gate='token' head layer"),
        (lambda: aj.LlamaAdapter("**", gate_activation="relu"), "='relu' tanh identity"),
        (lambda: aj.LlamaAdapter("**", init_std=0.0), "init_std=0.0, > 0"),
        (lambda: aj.PrefixTuning("**", init_std=-1.0), "init_std=-1.0, >= 0"),
        (lambda: aj.llama_adapter(last=33, num_layers=32), "last=33 1 num_layers=32"),
        (lambda: aj.llama_adapter(last=0, num_layers=32), "last=0 1 num_layers=32"),
        (lambda: aj.llama_adapter(last=3), "llama_adapter: last num_layers layers"),
        (lambda: aj.prefix_tuning(last=3), "prefix_tuning: last num_layers layers"),
        (lambda: aj.llama_adapter(layers=[1], targets="**"), "targets='**' {}"),
    ],
)
def test_fields_out_of_range(make, data):
    with raises(aj.UserError, *data.split()):
        make()


def test_fields_at_the_ends_of_their_ranges():
    assert aj.PrefixTuning("**", 1, init_std=0.0).init_std == 0.0
    for last in (1, 32):
        (method,) = aj.llama_adapter(last=last, num_layers=32)
        assert method.targets[0] == f"layers/{32 - last}/attention"
        assert len(method.targets) == last


def test_a_prefix_has_no_bias_and_no_mask():
    """One softmax over the prefix and the context, of which the context alone is biased."""
    method = aj.PrefixTuning("**", K)
    point = AttachmentPoint("attention", "attention")
    query, key, value = rng.standard_normal((3, B, T, HEADS, WIDTH)).astype(np.float32)
    prefix = dict(zip(("key", "value"), rng.standard_normal((2, K, HEADS, WIDTH)), strict=True))
    bias = rng.standard_normal((B, 1, T, T)).astype(np.float32)
    got = method.attend(
        prefix, point, None, nn.dot_product_attention, query, key, value, bias, CAUSAL
    )
    ahead = np.einsum("bthw,khw->bhtk", query, prefix["key"]) / np.sqrt(WIDTH)
    scores = np.einsum("bthw,bshw->bhts", query, key) / np.sqrt(WIDTH) + bias
    scores = np.where(CAUSAL, scores, -np.inf)
    weights = softmax(np.concatenate([ahead, scores], -1))
    expected = np.einsum("bhtk,khw->bthw", weights[..., :K], prefix["value"])
    expected += np.einsum("bhts,bshw->bthw", weights[..., K:], value)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_soft_cap_of_an_attention_function_bounds_the_prompt_too():
    """This library's decoders give their function `softcap`, as Gemma 2 has."""
    method = aj.LlamaAdapter("**", K)
    point = AttachmentPoint(
        "attention", "attention", attention=registry.Attention(D, HEADS, HEADS, WIDTH)
    )
    query, key, value = rng.standard_normal((3, B, T, HEADS, WIDTH)).astype(np.float32)
    tables = dict(zip(("key", "value"), rng.standard_normal((2, D, D)), strict=True))
    own = {"embedding": 3 * rng.standard_normal((K, D)), "gate": rng.standard_normal(HEADS)}

    def attention_fn(query, key, value, softcap):
        return nn.dot_product_attention(query, key, value)

    def project(name, x):
        return x @ jnp.asarray(tables[name], jnp.float32)

    leaves = {name: jnp.asarray(x, jnp.float32) for name, x in own.items()}
    got = method.attend(leaves, point, project, attention_fn, query, key, value, softcap=2.0)
    ahead = {n: (own["embedding"] @ table).reshape(K, HEADS, WIDTH) for n, table in tables.items()}
    scores = np.einsum("bthw,khw->bhtk", query, ahead["key"]) / np.sqrt(WIDTH)
    branch = np.einsum("bhtk,khw->bthw", softmax(2 * np.tanh(scores / 2)), ahead["value"])
    expected = attend(*double((query, key, value))) + np.tanh(own["gate"])[:, None] * branch
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "recipe", [aj.PrefixTuning("**/attention", K), aj.llama_adapter(K, last=1, num_layers=1)]
)
def test_prompts_leave_attention_sinks_their_share(recipe):
    """A prefix joins the softmax with the sinks; a gated prompt has a softmax without them."""
    calls = []

    def watched(query, key, value, **options):
        mixed = dot_product_attention(query, key, value, **options)
        calls.append((query, key, value, options["sinks"], mixed))
        return mixed

    config = replace(TINY, num_hidden_layers=1, attention_sinks=True)
    base = Decoder(config, attention=watched, rngs=nnx.Rngs(0))
    base.layers[0].attention.sinks[...] = jnp.linspace(-1, 2, HEADS)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(1), example_inputs=(IDS,))
    nnx.update(model, noise(nnx.state(model, aj.nnx.AdapterParam)))
    model(IDS)
    query, key, value, sinks, mixed = double(calls[-1])
    longer = K if isinstance(recipe, aj.PrefixTuning) else 0
    assert key.shape[1] == T + longer
    seen = np.concatenate([np.ones((1, 1, T, longer), bool), CAUSAL], axis=-1)
    for head in range(HEADS):
        scores = np.einsum("btw,bkw->btk", query[:, :, head], key[:, :, head // 2]) / 2
        scores = np.where(seen[0], scores, -np.inf)
        scores = np.concatenate([scores, np.full((B, T, 1), sinks[head])], axis=-1)
        expected = softmax(scores)[..., :-1] @ value[:, :, head // 2]
        np.testing.assert_allclose(mixed[:, :, head], expected, atol=2e-6)


def test_more_layers_than_there_are():
    model = Decoder(TINY, rngs=nnx.Rngs(0))
    with raises(
        aj.TargetError, "'layers/3/attention'", "'layers/4/attention'", " layers/2/attention"
    ):
        aj.adapt(model, aj.llama_adapter(layers=range(2, 5)), rngs=nnx.Rngs(0))


def test_heads_that_do_not_divide():
    point = AttachmentPoint("attention", "attention", attention=registry.Attention(D, 4, 3, 4))
    for method in (aj.LlamaAdapter("attention"), aj.PrefixTuning("attention")):
        with raises(aj.RecipeError, "'attention'", "4 query heads", "3 key heads"):
            method.leaves(point)


def test_a_function_that_masks_by_itself_would_hide_the_prefix():
    class Causal(nnx.Module):
        def __init__(self):
            self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.attention(x, is_causal=True)

    model = aj.adapt(Causal(), aj.PrefixTuning("attention", K), rngs=nnx.Rngs(0))
    with raises(aj.RecipeError, "'attention'", "is_causal=True"):
        model(X)


@pytest.mark.slow
def test_prompts_keep_the_dtype_of_a_half_precision_base():
    half = jnp.bfloat16
    model = Decoder(TINY, dtype=half, param_dtype=half, rngs=nnx.Rngs(0))
    adapted = aj.adapt(model, aj.llama_adapter(K), rngs=nnx.Rngs(1))
    assert adapted.hidden(IDS).dtype == model.hidden(IDS).dtype == half
    np.testing.assert_array_equal(adapted(IDS), model(IDS))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(adapted, aj.nnx.AdapterParam))} == {
        np.dtype(np.float32)
    }


class NnxInline(nnx.MultiHeadAttention):
    """A known class whose call does not use its attention function."""

    def __call__(self, x):
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(WIDTH)
        return self.out(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), value))


class NnxAround(nnx.Module):
    def __init__(self):
        self.attention = NnxInline(HEADS, D, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.slow
@pytest.mark.witness("PrefixTuning")
@pytest.mark.parametrize("kind", [aj.LlamaAdapter, aj.PrefixTuning])
def test_a_class_that_overrides_the_call_of_a_known_one(kind):
    """Its call is read, not that of the known class; flax's own computes the same."""
    model = aj.adapt(NnxAround(), kind("attention", K), rngs=nnx.Rngs(0), example_inputs=(X,))
    nnx.update(model, noise(nnx.state(model, aj.nnx.AdapterParam)))
    known = NnxAround()
    known.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=nnx.Rngs(0))
    known = aj.adapt(known, kind("attention", K), rngs=nnx.Rngs(0))
    nnx.update(known, nnx.state(model))
    np.testing.assert_allclose(model(X), known(X), atol=2e-6)
