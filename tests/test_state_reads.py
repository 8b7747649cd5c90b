"""NNX models that read their parameters as state: adapted they are the merged model.

Each style is compared with a plain formula in float64, with factors that are not zero, once with
example inputs and once without, where the first call shows what it reads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.arrays import double, drawn, drawn_like

import adapters_jax as aj
from adapters_jax.errors import RecipeError
from adapters_jax.nnx.graph import CALLS

N, LAYERS, RANK, ALPHA = 4, 3, 2, 3.0
X = drawn((5, N), 1)
METHODS = {
    "lora": aj.LoRA("**/kernel", RANK, ALPHA),
    "dora": aj.DoRA("**/kernel", RANK, ALPHA),
    "ia3": aj.IA3("**/kernel"),
}


def linear(key, width=N):
    return nnx.Linear(width, width, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(key))


class One(nnx.Module):
    """A layer."""

    def __init__(self, width=N):
        self.d = linear(0, width)


class Stack(nnx.Module):
    """Stacked layers."""

    def __init__(self):
        make = nnx.vmap(lambda key: linear(key))
        self.d = make(jax.random.split(jax.random.key(0), LAYERS))


class Blocks(nnx.Module):
    """Stacked modules that read the state of a layer in them."""

    def __init__(self):
        def make(key):
            block = Style(lambda m, x: x @ nnx.state(m.d)["kernel"][...], One)
            block.d = linear(key)
            return block

        self.d = nnx.vmap(make)(jax.random.split(jax.random.key(0), LAYERS))


class Style(nnx.Module):
    """A model with the parts of another one, and a function of these."""

    def __init__(self, run, of=One):
        self.run = run
        for name, part in vars(of()).items():
            if not name.startswith("_"):
                setattr(self, name, part)

    def __call__(self, x):
        return self.run(self, x)


def weights_of(tree):
    return tree["kernel"], tree["bias"]


def through(x, pairs):
    for w, b in pairs:
        x = x @ w[...] + b[...]
    return x


def pure(model, x):
    return through(x, [weights_of(nnx.to_pure_dict(nnx.state(model, nnx.Param))["d"])])


def whole(model, x):
    return through(x, [weights_of(nnx.state(model)["d"])])


def flat(model, x):
    state = dict(nnx.to_flat_state(nnx.state(model)))
    return through(x, [(state["d", "kernel"], state["d", "bias"])])


def leaves(model, x):
    b, w = jax.tree.leaves(model.d)
    return through(x, [(w, b)])


def listed(model, x):
    found = {path[-1]: node for path, node in nnx.iter_graph(model.d) if path}
    return through(x, [weights_of(found)])


def doubled(model, x):
    return jax.tree.map(lambda leaf: 2 * leaf, model.d)(x)


def merged_again(model, x):
    graphdef, state = nnx.split(model.d)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: 2 * leaf, state))(x)


def updated(model, x):
    before = nnx.to_pure_dict(nnx.state(model.d))
    nnx.update(model.d, jax.tree.map(lambda leaf: 2 * leaf, before))
    y = model.d(x)
    nnx.update(model.d, before)
    return y


def decayed(model, x):
    squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    return model.d(x) + sum(squares)


def loop(model, x):
    def layer(h, state):
        return jnp.tanh(through(h, [weights_of(state)])), None

    return jax.lax.scan(layer, x, nnx.state(model.d))[0]


OVER_LAYERS = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}


def scanned(model, x):
    return nnx.scan(lambda h, layer: jnp.tanh(layer(h)), **OVER_LAYERS)(x, model.d)


def gradient(model, x):
    grads = nnx.grad(lambda d: jnp.sum(d(x) ** 2))(model.d)
    return through(x, [weights_of(grads)])


def once(w, b, x, of=np):
    return x @ w + b


def stack(w, b, x):
    for i in range(LAYERS):
        x = np.tanh(x @ w[i] + b[i])
    return x


def normed(w, b, x):
    return x @ (w / np.linalg.norm(w, axis=0)) + b


def by_hand(w, b, x):
    y = 2 * (x @ w + b)
    return x @ (x.T @ y) + y.sum(0)


def inner(w, b, x):
    for i in range(LAYERS):
        x = np.tanh(x @ w[i])
    return x


# The model's function, what it computes, and the model whose parts it has.
STYLES = {
    "nnx.state of the model": (whole, once, One),
    "nnx.to_pure_dict": (pure, once, One),
    "nnx.to_flat_state": (flat, once, One),
    "nnx.state of a layer": (lambda m, x: through(x, [weights_of(nnx.state(m.d))]), once, One),
    "vars": (lambda m, x: through(x, [weights_of(vars(m.d))]), once, One),
    "nnx.iter_graph": (listed, once, One),
    "jax.tree.leaves": (leaves, once, One),
    "jax.tree.map": (doubled, lambda w, b, x: 2 * (x @ w + b), One),
    "nnx.split and merge": (merged_again, lambda w, b, x: 2 * (x @ w + b), One),
    "nnx.update": (updated, lambda w, b, x: 2 * (x @ w + b), One),
    "nnx.clone": (lambda m, x: nnx.clone(m.d)(x), once, One),
    "called and read": (
        lambda m, x: m.d(x) + x @ nnx.state(m.d)["kernel"][...],
        lambda w, b, x: 2 * (x @ w) + b,
        One,
    ),
    "a decay of its own": (decayed, lambda w, b, x: x @ w + b + (w**2).sum() + (b**2).sum(), One),
    "lax.scan over state": (loop, stack, Stack),
    "nnx.scan, and state": (
        lambda m, x: scanned(m, x) @ nnx.state(m.d)["kernel"][0],
        lambda w, b, x: stack(w, b, x) @ w[0],
        Stack,
    ),
    "state in nnx.scan": (scanned, inner, Blocks),
    "nnx.remat, and state": (
        lambda m, x: nnx.remat(lambda d, x: d(x))(m.d, x) + x @ vars(m.d)["kernel"][...],
        lambda w, b, x: 2 * (x @ w) + b,
        One,
    ),
    "nnx.jit, and state": (
        lambda m, x: nnx.jit(lambda d, x: d(x))(m.d, x) + x @ vars(m.d)["kernel"][...],
        lambda w, b, x: 2 * (x @ w) + b,
        One,
    ),
    "nnx.jit of weights": (
        lambda m, x: nnx.jit(lambda w, x: x @ w[...])(m.d.kernel, x) + m.d.bias[...],
        once,
        One,
    ),
    "nnx.scan of weights": (
        lambda m, x: nnx.scan(lambda h, w: h @ w[...], **OVER_LAYERS)(x, m.d.kernel),
        lambda w, b, x: x @ w[0] @ w[1] @ w[2],
        Stack,
    ),
    "nnx.grad of a layer": (gradient, by_hand, One),
    "nnx.WeightNorm": (lambda m, x: m.norm(x), normed, None),
}


class Normed(nnx.Module):
    """flax's own module that reads a layer's state, and writes it."""

    def __init__(self):
        self.norm = nnx.WeightNorm(linear(0), rngs=nnx.Rngs(1))


def shaken(model, seed=3):
    """The model with adapters that are drawn."""
    nnx.update(model, drawn_like(nnx.state(model, aj.nnx.AdapterParam), seed))
    return model


def adapted(base, method, inputs=(X,)):
    return shaken(aj.adapt(base, method, rngs=nnx.Rngs(1), example_inputs=inputs))


def changed(w, b, arrays):
    """The weight and bias by the formulas of the papers, in float64."""
    arrays = {name: double(x) for name, x in arrays.items()}
    if "scale" in arrays:
        return w * arrays["scale"][..., None, :], b * arrays["scale"]
    w = w + ALPHA / RANK * arrays["a"] @ arrays["b"]
    if "magnitude" in arrays:
        w = w * (arrays["magnitude"] / np.linalg.norm(w, axis=-2))[..., None, :]
    return w, b


def expected(model, base, formula):
    """What an adapted model computes by the formula."""
    ((_, placed, _),) = aj.nnx.adapted_points(model)
    layer = next(x for path, x in aj.nnx.modules_of(base).items() if path == placed.module)
    (module,) = [x for path, x in aj.nnx.modules_of(model).items() if path == placed.module]
    w, b = (double(vars(layer)[name][...]) for name in ("kernel", "bias"))
    before = formula(w, b, double(X))
    after = formula(*changed(w, b, aj.nnx.leaves_of(module, placed)), double(X))
    assert np.abs(after - before).mean() > 0.05
    return after


def gradients(model):
    """The gradients of all leaves of adapters."""
    graphdef, trained, rest = nnx.split(model, aj.nnx.AdapterParam, ...)

    def loss(trained):
        return jnp.sum(nnx.merge(graphdef, trained, rest, copy=True)(X) ** 2)

    return jax.tree.leaves(jax.grad(loss)(trained))


@pytest.mark.witness(
    "lax.scan over state-lora",
    "nnx.scan, and state-lora",
    "nnx.WeightNorm-lora",
    "nnx.state of the model-lora",
    "nnx.scan of weights-dora",
    "nnx.grad of a layer-lora",
    "jax.tree.map-lora",
    "called and read-lora",
    "nnx.split and merge-lora",
    "nnx.iter_graph-lora",
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("style", STYLES)
def test_adapted_is_merged_is_the_formula(style, method):
    run, formula, of = STYLES[style]
    base, close = Style(run, of or Normed), {"rtol": 2e-4, "atol": 2e-4}
    model = adapted(base, METHODS[method])
    y = expected(model, base, formula)
    np.testing.assert_allclose(model(X), y, **close)
    np.testing.assert_allclose(model(X), y, **close)  # and nothing of the first call is left
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), y, **close)
    np.testing.assert_allclose(aj.merge(model)(X), y, **close)
    # A normalised weight has no length, so that what scales it has no gradient.
    found = [np.abs(g).max() > 1e-3 for g in gradients(model)]
    assert any(found) if formula is normed else found and all(found)
    np.testing.assert_allclose(adapted(base, METHODS[method], None)(X), y, **close)


HANDED_ON = {
    "nnx.scan": (scanned, Stack),
    "nnx.remat": (lambda m, x: nnx.remat(lambda d, x: d(x))(m.d, x), One),
    "nnx.jit": (lambda m, x: nnx.jit(lambda d, x: d(x))(m.d, x), One),
    "nnx.vmap": (lambda m, x: nnx.vmap(lambda d: d(x))(m.d).sum(0), Stack),
    "nnx.cond": (lambda m, x: nnx.cond(x[0, 0] > 9, lambda d: d(x), lambda d: -d(x), m.d), One),
    "nnx.fori_loop": (
        lambda m, x: nnx.fori_loop(0, 2, lambda i, c: (c[0], jnp.tanh(c[0](c[1]))), (m.d, x))[1],
        One,
    ),
    "jax.checkpoint": (lambda m, x: jax.checkpoint(lambda d, x: d(x))(m.d, x), One),
    "lax.scan of modules": (
        lambda m, x: jax.lax.scan(lambda h, d: (jnp.tanh(d(h)), None), x, m.d)[0],
        Stack,
    ),
    "nnx.clone": (lambda m, x: nnx.clone(m.d)(x), One),
}


def stated(model, inputs=(X,), name="__call__"):
    return vars(model)[CALLS].stated(model, name, inputs, {})


@pytest.mark.parametrize("style", HANDED_ON)
def test_state_that_is_handed_on_is_not_read(style):
    """Such a model computes as it would if nothing looked for reads of its state."""
    model = adapted(Style(*HANDED_ON[style]), METHODS["lora"])
    assert stated(model) == ()
    np.testing.assert_allclose(model(X), aj.merge(model)(X), rtol=1e-4, atol=1e-4)


def test_a_weight_read_as_state_is_computed_thin():
    def flops(run):
        base = Style(run, lambda: One(64))
        graphdef, state = nnx.split(aj.adapt(base, METHODS["lora"], rngs=nnx.Rngs(0)))
        x = jnp.ones((32, 64))
        return jax.jit(lambda state: nnx.merge(graphdef, state)(x)).lower(state).cost_analysis()

    read, called = flops(whole), flops(lambda m, x: m.d(x))
    assert read["flops"] == called["flops"] < 2 * 32 * 64 * 64 + 64 * 1024


class Modes(nnx.Module):
    """Reads its state in one of its modes only."""

    def __init__(self):
        self.d, self.regular = linear(0), False

    def __call__(self, x, strong=False):
        y = self.d(x)
        return y + self.decay() if strong or self.regular else y

    def decay(self):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))


@pytest.mark.parametrize("inputs", [(X,), None])
def test_each_function_and_mode_shows_what_it_reads(inputs):
    model = adapted(Modes(), METHODS["lora"], inputs)
    merged = aj.merge(model)
    np.testing.assert_allclose(model(X), merged(X), rtol=1e-4, atol=1e-4)
    assert stated(model) == ()
    np.testing.assert_allclose(model.decay(), merged.decay(), rtol=1e-5)
    np.testing.assert_allclose(model(X, strong=True), merged(X, strong=True), rtol=1e-4)
    model.regular = merged.regular = True
    np.testing.assert_allclose(model(X), merged(X), rtol=1e-4)


class Around(nnx.Module):
    """A module around one that reads its state."""

    def __init__(self):
        self.inner = Style(pure)

    def __call__(self, x):
        return self.inner(x)


def test_parts_are_called_by_themselves():
    model = adapted(Around(), METHODS["dora"])
    np.testing.assert_allclose(model.inner(X), aj.merge(model).inner(X), rtol=1e-4, atol=1e-4)


def test_a_model_that_computes_on_numbers():
    """It cannot run abstractly, so that all its modules are as in the base."""

    def run(model, x):
        y = whole(model, x)
        return y if float(y.sum()) > -1e9 else -y

    model = adapted(Style(run), METHODS["lora"], None)
    np.testing.assert_allclose(model(X), aj.merge(model)(X), rtol=1e-4, atol=1e-4)


def lists(model, x):
    state = nnx.state(model)["ws"]
    return x @ state[0][...] @ state[1][...] + x @ model.ws[0][...]


def dicts(model, x):
    return x @ nnx.state(model)["ws"]["a"][...] @ vars(model)["ws"]["b"][...] + x @ model.ws["a"]


@pytest.mark.parametrize(("run", "make"), [
    (lists, nnx.List), (lists, lambda ws: nnx.data(ws)),
    (dicts, lambda ws: nnx.data(dict(zip("ab", ws, strict=True)))),
])  # fmt: skip
def test_weights_in_containers(run, make):
    class Raw(nnx.Module):
        def __init__(self):
            self.ws = make([nnx.Param(jnp.asarray(drawn((N, N), i))) for i in range(2)])

        def __call__(self, x):
            return run(self, x)

    model = adapted(Raw(), aj.LoRA("ws/*", 2))
    merged = aj.merge(model)
    assert np.abs(merged(X) - Raw()(X)).max() > 0.1
    np.testing.assert_allclose(model(X), merged(X), rtol=1e-4, atol=1e-4)


def test_after_a_call_the_model_is_as_before():
    model = adapted(Style(decayed), METHODS["lora"])

    def stored():
        return [id(x) for x in jax.tree.leaves(nnx.state(model))], nnx.graphdef(model)

    before = stored()
    model(X)
    assert stored() == before
    with pytest.raises(TypeError):
        model(X[:, :2])
    assert stored() == before


def test_what_the_model_writes_beside_its_weights_stays():
    class Counting(nnx.Module):
        def __init__(self):
            self.d, self.calls = linear(0), nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return pure(self, x)

    model = adapted(Counting(), METHODS["lora"])
    model(X), nnx.jit(lambda m: m(X))(model)
    assert model.calls[...] == 2


def test_dropout_acts_where_the_state_is_read():
    model = adapted(Style(pure), aj.LoRA("**/kernel", 2, dropout=0.5))
    assert np.abs(model(X) - model(X)).max() > 0.01
    model.eval()
    np.testing.assert_allclose(model(X), aj.merge(model)(X), rtol=1e-4, atol=1e-4)


def test_more_adapters_on_an_adapted_model():
    model = adapted(Style(decayed), METHODS["ia3"])
    model = adapted(model, METHODS["lora"])
    np.testing.assert_allclose(model(X), aj.merge(model)(X), rtol=1e-4, atol=1e-4)


def test_a_quantised_base():
    base = Style(lambda m, x: whole(m, x) + m.d(x), lambda: One(64))
    x = drawn((3, 64), 1)
    model = adapted(aj.quantize(base, dtype="int8"), METHODS["lora"], (x,))
    np.testing.assert_allclose(model(x), aj.merge(aj.dequantize(model))(x), rtol=1e-4, atol=1e-3)


def test_rows_of_a_batch_with_an_adapter_each():
    model = adapted(Style(pure), METHODS["lora"])
    bank, alone = aj.Bank(model, capacity=3), {}
    for seed, name in enumerate("ab"):
        graphdef, tree, rest = nnx.split(shaken(model, seed), aj.nnx.AdapterParam, ...)
        bank = bank.put(name, (METHODS["lora"], tree))
        alone[name] = nnx.merge(graphdef, tree, rest, copy=True)(X)
    names = ["a", "b", None, "b", "a"]
    y = bank.model(X, adapters=bank.rows(names))
    alone[None] = Style(pure)(X)
    for i, name in enumerate(names):
        np.testing.assert_allclose(y[i], alone[name][i], rtol=1e-4, atol=1e-4)


def test_training_and_files(tmp_path):
    base = Style(decayed)
    model = adapted(base, METHODS["lora"])
    state = aj.TrainState.create(model, tx=optax.sgd(1e-3), key=jax.random.key(0))
    step = aj.make_train_step(lambda model, x, key: jnp.mean(model(x) ** 2))
    before = [np.asarray(x) for x in jax.tree.leaves(state.trained)]
    state, metrics = step(state, X)
    graph = jax.value_and_grad(lambda t: jnp.mean(nnx.merge(*t_of(model, t), copy=True)(X) ** 2))
    trained = nnx.state(model, aj.nnx.AdapterParam)
    loss, grads = graph(trained)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for old, new, g in zip(
        before, jax.tree.leaves(state.trained), jax.tree.leaves(grads), strict=True
    ):
        assert np.abs(g).max() > 1e-3
        np.testing.assert_allclose(new, old - 1e-3 * g, rtol=1e-4, atol=1e-5)
    aj.save_adapter(tmp_path / "adapter", model)
    loaded = aj.load_adapter(tmp_path / "adapter", base)
    np.testing.assert_allclose(loaded(X), model(X), rtol=1e-5, atol=1e-5)


def t_of(model, trained):
    graphdef, _, rest = nnx.split(model, aj.nnx.AdapterParam, ...)
    return graphdef, trained, rest


def test_an_abstract_model_stays_abstract():
    model = aj.adapt(
        nnx.eval_shape(lambda: Style(decayed)), METHODS["lora"], rngs=nnx.Rngs(0),
        example_inputs=(X,),
    )  # fmt: skip
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(model)))
    assert stated(model) == ("d",)


READS = "Style reads parameters as state.* would read 'd/adapter/down/.*' with them.*'!d'"


@pytest.mark.slow
def test_an_adapter_of_an_output_that_would_be_read_is_refused():
    method = aj.Bottleneck("d", 2)
    with pytest.raises(RecipeError, match=READS):
        adapted(Style(decayed), method)
    model = adapted(Style(decayed), method, None)
    with pytest.raises(RecipeError, match=READS):
        model(X)
    # Where the weight alone is read, it is that of the base.
    model = adapted(Style(lambda m, x: x @ nnx.state(m.d)["kernel"][...] - m.d(x)), method)
    base = aj.nnx.copy(model)
    aj.nnx.detach(base)
    np.testing.assert_allclose(model(X) + model.d(X), base.d(X) - base.d.bias[...], atol=1e-4)
