"""Loops of others: what they train, and bases that moved in them."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from helpers.arrays import drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.nnx import AdapterParam
from adapters_jax.nnx.graph import frozen_leaves, params_of
from adapters_jax.testing.subjects import bits
from adapters_jax.trees import flatten, path_of
from adapters_jax.weights import fingerprints

X = drawn((5, 8), 1)
FROZEN = nnx.All(nnx.Param, nnx.Not(AdapterParam))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """No base of another test is known."""
    monkeypatch.setattr(fingerprints, "_known", [])


class Scale(nnx.Param):
    """A parameter with a class of its own."""


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.hidden, self.out = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.scale = Scale(jnp.ones(4))

    def __call__(self, x):
        return self.out(nnx.tanh(self.hidden(x))) * self.scale


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(nn.tanh(nn.Dense(16, name="hidden")(x)))


RECIPE = aj.Recipe(aj.LoRA("hidden", rank=2), aj.Unfreeze(("out/bias", "scale")))
LINEN = aj.Recipe(aj.LoRA("hidden", rank=2), aj.Unfreeze("out/bias"))


def adapted(recipe=RECIPE, seed=0):
    return aj.adapt(Net(seed), recipe, rngs=nnx.Rngs(1))


def loss(model, x=X):
    return jnp.mean((model(x) - 1.0) ** 2)


@nnx.jit(static_argnames="wrt")
def step(model, optimizer, wrt):
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    optimizer.update(model, grads)


def trained(model, wrt, tx, steps=3):
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    for _ in range(steps):
        step(model, optimizer, wrt)
    return model


def ours(model, tx, steps=3, *params):
    """The trained leaves after steps of our own."""
    state = aj.TrainState.create(model, *params, tx=tx, key=jax.random.key(0))
    run = aj.make_train_step(
        (lambda params, x, key: loss(lambda x: model.apply({"params": params}, x), x))
        if params
        else lambda model, x, key: loss(model, x)
    )
    for _ in range(steps):
        state, _ = run(state, X)
    return flatten(state.trained)


def close(one, two):
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_allclose(x, two[path], rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("wrt", [AdapterParam, nnx.LoRAParam])
def test_an_optimizer_of_either_type_trains_what_the_recipe_says(wrt, tmp_path):
    model, tx = adapted(), optax.adam(1e-2)
    base, expected = bits(nnx.state(model, FROZEN)), ours(model, tx)
    assert {"hidden/lora/a", "hidden/lora/b", "out/bias", "scale"} == set(expected)
    trained(model, wrt, tx)
    assert bits(nnx.state(model, FROZEN)) == base
    close(flatten(nnx.state(model, wrt)), expected)
    loaded = aj.load_adapter(aj.save_adapter(tmp_path / "a", model), Net())
    np.testing.assert_array_equal(loaded(X), model(X))
    merged = aj.merge(model)
    assert type(merged.scale) is Scale and type(merged.out.bias) is nnx.Param
    np.testing.assert_allclose(merged(X), model(X), rtol=1e-5, atol=1e-6)


class WithLoRA(nnx.Module):
    """A base that has a LoRA of flax's."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wide = nnx.LoRALinear(8, 16, lora_rank=3, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)
        self.wide.lora.lora_b[...] = drawn((3, 16))

    def __call__(self, x):
        return self.out(nnx.tanh(self.wide(x)))


def test_the_lora_of_a_base_is_frozen_and_another_trainer_moves_it():
    build = lambda *more: aj.adapt(  # noqa: E731
        WithLoRA(), aj.Recipe(aj.LoRA("out", rank=2), *more), rngs=nnx.Rngs(1)
    )
    model = build()
    own = {"wide/lora/lora_a", "wide/lora/lora_b"}
    assert own < set(frozen_leaves(model)) and aj.audit(model).trainable_parameters == 2 * 20
    base = bits(nnx.state(model, FROZEN))
    trained(model, AdapterParam, optax.adam(1e-2))
    assert bits(nnx.state(model, FROZEN)) == base
    trained(model, nnx.LoRAParam, optax.adam(1e-2))
    with raises(aj.MismatchError, "2 of 6 frozen", *own, "wrt=aj.nnx.AdapterParam"):
        aj.audit(model)
    both = build(aj.Unfreeze("wide/lora/*"))
    trained(both, nnx.LoRAParam, optax.adam(1e-2))
    assert type(aj.merge(both).wide.lora.lora_a) is nnx.LoRAParam


