"""Mistakes of newcomers with models of their own: each is one sentence that says what to write."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.files.checkpoint import Checkpoints

pytestmark = pytest.mark.hostile

X, KEY, SGD = jnp.ones((2, 4)), jax.random.key(0), optax.sgd(0.1)


class Normed(nn.Module):
    """A linen model with statistics."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(3, name="head")(nn.Dense(4, name="body")(x))


class Attends(nnx.Module):
    """An NNX model whose attention and weight are its own."""

    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        q = x @ self.weight[...]
        return self.drop(nn.softmax(q @ x.swapaxes(-1, -2)) @ x)


class Both(nnx.Module):
    """An NNX model with a layer of flax and a weight of its own."""

    def __init__(self):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        return self.layer(x @ self.weight[...])


NET = Normed()
VARIABLES = NET.init(KEY, X)
PARAMS = VARIABLES["params"]
STATS = {"batch_stats": VARIABLES["batch_stats"]}
RECIPE = aj.Recipe(aj.LoRA("body", rank=2), aj.Unfreeze("head/**"))
MODEL = aj.adapt(NET, RECIPE)
WHOLE = aj.init_adapters(MODEL, PARAMS, KEY, X)


def own():
    return Attends(nnx.Rngs(0))


def adapted():
    return aj.adapt(own(), aj.LoRA("weight", 2), rngs=nnx.Rngs(1), example_inputs=(X,))


def state_of(params=WHOLE, **given):
    return aj.TrainState.create(MODEL, params, tx=SGD, key=KEY, **given)


@pytest.mark.parametrize(
    ("model", "tree"),
    [(NET, PARAMS), (NET, VARIABLES), (own(), nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))],
)
def test_parameters_are_no_inputs_of_suggest(model, tree):
    with raises(aj.UserError, type(model).__name__, "parameters", "aj.suggest(model, *inputs)"):
        aj.suggest(model, tree, X)


