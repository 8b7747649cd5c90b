"""Starts of LoRA from both weights and from activations: plain formulas, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import double, drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.methods.calibration import Observer
from adapters_jax.transforms import calibrate
from adapters_jax.trees import flatten
from adapters_jax.weights.quantized import is_quantized

IN, OUT, R, ALPHA = 32, 24, 3, 6.0
X = drawn((5, IN))
ROUNDS = {"loftq": 1, "loftq_5": 5}


def loftq(start="loftq"):
    return aj.LoRA("**", R, ALPHA, a_init=start)


def numpy_rounds(weight, rounds, quantize):
    """LoftQ's algorithm: the product s A B and the quantised weight, in float64."""
    product = np.zeros_like(weight)
    for _ in range(rounds):
        stored = quantize(weight - product)
        u, s, v = np.linalg.svd(weight - stored)
        product = (u[:, :R] * s[:R]) @ v[:R]
    return product, stored


@pytest.mark.witness("int4-loftq", "nf4-loftq_5", "int8-loftq")
@pytest.mark.parametrize("start", ROUNDS)
@pytest.mark.parametrize("dtype", ["int4", "nf4", "int8"])
def test_loftq_starts_at_what_quantising_rounds_away(start, dtype):
    block = {} if dtype == "int8" else {"block": 8}
    weight = drawn((IN, OUT))

    def quantize(floats):
        tree = {"kernel": jnp.float32(floats)}
        return double(
            aj.quantize(nn.Dense(OUT, False), tree, X, dtype=dtype, **block)["kernel"].unbox()
        )

    model = aj.adapt(nn.Dense(OUT, False), loftq(start))
    params = aj.init_adapters(model, {"kernel": weight}, jax.random.key(0), X)
    assert not np.any(params["lora"]["a"]) and not np.any(params["lora"]["b"])
    small = aj.quantize(model, params, X, dtype=dtype, **block)
    product, stored = numpy_rounds(double(weight), ROUNDS[start], quantize)
    a, b = (double(small["lora"][name]) for name in "ab")
    # qwix's integers round the largest number of a block at a tie, which the last bit decides.
    if start == "loftq" or dtype == "nf4":
        np.testing.assert_allclose(small["kernel"].unbox(), stored, atol=1e-5)
        np.testing.assert_allclose(ALPHA / R * a @ b, product, atol=1e-5)
    expected = np.linalg.norm(double(weight) - stored - product)
    # Without A B the error is all singular values of W - Q, with it those after the first r.
    error = double(weight) - double(small["kernel"].unbox())
    s, left = np.linalg.svd(error)[1], np.linalg.norm(error - ALPHA / R * a @ b)
    np.testing.assert_allclose(left, np.sqrt(np.sum(s[R:] ** 2)), rtol=1e-4)
    plain = double(weight) - quantize(weight)
    assert left < np.linalg.norm(plain)
    np.testing.assert_allclose(left, expected, rtol=0.05)
    expected = double(X) @ weight
    error = np.linalg.norm(model.apply({"params": small}, X) - expected)
    assert error < 0.95 * np.linalg.norm(double(X) @ plain)

    other = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    other.kernel[...] = jnp.asarray(weight)
    other = aj.quantize(aj.adapt(other, loftq(start), rngs=nnx.Rngs(1)), dtype=dtype, **block)
    np.testing.assert_allclose(other(X), model.apply({"params": small}, X), atol=1e-4)
    again = aj.quantize(model, {**params, "lora": {"a": a + 1, "b": b}}, X, dtype=dtype, **block)
    np.testing.assert_allclose(again["lora"]["a"], a + 1)
    np.testing.assert_array_equal(again["kernel"].unbox(), small["kernel"].unbox())