USES = {
    "audit": aj.audit,
    "merge": aj.merge,
    "save_adapter": lambda model: aj.save_adapter("a", model),
    "TrainState.create": lambda model: ours(model, optax.sgd(0.1), 0),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_that_was_trained_is_refused_and_accepted_when_adapted_again(
    use, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    before = {path: np.asarray(x) for path, x in frozen_leaves(model).items()}
    trained(model, nnx.LoRAParam, optax.sgd(0.1))
    USES[use](model)
    trained(model, nnx.Param, optax.sgd(0.1))
    moved = {p: float(np.abs(x - before[p]).max()) for p, x in frozen_leaves(model).items()}
    size, number = max(moved, key=moved.get), 3
    with raises(aj.MismatchError, f"{use}: {number} of 3 frozen", size, "aj.adapt(model") as caught:
        USES[use](model)
    assert f"{size} by {moved[size]:.1g}"[:-1] in str(caught.value)
    again = aj.adapt(model, aj.Recipe(), rngs=nnx.Rngs(0))
    assert again.adapter_recipe == RECIPE
    USES[use](again)


def nudge(model):
    """Moves the float parameters of the base by a fiftieth."""
    for variable in params_of(model).values():
        value = variable.get_raw_value()
        if not isinstance(variable, AdapterParam) and isinstance(value, jax.Array):
            variable.set_raw_value(value * 1.02)


def cast(*dtypes):
    def run(model):
        for dtype in dtypes:
            frozen = nnx.state(model, FROZEN)
            nnx.update(model, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), frozen))
        return model

    return run


def seen_by_a_step(model):
    trained(model, AdapterParam, optax.sgd(0.1))
    return model


def through_state(model):
    state = aj.TrainState.create(model, tx=optax.sgd(0.1), key=jax.random.key(0))
    run = aj.make_train_step(lambda model, x, key: loss(model, x))
    for _ in range(3):
        state, _ = run(state, X)
    return state.model


CHANGES = {
    "as it is": lambda model: model,
    "cloned": nnx.clone,
    "split": lambda model: nnx.merge(*nnx.split(model)),
    "stepped": seen_by_a_step,
    "in a state": through_state,
    "bfloat16": cast(jnp.bfloat16),
    "float16": cast(jnp.float16),
    "back in float32": cast(jnp.bfloat16, jnp.float32),
    "int8": lambda model: aj.quantize(model, dtype="int8"),
    "nf4": lambda model: aj.quantize(model, dtype="nf4", block=4),
    "float again": lambda model: aj.dequantize(aj.quantize(model, dtype="int4", block=4)),
    "adapted again": lambda model: aj.adapt(model, aj.LoRA("out", 1), rngs=nnx.Rngs(2)),
    "merged": lambda model: aj.adapt(aj.merge(model), aj.LoRA("out", 1), rngs=nnx.Rngs(2)),
    "sharded": lambda model: aj.shard(model, aj.make_mesh("data=1")),
}


@pytest.mark.witness(
    "float again-gaussian",
    "bfloat16-gaussian",
    "nf4-gaussian",
    "sharded-gaussian",
    "back in float32-gaussian",
    "in a state-gaussian",
    "int8-gaussian",
    "as it is-gaussian",
    "adapted again-gaussian",
    "stepped-gaussian",
    "merged-gaussian",
    "split-gaussian",
    "cloned-gaussian",
    "as it is-pissa",
)
@pytest.mark.parametrize("start", ["gaussian", "pissa"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_base_on_purpose_is_no_move_and_a_move_after_it_is_one(change, start):
    recipe = aj.Recipe(aj.LoRA("hidden", 2, a_init=start), aj.Unfreeze("out/bias"))
    model = CHANGES[change](adapted(recipe))
    aj.audit(model)
    ours(model, optax.sgd(0.1), 0)
    nudge(model)
    with raises(aj.MismatchError, "moved"):
        aj.audit(model)


def test_another_checkpoint_in_the_model_is_another_base():
    model = adapted()
    nnx.update(model, nnx.state(Net(7), nnx.Param))
    aj.audit(model)
    ours(model, optax.sgd(0.1), 0)  # makes it known
    nudge(model)
    with raises(aj.MismatchError, "moved"):
        aj.audit(model)


def test_bases_that_are_near_each_other_share_a_compiled_step():
    """`nnx.jit` gives the second model the static attributes of the first."""
    one, two = Net(), Net()
    two.hidden.kernel[...] *= 1.01
    one, two = (aj.adapt(base, RECIPE, rngs=nnx.Rngs(1)) for base in (one, two))
    calls = []

    @nnx.jit
    def step(model, optimizer):
        calls.append(0)
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam))(model))

    tx = optax.sgd(0.1)
    for model in (one, two, one, two):
        step(model, nnx.Optimizer(model, tx, wrt=AdapterParam))
        aj.audit(model)
    assert len(calls) == 1
    run = aj.make_train_step(lambda model, x, key: loss(model, x))
    for model in (one, two):
        state = aj.TrainState.create(model, tx=tx, key=jax.random.key(0))
        for _ in range(3):
            state, _ = run(state, X)
        aj.merge(state.model)
    assert run.jitted._cache_size() == 1