def test_a_mapping_that_a_model_takes_is_an_input():
    class Takes(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return nn.Dense(2)(batch["scale"])

    assert "Dense_0" in repr(aj.suggest(Takes(), {"scale": X}))


@pytest.mark.parametrize("name", ["scale", "bias", "params"])
def test_a_models_own_error_on_a_batch_with_a_name_of_parameters(name):
    class Damaged(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return (nn.Dense(2)(batch["x"]) * batch[name]).reshape(3, 7)

    with raises(TypeError, "(3, 7)"):
        aj.suggest(Damaged(), {"x": X, name: jnp.ones(())})
    with raises(aj.UserError, "Damaged", "too many", f"{name!r}: float32[]"):
        aj.suggest(Damaged(), {"x": X, name: jnp.ones(())}, X)


@pytest.mark.parametrize(
    "call",
    [
        lambda params: aj.merge(MODEL, params, X),
        lambda params: aj.init_adapters(MODEL, params, KEY, X),
        lambda params: aj.audit(MODEL, params),
        lambda params: aj.quantize(NET, params, X),
        lambda params: aj.Bank(MODEL, params),
        lambda params: state_of(params),
        lambda params: aj.load_adapter("anywhere", NET, params, X),
    ],
    ids=["merge", "init_adapters", "audit", "quantize", "Bank", "TrainState", "load_adapter"],
)
def test_what_stands_for_parameters(call):
    with raises(TypeError, "params"):
        call(None)
    with raises(aj.MismatchError, "batch_stats, params", 'variables["params"]', "write"):
        call({"batch_stats": {}, "params": WHOLE})
    with raises(aj.UserError, "ArrayImpl", 'variables["params"]', "write"):
        call(X)


def test_a_linen_model_is_merged_with_its_parameters():
    with raises(TypeError, "aj.merge(model, params, *example_inputs)"):
        aj.merge(MODEL)
    with raises(aj.UserError, "Normed", "aj.adapt(model, recipe)"):
        aj.merge(NET, WHOLE, X)
    with raises(TypeError, "TrainState", "aj.merge(model, state.params, *example_inputs)"):
        aj.merge(state_of(collections=STATS))


def test_errors_of_unmerge_name_it():
    with raises(TypeError, "unmerge: ", "aj.unmerge(model, params, *example_inputs)"):
        aj.unmerge(MODEL)
    with raises(TypeError, "unmerge: ", "aj.unmerge(model)"):
        aj.unmerge(adapted(), PARAMS)
    with raises(TypeError, "unmerge: got a TrainState", "aj.unmerge(model, state.params"):
        aj.unmerge(state_of(collections=STATS))


def test_an_nnx_model_has_its_parameters():
    model = adapted()
    for call, name in [(aj.merge, "aj.merge(model)"), (aj.audit, "aj.audit(model)")]:
        with raises(TypeError, name):
            call(model, nnx.state(model))
    with raises(TypeError, "AdaptedAttends", "aj.adapt"):
        aj.init_adapters(model, PARAMS, KEY, X)


def test_a_state_of_an_nnx_model_may_have_a_module_params():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.params = nnx.Linear(4, 4, rngs=rngs)

    recipe = aj.Recipe(aj.LoRA("params", 2))
    model = aj.adapt(Own(nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    counted = aj.audit(recipe, nnx.state(model, nnx.Param))
    assert counted.adapter_parameters == aj.audit(model).adapter_parameters == 16


def test_adapters_are_made_for_an_adapted_model():
    with raises(TypeError, "Normed", "aj.adapt(base, recipe)"):
        aj.init_adapters(NET, PARAMS, KEY, X)
    with raises(TypeError, "dict", "aj.adapt(base, recipe)"):
        aj.init_adapters(PARAMS, MODEL, KEY, X)


@pytest.mark.parametrize("key", [X, 0, nnx.Rngs(0), jax.random.split(KEY)])
def test_a_key_that_is_none(key):
    with raises(aj.UserError, "key=", "jax.random.key(0)"):
        aj.init_adapters(MODEL, PARAMS, key, X)
    with raises(aj.UserError, "key=", "jax.random.key(0)"):
        aj.TrainState.create(MODEL, WHOLE, tx=SGD, key=key)


def test_the_key_of_a_random_stream_is_a_key():
    key = nnx.Rngs(0).params.key
    state = aj.TrainState.create(MODEL, WHOLE, tx=SGD, key=key, collections=STATS)
    assert state.key == key[...]
    assert "lora" in aj.init_adapters(MODEL, PARAMS, key, X)["body"]


def test_models_and_recipes_in_each_others_place():
    with raises(TypeError, "adapt: got Recipe", "aj.adapt(model, recipe)"):
        aj.adapt(RECIPE, NET)
    with raises(TypeError, "the class Normed"):
        aj.adapt(Normed, RECIPE)
    with raises(TypeError, "AdaptedNormed", "model.recipe"):
        aj.partition(WHOLE, MODEL)
    with raises(TypeError, "AdaptedAttends", "aj.nnx.recipe_of(model)"):
        aj.Recipe(adapted())
    with raises(TypeError, "aj.Recipe(LoRA(...), Unfreeze(...))"):
        aj.LoRA("body") + aj.Unfreeze("head/**")
    assert aj.LoRA("body", rank=2) + aj.Recipe(aj.Unfreeze("head/**")) == RECIPE


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (lambda: state_of(collections=STATS), "TrainState, which is no recipe but has one, state."),
        (lambda: aj.Bank(MODEL, WHOLE), "Bank, which is no recipe but has one, bank.recipe"),
        (lambda: MODEL, "AdaptedNormed, which is no recipe but has one, model.recipe"),
    ],
)
def test_the_recipe_of_what_has_one(made, shown):
    with raises(TypeError, shown):
        aj.Recipe(made())


@pytest.mark.parametrize(
    ("given", "shown"),
    [(X, ("float32[2, 4]", "(x,)")), ({"x": X}, ("(inputs,)", "aj.inputs(**inputs)"))],
)
def test_example_inputs_come_in_a_tuple(given, shown):
    with raises(aj.UserError, *shown, "tuple"):
        aj.adapt(own(), aj.LoRA("weight"), rngs=nnx.Rngs(0), example_inputs=given)
    with raises(aj.UserError, *shown, "tuple"):
        aj.audit(MODEL, WHOLE, inputs=given)


class Encodes(nn.Module):
    """A linen model whose call takes a mask, beside another function."""

    def setup(self):
        self.body = nn.Dense(4)

    def __call__(self, x, mask):
        return self.encode(x) * mask

    def encode(self, x):
        return self.body(x)


@pytest.mark.parametrize("given", [aj.inputs(X, mask=X), aj.inputs(X, method="encode")])
def test_described_inputs_stand_wherever_inputs_do(given, tmp_path):
    net, recipe = Encodes(), aj.LoRA("body", rank=2)
    params = net.init(KEY, X, X)["params"]
    assert "Encodes" not in repr(aj.suggest(net, given))
    model = aj.adapt(net, recipe)
    whole = aj.init_adapters(model, params, KEY, given)
    saved = aj.save_adapter(tmp_path / "a", aj.partition(whole, recipe)[0], recipe)
    loaded = aj.load_adapter(saved, net, params, given)[1]
    for tree in (loaded, aj.init_adapters(model, params, KEY, X, X)):
        assert jax.tree.all(jax.tree.map(np.array_equal, whole, tree))
    assert jax.tree.all(jax.tree.map(np.array_equal, aj.merge(model, whole, given), params))
    with raises(aj.UserError, "aj.inputs(...) alone", "inputs(float32[2, 4]"):
        aj.init_adapters(model, params, KEY, given, mask=X)
    with raises(aj.UserError, "aj.inputs(...) alone"):
        aj.suggest(net, X, given)


def test_described_inputs_of_nnx():
    model = own()
    assert repr(aj.suggest(model, aj.inputs(X))) == repr(aj.suggest(model, x=X))
    one = aj.adapt(model, aj.LoRA("weight", 2), rngs=nnx.Rngs(1), example_inputs=(aj.inputs(x=X),))
    assert one.lora["weight"]["a"].shape == adapted().lora["weight"]["a"].shape


def test_prompts_in_an_attention_that_did_not_run():
    recipe = aj.LlamaAdapter("**", prompt_length=2)
    with raises(aj.TargetError, "Attends", "example_inputs=(...)") as caught:
        aj.adapt(own(), recipe, rngs=nnx.Rngs(0))
    assert "aj.suggest" not in str(caught.value)  # the targets are right


def test_prompts_in_a_layer_that_has_no_attention():
    with raises(aj.TargetError, "LlamaAdapter does not fit Linear", "aj.suggest") as caught:
        aj.adapt(
            nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
            aj.LlamaAdapter("layers/0", prompt_length=2),
            rngs=nnx.Rngs(0),
        )
    assert "example_inputs" not in str(caught.value)  # they would not help


def test_a_module_among_parameters_and_dots_in_a_path():
    with raises(aj.TargetError, "'head'", "'head/**'"):
        aj.init_adapters(aj.adapt(NET, aj.Unfreeze("head")), PARAMS, KEY, X)
    base = nnx.Sequential(own(), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with raises(aj.TargetError, "'layers.1'", "'layers/1'"):
        aj.adapt(base, aj.LoRA("layers.1"), rngs=nnx.Rngs(0))


def loss(variables, batch, key):
    y, updated = MODEL.apply(variables, batch, train=True, mutable=["batch_stats"])
    return jnp.mean(y**2), {}, updated


@pytest.mark.parametrize(
    ("collections", "loss_fn", "shown"),
    [
        (None, loss, "got no collections"),
        (VARIABLES["batch_stats"], lambda v, x, k: jnp.mean(MODEL.apply(v, x)), "norm, params"),
        (STATS, lambda v, x, k: jnp.mean(MODEL.apply({"params": v["params"]}, x)), "batch_stats"),
        (STATS, lambda v, x, k: jnp.mean(MODEL.apply({"params": v}, x)), "batch_stats, params"),
    ],
)
def test_a_loss_function_that_misses_variables(collections, loss_fn, shown):
    state = state_of(collections=collections)
    with raises(aj.UserError, shown, "collections=", "model.apply(variables"):
        aj.make_train_step(loss_fn)(state, X)


def test_a_loss_function_of_another_model():
    outside = adapted()
    state = aj.TrainState.create(adapted(), tx=SGD, key=KEY)
    with raises(aj.UserError, "first argument"):
        aj.make_train_step(lambda model, x, key: jnp.mean(outside(x)))(state, X)


def test_a_loss_function_with_random_streams_from_outside():
    rngs = nnx.Rngs(0)

    def noisy(variables, batch, key):
        return jnp.mean(MODEL.apply(variables, batch + jax.random.normal(rngs(), batch.shape)))

    with raises(aj.UserError, "third argument, the key") as caught:
        aj.make_train_step(noisy)(state_of(collections=STATS), X)
    assert "is the model" not in str(caught.value)  # in linen it is not


def test_functions_of_steps():
    with raises(aj.UserError, "AdaptedNormed", "f(params, batch, key)"):
        aj.make_train_step(MODEL)
    with raises(aj.UserError, "f(model, batch, key)"):
        aj.make_train_step(lambda model, batch: 0.0)
    with raises(aj.UserError, "f(model, batch)", "key"):
        aj.make_eval_step(loss)
    with raises(aj.UserError, "AdaptedNormed", "TrainState"):
        aj.make_eval_step(lambda params, batch: 0.0)(MODEL, X)
    assert aj.make_train_step(jax.jit(lambda *given: jnp.zeros(())))


class Squares(nnx.Module):
    """A loss that is a module."""

    def __call__(self, params, batch, key):
        return jnp.mean(MODEL.apply({"params": params["params"], **STATS}, batch) ** 2)


def test_a_loss_may_be_a_module():
    state = state_of(collections=STATS)
    assert aj.make_train_step(Squares())(state, X)[1]["loss"] > 0
    with raises(aj.UserError, "AdaptedAttends", "f(model, batch, key)"):
        aj.make_train_step(adapted())


def test_optimisers_of_a_recipe():
    with raises(aj.UserError, "aj.lora_plus(optax.adamw, 1e-4, recipe)"):
        aj.lora_plus(optax.adamw(1e-3), 1e-4, RECIPE)
    with raises(aj.UserError, "tx=Recipe", "optax.adam(1e-4)"):
        aj.freeze_base(RECIPE, SGD)
    with raises(aj.RecipeError, "LoRA", "aj.init_adapters(model, params, key"):
        aj.freeze_base(SGD, RECIPE).init(PARAMS)
    with raises(aj.UserError, "audit", "tx="):
        aj.audit(MODEL, WHOLE, X)


def test_an_optimiser_of_a_recipe_may_have_a_part_of_the_tree():
    labels = {"body": "lora", "head": "frozen", "norm": "frozen"}
    parts = {"lora": optax.adam(0.1), "frozen": aj.freeze_base(SGD, RECIPE)}
    tx = optax.multi_transform(parts, labels)
    updates, _ = tx.update(WHOLE, tx.init(WHOLE), WHOLE)
    assert not updates["norm"]["scale"].any() and updates["head"]["kernel"].any()


def test_files_in_another_order(tmp_path):
    state = state_of(collections=STATS)
    with raises(TypeError, "TrainState", "save_adapter(directory"):
        aj.save_adapter(state, tmp_path / "a")
    with raises(TypeError, "Normed", "load_adapter(directory, model, params"):
        aj.load_adapter(NET, PARAMS, tmp_path / "a", X)
    with raises(TypeError, "dict", "module"):
        aj.load_adapter(tmp_path / "a", PARAMS, NET, X)
    with raises(aj.UserError, "drop/rngs", "aj.partition(params, recipe)"):
        aj.save_adapter(tmp_path / "a", nnx.state(adapted()), aj.LoRA("weight", 2))
    with Checkpoints(tmp_path / "saved") as checkpoints:
        with raises(aj.UserError, "AdaptedNormed", "TrainState"):
            checkpoints.save(1, MODEL)
        with raises(aj.UserError, "AdaptedNormed", "TrainState"):
            checkpoints.restore(MODEL)


def test_adapters_in_a_bank_and_several_states():
    model = adapted()
    with raises(TypeError, "AdaptedAttends", "aj.read_adapter", "recipe_of") as caught:
        aj.Bank(model).put("a", model)
    assert "Array" not in str(caught.value)
    with raises(aj.UserError, "[a, b]"):
        aj.stack_states(state_of())


def test_rows_come_from_a_bank():
    with raises(aj.UserError, "adapters=['a', None]", "bank.rows([...])"):
        MODEL.apply({"params": WHOLE, **STATS}, X, adapters=["a", None])


def test_slices_of_a_method_that_has_none():
    with raises(aj.UserError, "slices=((0, 2),)", "slices=()"):
        aj.DoRA("body", rank=2, slices=((0, 2),))


def test_a_mesh_is_made():
    with raises(aj.ShardingError, "aj.make_mesh('data=-1')"):
        aj.shard(adapted(), "data=-1")
    with raises(aj.ShardingError, "mesh='data'", "aj.make_mesh('data=-1')"):
        aj.shard(adapted(), "data")


def test_a_message_is_one_line():
    with raises(aj.UserError, "tx=array([[0., 0.], [0., 0.], [0., 0.]])") as caught:
        aj.TrainState.create(MODEL, WHOLE, tx=np.zeros((3, 2)), key=KEY)
    assert "\n" not in str(caught.value)


def test_a_banks_model_is_told_which_adapters():
    bank = aj.Bank(MODEL, WHOLE, capacity=1)
    with raises(aj.UserError, "Normed", "adapters=bank.rows([...])"):
        bank.model.apply({"params": bank.params, **STATS}, X)
    bank = aj.Bank(adapted(), capacity=1)
    with raises(aj.UserError, "Attends", "adapters=bank.rows([...])"):
        bank.model(X)


def test_a_banks_model_has_the_functions_without_parameters():
    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="body")(x)

        @nn.nowrap
        def empty_cache(self, rows):
            return jnp.zeros((rows, 4))

    model = aj.adapt(Counts(), aj.LoRA("body", 2))
    params = aj.init_adapters(model, Counts().init(KEY, X)["params"], KEY, X)
    assert aj.Bank(model, params).model.empty_cache(3).shape == (3, 4)


def test_patterns_in_the_place_of_a_size():
    with raises(aj.UserError, "rank='**/qkv'", "targets='**/qkv'"):
        aj.lora("**/qkv")
    with raises(aj.UserError, "bottleneck_dim=('**/down',)", "targets=('**/down',)"):
        aj.houlsby(("**/down",))


def test_random_streams_among_the_inputs_of_suggest():
    with raises(aj.UserError, "Attends", "unexpected keyword argument 'rngs'"):
        aj.suggest(own(), X, rngs=nnx.Rngs(0))


def test_weights_that_stay_in_float_are_named():
    with pytest.warns(aj.AdapterWarning, match=r"Both .* weight; .*aj.quantize\(model, \*inputs"):
        quantized = aj.quantize(Both())
    assert type(quantized.weight) is nnx.Param
    assert type(aj.quantize(Both(), X).weight) is aj.nnx.QuantizedParam
    model = aj.adapt(Both(), aj.LoRA("layer", 2), rngs=nnx.Rngs(0))
    with pytest.warns(aj.AdapterWarning, match="quantize: Both "):
        aj.quantize(model)
    whole = Both()
    whole.weight = nnx.Param(jnp.ones((4, 4), jnp.int32))  # a table of whole numbers
    aj.quantize(whole)


def test_vectors_of_scanned_layers_are_no_weights():
    class Scaled(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(4, 4, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(4))

    class Stack(nnx.Module):
        def __init__(self, own):
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Scaled))(nnx.Rngs(0))
            self.table = nnx.Param(jnp.ones((4, 4))) if own else None

    assert type(aj.quantize(Stack(False)).layers.layer.kernel) is aj.nnx.QuantizedParam
    with pytest.warns(aj.AdapterWarning, match="stay in float: table;"):
        aj.quantize(Stack(True))


def test_a_quantised_model_prints_its_shapes():
    text = repr(aj.quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(0))))
    assert "QuantizedParam(" in text and "shape=(4, 3)" in text and "int8" in text