def test_a_file_of_loftq_gives_its_model_again_on_the_float_base(tmp_path):
    weight, method = {"kernel": jnp.asarray(drawn((IN, OUT)))}, loftq("loftq_5")
    model = aj.adapt(nn.Dense(OUT, False), method)
    params = aj.init_adapters(model, weight, jax.random.key(0), X)
    params = aj.quantize(model, params, X, dtype="nf4", block=8)
    params = {**params, "lora": jax.tree.map(lambda x: x + 0.1, params["lora"])}
    expected = model.apply({"params": params}, X)
    aj.save_adapter(tmp_path / "a", aj.partition(params, method)[0], method)
    again, loaded = aj.load_adapter(tmp_path / "a", nn.Dense(OUT, False), weight, X)
    loaded = aj.quantize(again, loaded, X, dtype="nf4", block=8)
    np.testing.assert_allclose(again.apply({"params": loaded}, X), expected, atol=1e-5)
    small = aj.quantize(nn.Dense(OUT, False), weight, X, dtype="nf4", block=8)
    with raises(aj.RecipeError, "quantised", "a_init='gaussian'", "adapt the float base first"):
        aj.load_adapter(tmp_path / "a", nn.Dense(OUT, False), small, X)


def test_each_layer_of_a_stack_and_each_expert_has_its_own_loftq():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum(
                "ecd,edf->ecf", x, self.param("w", nn.initializers.ones, (2, IN, OUT))
            )

    x, weight = drawn((2, 4, IN)), drawn((2, IN, OUT))
    model = aj.adapt(Experts(), loftq())
    params = aj.init_adapters(model, {"w": weight}, jax.random.key(0), x)
    params = aj.quantize(model, params, x, dtype="int4", block=8)
    error = double(weight) - double(params["w"].unbox())
    for expert in range(2):
        a, b = (double(params["lora"][name])[expert] for name in "ab")
        u, s, v = np.linalg.svd(error[expert])
        np.testing.assert_allclose(ALPHA / R * a @ b, (u[:, :R] * s[:R]) @ v[:R], atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "loftq_5"])
def test_a_quantised_base_says_which_starts_it_can_have(start):
    weight = {"kernel": drawn((IN, OUT))}
    small = aj.quantize(nn.Dense(OUT, False), weight, X, dtype="int8")
    model = aj.adapt(nn.Dense(OUT, False), loftq(start))
    data = (
        "''",
        "quantised",
        "a_init='gaussian'",
        "a_init='uniform'",
        "adapt the float base first",
    )
    with raises(aj.RecipeError, *data):
        aj.init_adapters(model, small, jax.random.key(0), X)
    other = aj.quantize(nnx.Linear(IN, OUT, rngs=nnx.Rngs(0)), dtype="int8")
    with raises(aj.RecipeError, *data):
        aj.adapt(other, loftq(start), rngs=nnx.Rngs(1))


def test_a_weight_that_stays_in_floats_cannot_start_so():
    model = aj.adapt(nn.Sequential([nn.Dense(8), nn.Dense(8)]), loftq())
    base = jax.eval_shape(lambda: model.inner.init(jax.random.key(0), X)["params"])
    params = aj.init_adapters(model, base, jax.random.key(0), X)
    with raises(aj.RecipeError, "'layers_1'", "a_init='loftq'", "aj.quantize"):
        aj.quantize(model, params, X, targets="layers_0")
    whole = aj.quantize(model, params, X, dtype="nf4", block=4)
    assert is_quantized(whole["layers_1"]["kernel"])


EVA = aj.LoRA("**", R, ALPHA, a_init="eva")


def principal(x, weights=None):
    """Principal directions and shares of the variance of centred rows, in float64."""
    x = double(x).reshape(-1, x.shape[-1])
    w = np.ones(len(x)) if weights is None else double(weights).reshape(-1)
    centred = x - (w @ x) / w.sum()
    values, vectors = np.linalg.eigh((centred * w[:, None]).T @ centred)
    return vectors[:, ::-1], values[::-1] / values.sum()


def spread(shape, seed=0, decay=0.7):
    """Rows along random directions with falling deviations, and a mean."""
    rng = np.random.default_rng(seed)
    d = shape[-1]
    turn = np.linalg.qr(np.random.default_rng(7).standard_normal((d, d)))[0]
    return np.float32((rng.standard_normal(shape) * decay ** np.arange(d)) @ turn + 0.3)


def same_space(found, expected, tolerance=1e-3):
    """Whether two bases of columns span one space."""
    cosines = np.linalg.svd(double(found).T @ double(expected))[1]
    np.testing.assert_allclose(cosines, 1.0, atol=tolerance)