def test_a_model_without_values_is_not_remembered():
    nnx.eval_shape(adapted)
    jax.jit(lambda: nnx.split(adapted())[1])()
    deleted = jnp.ones(3)
    deleted.delete()
    fingerprints.remember({"a": deleted, "b": np.arange(3), "c": 1.0, "d": None, "e": jnp.ones(0)})
    assert not fingerprints._known


def linen(seed=0):
    return LinenNet().init(jax.random.key(seed), X)["params"]


@pytest.mark.slow
def test_one_linen_model_with_several_bases():
    model = aj.adapt(LinenNet(), LINEN)
    seeds = [aj.init_adapters(model, linen(i), jax.random.key(9), X) for i in range(3)]
    near = jax.tree.map(lambda x: x * 1.01, linen())
    seeds.append(aj.init_adapters(model, near, jax.random.key(9), X))
    stacked = jax.vmap(
        lambda key: aj.init_adapters(model, LinenNet().init(key, X)["params"], key, X)
    )(jax.random.split(jax.random.key(3), 2))
    seeds.append(jax.tree.map(lambda x: x[1], stacked))
    for params in seeds:
        aj.audit(model, params)
        aj.merge(model, params)
    for params in seeds[:4]:
        with raises(aj.MismatchError, "hidden/kernel", "aj.freeze_base", "aj.init_adapters"):
            aj.merge(model, jax.tree.map(lambda x: x * 1.02, params))


def labels(params):
    label = lambda path, _: "train" if LINEN.trains(path_of(path)) else "freeze"  # noqa: E731
    return jax.tree_util.tree_map_with_path(label, params)