def test_targets_without_one_weight_have_every_adapter():
    """A pattern that leaves out a weight leaves out its module, and no adapter is missing there."""
    model = aj.adapt(NET, aj.LoRA(("{body,head}", "!head/kernel"), rank=2))
    params = aj.init_adapters(model, PARAMS, KEY, X)
    assert "lora" not in params["head"]
    aj.TrainState.create(model, params, tx=SGD, key=KEY, collections=STATS)


def test_a_base_of_other_shapes():
    assert "shapes of its parameters" in aj.base_identity(PARAMS).differences(aj.base_identity({}))


def test_a_state_where_a_model_is_expected():
    with raises(TypeError, "audit: got a TrainState", "aj.audit(model, state.params)"):
        aj.audit(state_of(collections=STATS))
    state = aj.TrainState.create(adapted(), tx=SGD, key=KEY)
    for call in (aj.audit, aj.merge, aj.unmerge):
        with raises(TypeError, "TrainState", f"aj.{call.__name__}(state.model)"):
            call(state)


@pytest.mark.parametrize("head", [True, ["classifier"], ("a", "b")])
def test_a_head_is_one_path(head):
    with raises(aj.UserError, "head=", "head='head'", "aj.Unfreeze"):
        aj.lora(4, head=head)


def with_targets(targets):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, name="attention")(x)

    x = jnp.ones((1, 3, 4))
    params = Block().init(KEY, x)["params"]
    aj.init_adapters(aj.adapt(Block(), aj.LoRA(targets, 2)), params, KEY, x)


