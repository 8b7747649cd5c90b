"""Functions of parameters, Equinox modules and Haiku's functions, adapted without an edit.

Factors are drawn, so that nothing is compared at zero; see `drawn_adapters`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.arrays import double, drawn, drawn_like

import adapters_jax as aj
from adapters_jax.errors import MismatchError, RecipeError, TargetError, UserError
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.trees import flatten

LAYERS, D, HEADS, VOCABULARY = 3, 8, 2, 11
IDS = np.array([[1, 2, 3], [4, 5, 6]])
LORA = aj.LoRA("**", rank=2, alpha=3.0)


def decoder_params():
    shapes = {
        "embed": (VOCABULARY, D),
        "layers": {
            "wqkv": (LAYERS, D, 3, HEADS, D // HEADS),
            "wo": (LAYERS, HEADS, D // HEADS, D),
            "up": (LAYERS, D, 2 * D),
            "down": (LAYERS, 2 * D, D),
        },
        "head": (D, VOCABULARY),
    }
    leaves, definition = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    drawings = (0.3 * drawn(shape, i) for i, shape in enumerate(leaves))
    return definition.unflatten(map(jnp.asarray, drawings))


def layer(x, w):
    """A layer of the decoder: einsums, a softmax, a feed-forward network."""
    q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->btchk", x, w["wqkv"]), 2, 0)
    scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / 2
    mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bqhk,hkd->bqd", mixed, w["wo"])
    return x + jax.nn.gelu(x @ w["up"]) @ w["down"]


def decoder(params, ids):
    """A decoder of plain jax.numpy with a scan with remat over its layers."""
    body = jax.checkpoint(lambda x, w: (layer(x, w), None))
    x, _ = jax.lax.scan(body, params["embed"][ids], params["layers"])
    return x @ params["head"]


def drawn_adapters(adapted, params):
    """The tree of an adapted function with drawn arrays in its adapters."""
    tree = aj.init_adapters(adapted, params, jax.random.key(1))
    adapters, base = aj.partition(tree, adapted.recipe)
    return aj.merge_trees(jax.tree.map(lambda x: 0.3 * x, drawn_like(adapters)), base)


def moved(y, base):
    """Whether outputs differ clearly, so that equal ones say something."""
    return float(jnp.abs(y - base).max()) > 0.02


def assert_near(y, expected):
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_a_function_computes_the_sum_and_starts_as_itself():
    params = {"in": jnp.asarray(drawn((4, 3))), "out": jnp.asarray(drawn((3, 2), 1))}
    x = drawn((5, 4), 2)

    def run(params, x):
        return x @ params["in"] @ params["out"]

    adapted = aj.adapt(run, params, LORA, example_inputs=(x,))
    start = aj.init_adapters(adapted, params, jax.random.key(0))
    np.testing.assert_array_equal(adapted(start, x), run(params, x))
    tree = drawn_adapters(adapted, params)
    factors = {name: {k: double(v) for k, v in tree["lora"][name].items()} for name in params}
    weights = {
        name: double(w) + 1.5 * factors[name]["a"] @ factors[name]["b"]
        for name, w in params.items()
    }
    assert_near(adapted(tree, x), run(weights, double(x)))


@pytest.mark.weekly
@pytest.mark.parametrize("method", [LORA, aj.DoRA("**", 2), aj.IA3("layers/**")], ids=repr)
def test_a_decoder_of_plain_numpy_is_its_merged_one(method):
    params = decoder_params()
    adapted = aj.adapt(decoder, params, method, example_inputs=(IDS,))
    tree = drawn_adapters(adapted, params)
    merged = aj.merge(adapted, tree)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert moved(adapted(tree, IDS), decoder(params, IDS))
    assert_near(jax.jit(adapted)(tree, IDS), decoder(merged, IDS))
    gradients = jax.grad(lambda tree: adapted(tree, IDS).var())(tree)
    trained = flatten(aj.partition(gradients, adapted.recipe)[0])
    assert all(float(jnp.abs(x).max()) > 0 for x in trained.values())
    audit = aj.audit(adapted, tree, inputs=(IDS,))
    assert audit.adapter_parameters == sum(x.size for x in trained.values())
    if isinstance(method, aj.LoRA):
        assert "computed thin: 6 of 6 changed weights" in audit.computed()


@pytest.mark.slow
def test_a_step_costs_what_thin_products_by_hand_cost():
    params = decoder_params()
    adapted = aj.adapt(decoder, params, LORA, example_inputs=(IDS,))
    tree = drawn_adapters(adapted, params)
    trained, base = aj.partition(tree, adapted.recipe)

    def by_hand(trained, base, ids):
        lora, layers = trained["lora"], trained["layers"]["lora"]

        def thin(x, w, f, equation):
            """x W + 1.5 (x A) B, whatever axes the weight has."""
            inputs, out = f["a"].shape[:-1], f["b"].shape[1:]
            rows = x.reshape(*x.shape[: x.ndim - len(inputs)], -1)
            a, b = f["a"].reshape(-1, 2), f["b"].reshape(2, -1)
            change = 1.5 * ((rows @ a) @ b)
            return jnp.einsum(equation, x, w) + change.reshape(*rows.shape[:-1], *out)

        def layer(x, each):
            w, f = each
            qkv = thin(x, w["wqkv"], f["wqkv"], "btd,dchk->btchk")
            q, k, v = jnp.moveaxis(qkv, 2, 0)
            scores = jnp.einsum("bqhk,bthk->bhqt", q, k) / 2
            mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), v)
            x = x + thin(mixed, w["wo"], f["wo"], "bqhk,hkd->bqd")
            inner = jax.nn.gelu(thin(x, w["up"], f["up"], "btd,de->bte"))
            return x + thin(inner, w["down"], f["down"], "bte,ed->btd"), None

        x = base["embed"][ids] + 1.5 * lora["embed"]["a"][ids] @ lora["embed"]["b"]
        x, _ = jax.lax.scan(jax.checkpoint(layer), x, (base["layers"], layers))
        return thin(x, base["head"], lora["head"], "btd,dv->btv")

    def flops(run):
        gradient = jax.jit(jax.grad(lambda trained, base: run(trained, base).var()))
        return gradient.lower(trained, base).compile().cost_analysis()["flops"]

    ids = np.tile(IDS, (8, 20))
    ours = lambda trained, base: adapted(aj.merge_trees(trained, base), ids)  # noqa: E731
    assert_near(ours(trained, base), by_hand(trained, base, ids))
    assert flops(ours) <= 1.01 * flops(lambda t, b: by_hand(t, b, ids))


@pytest.mark.weekly
def test_training_files_banks_and_quantising(tmp_path):
    params = decoder_params()
    adapted = aj.adapt(decoder, params, LORA, example_inputs=(IDS,))
    tree = drawn_adapters(adapted, params)
    state = aj.TrainState.create(adapted, tree, tx=optax.adam(1e-2), key=jax.random.key(0))

    def loss(tree, batch, key):
        logits = adapted(tree, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch).mean()

    step = aj.make_train_step(loss)
    losses = []
    for _ in range(4):
        state, metrics = step(state, IDS)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    for path, x in flatten(aj.partition(state.params, LORA)[1]).items():
        np.testing.assert_array_equal(x, flatten(aj.partition(tree, LORA)[1])[path])

    aj.save_adapter(tmp_path / "adapter", state)
    loaded, params_again = aj.load_adapter(tmp_path / "adapter", decoder, params)
    np.testing.assert_array_equal(loaded(params_again, IDS), adapted(state.params, IDS))
    assert loaded.adapter_placements.placements == adapted.adapter_placements.placements

    bank = aj.Bank(adapted, tree, capacity=2).put("trained", state)
    y = bank.model(bank.params, IDS, adapters=bank.rows(["trained", None]))
    assert_near(y[0], adapted(state.params, IDS)[0])
    assert_near(y[1], decoder(params, IDS)[1])

    packed = aj.quantize(adapted, state.params, IDS)
    opened = aj.dequantize(packed)
    assert_near(adapted(packed, IDS), adapted(opened, IDS))
    assert moved(adapted(packed, IDS), decoder(params, IDS))


def test_a_training_resumes_and_its_adapter_goes_to_peft_and_back(tmp_path):
    params = {"layers": [{"q_proj": {"kernel": jnp.asarray(drawn((4, 4), i))}} for i in range(2)]}
    x = drawn((3, 4), 5)

    def run(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["q_proj"]["kernel"])
        return x

    adapted = aj.adapt(run, params, aj.LoRA("**/q_proj", 2, alpha=4), example_inputs=(x,))
    tree, tx = aj.init_adapters(adapted, params, jax.random.key(1)), optax.adam(0.1)
    state = aj.TrainState.create(adapted, tree, tx=tx, key=jax.random.key(2))
    step = aj.make_train_step(lambda tree, batch, key: ((adapted(tree, batch) - 1) ** 2).mean())
    state, _ = step(state, x)
    with aj.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
        other = aj.TrainState.create(adapted, tree, tx=tx, key=jax.random.key(3))
        restored = checkpoints.restore(other).state
    (one, _), (two, _) = step(state, x), step(restored, x)
    for path, leaf in flatten(one.adapters).items():
        np.testing.assert_array_equal(leaf, flatten(two.adapters)[path])

    names = {f"model.layers.{i}.self_attn.q_proj": f"layers/{i}/q_proj" for i in range(2)}
    adapters, base = aj.partition(one.params, adapted.recipe)
    save_peft(tmp_path / "peft", adapted.recipe, adapters, names, base)
    recipe, again = load_peft(tmp_path / "peft", names, base)[:2]
    loaded = aj.adapt(run, params, recipe, example_inputs=(x,))
    np.testing.assert_array_equal(loaded(aj.merge_trees(again, base), x), adapted(one.params, x))


def test_ia3_scales_the_bias_beside_a_weight_that_a_vector_scales():
    params = {"w": drawn((4, 3)), "gain": drawn((3,), 1), "b": drawn((3,), 2)}
    x = drawn((5, 4), 3)

    def run(params, x):
        return x @ (params["w"] * params["gain"]) + params["b"]

    adapted = aj.adapt(run, params, aj.IA3("w"), example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    (scale,) = flatten(aj.partition(tree, adapted.recipe)[0]).values()
    expected = run({name: double(w) for name, w in params.items()}, double(x)) * double(scale)
    assert_near(adapted(tree, x), expected)
    assert_near(run(aj.merge(adapted, tree), x), expected)


def test_any_pytree_holds_the_parameters():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        weight: jax.Array
        bias: jax.Array

    params = [Layer(drawn((4, 4), i), drawn((4,), i + 5)) for i in range(2)]
    x = drawn((3, 4), 9)

    def run(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer.weight + layer.bias)
        return x

    adapted = aj.adapt(run, params, aj.LoRA("1", 2), example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    merged = aj.merge(adapted, tree)
    assert isinstance(merged[1], Layer)
    np.testing.assert_array_equal(merged[0].weight, params[0].weight)
    assert_near(adapted(tree, x), run(merged, x))
    assert list(flatten(aj.partition(tree, adapted.recipe)[0])) == ["1/lora/a", "1/lora/b"]


def test_dropout_needs_a_key_and_acts_in_training_alone():
    params, x = {"w": drawn((40, 3))}, drawn((5, 40), 1)
    run = lambda params, x: x @ params["w"]  # noqa: E731
    adapted = aj.adapt(run, params, aj.LoRA("w", 2, dropout=0.5), example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    plain = adapted(tree, x)
    assert_near(plain, run(aj.merge(adapted, tree), x))
    first, second = (adapted(tree, x, rngs={"dropout": jax.random.key(i)}) for i in range(2))
    assert moved(first, plain) and moved(first, second)


def test_abstract_parameters_give_an_abstract_tree():
    shapes = jax.eval_shape(lambda x: x, decoder_params())
    adapted = aj.adapt(decoder, shapes, LORA, example_inputs=(jax.ShapeDtypeStruct((2, 3), int),))
    tree = aj.init_adapters(adapted, shapes, jax.random.key(0))
    assert isinstance(tree["lora"]["head"]["a"], jax.ShapeDtypeStruct)
    assert aj.audit(adapted, tree).adapter_parameters == 652


@pytest.mark.parametrize(
    ("run", "params", "inputs", "error", "text"),
    [
        (
            lambda p, x: decoder(decoder_params(), x),
            None,
            (IDS,),
            UserError,
            "none of the 6 arrays",
        ),
        (decoder, {}, (IDS,), UserError, "params holds no array"),
        (decoder, {"eps": 1e-5, "w": IDS}, (IDS,), UserError, "eps is 1e-05, expected arrays"),
        (decoder, None, (IDS, 3), UserError, "too many positional arguments"),
        (decoder, None, None, TypeError, "a function needs example inputs"),
        (lambda p, x, method: x, None, (IDS, 1), UserError, "has an argument method"),
        (
            lambda p, x: x,
            {"a/b": IDS, "a": {"b": IDS}},
            (IDS,),
            UserError,
            "several parts of params have the path a/b",
        ),
    ],
)
def test_what_is_no_function_of_its_parameters(run, params, inputs, error, text):
    params = decoder_params() if params is None else params
    with pytest.raises(error, match=text):
        aj.adapt(run, params, LORA, example_inputs=inputs)


def test_a_function_that_ignores_its_parameters_trains_nothing_either():
    with pytest.raises(UserError, match="depends on none of the 6 arrays"):
        aj.adapt(lambda p, x: 1.0 * x, decoder_params(), aj.Unfreeze("head"), example_inputs=(IDS,))


def test_other_parameters_than_at_adapt_are_named():
    params = decoder_params()
    adapted = aj.adapt(decoder, params, LORA, example_inputs=(IDS,))
    wrong = {**params, "tail": params["head"], "embed": params["embed"][:4]}
    del wrong["head"]
    with pytest.raises(MismatchError, match=r"missing: head(.|\n)*tail(.|\n)*\[4, 8\]"):
        aj.init_adapters(adapted, wrong, jax.random.key(0))
    with pytest.raises(RecipeError, match="hold nothing of LoRA"):
        adapted(params, IDS)
    with pytest.raises(UserError, match="the first argument is a ndarray, expected the tree"):
        adapted(IDS)


def test_a_bottleneck_says_that_a_function_has_no_modules():
    with pytest.raises(TargetError, match="plain function, which has no modules"):
        aj.adapt(decoder, decoder_params(), aj.Bottleneck("layers", 2), example_inputs=(IDS,))


def test_several_attentions_of_one_node_are_refused_with_what_to_do_instead():
    def one(w, x, n):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w[f"{name}{n}"]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
        return jnp.einsum("bhqt,bthk->bqhk", weights, v)

    w = {f"{name}{n}": jnp.ones((4, 2, 3)) for name in "qkv" for n in range(2)}
    prompt = aj.LlamaAdapter("mix", 3)
    function = lambda p, x: one(p["mix"], x, 0) + one(p["mix"], x, 1)  # noqa: E731
    with pytest.raises(TargetError, match=r"of 2 attentions.*aj\.LoRA, or keep those of each"):
        aj.adapt(function, {"mix": w}, prompt, example_inputs=(jnp.ones((1, 5, 4)),))


def decoder_by_formula(params, prefix, ids):
    """The decoder in float64, each layer with keys and values of a prefix before its own."""
    w = {path: double(x) for path, x in flatten(params).items()}
    x = w["embed"][ids]
    for i in range(LAYERS):
        q, k, v = np.moveaxis(np.einsum("btd,dchk->btchk", x, w["layers/wqkv"][i]), 2, 0)
        own = [double(prefix[name][i]) for name in ("key", "value")]
        k, v = (
            np.concatenate([np.broadcast_to(o, (len(x), *o.shape)), y], 1)
            for o, y in zip(own, (k, v), strict=True)
        )
        share = np.exp(np.einsum("bqhk,bthk->bhqt", q, k) / 2)
        mixed = np.einsum("bhqt,bthk->bqhk", share / share.sum(-1, keepdims=True), v)
        x = x + np.einsum("bqhk,hkd->bqd", mixed, w["layers/wo"][i])
        inner = double(jax.nn.gelu(jnp.asarray(x @ w["layers/up"][i], jnp.float32)))
        x = x + inner @ w["layers/down"][i]
    return x @ w["head"]


@pytest.mark.slow
def test_prompts_act_in_the_attention_of_a_loop_over_layers():
    params = decoder_params()
    adapted = aj.adapt(decoder, params, aj.PrefixTuning("layers", 3), example_inputs=(IDS,))
    tree = drawn_adapters(adapted, params)
    prefix = tree["layers"]["prefix"]
    assert prefix["key"].shape == (LAYERS, 3, HEADS, D // HEADS)
    expected = decoder_by_formula(params, prefix, IDS)
    assert_near(jax.jit(adapted)(tree, IDS), expected)
    assert_near(adapted(tree, IDS), expected)  # where operations run at once
    assert moved(adapted(tree, IDS), decoder(params, IDS))
    assert aj.audit(adapted, tree).adapter_parameters == 2 * LAYERS * 3 * D


@pytest.mark.witness("LlamaAdapter")
@pytest.mark.parametrize("method", [aj.LlamaAdapter, aj.PrefixTuning])
def test_prompts_in_a_loop_are_those_of_its_layers(method):
    params = decoder_params()

    def looped(params, ids):
        x = params["embed"][ids]
        for weights in params["layers"]:
            jax.lax.cond(
                x.sum() > 0, lambda x: None, lambda x: None, x
            )  # an operation without results
            x = layer(x, weights)
        return x @ params["head"]

    rows = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(LAYERS)]
    unrolled = {**params, "layers": rows}
    one = aj.adapt(decoder, params, method("layers", 3), example_inputs=(IDS,))
    tree = drawn_adapters(one, params)
    many = aj.adapt(looped, unrolled, method("layers/*", 3), example_inputs=(IDS,))
    layers = aj.init_adapters(many, unrolled, jax.random.key(1))
    adapters = aj.partition(tree, one.recipe)[0]["layers"]
    each = {str(i): jax.tree.map(lambda x, i=i: x[i], adapters) for i in range(LAYERS)}
    layers = aj.merge_trees({"layers": each}, aj.partition(layers, many.recipe)[1])
    assert_near(one(tree, IDS), many(layers, IDS))
    assert moved(one(tree, IDS), decoder(params, IDS))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: aj.adapt(decoder, LORA), "a function needs its parameters"),
        (lambda: aj.adapt(3, LORA), "got int, expected"),
        (lambda: aj.adapt(decoder, LORA, {"w": IDS}, example_inputs=(IDS,)), "got LoRA between"),
    ],
)
def test_swapped_and_missing_arguments(call, text):
    with pytest.raises(TypeError, match=text):
        call()


def test_what_is_suggested_for_a_function():
    found = aj.suggest(jax.jit(decoder), decoder_params(), IDS)
    assert found.arguments("llama_adapter") == {"targets": "layers"}
    assert found.arguments("lora") == {"targets": "**/wqkv"}
    with pytest.raises(TypeError, match="a function needs its parameters"):
        aj.suggest(decoder)


# Equinox


def bottleneck(y, leaves):
    """A bottleneck adapter in float64 on the output of a module."""
    leaves = {path: double(x) for path, x in flatten(leaves).items()}
    inner = double(jax.nn.gelu(y @ leaves["down/kernel"] + leaves["down/bias"]))
    return y + inner @ leaves["up/kernel"] + leaves["up/bias"]


@pytest.mark.slow
def test_equinox_modules_take_bottlenecks_on_their_outputs():
    eqx = pytest.importorskip("equinox")

    class Two(eqx.Module):
        first: eqx.nn.MLP
        second: eqx.nn.Linear

        def __call__(self, x):
            return self.second(self.first(x))

    keys = jax.random.split(jax.random.key(0))
    base = Two(eqx.nn.MLP(4, 6, 8, 1, key=keys[0]), eqx.nn.Linear(6, 3, key=keys[1]))
    run = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    x = drawn((5, 4))
    adapted = aj.adapt(run, base, aj.Bottleneck("{first,second}", 2), example_inputs=(x,))
    tree = drawn_adapters(adapted, base)
    inner = bottleneck(double(jax.vmap(base.first)(x)), tree["first"]["adapter"])
    outer = inner @ double(base.second.weight).T + double(base.second.bias)
    assert_near(jax.jit(adapted)(tree, x), bottleneck(outer, tree["second"]["adapter"]))
    assert moved(adapted(tree, x), run(base, x))


@pytest.mark.slow
def test_equinox_merges_into_modules_of_its_own(tmp_path):
    eqx = pytest.importorskip("equinox")
    base, x = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(0)), drawn((4,))
    adapted = aj.adapt(base, LORA, example_inputs=(x,))
    tree = drawn_adapters(adapted, base)
    merged = aj.merge(adapted, tree)
    assert type(merged) is eqx.nn.MLP and merged.activation is base.activation
    assert_near(adapted(tree, x), merged(x))
    assert moved(merged(x), base(x))
    aj.save_adapter(tmp_path / "a", *[aj.partition(tree, adapted.recipe)[0], adapted.recipe])
    loaded, again = aj.load_adapter(tmp_path / "a", base, example_inputs=(x,))
    np.testing.assert_array_equal(loaded(again, x), adapted(tree, x))
    with pytest.raises(UserError, match=r"inputs \(\): missing a required argument: 'x'"):
        aj.load_adapter(tmp_path / "a", base)
    with pytest.raises(TargetError, match="layers/0/in_features is 4"):
        aj.adapt(base, aj.LoRA("layers/0/in_features", 2), example_inputs=(x,))


def equinox_blocks():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=first)
            self.mlp = eqx.nn.MLP(D, D, 2 * D, 1, key=second)

        def __call__(self, x):
            x = x + self.attention(x, x, x)
            return x + jax.vmap(self.mlp)(x)

    stacked = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), LAYERS))
    arrays, static = eqx.partition(stacked, eqx.is_array)
    rows = [jax.tree.map(lambda x, i=i: x[i], arrays) for i in range(LAYERS)]
    unrolled = [eqx.combine(row, static) for row in rows]

    def scanned(blocks, x):
        arrays, static = eqx.partition(blocks, eqx.is_array)

        def body(x, layer):
            return eqx.combine(layer, static)(x), None

        return jax.lax.scan(jax.checkpoint(body), x, arrays)[0]

    def looped(blocks, x):
        for block in blocks:
            x = block(x)
        return x

    return (scanned, stacked), (looped, unrolled)


@pytest.mark.weekly
@pytest.mark.parametrize(
    "method",
    [
        aj.Bottleneck("**/mlp", 3),
        aj.Bottleneck("**/attention", 3, placement="parallel", scale=2.0),
        aj.LlamaAdapter("**/attention", 3),
        aj.PrefixTuning("**/attention", 3),
    ],
    ids=repr,
)
def test_equinox_layers_in_a_scan_are_the_unrolled_ones(method):
    """Adapters on outputs and in attention go through a loop and a batch as the layers do."""
    (scanned, stacked), (looped, unrolled) = equinox_blocks()
    x = drawn((2, 5, D))
    batched = lambda run: lambda params, x: jax.vmap(lambda x: run(params, x))(x)  # noqa: E731
    # Patterns of one model on the other: "**/" stands for no name as well.
    one = aj.adapt(batched(scanned), stacked, method, example_inputs=(x,))
    tree = drawn_adapters(one, stacked)
    arrays, _ = aj.partition(tree, one.recipe)
    many = aj.adapt(batched(looped), unrolled, method, example_inputs=(x,))
    layers = aj.init_adapters(many, unrolled, jax.random.key(1))
    rows = {str(i): jax.tree.map(lambda x, i=i: x[i], arrays) for i in range(LAYERS)}
    layers = aj.merge_trees(rows, aj.partition(layers, many.recipe)[1])
    y = jax.jit(one)(tree, x)
    assert_near(y, many(layers, x))
    assert moved(y, batched(scanned)(stacked, x))


@pytest.mark.slow
def test_equinox_layers_in_a_scan_merge():
    (scanned, stacked), _ = equinox_blocks()
    x = drawn((5, D))
    adapted = aj.adapt(scanned, stacked, LORA, example_inputs=(x,))
    tree = drawn_adapters(adapted, stacked)
    assert_near(adapted(tree, x), scanned(aj.merge(adapted, tree), x))
    assert moved(adapted(tree, x), scanned(stacked, x))


def test_dropout_on_outputs_of_a_function_is_refused():
    (_, _), (looped, unrolled) = equinox_blocks()
    recipe = aj.Bottleneck("0/mlp", 2, dropout=0.1)
    with pytest.raises(RecipeError, match="has dropout 0.1 and targets '0/mlp'"):
        aj.adapt(looped, unrolled, recipe, example_inputs=(drawn((5, D)),))


# Haiku


def haiku_net():
    hk = pytest.importorskip("haiku")

    def net(x):
        start = hk.initializers.VarianceScaling()
        attention = hk.MultiHeadAttention(HEADS, D // HEADS, w_init=start, name="attention")
        return hk.nets.MLP([6, D], name="mlp")(x + attention(x, x, x))

    base = hk.without_apply_rng(hk.transform(net))
    return base.apply, base.init(jax.random.key(0), drawn((2, 5, D)))


@pytest.mark.slow
@pytest.mark.parametrize("method", [LORA, aj.IA3("mlp/**")], ids=repr)
def test_haiku_merges_into_its_own_parameters(method):
    run, params = haiku_net()
    x = drawn((2, 5, D))
    adapted = aj.adapt(run, params, method, example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    merged = aj.merge(adapted, tree)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert_near(adapted(tree, x), run(merged, x))
    assert moved(adapted(tree, x), run(params, x))


@pytest.mark.slow
def test_haiku_modules_take_bottlenecks_and_prompts():
    run, params = haiku_net()
    x = drawn((2, 5, D))
    adapted = aj.adapt(run, params, aj.Bottleneck("mlp", 2), example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    expected = bottleneck(double(run(params, x)), tree["mlp"]["adapter"])
    assert_near(jax.jit(adapted)(tree, x), expected)

    prompted = aj.adapt(run, params, aj.PrefixTuning("attention", 3), example_inputs=(x,))
    tree = drawn_adapters(prompted, params)
    assert_near(prompted(tree, x), run_with_prefix(params, tree["attention"]["prefix"], x))
    assert moved(prompted(tree, x), run(params, x))


def run_with_prefix(params, prefix, x):
    """The Haiku net by its formula, with keys and values of a prefix before its own."""
    weights = {path: double(w) for path, w in flatten(params).items()}
    linear = lambda x, name: x @ weights[f"{name}/w"] + weights[f"{name}/b"]  # noqa: E731
    heads = lambda x: x.reshape(*x.shape[:-1], HEADS, -1)  # noqa: E731
    x = double(x)
    q, k, v = (heads(linear(x, f"attention/{name}")) for name in ("query", "key", "value"))
    own = [
        np.broadcast_to(double(prefix[name]), (2, *prefix[name].shape)) for name in ("key", "value")
    ]
    k, v = np.concatenate([own[0], k], 1), np.concatenate([own[1], v], 1)
    scores = np.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(D // HEADS)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhqt,bthk->bqhk", share / share.sum(-1, keepdims=True), v)
    y = x + linear(mixed.reshape(*x.shape), "attention/linear")
    return linear(np.maximum(linear(y, "mlp/~/linear_0"), 0), "mlp/~/linear_1")


@pytest.mark.slow
def test_haiku_in_a_loop_over_layers():
    hk = pytest.importorskip("haiku")
    body = lambda x: x + hk.nets.MLP([6, D], name="mlp")(x)  # noqa: E731
    base = hk.without_apply_rng(
        hk.transform(lambda x: hk.experimental.layer_stack(LAYERS)(body)(x))
    )
    x = drawn((2, D))
    params = base.init(jax.random.key(0), x)
    adapted = aj.adapt(base.apply, params, LORA, example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    assert_near(adapted(tree, x), base.apply(aj.merge(adapted, tree), x))
    recipe = aj.Bottleneck("**/mlp", 2)
    adapted = aj.adapt(base.apply, params, recipe, example_inputs=(x,))
    down = drawn_adapters(adapted, params)["__layer_stack_no_per_layer"]["mlp"]["adapter"]["down"]
    assert down["kernel"].shape == (LAYERS, D, 2)


@pytest.mark.slow
def test_haiku_names_inside_a_loop_are_not_those_outside():
    """A module in a loop over layers has the name of one outside, which alone is adapted."""
    hk = pytest.importorskip("haiku")

    def net(x):
        x = hk.experimental.layer_stack(2)(lambda x: x + hk.Linear(D, name="mlp")(x))(x)
        return hk.Linear(D, name="mlp")(x)

    base, x = hk.without_apply_rng(hk.transform(net)), drawn((2, D))
    params = base.init(jax.random.key(0), x)
    adapted = aj.adapt(base.apply, params, aj.Bottleneck("mlp", 2), example_inputs=(x,))
    tree = drawn_adapters(adapted, params)
    expected = bottleneck(double(base.apply(params, x)), tree["mlp"]["adapter"])
    assert_near(adapted(tree, x), expected)
