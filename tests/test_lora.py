"""LoRA: scales, initialisers, ranks, and dropout with every flag that turns it off."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.errors import InvalidRngError
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.methods.base import AttachmentPoint
from adapters_jax.placement import Placement
from adapters_jax.weights.axes import Axes
from adapters_jax.weights.changes import Changed
from adapters_jax.weights.lazy import Lazy, thin

DIN, DOUT = 6, 4
DENSE, EMBED = Axes((0,), (1,)), Axes((0,), (1,), lookup=True)


def point_of(shape=(DIN, DOUT), axes=DENSE, path="layer_0/query"):
    return AttachmentPoint("weight", path, {"kernel": shape}, weight="kernel", axes=axes)


def read(lora, leaves, weight, use, key=None, axes=DENSE):
    """What a function makes of a weight that a method changes."""
    point = point_of(weight.shape, axes)
    (change,) = lora.changes(leaves, point, lambda: weight, key)["kernel"]
    with thin() as trace:
        return use(Lazy(trace, Changed.of(jnp.asarray(weight), (change,))))


@pytest.mark.parametrize(
    ("rank", "alpha", "stabilized", "scale"),
    [
        (4, None, False, 1.0),
        (4, 4, False, 1.0),
        (4, 16.0, False, 4.0),
        (3, 0.75, False, 0.25),
        (4, 16.0, True, 8.0),
        (9, None, True, 3.0),
    ],
)
def test_the_scale_by_hand(rank, alpha, stabilized, scale):
    lora = aj.LoRA("**", rank, alpha, rank_stabilized=stabilized)
    assert lora.scale_at("anywhere") == pytest.approx(scale)
    x, w, a, b = drawn((5, 9), 1), drawn((9, 9), 2), drawn((9, rank), 3), drawn((rank, 9), 4)
    got = read(lora, {"a": a, "b": b}, w, lambda w: jnp.matmul(x, w))
    expected = double(x) @ (double(w) + scale * (double(a) @ double(b)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_rank_and_alpha_patterns_are_resolved_each_on_its_own():
    lora = aj.LoRA(
        "**",
        8,
        alpha=16.0,
        rank_pattern={"layer_0/**": 4, "**/query": 2},
        alpha_pattern={"**/query": 32.0, "layer_1/**": None},
    )
    resolved = {
        "layer_0/query": (4, 32.0 / 4),
        "layer_0/key": (4, 16.0 / 4),
        "layer_1/query": (2, 32.0 / 2),
        "layer_1/key": (8, 1.0),
        "layer_2/key": (8, 2.0),
    }
    for path, (rank, scale) in resolved.items():
        assert (lora.rank_at(path), lora.scale_at(path)) == (rank, scale), path
        assert lora.leaves(point_of((9, 9), path=path))["b"].shape == (rank, 9)
    assert aj.LoRA("**", 8, rank_pattern={"a": 2}).scale_at("a") == 1.0


LAWS = {
    # name: (deviation, greatest magnitude or None, share beyond two deviations)
    "gaussian": (1 / math.sqrt(400), None, 0.0455),
    "uniform": (1 / math.sqrt(3 * 400), 1 / math.sqrt(400), 0.0),
    "gaussian_rank": (1 / 200, None, 0.0455),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_law_of_a(law):
    leaves = aj.LoRA("**", 200, a_init=law).leaves(point_of((400, 300)))
    a = double(leaves["a"].init(jax.random.key(0), leaves["a"].shape))
    deviation, limit, tail = LAWS[law]
    assert a.shape == (400, 200)
    assert abs(a.mean()) < 0.015 * deviation
    assert abs(a.std() / deviation - 1) < 0.01
    assert abs((np.abs(a) > 2 * a.std()).mean() - tail) < 0.003
    if limit:
        assert 0.999 * limit < np.abs(a).max() <= limit
    assert leaves["b"].shape == (200, 300)
    assert not double(leaves["b"].init(jax.random.key(0), (200, 300))).any()


def test_the_fan_in_is_of_all_input_axes():
    conv = point_of((3, 50, 300), Axes((0, 1), (2,), window=(0,)))
    leaf = aj.LoRA("**", 100).leaves(conv)["a"]
    assert leaf.shape == (3, 50, 100)
    a = double(leaf.init(jax.random.key(0), leaf.shape))
    assert abs(a.std() * math.sqrt(150) - 1) < 0.02


def test_an_embedding_starts_with_a_at_zero_and_b_from_the_unit_gaussian():
    leaves = aj.LoRA("**", 100, a_init="uniform").leaves(point_of((500, 300), EMBED))
    assert not double(leaves["a"].init(jax.random.key(0), leaves["a"].shape)).any()
    b = double(leaves["b"].init(jax.random.key(0), leaves["b"].shape))
    assert leaves["a"].shape == (500, 100) and b.shape == (100, 300)
    assert abs(b.mean()) < 0.02 and abs(b.std() - 1) < 0.02 and np.abs(b).max() > 3.5


@pytest.mark.parametrize(
    ("axes", "shape", "parts"),
    [
        (DENSE, (6, 4), (6, 4)),
        (Axes((0,), (1, 2)), (6, 2, 2), (6, 4)),
        (Axes((0, 1), (2,)), (2, 2, 6), (4, 6)),
        (Axes((0, 1), (2,), window=(0,)), (3, 2, 4), (6, 4)),
        (EMBED, (3, 5), (3, 5)),
    ],
)
def test_a_rank_beyond_the_weight(axes, shape, parts):
    limit = min(parts)
    point = point_of(shape, axes)
    leaves = aj.LoRA("**", limit).leaves(point)
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == limit * sum(parts)
    assert aj.lora_parameters(*parts, limit) == limit * sum(parts)
    fix = f"rank_pattern={{'layer_0/query': {limit}}}"
    with raises(aj.RecipeError, f"rank {limit + 1}", f"min({parts[0]}, {parts[1]})", fix):
        aj.LoRA("**", limit + 1).leaves(point)
    fixed = aj.LoRA("**", limit + 1, rank_pattern={"layer_0/query": limit})
    assert fixed.leaves(point)["a"].shape[-1] == limit


@pytest.mark.parametrize("make", [aj.LoRA, aj.DoRA])
def test_a_rank_beyond_the_weight_that_a_pattern_sets(make):
    recipe = make("**", 8, alpha=4, rank_pattern={"**": 3})
    model, x = aj.adapt(nn.Dense(1), recipe), drawn((5, 6), 1)
    params = nn.Dense(1).init(jax.random.key(0), x)["params"]
    params = aj.init_adapters(model, params, jax.random.key(1), x)
    a, b = drawn((6, 3), 2), drawn((3, 1), 3)
    params["lora"] = {**params["lora"], "a": jnp.asarray(a), "b": jnp.asarray(b)}
    assert {n: leaf.shape for n, leaf in params["lora"].items() if n in "ab"} == {
        "a": (6, 3),
        "b": (3, 1),
    }
    merged = aj.merge(model, params, x)
    expected = x @ np.asarray(merged["kernel"])
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)
    if make is aj.LoRA:
        change = 4 / 3 * double(a) @ double(b)
        np.testing.assert_allclose(merged["kernel"] - params["kernel"], change, atol=1e-5)
    found = aj.audit(model, params)
    assert found.adapter_parameters == 3 * (6 + 1) + (make is aj.DoRA)
    for start in ("pissa", "loftq", "eva"):  # which have no more directions than the weight
        with raises(aj.RecipeError, "rank 3"):
            dataclasses.replace(recipe, a_init=start).leaves(point_of((6, 1)))


def test_a_rank_beyond_one_expert():
    """The limit is that of each expert's matrix, however many there are."""
    point = point_of((8, 3, 5), Axes((1,), (2,), (0,)))
    leaves = aj.LoRA("**", 3).leaves(point)
    assert {name: leaf.shape for name, leaf in leaves.items()} == {"a": (8, 3, 3), "b": (8, 3, 5)}
    with raises(aj.RecipeError, "rank 4", "min(3, 5)", "'layer_0/query'"):
        aj.LoRA("**", 4).leaves(point)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_at_full_rank_any_change_of_the_weight_can_be_had(shape):
    rank, alpha = min(shape), 2.0
    weight, change = double(drawn(shape, 1)), double(drawn(shape, 2))
    u, s, v = np.linalg.svd(change, full_matrices=False)
    factors = {"a": u * s, "b": v * rank / alpha}
    params = {"kernel": weight, "bias": np.zeros(shape[1]), "lora": factors}
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    model = aj.adapt(nn.Dense(shape[1]), aj.LoRA("**", rank, alpha))
    x = drawn((7, shape[0]), 3)
    expected = double(x) @ (weight + change)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5, rtol=1e-5)
    merged = aj.merge(model, params, x)
    np.testing.assert_allclose(merged["kernel"], weight + change, atol=1e-5)