@pytest.mark.parametrize(
    ("targets", "ours"),
    [
        (["q_proj", "v_proj"], "'**/query' and '**/value'"),
        ("**/{q_proj,v_proj}", "'**/{query,value}'"),
        ("encoder.self_attn.q_proj", "'**/query'"),
        ("query,value", "'**/{query,value}'"),
        (["query", "value"], "'**/query' and '**/value'"),
    ],
)
def test_targets_by_the_names_of_transformers(targets, ours):
    with raises(aj.TargetError, f"write the targets {ours}") as caught:
        with_targets(targets)
    assert "Nearest" not in str(caught.value)
    with raises(aj.TargetError, "aj.suggest"):
        with_targets("**/gate_proj")


@pytest.mark.parametrize(
    ("targets", "advice"),
    [
        (["**/key", "v_proj"], "target 'v_proj' matches nothing; write '**/value'"),
        (["**/key", "q_proj", "v_proj"], "target 'v_proj' matches nothing; write '**/value'"),
        (["attention/key", "attention/v_proj"], "nothing; write 'attention/value'"),
        (["q_proj", "lm_head"], "target 'q_proj' matches nothing; write '**/query'"),
    ],
)
def test_one_name_of_transformers_beside_other_targets(targets, advice):
    with raises(aj.TargetError, advice) as caught:
        with_targets(targets)
    lines = str(caught.value).split("\n")
    assert not any("Nearest" in line for line in lines if advice in line)
    assert any("'lm_head' matches nothing. Nearest" in x for x in lines) == ("lm_head" in targets)