def check_first(found, x, weights=None, rank=R):
    vectors, shares = principal(x, weights)
    cosines = np.abs(np.sum(double(found.directions)[:, :rank] * vectors[:, :rank], 0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-3)
    np.testing.assert_allclose(found.explained[:rank], shares[:rank], rtol=1e-2)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(12, name="up")(x))
        return nn.Dense(4, name="down")(h)


def mlp():
    params = Mlp().init(jax.random.key(0), jnp.ones((1, IN)))["params"]
    return jax.tree.map(lambda x: x + 0.01, params)


def hidden(params, x):
    return np.tanh(double(x) @ double(params["up"]["kernel"]) + double(params["up"]["bias"]))


BATCHES = [(spread((6, 5, IN), seed),) for seed in range(4)]
TOGETHER = np.concatenate([x for (x,) in BATCHES])


@pytest.mark.slow
@pytest.mark.witness("256")
@pytest.mark.parametrize("size", [256, 24])
def test_eva_starts_along_the_principal_directions_of_the_inputs_in_every_api(size):
    params = mlp()
    found = aj.calibrate(Mlp(), EVA, iter(BATCHES), params=params, size=size)
    check_first(found.inputs["up/kernel"], TOGETHER)
    check_first(found.inputs["down/kernel"], hidden(params, TOGETHER))

    model = aj.adapt(Mlp(), EVA)
    grown = aj.init_adapters(model, params, jax.random.key(1), BATCHES[0][0], calibration=found)
    for name in ("up", "down"):
        a, expected = grown[name]["lora"]["a"], found.inputs[f"{name}/kernel"].directions[:, :R]
        np.testing.assert_array_equal(a, expected)
        np.testing.assert_allclose(double(a).T @ a, np.eye(R), atol=1e-5)
        assert not np.any(grown[name]["lora"]["b"])
        np.testing.assert_array_equal(grown[name]["kernel"], params[name]["kernel"])

    def predict(p, x):
        h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
        return h @ p["down"]["kernel"] + p["down"]["bias"]

    plain = aj.calibrate(predict, EVA, BATCHES, params=params, size=size)
    for path, each in found.inputs.items():
        np.testing.assert_allclose(plain.inputs[path].explained, each.explained, atol=1e-5)
        same_space(plain.inputs[path].directions[:, :R], each.directions[:, :R])
    adapted = aj.adapt(predict, params, EVA, example_inputs=BATCHES[0])
    tree = aj.init_adapters(adapted, params, jax.random.key(1), calibration=plain)
    assert tree["up/lora" if "up/lora" in tree else "up"]

    class Other(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(IN, 12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.down(self.drop(jnp.tanh(self.up(x))))

    other = Other(nnx.Rngs(0))
    nnx.update(other, params)
    seen = aj.calibrate(other, EVA, BATCHES, size=size)
    assert not other.drop.deterministic
    for path, each in found.inputs.items():
        same_space(seen.inputs[path].directions[:, :R], each.directions[:, :R])
    model = aj.adapt(other, EVA, rngs=nnx.Rngs(1), example_inputs=BATCHES[0], calibration=seen)
    np.testing.assert_array_equal(
        model.down.lora["a"][...], seen.inputs["down/kernel"].directions[:, :R]
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(IN, name="up")(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Layer), length=3, **lifted)(name="layers")(x, None)[0].mean(1)


def test_each_scanned_layer_has_directions_of_its_own():
    (x,) = BATCHES[0]
    params = Scanned().init(jax.random.key(0), x)["params"]
    found = aj.calibrate(Scanned(), EVA, BATCHES, params=params).inputs["layers/up/kernel"]
    kernel, h = double(params["layers"]["up"]["kernel"]), double(TOGETHER)
    assert found.directions.shape == (3, IN, IN)
    for layer in range(3):
        vectors, shares = principal(h)
        same_space(found.directions[layer, :, :R], vectors[:, :R])
        np.testing.assert_allclose(found.explained[layer, :R], shares[:R], rtol=1e-2)
        h = np.tanh(h @ kernel[layer])
    seen = aj.Calibration({"layers/up/kernel": found})
    model = aj.adapt(Scanned(), EVA)
    grown = aj.init_adapters(model, params, jax.random.key(1), x, calibration=seen)
    np.testing.assert_array_equal(grown["layers"]["up"]["lora"]["a"], found.directions[:, :, :R])
    ranks = aj.eva_ranks(EVA, seen, rho=2.0)  # one rank for all layers of the stack
    assert ranks == aj.Recipe(EVA)


def test_what_a_mask_leaves_out_does_not_count():
    params = mlp()
    masks = [np.random.default_rng(i).random(x.shape[:2]) < 0.6 for i, (x,) in enumerate(BATCHES)]
    pairs = [(x, mask) for (x,), mask in zip(BATCHES, masks, strict=True)]
    how = {"mask": lambda pair: pair[1], "inputs": lambda pair: (pair[0],), "params": params}
    found = aj.calibrate(Mlp(), EVA, pairs, **how)
    weights = np.concatenate(masks)
    check_first(found.inputs["up/kernel"], TOGETHER, weights)
    check_first(found.inputs["down/kernel"], hidden(params, TOGETHER), weights)
    assert found.inputs["up/kernel"].count == weights.sum()
    rows = [(x.reshape(-1, IN), mask) for x, mask in pairs]  # tokens of a batch in one axis
    flat = aj.calibrate(Mlp(), EVA, rows, **how)
    np.testing.assert_allclose(
        flat.inputs["up/kernel"].explained, found.inputs["up/kernel"].explained, atol=1e-6
    )
    with raises(aj.RecipeError, "up", "[6, 5, 32]", "(5, 6)"):
        how["mask"] = lambda pair: pair[1].T
        aj.calibrate(Mlp(), EVA, pairs, **how)
    with raises(aj.UserError, "/kernel", "the mask counts none"):
        how["mask"] = lambda pair: np.zeros((6, 5))
        aj.calibrate(Mlp(), EVA, pairs, **how)


@pytest.mark.slow
def test_a_quantised_base_and_dora_start_from_activations_too():
    params = mlp()
    small = aj.quantize(Mlp(), params, BATCHES[0][0], dtype="int8")
    method = aj.DoRA("up", R, a_init="eva")
    found = aj.calibrate(Mlp(), method, BATCHES, params=small)
    check_first(found.inputs["up/kernel"], TOGETHER)
    model = aj.adapt(Mlp(), method)
    grown = aj.init_adapters(model, small, jax.random.key(0), BATCHES[0][0], calibration=found)
    np.testing.assert_array_equal(
        grown["up"]["lora"]["a"], found.inputs["up/kernel"].directions[:, :R]
    )
    norm = np.linalg.norm(double(small["up"]["kernel"].unbox()), axis=0)
    np.testing.assert_allclose(grown["up"]["lora"]["magnitude"], norm, rtol=1e-5)


def test_experts_and_weights_with_several_input_axes():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            ones = nn.initializers.ones
            h = jnp.einsum("ecd,edhk->echk", x, self.param("up", ones, (2, IN, 3, 4)))
            return jnp.einsum("echk,hkf->ecf", h, self.param("out", ones, (3, 4, 5)))

    x = spread((2, 40, IN))
    params = {"up": drawn((2, IN, 3, 4)), "out": drawn((3, 4, 5))}
    found = aj.calibrate(Heads(), EVA, [(x,)], params=params).inputs
    for expert in range(2):
        vectors, _ = principal(x[expert])
        same_space(found["up"].directions[expert, :, :R], vectors[:, :R])
    h = np.einsum("ecd,edm->ecm", double(x), double(params["up"]).reshape(2, IN, 12))
    check_first(found["out"], h)
    grown = aj.init_adapters(
        aj.adapt(Heads(), EVA), params, jax.random.key(0), x, calibration=aj.Calibration(found)
    )
    a = [leaf for path, leaf in flatten(grown).items() if path.endswith("out/a")]
    np.testing.assert_array_equal(a[0], found["out"].directions[:, :R].reshape(3, 4, R))


def test_ranks_go_where_directions_explain_most_within_the_budget():
    params = mlp()
    found = aj.calibrate(Mlp(), EVA, [(spread((60, IN), decay=0.97),)], params=params)
    moved = aj.eva_ranks(EVA, found, rho=1.3)
    shares = {n: found.inputs[f"{n}/kernel"].explained[:4] for n in ("up", "down")}
    every = sorted(((s, n) for n, each in shares.items() for s in each), reverse=True)[: 2 * R]
    expected = {name: sum(n == name for _, n in every) for name in shares}
    assert sorted(expected.values()) == [2, 4]
    (method,) = moved
    assert {name: method.rank_at(name) for name in expected} == expected
    assert method.scale_at("up") == method.scale_at("down") == ALPHA / R
    model = aj.adapt(Mlp(), moved)
    grown = aj.init_adapters(model, params, jax.random.key(1), BATCHES[0][0], calibration=found)
    assert {n: grown[n]["lora"]["a"].shape[1] for n in expected} == expected
    assert aj.eva_ranks(EVA, found, rho=1).methods[0].rank_pattern == ()
    few = aj.LoRA("**", 1, a_init="eva", rank_stabilized=True)
    (method,) = aj.eva_ranks(few, found, rho=2)
    assert len(method.targets) == 2 and method.targets[1].startswith("!")
    (left,) = {"up", "down"} - {method.targets[1][1:]}
    assert method.rank_at(left) == 2
    np.testing.assert_allclose(method.scale_at(left), 1.0)


@pytest.mark.slow
def test_a_calibration_that_cannot_be_is_refused():
    params, x = mlp(), BATCHES[0][0]
    bad = BATCHES[1][0].copy()
    bad[0, 0, 0] = np.nan

    def given(batches, **more):
        return aj.calibrate(Mlp(), EVA, batches, params=params, **more)

    with raises(aj.UserError, "there are no batches"):
        given([])
    with raises(aj.UserError, "batch 1", "NaN"):
        given([(x,), (bad,), (bad,)])
    with raises(aj.UserError, "batch 1", "differs"):
        given([(x,), aj.inputs(x=x)])
    with raises(aj.UserError, "a_init='eva'"):
        aj.calibrate(Mlp(), aj.LoRA("**", 2), BATCHES, params=params)
    with raises(aj.UserError, "size=0"):
        given(BATCHES, size=0)
    with raises(TypeError, "base"):
        aj.calibrate(aj.adapt(Mlp(), EVA), EVA, BATCHES, params=params)
    with raises(TypeError, "params"):
        aj.calibrate(Mlp(), EVA, BATCHES)
    with raises(aj.UserError, "a_init='eva'", "up/kernel", "aj.calibrate"):
        aj.init_adapters(aj.adapt(Mlp(), EVA), params, jax.random.key(0), x)
    with raises(aj.UserError, "a_init='eva'", "aj.calibrate"):
        aj.adapt(Mlp(), EVA).init(jax.random.key(0), x)
    layer = nnx.Linear(IN, 4, rngs=nnx.Rngs(0))
    with raises(aj.UserError, "a_init='eva'", "kernel", "aj.calibrate"):
        aj.adapt(layer, EVA, rngs=nnx.Rngs(1))
    found = given(BATCHES)
    with raises(aj.UserError, "another model", "kernel of [32, 4], not None"):
        aj.adapt(layer, EVA, rngs=nnx.Rngs(1), calibration=found)
    other = {**params, "up": {**params["up"], "kernel": drawn((IN + 1, 12))}}
    wide = drawn((2, IN + 1))
    with raises(aj.UserError, "up/kernel of [33, 12], not [32, 12]"):
        aj.init_adapters(aj.adapt(Mlp(), EVA), other, jax.random.key(0), wide, calibration=found)
    with raises(aj.UserError, "no weights of the recipe", "calibration is Calibration(2 weights)"):
        aj.init_adapters(
            aj.adapt(Mlp(), aj.LoRA("**", 2)), params, jax.random.key(0), x, calibration=found
        )
    with raises(TypeError, "dict"):
        aj.init_adapters(aj.adapt(Mlp(), EVA), params, jax.random.key(0), x, calibration={})
    with raises(TypeError, "init_adapters", "calibration"):
        aj.adapt(Mlp(), EVA, calibration=found)
    with raises(aj.UserError, "needs 3", "of 2 inputs"):
        few = given([(x[0, :2],)])
        aj.init_adapters(aj.adapt(Mlp(), EVA), params, jax.random.key(0), x, calibration=few)
    small = given(BATCHES, size=4)
    with raises(aj.UserError, "needs 3", "size=8"):
        aj.init_adapters(aj.adapt(Mlp(), EVA), params, jax.random.key(0), x, calibration=small)
    with raises(aj.UserError, "down/kernel", "the rank 4", "2 directions", "size=8"):
        aj.eva_ranks(EVA, small)
    with raises(aj.UserError, "rho=0.5"):
        aj.eva_ranks(EVA, found, rho=0.5)
    with raises(aj.UserError, "eva_ranks", "a_init='eva'"):
        aj.eva_ranks(aj.LoRA("**", 2), found)


@pytest.mark.parametrize("how", ["conv", "embed", "tied", "formed", "twice"])
def test_a_weight_without_activations_of_its_own_is_named(how):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if how == "conv":
                return nn.Conv(4, (3,), name="layer")(x)
            if how in ("embed", "tied"):
                embed = nn.Embed(4, IN, name="layer")
                return (
                    embed(jnp.zeros(3, int))
                    if how == "embed"
                    else embed.attend(x) + embed(jnp.int32(0))[0]
                )
            weight = self.param("layer", nn.initializers.ones, (IN, IN))
            return x @ (weight / weight.max()) if how == "formed" else x @ weight @ weight.T

    (x,) = BATCHES[0]
    params = Net().init(jax.random.key(0), x)["params"]
    with raises(aj.RecipeError, "calibrate", "'!layer"):
        aj.calibrate(Net(), EVA, BATCHES, params=params)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_a_batch_costs_a_forward_pass_and_thin_products_and_compiles_once(scanned):
    """By XLA: what a gradient would need beside the statistics is not computed."""
    width, size, rows, runs = 64, 8, 32, []

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            runs.append(None)
            return x + nn.Dense(width)(nn.tanh(nn.Dense(4 * width)(x))), None

    lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    model = nn.scan(Wide, length=2, **lifted)() if scanned else Wide()
    x = drawn((rows, width))
    params = model.init(jax.random.key(0), x, None)["params"]
    first = aj.inputs(x, None)
    run, _, tapes, rest = calibrate._observed(
        model, params, aj.Recipe(Observer("**", size)), first, {}
    )
    step = calibrate._step(run, first)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    with_it = flops(lambda *given: step(*given, None, tapes, jnp.int32(-1), 0), tapes, rest, {0: x})
    without = flops(lambda p, x: model.apply({"params": p}, x, None)[0].sum(), params, x)
    thin = 2 * 2 * rows * size * (width + 4 * width)
    elementwise = 10 * rows * (width + 4 * width)
    assert with_it < without + thin + elementwise + 10 * size * (width + 4 * width)

    counts = []

    def batches():
        for seed in range(4):
            counts.append(len(runs))
            yield aj.inputs(drawn((rows, width), seed), None)

    aj.calibrate(model, aj.LoRA("**", 2, a_init="eva"), batches(), params=params, size=size)
    assert counts[0] < counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("start", ["loftq", "loftq_5", "eva"])
def test_a_command_does_not_train_what_has_no_start(start, tmp_path):
    with raises(aj.UserError, f"a_init={start!r}", "olora"):
        MethodOptions("lora", a_init=start).build()
    file = tmp_path / "recipe.json"
    file.write_text(aj.Recipe(aj.LoRA("**/query", 2, a_init=start)).to_json())
    with raises(aj.UserError, f"a_init={start!r}", "olora"):
        MethodOptions(recipe=file).build()


@pytest.mark.parametrize("start", ["loftq", "loftq_5"])
def test_loftq_whose_base_stays_in_floats_does_not_train_in_silence(start):
    model = aj.adapt(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), loftq(start), rngs=nnx.Rngs(1))
    options = {"tx": optax.sgd(0.1), "key": jax.random.key(0)}
    with raises(aj.RecipeError, "does not train", start, "aj.quantize", "'gaussian'"):
        aj.TrainState.create(model, **options)
    aj.TrainState.create(aj.quantize(model, dtype="int4"), **options)
