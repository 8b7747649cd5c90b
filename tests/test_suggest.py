"""`aj.suggest`: the exact targets that it proposes, and that they adapt the model."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from jax.experimental import pallas as pl

import adapters_jax as aj
from adapters_jax.errors import RecipeError, UserError
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.suggesting import PRESETS
from adapters_jax.targets import selects
from adapters_jax.trace.patterns import numbered, of_parameters, shortest

D, HEADS = 8, 2
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
X = jax.ShapeDtypeStruct((2, 6, D), jnp.float32)
BERT = BertConfig(
    vocab_size=40,
    hidden_size=D,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    intermediate_size=12,
    max_position_embeddings=16,
)
GPT = DecoderConfig.from_dict(
    {
        **{"model_type": "gpt2", "vocab_size": 40, "n_embd": D, "n_layer": 2, "n_head": HEADS},
        "n_positions": 16,
    }
)
LLAMA = DecoderConfig(
    vocab_size=40,
    hidden_size=D,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=1,
)
NORMS = "**/*norm/{scale,bias}"


def llama(config=LLAMA, **options):
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


def proposed(down, prompts, norms):
    """The arguments of every preset for a model of ours."""
    return {
        "houlsby": {"targets": "**/output", "layer_norms": norms},
        "pfeiffer": {"targets": "**/mlp/output"},
        "parallel": {"targets": "**/mlp"},
        "lora": {"targets": "**/{query,value}"},
        "ia3": {"targets": "**/{key,value}", "feed_forward": down},
        "llama_adapter": prompts,
        "prefix_tuning": prompts,
        "layer_norms": {"targets": norms},
    }


def layers(layer, count=2):
    return {"targets": f"{layer}/attention", "num_layers": count}


OURS = {
    "bert": (lambda: Bert(BERT), "**/mlp/output/dense", layers("layer_{}"), NORMS),
    "bert, scanned, remat": (
        lambda: Bert(BERT, scan=True, remat=True),
        "**/mlp/output/dense",
        {"targets": "**/attention"},
        NORMS,
    ),
    "gpt2": (lambda: llama(GPT), "**/mlp/output", layers("layers/{}"), NORMS),
    "llama, remat": (
        lambda: llama(remat=True),
        "**/mlp/output",
        layers("layers/{}"),
        "**/*norm/scale",
    ),
    "llama, scanned": (
        lambda: llama(scan=True),
        "**/mlp/output",
        {"targets": "**/attention"},
        "**/*norm/scale",
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_the_targets_of_every_preset_in_our_models(name):
    make, *expected = OURS[name]
    found = aj.suggest(make(), IDS)
    assert {preset: found.arguments(preset) for preset in PRESETS} == proposed(*expected)


def recipes(found):
    """All presets, in two recipes whose methods share no module."""
    sequential = [found.recipe(p) for p in ("houlsby", "ia3", "llama_adapter", "layer_norms")]
    yield aj.Recipe(sequential, found.recipe("lora", 2))
    yield aj.Recipe(found.recipe("parallel"), found.recipe("prefix_tuning"))


@pytest.mark.slow
def test_the_recipes_adapt_a_linen_model():
    model = Bert(BERT, scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    for recipe in recipes(aj.suggest(model, IDS)):
        adapted = aj.adapt(model, recipe)
        whole = aj.init_adapters(adapted, params, jax.random.key(1), IDS)
        assert aj.audit(adapted, whole).unmatched == ()


def test_the_recipes_adapt_an_nnx_model():
    model = llama()
    for recipe in recipes(aj.suggest(model, IDS)):
        adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(1), example_inputs=(IDS,))
        assert aj.audit(adapted).unmatched == ()


def test_adapters_that_a_model_has_already_are_left_out():
    recipe = aj.houlsby(4) + aj.lora(2)
    linen = aj.suggest(aj.adapt(Bert(BERT), recipe), IDS)
    assert linen == aj.suggest(Bert(BERT), IDS)
    model = llama()
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0))
    assert aj.suggest(adapted, IDS) == aj.suggest(model, IDS)
    assert aj.audit(adapted).adapter_parameters > 0  # the model keeps them


def test_a_quantized_model():
    quantized = nnx.eval_shape(lambda: aj.quantize(Decoder(LLAMA, rngs=nnx.Rngs(0))))
    assert aj.suggest(quantized, IDS) == aj.suggest(llama(), IDS)


class Odd(nn.Module):
    """Names that say nothing; keys before queries in both products; a softmax over axis -2."""

    layers: int = 2

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            a, b, c = (nn.DenseGeneral((HEADS, 4), name=f"{n}{i}")(x) for n in ("a", "b", "c"))
            a, b, c = jax.lax.optimization_barrier((a, b, c))
            seen = nn.softmax(jnp.einsum("bkhd,bqhd->bhkq", b, a) / 2, axis=-2)
            y = jnp.einsum("bkhd,bhkq->bqhd", c, seen)
            x = nn.LayerNorm(name=f"f{i}")(x + nn.DenseGeneral(D, (-2, -1), name=f"d{i}")(y))
            x += nn.Dense(D, name=f"h{i}")(jnp.tanh(nn.Dense(20, name=f"g{i}")(x)))
        return nn.Dense(3, name="e")(x[:, 0])


def test_names_play_no_part():
    found = aj.suggest(Odd(), X)
    assert found.arguments("lora") == {"targets": "{a*,c*}", "head": "e"}
    assert found.arguments("ia3") == {"targets": "{b*,c*}", "feed_forward": "h*", "head": "e"}
    assert found.arguments("houlsby") == {
        "targets": "{d*,h*}",
        "layer_norms": "f*/{scale,bias}",
        "head": "e",
    }
    assert found.roles.query == ("a0", "a1") and found.roles.up == ("g0", "g1")
    assert found.roles.attention == ()  # all of it is in the model itself
    assert aj.suggest(Odd(1), X).arguments("lora")["targets"] == "{a0,c0}"


class Fused(nn.Module):
    """One weight for queries, keys and values: in three parts, or in turns in every head."""

    how: tuple[str, str]  # of each layer

    @nn.compact
    def __call__(self, x):
        for i, how in enumerate(self.how):
            made = nn.Dense(3 * D, name=f"all_{i}")(x)
            if how == "turns":
                parts = jnp.moveaxis(made.reshape(*x.shape[:2], HEADS, -1, 3), -1, 0)
            elif how == "split":
                parts = jnp.split(made, 3, -1)
            else:
                parts = [made[..., i * D : (i + 1) * D] for i in range(3)]
            q, k, v = (part.reshape(*x.shape[:2], HEADS, -1) for part in parts)
            q = jnp.concatenate([q[..., 2:], -q[..., :2]], -1)  # as rotary positions do
            y = nn.dot_product_attention(q, k, v)
            x += nn.Dense(D, name=f"end_{i}")(y.reshape(x.shape))
        return x


@pytest.mark.parametrize("how", ["split", "slices"])
def test_of_a_fused_weight_lora_adapts_the_queries_and_values_alone(how):
    found = aj.suggest(Fused((how, how)), X)
    slices = ((0, D), (2 * D, 3 * D))
    assert found.arguments("lora") == {"targets": "all_*", "slices": slices}
    assert found.recipe("lora", 4) == aj.lora(4, targets="all_*", slices=slices)
    assert found.roles.fused == ("all_0", "all_1") and "\n# fused: all_* " in repr(found)
    assert found.roles.attention_output == ("end_0", "end_1") and found.roles.head == ()


@pytest.mark.parametrize("other", ["split", "turns"])
def test_a_fused_weight_whose_heads_have_all_in_turns_is_adapted_whole(other):
    found = aj.suggest(Fused((other, "turns")), X)
    assert found.arguments("lora") == {"targets": "all_*"}
    assert found.roles.fused == ("all_0", "all_1") and found.roles.slices == ()


class Shared(nn.Module):
    """An attention whose queries are its keys."""

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[:2], HEADS, -1)
        both, v = (nn.Dense(D, name=name)(x).reshape(shape) for name in ("both", "value"))
        return x + nn.Dense(D, name="end")(nn.dot_product_attention(both, both, v).reshape(x.shape))


def test_of_a_fused_weight_what_it_makes_is_named():
    found = aj.suggest(Fused(("split",)), X)
    assert "# fused: all_0 makes queries, keys and values; aj.ia3" in repr(found)
    assert "# fused: both makes queries and keys; aj.lora" in repr(aj.suggest(Shared(), X))


class Rms(nnx.Module):
    """Two ways to write a norm: scaled before the division, or by one plus a parameter after it."""

    def __init__(self, before):
        self.before, self.w = before, nnx.Param(jnp.ones(D))

    def __call__(self, x):
        variance = jnp.mean(x**2, -1, keepdims=True) + 1e-6
        if self.before:
            return self.w[...] * x / jnp.sqrt(variance)
        return x * jax.lax.rsqrt(variance) * (1 + self.w[...])


class Raw(nnx.Module):
    """Weights without modules of their own: an attention, and experts that a router weighs."""

    def __init__(self, rngs):
        def weight(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape))

        self.skip = nnx.Param(jnp.ones(()))
        self.wq, self.wk, self.wv = (weight(D, HEADS, 4) for _ in range(3))
        self.wo = weight(HEADS, 4, D)

    def __call__(self, x, cache):
        q, k, v = (jnp.einsum("btd,dhf->bthf", x, w[...]) for w in (self.wq, self.wk, self.wv))
        y = jax.nn.dot_product_attention(q, k, v)
        return cache, jnp.einsum("bthf,hfd->btd", y, self.wo[...])


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(D, 3, rngs=rngs)
        self.open = nnx.Param(jax.random.normal(rngs.params(), (3, D, 16)))
        self.make = nnx.Param(jax.random.normal(rngs.params(), (3, D, 16)))
        self.back = nnx.Param(jax.random.normal(rngs.params(), (3, 16, D)))

    def __call__(self, x):
        gates, which = jax.lax.top_k(jax.nn.softmax(self.router(x)), 2)
        weight = (gates[..., None] * jax.nn.one_hot(which, 3)).sum(-2)
        x = jnp.einsum("btd,bte->bted", x, (weight > 0).astype(x.dtype))
        h = jax.nn.silu(jnp.einsum("bted,edf->btef", x, self.open[...]))
        h *= jnp.einsum("bted,edf->btef", x, self.make[...])
        return jnp.einsum("bte,bted->btd", weight, jnp.einsum("btef,efd->bted", h, self.back[...]))


class RawNet(nnx.Module):
    """An embedding with methods of its own, read again as the head."""

    def __init__(self, rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (40, D)))
        self.mix = nnx.List([Raw(rngs) for _ in range(2)])
        self.think = nnx.List([Experts(rngs) for _ in range(2)])
        self.first, self.last = Rms(False), Rms(True)

    def __call__(self, ids):
        x = self.table[...][ids]
        for mix, think in zip(self.mix, self.think, strict=True):
            x += mix(self.first(x), None)[1]
            x = mix.skip[...] * x
            x += think(self.first(x))
        return self.last(x) @ self.table[...].T


def test_raw_weights_are_named_themselves_and_bottlenecks_go_to_the_module_that_returns_them():
    found = aj.suggest(nnx.eval_shape(lambda: RawNet(nnx.Rngs(0))), IDS)
    assert found.arguments("lora") == {"targets": "**/{wq,wv}"}
    assert found.arguments("ia3") == {"targets": "**/{wk,wv}", "feed_forward": "**/back"}
    assert found.arguments("houlsby") == {
        "targets": "{mix,think}/*",
        "layer_norms": "{first,last}/w",
    }
    assert found.arguments("parallel") == {"targets": "think/*"}
    assert found.arguments("llama_adapter") == {"targets": "mix/{}", "num_layers": 2}
    assert set(found.roles.up) == {f"think/{i}/{n}" for i in range(2) for n in ("open", "make")}
    assert found.roles.embeddings == ("table",) and found.roles.head == ()


class Latents(nn.Module):
    """Learned queries, a table read by one-hot vectors, a head of two layers."""

    @nn.compact
    def __call__(self, ids):
        x = jax.nn.one_hot(ids, 40) @ self.param("words", nn.initializers.normal(), (40, D))
        z = jnp.tile(self.param("latents", nn.initializers.normal(), (5, D)), (2, 1, 1))
        z += nn.MultiHeadDotProductAttention(HEADS, name="read")(z, x)
        z += nn.MultiHeadDotProductAttention(HEADS, name="think")(z)
        return Head(name="head")(z[:, 0])


class Head(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(jnp.tanh(nn.Dense(D, name="in")(x)))


def test_prompts_of_llama_adapter_go_to_self_attention_alone():
    found = aj.suggest(Latents(), IDS)
    assert found.arguments("lora") == {"targets": "**/{query,value}", "head": "head"}
    assert found.arguments("llama_adapter") == {"targets": "think", "head": "head"}
    assert found.arguments("prefix_tuning") == {"targets": "{read,think}", "head": "head"}
    assert found.roles.embeddings == ("words",)
    assert found.recipe("lora", 4, targets="**/query") == aj.lora(
        4, targets="**/query", head="head"
    )


class Chunked(nn.Module):
    """An attention that sums up chunks of keys in a loop, or runs in a kernel."""

    kernel: bool = False

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(D, name=name)(x) for name in ("one", "two", "three"))
        return x + nn.Dense(D, name="four")((self.fused if self.kernel else self.chunks)(q, k, v))

    def chunks(self, q, k, v):
        def chunk(carry, pair):
            most, total, y = carry
            k, v = pair
            logits = jnp.einsum("bqd,bkd->bqk", q, k)
            new = jnp.maximum(most, logits.max(-1))
            seen, before = jnp.exp(logits - new[..., None]), jnp.exp(most - new)
            y = y * before[..., None] + jnp.einsum("bqk,bkd->bqd", seen, v)
            return (new, total * before + seen.sum(-1), y), None

        empty = jnp.full(q.shape[:2], -1e9), jnp.zeros(q.shape[:2]), jnp.zeros_like(q)
        pairs = [jnp.moveaxis(x.reshape(2, 3, 2, D), 1, 0) for x in (k, v)]
        (_, total, y), _ = jax.lax.scan(chunk, empty, tuple(pairs))
        return y / total[..., None]

    def fused(self, q, k, v):
        def body(q, k, v, out):
            out[...] = jax.nn.softmax(q[...] @ jnp.swapaxes(k[...], -1, -2)) @ v[...]

        return pl.pallas_call(body, jax.ShapeDtypeStruct(q.shape, q.dtype), interpret=True)(q, k, v)


def test_an_attention_in_a_loop_is_found_and_one_in_a_kernel_is_said_not_to_be():
    roles = aj.suggest(Chunked(), X).roles
    assert (roles.query, roles.key, roles.value) == (("one",), ("two",), ("three",))
    assert roles.attention_output == ("four",) and roles.kernels == ()
    found = aj.suggest(Chunked(kernel=True), X)
    assert found.roles.query == found.roles.attention_output == found.roles.down == ()
    assert "pallas_call" in repr(found)


class Convolutions(nn.Module):
    """No attention; the residual blocks are convolutions with batch norms."""

    @nn.compact
    def __call__(self, x, train=True):
        for _ in range(2):
            y = nn.Conv(D, (3, 3))(nn.relu(nn.Conv(D, (3, 3))(x)))
            x = nn.relu(x + nn.BatchNorm(use_running_average=not train)(y))
        return nn.Dense(3, name="classes")(x.mean((1, 2)))


def test_a_model_without_attention_gets_no_recipe_but_what_was_looked_for():
    found = aj.suggest(Convolutions(), jax.ShapeDtypeStruct((2, 6, 6, D), jnp.float32), train=True)
    assert found.roles.head == ("classes",) and found.roles.norms == ()
    lines = repr(found).splitlines()
    assert [line for line in lines if line.startswith("aj.")] == []
    assert len([line for line in lines if line.startswith("# aj.")]) == len(PRESETS)
    with raises(RecipeError, "aj.lora", "an attention", "a softmax between two products"):
        found.recipe("lora")
    with raises(UserError, "'lore'", "lora"):
        found.recipe("lore")


def test_prompts_in_the_last_layers_alone():
    recipe = aj.suggest(llama(), IDS).recipe("llama_adapter", 3, last=1)
    assert recipe == aj.Recipe(aj.LlamaAdapter("layers/1/attention", 3))


def test_what_is_printed_is_python_that_gives_the_recipes():
    found = aj.suggest(Bert(BERT), IDS)
    lines = [line for line in repr(found).splitlines() if line.startswith("aj.")]
    assert [eval(line, {"aj": aj}) for line in lines] == [found.recipe(p) for p in PRESETS]


class Block(nn.Module):
    """flax's own attention, and a feed-forward layer of its own module."""

    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(HEADS, name="look")(nn.LayerNorm(name="before")(x))
        return x + Mlp(name="think")(x)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D, name="down")(nn.gelu(nn.Dense(16, name="up")(x)))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return block(Block(name="layers"), x, None)[0]


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.jit(Block)(name=f"layer_{i}")(x)
        return x