@pytest.mark.parametrize(
    ("targets", "shown", "not_shown"),
    [
        (["key", "classifier"], "classifier (", "write"),  # is there, and cannot be adapted
        (["key", "encoder.key"], "Nearest paths: key", "write"),  # no name of another library
        (["key", "q_proj", "!query"], "Nearest paths", "write 'query'"),  # is excluded
        (["key", "k_proj"], "Nearest paths", "write 'key'"),  # is a target already
        (["key", "q_proj"], "'q_proj' matches nothing; write 'query'", "Nearest"),
        (["key", *(f"v_proj{i}" for i in range(40))], "other targets fail as well", "write"),
    ],
)
def test_what_is_no_name_of_another_library_beside_other_targets(targets, shown, not_shown):
    class Own(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((2, 2)))

    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    base = nnx.Dict(key=layer, query=nnx.clone(layer), head=nnx.clone(layer), classifier=Own())
    with raises(aj.TargetError, shown) as caught:
        aj.adapt(base, aj.LoRA(targets, 2), rngs=nnx.Rngs(0))
    assert not_shown not in str(caught.value)


def test_embeddings_by_the_name_of_transformers():
    base = nnx.Dict(embeddings=nnx.Embed(4, 2, rngs=nnx.Rngs(0)))
    with raises(aj.TargetError, "write the targets 'embeddings'"):
        aj.adapt(base, aj.LoRA("embed_tokens", 2), rngs=nnx.Rngs(0))