def test_refused_where_there_is_no_weight():
    with raises(aj.RecipeError, "norm (LoRA)"):
        Placement(aj.LoRA("**", 2), "norm", "norm").point()


def test_half_precision_stays_and_factors_are_kept_in_full():
    x = jnp.asarray(drawn((4, DIN), 1), jnp.bfloat16)
    model = aj.adapt(nn.Dense(DOUT, dtype=jnp.bfloat16), aj.LoRA("**", 2, 3.0))
    base = {
        "kernel": jax.ShapeDtypeStruct((DIN, DOUT), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((DOUT,), jnp.bfloat16),
    }
    abstract = aj.init_adapters(model, base, jax.random.key(0), x)
    assert {leaf.dtype for leaf in abstract["lora"].values()} == {jnp.dtype("float32")}
    params = drawn_like(abstract)
    y = model.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    a, b = (double(params["lora"][name]) for name in "ab")
    expected = double(x) @ (double(params["kernel"]) + 1.5 * a @ b) + double(params["bias"])
    np.testing.assert_allclose(double(y), expected, rtol=0.05, atol=0.2)


def test_dropout_zeroes_inputs_of_the_branch_and_keeps_the_mean():
    """With identities for factors, the entries of the branch's input can be read off."""
    lora = aj.LoRA("**", DIN, dropout=0.25)
    eye = {"a": np.eye(DIN, dtype=np.float32), "b": np.eye(DIN, dtype=np.float32)}
    x, weight = jnp.ones((2000, DIN)), np.full((DIN, DIN), 7 / DIN, np.float32)

    def run(key=None):
        return np.asarray(read(lora, eye, weight, lambda w: jnp.matmul(x, w), key))

    np.testing.assert_allclose(run(), np.full(x.shape, 8.0), rtol=1e-6)
    trained = run(jax.random.key(0))
    kept = np.isclose(trained, 7 + 1 / 0.75, atol=1e-5)
    assert (kept | np.isclose(trained, 7.0, atol=1e-5)).all()
    assert abs(kept.mean() - 0.75) < 0.02 and abs(trained.mean() - 8.0) < 0.03
    assert (run(jax.random.key(1)) != trained).any()


def test_tokens_are_not_dropped_before_an_embedding():
    lora = aj.LoRA("**", 2, dropout=0.9)
    ids, weight = np.array([[1, 0], [2, 1]]), drawn((3, 5), 1)
    leaves = {"a": drawn((3, 2), 2), "b": drawn((2, 5), 3)}
    expected = (double(weight) + double(leaves["a"]) @ double(leaves["b"]))[ids]
    for key in (None, jax.random.key(0)):
        got = read(lora, leaves, weight, lambda w: jnp.take(w, ids, axis=0), key, EMBED)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


class Inner(nn.Module):
    """A block that says nothing of training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(DIN, name="dense")(x)


MODEL = """
class Model(nn.Module):
    {field}

    @nn.compact
    def __call__(self, x{argument}):
        return block(name="block")(x)
"""


def with_flag(name, field=False, default=None, block=Inner):
    """A model class with a flag of some name, as an argument of the call or as a field."""
    code = MODEL.format(
        field=f"{name}: bool | None = None" if field else "",
        argument="" if field else f", {name}={default}",
    )
    names = {"nn": nn, "block": block, "__name__": __name__}
    exec(code, names)
    return names["Model"]


FLAGS = [
    ("deterministic", True),
    *((name, False) for name in ("train", "training", "is_train", "is_training")),
]
X = drawn((3, DIN), 1)
PARAMS = {"block": {"dense": {"kernel": drawn((DIN, DIN), 2), "bias": drawn((DIN,), 3)}}}
PARAMS["block"]["dense"]["lora"] = {"a": drawn((DIN, 2), 4), "b": drawn((2, DIN), 5)}
RECIPE = aj.Recipe(aj.LoRA("**/dense", 2, dropout=0.5))
KEYS = {"dropout": jax.random.key(0)}


def drops(model, *args, rngs=KEYS, **kwargs):
    """Whether the adapted model drops something."""
    adapted = aj.adapt(model, RECIPE)
    got = adapted.apply({"params": PARAMS}, X, *args, rngs=rngs, **kwargs)
    dense = jax.tree.map(double, PARAMS["block"]["dense"])
    plain = X @ (dense["kernel"] + dense["lora"]["a"] @ dense["lora"]["b"]) + dense["bias"]
    return not np.allclose(got, plain, atol=1e-4)


@pytest.mark.parametrize(("flag", "evaluating"), FLAGS)
def test_dropout_follows_the_flag_of_the_model(flag, evaluating):
    model = with_flag(flag)()
    assert not drops(model, evaluating)
    assert drops(model, not evaluating)
    assert not drops(model, **{flag: evaluating})
    assert drops(model, **{flag: not evaluating})
    assert not drops(with_flag(flag, default=evaluating)())
    assert drops(with_flag(flag, default=not evaluating)())
    assert not drops(with_flag(flag, default=not evaluating)(), evaluating)
    field = with_flag(flag, field=True)
    assert not drops(field(**{flag: evaluating}))
    assert drops(field(**{flag: not evaluating}))


def test_without_a_flag_dropout_follows_the_key():
    model = with_flag("verbose")()
    assert drops(model)
    assert not drops(model, rngs={})
    assert drops(with_flag("deterministic")())
    assert not drops(with_flag("deterministic")(), rngs={})


@pytest.mark.parametrize(("flag", "evaluating"), FLAGS)
def test_training_without_a_key_is_an_error(flag, evaluating):
    with raises(InvalidRngError, "dropout"):
        drops(with_flag(flag)(), not evaluating, rngs={})
    assert not drops(with_flag(flag)(), evaluating, rngs={})


def test_the_flag_of_the_nearest_call_counts():
    class Teacher(nn.Module):
        """A part that is always in evaluation."""

        @nn.compact
        def __call__(self, x, deterministic=True):
            return nn.Dense(DIN, name="dense")(x)

    model = with_flag("train", block=Teacher)()
    assert not drops(model, True)
    assert drops(with_flag("train", block=Inner)(), True)


class Methods(nn.Module):
    """The flag is given to a method that is not `__call__`."""

    def setup(self):
        self.block = Inner()

    def __call__(self, x):
        return self.encode(x, True)

    def encode(self, x, deterministic):
        return self._run(x)

    def _run(self, x):
        return self.block(x)


def test_the_flag_of_any_method_counts():
    for method in ("encode", Methods.encode, lambda m, x, flag: m.encode(x, flag)):
        assert drops(Methods(), False, method=method)
        assert not drops(Methods(), True, method=method)
    assert not drops(Methods())


def test_a_recipe_without_dropout_needs_no_key():
    model = aj.adapt(with_flag("train")(), aj.LoRA("**/dense", 2))
    model.apply({"params": PARAMS}, X, True)


def test_by_hand_it_is_the_same_arithmetic():
    x = drawn((2, DIN), 1)
    module = aj.linen.LoRADense(DOUT, rank=4, alpha=2.0, rank_stabilized=True)
    params = drawn_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    assert shapes(params) == {
        "kernel": (DIN, DOUT),
        "bias": (DOUT,),
        "lora": {"a": (DIN, 4), "b": (4, DOUT)},
    }
    dense = jax.tree.map(double, params)
    expected = x @ (dense["kernel"] + dense["lora"]["a"] @ dense["lora"]["b"]) + dense["bias"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)

    other = aj.nnx.LoRALinear(
        DIN, DOUT, rank=4, alpha=2.0, lora={"rank_stabilized": True}, rngs=nnx.Rngs(0)
    )
    other.kernel[...], other.bias[...] = params["kernel"], params["bias"]
    other.lora["a"][...], other.lora["b"][...] = params["lora"]["a"], params["lora"]["b"]
    np.testing.assert_allclose(other(x), expected, rtol=1e-4, atol=1e-5)


def test_by_hand_in_linen_dropout_follows_the_key_and_the_flag():
    x = drawn((20, DIN), 1)
    module = aj.linen.LoRADense(DOUT, rank=2, dropout=0.5)
    params = drawn_like(jax.eval_shape(module.init, jax.random.key(0), x))
    plain = module.apply(params, x)
    np.testing.assert_array_equal(module.apply(params, x, True, rngs=KEYS), plain)
    assert np.abs(module.apply(params, x, rngs=KEYS) - plain).max() > 0.1
    with raises(InvalidRngError, "dropout"):
        module.apply(params, x, deterministic=False)


@pytest.mark.slow
def test_each_scanned_layer_drops_entries_of_its_own():
    """Three layers with one kernel, one pair of factors and one input differ by their masks."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, nn.Dense(DIN, use_bias=False, name="dense")(x)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            each = nn.scan(Layer, **axes, in_axes=nn.broadcast, length=3)
            return each(name="layers")(0.0, x)[1]

    one = {name: leaf for name, leaf in PARAMS["block"]["dense"].items() if name != "bias"}
    params = {"layers": {"dense": jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)}}
    run = aj.adapt(Layers(), RECIPE).apply
    evaluated = run({"params": params}, X)
    np.testing.assert_array_equal(evaluated, jnp.stack([evaluated[0]] * 3))
    dropped = run({"params": params}, X, rngs=KEYS)
    for i in range(3):
        assert np.abs(dropped[i] - dropped[i - 1]).max() > 1e-3
    np.testing.assert_array_equal(run({"params": params}, X, rngs=KEYS), dropped)