class Parallel(nn.Module):
    """Attention and feed-forward layer of one input, added to each other first."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            h = nn.RMSNorm(name=f"norm_{i}")(x)
            attention = nn.MultiHeadDotProductAttention(HEADS, name=f"look_{i}")
            x += attention(h) + Mlp(name=f"think_{i}")(h)
        return x


class Training(nnx.Module):
    """Dropout, and batch norms inside of the layers, with state of their own."""

    def __init__(self, rngs):
        self.look = nnx.MultiHeadAttention(HEADS, D, decode=False, dropout_rate=0.1, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 16, rngs=rngs), nnx.Linear(16, D, rngs=rngs)
        self.within, self.after = nnx.BatchNorm(16, rngs=rngs), nnx.BatchNorm(D, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x += self.drop(self.look(self.after(x)))
        return self.after(x + self.drop(self.down(nnx.gelu(self.drop(self.within(self.up(x)))))))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_state_is_neither_a_parameter_nor_an_input(mode):
    model = nnx.eval_shape(lambda: Training(nnx.Rngs(0)))
    getattr(model, mode)()
    found = aj.suggest(model, X)
    assert found.arguments("lora") == {"targets": "**/{query,value}"}
    assert found.arguments("ia3") == {"targets": "**/{key,value}", "feed_forward": "down"}
    assert found.roles.norms == found.roles.head == ()


class Around(nnx.Module):
    """A linen block inside an NNX module."""

    def __init__(self, rngs):
        self.inner = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Block(), rngs), jnp.ones(X.shape))

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "prompts"),
    [
        (Scanned, "**/look"),
        (Jitted, "layer_{}/look"),
        (Parallel, "look_{}"),
        (lambda: nnx.eval_shape(lambda: Around(nnx.Rngs(0))), "**/look"),
    ],
    ids=["scanned", "jitted", "parallel", "in NNX"],
)
def test_linen_blocks_of_every_kind(make, prompts):
    found = aj.suggest(make(), X)
    assert found.arguments("houlsby")["targets"] == "**/{out,down}"
    assert found.arguments("pfeiffer")["targets"].endswith("down")
    assert found.arguments("lora") == {"targets": "**/{query,value}"}
    assert found.arguments("prefix_tuning")["targets"] == prompts


class Lookalikes(nn.Module):
    """What only looks like a layer, and a feed-forward layer that multiplies two products."""

    @nn.compact
    def __call__(self, ids, positions):
        def dense(name, width=D):
            return nn.Dense(width, name=name)

        words = nn.Embed(12, D, name="words")
        x = words(ids) + nn.Embed(40, D, name="places")(positions)
        x += dense("factor_b")(dense("factor_a", 3)(x))
        x += nn.Conv(D, (3,), name="conv_b")(nn.relu(nn.Conv(12, (3,), name="conv_a")(x)))
        x = nn.softmax(x @ jnp.swapaxes(x, 1, 2)) @ x
        x = dense("chain_b")(nn.relu(dense("chain_a", 12)(x)))
        x += dense("part_b")(nn.relu(dense("part_a", 12)(x[..., :3])))
        x += dense("sum_b", 5 * D)(nn.relu(dense("sum_a", 12)(x))).reshape(*x.shape, 5).sum(-1)
        x += dense("cut_b")(nn.relu(dense("cut_a", 12)(x))[..., :7])
        x += Gated(name="gated")(x).reshape(x.shape)
        return words.attend(x), jnp.tanh(dense("pool")(x[:, 0]))


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = nn.WeightNorm(nn.Dense(12, name="gate"))(x), nn.Dense(12, name="up")(x)
        return nn.Dense(D, name="down")(gate * up).reshape(-1, D)


def test_what_is_no_feed_forward_layer_no_attention_with_weights_and_no_head():
    roles = aj.suggest(Lookalikes(), IDS, IDS).roles
    assert roles.query == roles.attention_output == ()
    assert roles.up == ("gated/gate", "gated/up") and roles.down == ("gated/down",)
    assert roles.feed_forward_output == ("gated/down",)
    assert roles.feed_forward == ()  # it returns another shape than it takes
    assert roles.embeddings == ("words", "places") and roles.head == ()


def test_a_preset_that_matches_nothing_names_suggest():
    model = aj.adapt(Odd(), aj.lora(2))
    params = jax.eval_shape(Odd().init, jax.random.key(0), X)["params"]
    with raises(aj.TargetError, "**/{query,value}", "aj.suggest("):
        aj.init_adapters(model, params, jax.random.key(1), X)


def test_what_is_no_model_and_inputs_that_do_not_fit():
    class Wrapper:
        module = Bert(BERT)

    with raises(TypeError, "Wrapper", "model.module"):
        aj.suggest(Wrapper(), IDS)
    with raises(UserError, "Bert", "int32[2, 6]"):
        aj.suggest(Bert(BERT), IDS, nonsense=IDS)


PATHS = [
    f"{s}/{i}/{part}"
    for s in ("encoder", "decoder")
    for i in range(12)
    for part in ("self/q", "self/v", "cross/q", "cross/v", "ln_1", "ln_2", "mlp/up", "mlp/down")
]


@pytest.mark.parametrize(
    ("expected", "meant"),
    [
        (("**/{q,v}",), "**/{q,v}"),
        (("**/self/q",), "**/self/q"),
        (("**/ln_*",), "**/ln_*"),
        (("decoder/*/{cross/q,mlp/up}",), None),
        (("encoder/*/self/q",), "encoder/*/self/q"),
        (("**/11/self/q",), "**/11/self/q"),
    ],
)
def test_patterns_are_short_and_match_what_they_should(expected, meant):
    found = [p for p in PATHS if selects((meant or expected[0],), p)]
    patterns = shortest(found, PATHS)
    assert [p for p in PATHS if selects(patterns, p)] == found
    if meant:
        assert patterns == expected


def test_patterns_of_parameters_match_no_others():
    found = ["a_norm/w", "b_norm/w", "c_norm/w"]
    assert of_parameters(found, ["dense", "dense/w"]) == ("*norm/w",)
    assert of_parameters(found, ["d_norm/w"]) == ("{a_norm,b_norm,c_norm}/w",)


def test_a_norm_of_the_model_itself():
    class Scaled(nn.Module):
        """A norm written out in the model, with a scale of its own, and one that is a module."""

        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(x + nn.Dense(D)(x))
            scale = self.param("scale", nn.initializers.ones, (D,))
            return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * scale

    assert aj.suggest(nn.LayerNorm(), X).arguments("layer_norms") == {"targets": "{scale,bias}"}
    found, x = aj.suggest(Scaled(), X), jnp.ones(X.shape)
    assert found.arguments("layer_norms")["targets"] == ("LayerNorm_0/{scale,bias}", "scale")
    model = aj.adapt(Scaled(), found.recipe("layer_norms"))
    params = Scaled().init(jax.random.key(0), x)["params"]
    audit = aj.audit(model, aj.init_adapters(model, params, jax.random.key(1), x))
    assert audit.trainable_parameters == 3 * D


def test_a_layer_number_is_a_brace_only_where_all_layers_are_meant():
    layers = [f"layer_{i}/attention" for i in range(3)]
    assert numbered(layers, []) == "layer_{}/attention"
    assert numbered(layers[1:], layers) is None and numbered(layers[:1], []) is None
    assert numbered([p.replace("_", "/") for p in layers], ["layer/0/x/attention"]) is None