def test_the_configuration_of_an_adapter_is_no_recipe():
    whole = {"format": 1, "recipe": {"methods": []}}
    with raises(aj.UserError, '"methods"', 'under its key "recipe"'):
        aj.Recipe.from_json(whole)


@pytest.mark.parametrize("target", ["**/{q_proj,down_proj}", "q_proj,down_proj"])
def test_proposed_targets_are_all_in_the_model(target):
    base = nn.MultiHeadDotProductAttention(2)  # it has a query, and nothing like down
    params = base.init(KEY, jnp.ones((1, 3, 4)))["params"]
    with raises(aj.TargetError, "Nearest paths", "aj.suggest") as caught:
        aj.init_adapters(aj.adapt(base, aj.LoRA(target, 2)), params, KEY, jnp.ones((1, 3, 4)))
    assert "write the targets" not in str(caught.value)


@pytest.mark.parametrize(
    "targets",
    ["encodr/**", "layer_9/*", "layers_9/query", "{a/q_proj,b/v_proj}", "model.layers.1.q_proj"],
)
def test_no_wider_target_is_proposed(targets):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="value")(nn.Dense(4, name="query")(x))

    model = nn.Sequential([Block(name="layer_0"), Block(name="layer_1")])
    params = model.init(KEY, X)["params"]
    with raises(aj.TargetError, "Nearest paths") as caught:
        aj.init_adapters(aj.adapt(model, aj.LoRA(targets, 2)), params, KEY, X)
    assert "write the targets" not in str(caught.value)