@pytest.mark.parametrize(
    "tx",
    {
        "freeze_base": lambda tx: aj.freeze_base(tx, LINEN),
        # It passes on the gradients of what it leaves out.
        "masked": lambda tx: optax.masked(
            tx, lambda params: jax.tree.map(lambda label: label == "train", labels(params))
        ),
        "multi_transform": lambda tx: optax.multi_transform(
            {"train": tx, "freeze": optax.set_to_zero()}, labels
        ),
        "everything": lambda tx: tx,
    }.items(),
    ids=lambda pair: pair[0],
)
def test_the_train_state_of_flax(tx, tmp_path):
    name, masked = tx
    model = aj.adapt(LinenNet(), LINEN)
    params = aj.init_adapters(model, linen(), jax.random.key(1), X)
    expected, base = ours(model, optax.adam(1e-2), 3, params), bits(aj.partition(params, LINEN)[1])
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=masked(optax.adam(1e-2))
    )

    @jax.jit
    def step(state):
        value = lambda params: loss(lambda x: state.apply_fn({"params": params}, x))  # noqa: E731
        return state.apply_gradients(grads=jax.grad(value)(state.params))

    for _ in range(3):
        state = step(state)
    if name in ("everything", "masked"):
        for use in (aj.audit, aj.merge, lambda *given: ours(given[0], optax.sgd(1), 0, given[1])):
            with raises(aj.MismatchError, "3 of 3 frozen", "hidden/kernel", "aj.freeze_base"):
                use(model, state.params)
        aj.init_adapters(model, state.params, jax.random.key(2), X)
        aj.audit(model, state.params)
        return
    leaves, frozen = aj.partition(state.params, LINEN)
    assert bits(frozen) == base
    close(flatten(leaves), expected)
    saved = aj.save_adapter(tmp_path / "a", leaves, LINEN)
    _, params = aj.load_adapter(saved, LinenNet(), linen(), X)
    np.testing.assert_array_equal(bits(params), bits(state.params))
    merged = LinenNet().apply({"params": aj.merge(model, state.params)}, X)
    np.testing.assert_allclose(merged, model.apply({"params": state.params}, X), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4"])
def test_the_fingerprint_of_a_quantised_weight_is_that_of_its_floats(dtype):
    layer = nnx.Linear(128, 24, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    small = aj.quantize(layer, dtype=dtype, **({} if dtype == "int8" else {"block": 16}))
    one = fingerprints._fingerprint(small.kernel.get_raw_value())
    two = fingerprints._fingerprint(aj.dequantize(small).kernel[...])
    assert one.dtype == two.dtype == jnp.bfloat16 and len(set(one.values)) > 8
    np.testing.assert_array_equal(one.values, two.values)


def spread(size):
    return (size * (np.arange(64) * (np.sqrt(5) - 1) / 2 % 1)).astype(int)


@pytest.mark.parametrize("shape", [(), (3,), (7, 9), (40, 50), (2, 3, 4, 100), (1, 5000)])
def test_entries_are_few_and_spread(shape):
    x = drawn(shape)
    taken = fingerprints._fingerprint(jnp.asarray(x)).values
    flat = x.ravel()
    np.testing.assert_array_equal(taken, flat if flat.size <= 64 else flat[spread(flat.size)])
    np.testing.assert_array_equal(taken, fingerprints._fingerprint(x).values)


def test_entries_of_other_processes_are_left_out():
    x = drawn((40, 50))

    def part(start):
        rows = slice(start, start + 10)
        return types.SimpleNamespace(index=(rows, slice(None)), data=jnp.asarray(x[rows]))

    shards = [part(10), part(10), part(30)]
    array = types.SimpleNamespace(dtype=x.dtype, addressable_shards=shards)
    index = np.unravel_index(spread(2000), x.shape)
    values, held = fingerprints._entries(array, index)
    here = (index[0] // 10) % 2 == 1
    np.testing.assert_array_equal(held, here)
    np.testing.assert_array_equal(values, np.where(here, x[index], 0))
    assert 0 < here.sum() < 64
    old = fingerprints.Fingerprint(x[index].astype(float), np.ones(64, bool), x.dtype)
    new = fingerprints.Fingerprint(values.astype(float), held, x.dtype)
    assert fingerprints._distance(old, new) == 0.0
    assert fingerprints._distance(old, new._replace(values=new.values * 1.5)) > 0.1
    found = fingerprints._likeness({("a", x.shape): old}, {("a", x.shape): new})
    np.testing.assert_allclose(found, [2, here.sum(), 0, 0, 0])


MOVES = {
    "a little": lambda x: x + 1e-3,
    "by more than its spread": lambda x: x + 1.2 * drawn(x.shape, 3),
    "to what is no number": lambda x: np.where(x > 0, np.nan, x),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_a_move_is_seen(move, dtype):
    x = drawn((30, 40)).astype(dtype)
    fingerprints.remember({"a": x, "b": x[0]})
    fingerprints.check_unmoved("audit", {"a": x.copy(), "b": x[0]}, True)
    with raises(aj.MismatchError, "1 of 2 frozen", "a by"):
        fingerprints.check_unmoved("audit", {"a": MOVES[move](x), "b": x[0]}, True)


def test_the_oldest_of_many_bases_is_forgotten():
    x = drawn((30, 40))
    for i in range(72):
        fingerprints.remember({"a": x + i})
        fingerprints.remember({"a": x + i})
    assert len(fingerprints._known) == 64
    fingerprints.check_unmoved("audit", {"a": x + 8}, True)
    with raises(aj.MismatchError, "a by 1 "):
        fingerprints.check_unmoved("audit", {"a": x + 7}, True)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("float32", "bfloat16"),
        ("float32", "float8_e4m3fn"),
        ("float64", "float32"),
        ("bfloat16", "float16"),
    ],
)
def test_a_rounding_is_no_move_in_either_direction(before, after):
    x = drawn((30, 40)).astype(before)
    coarse = x.astype(after)
    for known, now in [(x, coarse), (coarse, x)]:
        fingerprints.remember({f"{known.dtype}": known})
        fingerprints.check_unmoved("audit", {f"{known.dtype}": now}, True)
        with raises(aj.MismatchError, f"{known.dtype} by"):
            moved = (now.astype(np.float32) * 1.3).astype(now.dtype)
            fingerprints.check_unmoved("audit", {f"{known.dtype}": moved}, True)


def test_numbers_that_a_device_flushes_to_zero_are_no_move():
    x = drawn((30, 40))
    x[::2] = 1e-40
    fingerprints.remember({"a": x})
    fingerprints.check_unmoved("audit", {"a": np.where(x == np.float32(1e-40), 0, x)}, True)


def test_values_are_read_inside_of_a_trace():
    small = aj.quantize(nnx.Linear(128, 24, rngs=nnx.Rngs(0)), dtype="int4", block=16)
    weight = small.kernel.get_raw_value()
    fingerprints._known.clear()
    jax.jit(lambda: fingerprints.remember({"a": weight}))()
    (base,) = fingerprints._known
    (taken,) = base.values()
    np.testing.assert_array_equal(taken.values, fingerprints._fingerprint(weight).values)


def test_a_linen_base_that_is_quantised_or_loaded_with_an_adapter_is_known(tmp_path):
    model = aj.adapt(LinenNet(), LINEN)
    params = aj.init_adapters(model, linen(), jax.random.key(1), X)
    saved = aj.save_adapter(tmp_path / "a", aj.partition(params, LINEN)[0], LINEN)
    small = aj.quantize(model, params, X, dtype="int8")
    aj.audit(model, small)
    floats = aj.dequantize(small)
    aj.merge(model, floats)
    fingerprints._known.clear()
    near = jax.tree.map(lambda x: x * 1.01, linen())
    for base in (linen(), near):
        model, params = aj.load_adapter(saved, LinenNet(), base, X)
        aj.audit(model, params)
    with raises(aj.MismatchError, "hidden/kernel"):
        aj.audit(model, jax.tree.map(lambda x: x * 1.02, params))


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from adapters_jax.weights import fingerprints
mesh = jax.make_mesh((2, 4), ("a", "b"))
x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
fingerprints.remember({"x": x})
((known,),) = [base.values() for base in fingerprints._known]
for spec in (P(), P("a"), P("b", "a"), P(None, ("a", "b")), P(("b", "a"))):
    laid = jax.device_put(x, NamedSharding(mesh, spec))
    taken = fingerprints._fingerprint(laid)
    assert taken.held.all() and (taken.values == known.values).all(), spec
    fingerprints.check_unmoved("audit", {"x": laid}, True)
print("done")
"""


@pytest.mark.slow
def test_arrays_that_are_split_over_devices():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", SHARDED]
    assert subprocess.check_output(command, text=True, env=environment).strip() == "done"


def test_a_base_is_compared_with_one_known_base_and_not_leaf_by_leaf_with_many():
    body, head = drawn((30, 40)), drawn((4,))
    fingerprints.remember({"body": body})  # of a recipe that trains the head
    fingerprints.remember({"body": body + drawn(body.shape, 2), "head": np.zeros(4, "f4")})
    fingerprints.check_unmoved("audit", {"body": body, "head": head}, True)
    with raises(aj.MismatchError, "1 of 2 frozen", "body"):
        fingerprints.check_unmoved("audit", {"body": body + 1e-3, "head": head}, True)


def test_a_base_that_shares_leaves_with_a_known_one_is_another():
    body, head = drawn((30, 40)), drawn((40, 5), 2)
    fingerprints.remember({"body": body, "head": head, "scale": np.ones(40, "f4")})
    now = {"body": body, "head": drawn((40, 5), 3), "scale": np.ones(40, "f4")}
    fingerprints.check_unmoved("audit", now, True)
    with raises(aj.MismatchError, "1 of 3 frozen", "head"):
        fingerprints.check_unmoved("audit", {**now, "head": head + 1e-3}, True)
    with raises(aj.MismatchError, "1 of 3 frozen", "scale"):
        moved = {"body": body, "head": head, "scale": np.ones(40, "f4") + 1e-3}
        fingerprints.check_unmoved("audit", moved, True)


def test_a_checkpoint_in_the_place_of_zeros_is_no_move():
    fingerprints.remember({"a": np.zeros((30, 40), "f4"), "b": np.ones(4, "f4")})
    fingerprints.check_unmoved("audit", {"a": drawn((30, 40)), "b": drawn((4,))}, True)


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((4, 3), lambda x: 0.9 * x + 3 * drawn(x.shape, 2)),  # few entries, and large ones
        ((30, 40), lambda x: 0.3 * x + drawn(x.shape, 2)),  # sisters, such as of one data set
    ],
)
def test_an_unrelated_base_is_no_move(shape, other):
    many = {f"{i}/kernel": drawn(shape, 10 + i) for i in range(1 if shape == (4, 3) else 20)}
    fingerprints.remember({**many, "scale": np.ones(40)})
    others = {path: other(x) for path, x in many.items()}
    fingerprints.check_unmoved("audit", {**others, "scale": drawn((40,), 5)}, True)
    with raises(aj.MismatchError, f"{len(many)} of {len(many) + 1} frozen"):
        moved = {path: x + 0.5 * drawn(x.shape, 2) for path, x in many.items()}
        fingerprints.check_unmoved("audit", {**moved, "scale": np.ones(40)}, True)
