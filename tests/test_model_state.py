"""State that is not a parameter: trained, resumed, saved and loaded to the last bit."""

import functools
import json
import logging
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import core, nnx
from flax import linen as nn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.distributed.plan import abstract_state, plan
from adapters_jax.errors import AdapterFileError, AdapterMismatchError
from adapters_jax.files.adapter import STATE, TENSORS, read_adapter
from adapters_jax.files.manifest import CONFIG
from adapters_jax.finetune.formats.native import Native
from adapters_jax.transforms.stacking import Stack
from adapters_jax.trees import leaves_by_path

APIS = ("linen", "nnx")
RECIPE = aj.Recipe(aj.LoRA("up", 2), aj.Unfreeze("norm/bias"))
PATHS = ["mixed", "norm/mean", "norm/var", "seen"]
TX = optax.adam(1e-1)
ROWS = 8


class LinenNet(nn.Module):
    """A batch norm, an integer counter and a half-precision average."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3, name="up")(x)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.75, name="norm")
        y = norm(x)
        seen = self.variable("counts", "seen", lambda: jnp.zeros((), jnp.int32))
        mixed = self.variable("averages", "mixed", lambda: jnp.zeros(3, jnp.bfloat16))
        if train and not self.is_initializing():
            seen.value += len(x)
            mixed.value = (mixed.value + x.mean(0).astype(jnp.bfloat16)) / 2
        return y + mixed.value.astype(y.dtype) * (seen.value > 0)


class Count(nnx.Variable):
    pass


class Average(nnx.Variable):
    pass


class NnxNet(nnx.Module):
    def __init__(self, seed=0, counts=True):
        rngs = nnx.Rngs(seed)
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.75, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.cache = nnx.Cache(jnp.zeros(2))
        self.table = jnp.arange(3.0)  # a constant
        self.mixed = Average(jnp.zeros(3, jnp.bfloat16))
        if counts:
            self.seen = Count(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        x = self.up(x)
        y = self.norm(x)
        if not self.norm.use_running_average:
            self.seen[...] += len(x)
            self.mixed[...] = (self.mixed[...] + x.mean(0).astype(jnp.bfloat16)) / 2
        return y + self.mixed[...].astype(y.dtype) * (self.seen[...] > 0)


@functools.cache
def linen_base():
    """The linen model, its parameters and its collections, which are not those of zero."""
    variables = dict(LinenNet().init(jax.random.key(0), batch(0)))
    params = variables.pop("params")
    params["up"]["kernel"] = nnx_base().up.kernel[...]
    return LinenNet(), params, jax.tree.map(lambda x: x + jnp.asarray(1, x.dtype), variables)


def nnx_base(**options):
    model = NnxNet(**options)
    other = nnx.state(model, (nnx.BatchStat, Count, Average))
    nnx.update(model, jax.tree.map(lambda x: x + jnp.asarray(1, x.dtype), other))
    return model


def batch(i):
    return jnp.asarray(np.random.default_rng(i).normal(1.0, 2.0, (ROWS, 4)), jnp.float32)


def new_state(api, tx=TX):
    key = jax.random.key(2)
    if api == "nnx":
        return aj.TrainState.create(aj.adapt(nnx_base(), RECIPE, rngs=nnx.Rngs(1)), tx=tx, key=key)
    base, params, collections = linen_base()
    model = aj.adapt(base, RECIPE)
    params = aj.init_adapters(model, params, jax.random.key(1), batch(0))
    return aj.TrainState.create(model, params, collections=collections, tx=tx, key=key)


def loss_of(api):
    model = aj.adapt(LinenNet(), RECIPE)

    def of_linen(variables, x, key):
        mutable = ["batch_stats", "counts", "averages"]
        y, updated = model.apply(variables, x, train=True, mutable=mutable)
        return jnp.mean((y - 1.0) ** 2), {"rows": 1.0 * len(x)}, updated

    def of_nnx(model, x, key):
        return jnp.mean((model(x) - 1.0) ** 2), {"rows": 1.0 * len(x)}

    return of_linen if api == "linen" else of_nnx


@functools.cache
def step_of(api, accumulate=1):
    return aj.make_train_step(loss_of(api), accumulate=accumulate)


def trained(api, first=0, last=3, state=None):
    state = new_state(api) if state is None else state
    for i in range(first, last):
        state, _ = step_of(api)(state, batch(i))
    return state


def output(api, model, variables=None):
    """The output of a model in evaluation."""
    if api == "linen":
        return np.asarray(model.apply(variables, batch(99)))
    model.eval()
    return np.asarray(model(batch(99)))


def output_of(api, state):
    if api == "nnx":
        return output(api, state.model)
    return output(api, aj.adapt(LinenNet(), RECIPE), state.variables)


def state_of(api, subject):
    """Statistics and the like by path, as dtypes and bytes; of a model, collections or a state."""
    other = subject.other if isinstance(subject, aj.TrainState) else subject
    if api == "nnx":
        kinds = (nnx.BatchStat, Count, Average)
        other = nnx.filter_state(other if other is not subject else nnx.state(other), kinds)
        found = leaves_by_path(other)
    else:
        found = {k: x for tree in other.values() for k, x in leaves_by_path(tree).items()}
    return {path: (x.dtype, np.asarray(x).tobytes()) for path, x in sorted(found.items())}


def bits(tree):
    plain = [jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x for x in tree]
    return [(x.dtype, np.asarray(x).tobytes()) for x in plain]


def loaded(api, directory, **options):
    """The model, and in linen its variables, of a directory."""
    if api == "nnx":
        return aj.load_adapter(directory, nnx_base(), **options), None
    base, params, collections = linen_base()
    model, params, collections = aj.load_adapter(
        directory, base, params, batch(0), collections=collections, **options
    )
    return model, {"params": params, **collections}


def by_hand(parts):
    """All state by path after the parts of the first batch, in plain arithmetic."""
    mixed, mean, var, seen = np.ones(3), np.ones(3), np.full(3, 2.0), 1
    for x in np.split(np.asarray(batch(0), np.float64), parts):
        h = x @ np.asarray(linen_base()[1]["up"]["kernel"], np.float64)
        mixed = (mixed + h.mean(0)) / 2
        mean, var = 0.75 * mean + 0.25 * h.mean(0), 0.75 * var + 0.25 * h.var(0)
        seen += len(x)
    return {"mixed": mixed, "norm/mean": mean, "norm/var": var, "seen": seen}


@pytest.mark.slow
@pytest.mark.witness("1-linen", "2-nnx")
@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("parts", [1, 2])
def test_statistics_are_those_by_hand_and_go_from_part_to_part(api, parts):
    state, metrics = step_of(api, parts)(new_state(api), batch(0))
    assert float(metrics["rows"]) == ROWS / parts
    found = state_of(api, state)
    for path, value in by_hand(parts).items():
        kind, data = found[path]
        tolerance = 1e-2 if kind == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.frombuffer(data, kind).astype(float), np.ravel(value), rtol=tolerance, err_msg=path
        )


@pytest.mark.parametrize("api", APIS)
def test_after_training_saving_and_loading_outputs_are_equal_to_the_last_bit(api, tmp_path):
    state = trained(api)
    saved = aj.save_adapter(tmp_path / "a", state)
    model, variables = loaded(api, saved)
    expected = output_of(api, state)
    np.testing.assert_array_equal(output(api, model, variables), expected)
    found = model if api == "nnx" else {k: x for k, x in variables.items() if k != "params"}
    assert state_of(api, found) == state_of(api, state)
    assert list(state_of(api, state)) == PATHS
    assert {path: kind for path, (kind, _) in state_of(api, state).items()} == {
        "mixed": jnp.bfloat16,
        "norm/mean": jnp.float32,
        "norm/var": jnp.float32,
        "seen": jnp.int32,
    }
    fresh = output_of(api, new_state(api))
    assert np.abs(fresh - expected).max() > 0.1  # the base's statistics give something else


def test_the_statistics_of_the_given_base_are_left_alone(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", trained("nnx"))
    base = nnx_base()
    before, mean = state_of("nnx", base), base.norm.mean[...]
    model = aj.load_adapter(saved, base)
    assert state_of("nnx", base) == before != state_of("nnx", model)
    assert base.norm.mean[...] is mean and not base.norm.use_running_average
    assert model.cache[...] is base.cache[...] and model.table is base.table
    saved = aj.save_adapter(tmp_path / "b", trained("linen"))
    net, params, collections = linen_base()
    before = state_of("linen", collections)
    _, _, found = aj.load_adapter(
        saved, net, params, batch(0), collections=core.freeze({**collections, "cache": {"i": 1}})
    )
    assert state_of("linen", collections) == before != state_of("linen", {**found, "cache": {}})
    assert found["cache"] == {"i": 1} and set(found) == {*collections, "cache"}


def test_a_model_and_a_tree_with_collections_are_saved_as_the_state_is(tmp_path):
    def files(directory):
        return {name: (directory / name).read_bytes() for name in os.listdir(directory)}

    state = trained("nnx")
    saved = [aj.save_adapter(tmp_path / str(i), x) for i, x in enumerate((state, state.model))]
    assert files(saved[0]) == files(saved[1])
    state = trained("linen")
    linen = aj.save_adapter(tmp_path / "linen", state)
    own = aj.save_adapter(
        *(tmp_path / "own", state.trained, RECIPE),
        collections={**state.other, "cache": {"index": jnp.zeros(3)}},
        base=aj.base_identity(state.params, RECIPE),
    )
    assert all(files(linen)[name] == files(own)[name] for name in (TENSORS, STATE))
    config = [json.loads(files(each)[CONFIG]) for each in (linen, own)]
    assert [each.pop("format") for each in config] == [3, 2]  # a tree does not say all placements
    assert [row["path"] for row in config[0].pop("placements")] == ["up"]
    assert config[0] == config[1]
    assert sorted(files(own)) == sorted([CONFIG, TENSORS, STATE])


def test_what_is_on_disk(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", trained("nnx"))
    config = json.loads((saved / CONFIG).read_text())
    assert (config["format"], config["tensors"], config["state_tensors"]) == (3, 3, 4)
    assert sorted(safetensors.numpy.load_file(saved / TENSORS)) == [
        *("norm/bias", "up/lora/a", "up/lora/b"),
    ]
    with safetensors.safe_open(saved / STATE, "np") as file:
        assert sorted(file.keys()) == PATHS and not file.metadata()


def test_a_model_without_such_state_has_files_of_format_1(tmp_path):
    class Plain(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.cache, self.table = nnx.Cache(jnp.ones(2)), jnp.ones(3)

    recipe = aj.LoRA("up", 2, dropout=0.5)
    model = aj.adapt(Plain(), recipe, rngs=nnx.Rngs(1))
    old = aj.save_adapter(
        *(tmp_path / "old", nnx.state(model, aj.nnx.AdapterParam), recipe),
        base=aj.base_identity(model),
    )
    new = aj.save_adapter(tmp_path / "new", model)
    assert sorted(os.listdir(new)) == sorted([CONFIG, TENSORS])
    assert (old / TENSORS).read_bytes() == (new / TENSORS).read_bytes()
    assert all("state" not in (each / CONFIG).read_text() for each in (old, new))
    assert json.loads((old / CONFIG).read_text())["format"] == 1


def test_a_file_of_one_api_loads_onto_a_model_of_the_other(tmp_path):
    for api, other in (APIS, APIS[::-1]):
        state = trained(api)
        model, variables = loaded(other, aj.save_adapter(tmp_path / api, state))
        found = model if other == "nnx" else {k: x for k, x in variables.items() if k != "params"}
        assert state_of(other, found) == state_of(api, state)
        np.testing.assert_allclose(
            output(other, model, variables), output_of(api, state), atol=1e-5
        )


@pytest.mark.parametrize("api", APIS)
def test_a_resumed_training_is_the_uninterrupted_one_to_the_last_bit(api, tmp_path):
    straight = trained(api, 0, 5)
    with aj.Checkpoints(tmp_path) as checkpoints:
        state = trained(api, 0, 2)
        checkpoints.save(2, state)
        trained(api, 2, 4, state)  # uses up what was saved
    with aj.Checkpoints(tmp_path) as checkpoints:
        state = checkpoints.restore(new_state(api)).state
        if api == "linen":
            without = new_state(api).replace(other={"counts": state.other["counts"]})
            with raises(aj.MismatchError, "other/batch_stats/norm/mean", "collections"):
                checkpoints.restore(without)
    found = trained(api, 2, 5, state)
    assert state_of(api, found) == state_of(api, straight)
    assert bits(jax.tree.leaves(found.checkpointed)) == bits(jax.tree.leaves(straight.checkpointed))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_keeps_all_state(api, accumulate):
    state, before = trained(api), state_of(api, trained(api))
    bad = batch(5).at[-1, 0].set(jnp.nan)
    state, metrics = step_of(api, accumulate)(state, bad)
    assert float(metrics["finite"]) == 0.0 and int(state.step) == 4
    assert state_of(api, state) == before
    state, metrics = step_of(api, accumulate)(state, batch(6))
    assert float(metrics["finite"]) == 1.0
    changed = state_of(api, state)
    assert all(changed[path] != before[path] for path in PATHS)


@pytest.mark.parametrize("api", APIS)
def test_evaluation_uses_the_statistics_and_changes_none(api):
    state = trained(api)
    model = aj.adapt(LinenNet(), RECIPE)
    evaluate = aj.make_eval_step(
        model.apply if api == "linen" else lambda model, x: model(x),
    )
    before = state_of(api, state)
    np.testing.assert_allclose(evaluate(state, batch(99)), output_of(api, state), atol=1e-5)
    assert state_of(api, state) == before


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_what_an_nnx_model_sows_is_dropped(tmp_path):
    class Sowing(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.sow(nnx.Intermediate, "h", x)
            return self.up(x)

    model = aj.adapt(Sowing(), aj.Unfreeze("up/bias"), rngs=nnx.Rngs(0))
    step = aj.make_train_step(lambda model, x, key: jnp.mean(model(x)), accumulate=2)
    for sown in (0, 1):
        state = aj.TrainState.create(model, tx=optax.sgd(1.0), key=jax.random.key(0))
        state, _ = step(step(state, batch(0))[0], batch(1))
        assert len(jax.tree.leaves(state.other)) == sown
        np.testing.assert_allclose(state.adapters["up"]["bias"][...], -2 / 3, rtol=1e-5)
        model(batch(0))
    saved = aj.save_adapter(tmp_path / "a", model)
    assert sorted(os.listdir(saved)) == sorted([CONFIG, TENSORS])


def test_a_loss_may_return_some_of_the_collections_or_none():
    model = aj.adapt(LinenNet(), RECIPE)

    def loss(variables, x, key):
        assert set(variables) == {"params", "batch_stats", "counts", "averages"}
        mutable = ["batch_stats", "counts", "averages"]
        y, updated = model.apply(variables, x, train=True, mutable=mutable)
        return jnp.mean(y), {}, core.freeze({"counts": updated["counts"]})

    state, before = new_state("linen"), state_of("linen", new_state("linen"))
    state, _ = aj.make_train_step(loss)(state, batch(0))
    found = state_of("linen", state)
    assert [path for path in PATHS if found[path] != before[path]] == ["seen"]
    state, _ = aj.make_train_step(lambda v, x, key: jnp.mean(model.apply(v, x)))(state, batch(0))
    assert state_of("linen", state) == found


def test_what_a_loss_cannot_return():
    def returning(*values):
        return aj.make_train_step(lambda subject, x, key: (jnp.zeros(()), *values))

    with raises(aj.UserError, "losses", "averages, batch_stats, counts"):
        returning({}, {"losses": {"x": 1.0}})(new_state("linen"), batch(0))
    with raises(aj.MismatchError, "counts/seen is float32[]", "int32[]"):
        returning({}, {"counts": {"seen": jnp.zeros(())}})(new_state("linen"), batch(0))
    with raises(aj.MismatchError, "missing: counts/seen"):
        returning({}, {"counts": {}})(new_state("linen"), batch(0))
    with raises(aj.UserError, "params"):
        returning({}, {"params": {}})(new_state("linen"), batch(0))
    with raises(aj.UserError, "4 values"):
        returning({}, None, None)(new_state("linen"), batch(0))
    with raises(aj.UserError, "NNX", "(loss, metrics)"):
        returning({}, {"counts": {}})(new_state("nnx"), batch(0))
    base, params, _ = linen_base()
    model = aj.adapt(base, aj.Unfreeze("norm/bias"))
    state = aj.TrainState.create(model, params, tx=TX, key=jax.random.key(0))
    with raises(aj.UserError, "counts", "none", "TrainState.create(..., collections=...)"):
        returning({}, {"counts": {}})(state, batch(0))


def test_collections_are_a_dictionary_of_collections():
    base, params, collections = linen_base()
    model = aj.adapt(base, aj.Unfreeze("norm/bias"))
    create = functools.partial(aj.TrainState.create, tx=TX, key=jax.random.key(0))
    for wrong, name in (
        ({"params": params, **collections}, "params"),
        (collections["averages"], "mixed"),
        (jnp.ones(3), "ArrayImpl"),
    ):
        with raises(aj.UserError, "TrainState.create", name, '{"batch_stats": '):
            create(model, params, collections=wrong)
        with raises(aj.UserError, "load_adapter", name):
            aj.load_adapter("a", base, params, collections=wrong)
        with raises(aj.UserError, "save_adapter", name):
            aj.save_adapter("a", {}, RECIPE, collections=wrong)
    adapted = aj.adapt(nnx_base(), RECIPE, rngs=nnx.Rngs(0))
    for subject in (adapted, new_state("nnx")):
        with raises(TypeError, "save_adapter", "collections"):
            aj.save_adapter("a", subject, collections=collections)
    with raises(TypeError, "TrainState.create", "collections"):
        create(adapted, collections=collections)
    with raises(TypeError, "load_adapter", "NNX"):
        aj.load_adapter("a", nnx_base(), collections=collections)
    assert create(model, params, collections={}).variables.keys() == {"params"}


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", APIS)
def test_all_of_it_works_on_shapes(api):
    if api == "linen":
        base, params, collections = linen_base()
        model = aj.adapt(base, RECIPE)
        shapes = jax.eval_shape(lambda *x: x, params, collections)
        whole = aj.init_adapters(model, shapes[0], jax.random.key(0), batch(0))
        abstract = functools.partial(abstract_state, model, whole, collections=shapes[1])
    else:
        graphdef, whole = nnx.split(aj.adapt(nnx_base(), RECIPE, rngs=nnx.Rngs(0)))
        model = nnx.merge(graphdef, jax.eval_shape(lambda x: x, whole))
        abstract = functools.partial(abstract_state, model)
    state = abstract(tx=TX)
    concrete = new_state(api)
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(s)] for s in (state, concrete)]
    assert kinds[0] == kinds[1]
    after, metrics = jax.eval_shape(step_of(api), state, batch(0))
    assert jax.tree.structure(after.other) == jax.tree.structure(concrete.other)
    assert set(metrics) == {"rows", "loss", "grad_norm", "finite"}
    found = plan(state, loss_of(api), batch(0), accumulate=2)
    held = sum(x.nbytes for x in jax.tree.leaves((concrete.base, concrete.other)))
    assert found.base == held and found.adapters == 4 * (3 + 8 + 6)


@pytest.mark.parametrize("api", APIS)
def test_on_a_mesh_every_device_has_the_collections_and_steps_compile_once(api):
    mesh = aj.make_mesh("data=-1,model=1")
    state = aj.shard(new_state(api), mesh)
    assert {x.sharding.spec for x in jax.tree.leaves(state.other)} == {jax.sharding.PartitionSpec()}
    step = aj.make_train_step(loss_of(api))
    for i in range(2):
        state, _ = step(state, aj.shard_batch(batch(i), mesh))
    assert step.jitted._cache_size() == 1
    expected, found = state_of(api, trained(api, 0, 2)), state_of(api, state)
    for path in PATHS:
        kind = expected[path][0]
        a, b = (np.float32(np.frombuffer(x[path][1], kind)) for x in (expected, found))
        np.testing.assert_allclose(a, b, rtol=1e-2)


def test_state_of_another_model_is_an_error_that_names_the_paths(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", trained("nnx"))
    with raises(AdapterMismatchError, saved / STATE, "1 unexpected: seen"):
        aj.load_adapter(saved, nnx_base(counts=False))
    less = aj.save_adapter(
        tmp_path / "less", aj.adapt(nnx_base(counts=False), RECIPE, rngs=nnx.Rngs(0))
    )
    with raises(AdapterMismatchError, less / STATE, "1 missing: seen"):
        aj.load_adapter(less, nnx_base())
    net, params, collections = linen_base()
    with raises(AdapterMismatchError, saved / STATE, "4 unexpected", *PATHS, "collections={"):
        aj.load_adapter(saved, net, params, batch(0))
    other = {**collections, "counts": {"seen": jnp.zeros(2)}}
    with raises(AdapterMismatchError, "seen is int32[]", "float32[2]"):
        aj.load_adapter(saved, net, params, batch(0), collections=other)


@pytest.mark.parametrize("api", APIS)
def test_a_file_without_state_leaves_the_bases_and_says_so(api, tmp_path, caplog):
    state = trained(api)
    saved = aj.save_adapter(tmp_path / "a", state.trained, RECIPE)
    model, variables = loaded(api, saved)
    found = model if api == "nnx" else {k: x for k, x in variables.items() if k != "params"}
    assert state_of(api, found) == state_of(api, new_state(api))
    ((name, level, message),) = caplog.record_tuples
    assert name.startswith("adapters_jax") and level == logging.WARNING
    assert str(saved) in message and all(path in message for path in PATHS)


def test_a_reader_without_a_model_says_that_state_is_not_read(tmp_path, caplog):
    saved = aj.save_adapter(tmp_path / "a", trained("nnx"))
    recipe, tensors = read_adapter(saved)
    assert recipe == RECIPE and set(tensors) == {"norm/bias", "up/lora/a", "up/lora/b"}
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING and str(saved / STATE) in message


def test_other_formats_do_not_drop_state_in_silence(tmp_path):
    class Base:
        name, classifies, identity = "some/base", False, aj.BaseIdentity()

    saved = aj.save_adapter(tmp_path / "a", trained("nnx").model)
    with raises(AdapterMismatchError, saved / STATE, "some/base"):
        Native().read(saved, Base())


def test_damaged_state_is_an_error(tmp_path):
    saved = aj.save_adapter(tmp_path / "a", trained("nnx"))
    whole = (saved / STATE).read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b""):
        (saved / STATE).write_bytes(content)
        with raises(AdapterFileError, saved / STATE):
            aj.load_adapter(saved, nnx_base())
    safetensors.numpy.save_file({"norm/mean": np.ones(3), "seen": np.ones(1)}, saved / STATE)
    with raises(AdapterFileError, saved / STATE, "2 tensors", CONFIG):
        aj.load_adapter(saved, nnx_base())
    (saved / STATE).unlink()
    with raises(AdapterFileError, saved, STATE):
        aj.load_adapter(saved, nnx_base())


def test_state_may_be_of_any_value_and_of_the_dtypes_of_the_format(tmp_path):
    class Net(nnx.Module):
        def __init__(self, *values):
            self.up = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.state = nnx.List([Count(x) for x in values])

    def adapted(*values):
        return aj.adapt(Net(*values), aj.LoRA("up", 1), rngs=nnx.Rngs(1))

    values = [jnp.array([jnp.inf, -jnp.inf, jnp.nan]), jnp.array([True, False])]
    values += [jnp.zeros((0, 3)), jnp.array([1, 255], jnp.uint8), {"a": (jnp.ones(2, jnp.int16),)}]
    values += [jnp.asarray([0.1, 3], kind) for kind in (jnp.float16, jnp.float8_e4m3fn)]
    saved = aj.save_adapter(tmp_path / "a", adapted(*values))
    zeros = jax.tree.map(jnp.zeros_like, values)
    found = nnx.state(aj.load_adapter(saved, Net(*zeros)), Count)
    assert bits(jax.tree.leaves(found)) == bits(jax.tree.leaves(values))
    with raises(aj.UserError, "state/0", "int4"):
        aj.save_adapter(tmp_path / "b", adapted(jnp.asarray([1], ml_dtypes.int4)))
    assert os.listdir(tmp_path) == ["a"]


def test_two_collections_with_one_path_are_an_error(tmp_path):
    twice = {"batch_stats": {"norm": {"mean": jnp.ones(1)}}, "ema": {"norm": {"mean": jnp.ones(1)}}}
    with raises(aj.UserError, "batch_stats, ema", "norm/mean"):
        aj.save_adapter(tmp_path / "a", {"bias": jnp.ones(1)}, aj.Unfreeze("*"), collections=twice)


def test_boxed_collections_stay_boxed(tmp_path):
    base, params, collections = linen_base()
    box = nn.Partitioned(collections["averages"]["mixed"], ("model",))
    boxed = {**collections, "averages": {"mixed": box}}
    model = aj.adapt(base, aj.Unfreeze("norm/bias"))
    create = functools.partial(aj.TrainState.create, model, params, tx=TX, key=jax.random.key(0))
    state = create(collections=boxed)
    new = {"averages": {"mixed": jnp.full(3, 7, jnp.bfloat16)}}
    loss = lambda variables, x, key: variables["params"]["norm"]["bias"].sum()  # noqa: E731
    step = aj.make_train_step(lambda *given: (loss(*given), {}, new))
    state, _ = step(state, batch(0))
    saved = aj.save_adapter(tmp_path / "a", state)
    _, _, found = aj.load_adapter(saved, base, params, batch(0), collections=boxed)
    for mixed in (state.other["averages"]["mixed"], found["averages"]["mixed"]):
        assert mixed.names == ("model",) and mixed.value.tolist() == [7.0, 7.0, 7.0]


@pytest.mark.slow
def test_state_of_unrolled_layers_loads_onto_scanned_ones_and_back(tmp_path):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self, scan):
            rngs = nnx.Rngs(0)
            if scan:
                graphdef, block = nnx.split(Block(rngs))
                self.layers = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.stack([x, x]), block))
            else:
                self.block_0, self.block_1 = Block(rngs), Block(rngs)

    stack = Stack("block_{}", "layers")
    unrolled = aj.adapt(Net(False), aj.LoRA("*/up", 1), rngs=nnx.Rngs(1))
    for i, block in enumerate((unrolled.block_0, unrolled.block_1)):
        block.norm.mean[...] = jnp.full(3, 1.0 + i)
    saved = aj.save_adapter(tmp_path / "unrolled", unrolled)
    scanned = aj.load_adapter(saved, Net(True), names=stack)
    assert scanned.layers.norm.mean[...].tolist() == [[1.0] * 3, [2.0] * 3]
    saved = aj.save_adapter(tmp_path / "scanned", scanned)
    back = aj.load_adapter(saved, Net(False), names=stack)
    assert [b.norm.mean[...].tolist() for b in (back.block_0, back.block_1)] == [
        [1.0] * 3,
        [2.0] * 3,
    ]


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=0.5, name="norm")(x)


class NnxNorm(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize("api", APIS)
def test_a_module_that_runs_again_on_a_changed_input_has_the_statistics_of_one_call(api):
    """What it read without the adapter is no batch of its own."""
    recipe = aj.Bottleneck("norm", 2, placement="norm", init_std=1e-6, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (ROWS, 3)) + 3.0
    if api == "linen":
        variables = LinenNorm().init(jax.random.key(0), x)
        model = aj.adapt(LinenNorm(), recipe)
        params = aj.init_adapters(model, variables["params"], jax.random.key(1), x)
        options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(2)}}
        _, after = model.apply({**variables, "params": params}, x, **options)
        mean = after["batch_stats"]["norm"]["mean"]
    else:
        model = aj.adapt(NnxNorm(), recipe, rngs=nnx.Rngs(1), example_inputs=(x,))
        model(x)
        mean = model.norm.mean[...]
        counts = jax.tree.leaves(nnx.state(model, nnx.RngCount))
        assert counts == [1]  # so the next call draws another key
    np.testing.assert_allclose(mean, x.mean(0) / 2, rtol=1e-4)
