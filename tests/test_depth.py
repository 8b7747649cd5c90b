"""Scanned layers beside unrolled ones: the same numbers from the same files, both ways."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, AdapterMismatchError, AdapterRecipeError
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import FAMILIES, bert, decoder
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.parts import blocks
from adapters_jax.finetune.tensors import Stored, from_tensors, to_tensors
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten, unflatten

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {name: FAMILIES[name].names for name in ("bert", "gpt2", "llama")}
DECODERS = ("gpt2", "llama")
RECIPE = aj.Recipe(
    aj.LoRA("**/attention/{query,value}", 2, alpha=6.0),
    aj.LlamaAdapter("**/attention", 3),
    aj.Bottleneck("**/mlp/output", 4),
    aj.Bottleneck("**/mlp_sum", 3, placement="parallel"),
    aj.Unfreeze("**/*norm/scale"),
)


def inputs_of(name):
    with np.load(FIXTURES / name / "expected.npz") as file:
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        found = {name: file[name] for name in names if name in file}
    if name in DECODERS:
        found["positions"] = found.pop("position_ids")
    return found


@cache
def loaded(name, scan, remat=False):
    """A model and its parameters; those of NNX are its state."""
    if name in DECODERS:
        model = decoder.load_decoder(FIXTURES / name, scan=scan, remat=remat)[1]
        return model, nnx.state(model, nnx.Param)
    config, params = bert.load_bert(FIXTURES / name, scan=scan)
    return bert.Bert(config, scan=scan, remat=remat), params


_run = nnx.jit(lambda model, inputs: model(**inputs))


def logits(name, model, params=None):
    """Of the tokens that are not padding."""
    inputs = inputs_of(name)
    if isinstance(model, nnx.Module):
        found = _run(model, inputs)
    else:
        found = jax.jit(model.apply)({"params": params}, **inputs)
    return np.asarray(found)[inputs["attention_mask"] == 1]


def adapted(name, scan, recipe=RECIPE, trained=None, remat=False):
    """A model with adapters that have these values, or noise, as (model, params, trained)."""
    model, params = loaded(name, scan, remat)
    if name in DECODERS:
        ids = inputs_of(name)["input_ids"]
        grown = aj.adapt(model, recipe, rngs=nnx.Rngs(1), example_inputs=(ids,))
        state = nnx.state(grown, AdapterParam)
        trained = drawn(state) if trained is None else trained
        nnx.update(grown, trained)
        return grown, None, trained
    grown = aj.adapt(model, recipe)
    ids = inputs_of(name)["input_ids"]
    own, base = aj.partition(aj.init_adapters(grown, params, jax.random.key(1), ids), recipe)
    trained = drawn(own) if trained is None else trained
    return grown, aj.merge_trees(trained, base), trained


def drawn(tree):
    return jax.tree.map(lambda x: jnp.asarray(0.3 * x), drawn_like(tree, 7))


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.witness("bert")
@pytest.mark.parametrize("name", NAMES)
def test_one_checkpoint_gives_the_same_logits(name):
    (model, params), (scanned, stacked) = loaded(name, False), loaded(name, True)
    expected = logits(name, model, params)
    np.testing.assert_allclose(logits(name, scanned, stacked), expected, atol=1e-6)
    equal(aj.stack_layers(params, NAMES[name]), stacked)
    equal(aj.unstack_layers(stacked, NAMES[name]), params)
    assert any(path.startswith("layers/attention/query") for path in flatten(stacked))


@pytest.mark.slow
def test_every_layer_begins_by_itself():
    tiny = bert.BertConfig(11, 4, 2, 1, 8, max_position_embeddings=4)
    init = jax.jit(bert.Bert(tiny, scan=True).init)
    params = init(jax.random.key(0), jnp.ones((1, 2), int))["params"]
    llama = nnx.jit(lambda: Decoder(LLAMA, scan=True, rngs=nnx.Rngs(0)))()
    for kernel in (
        params["layers"]["attention"]["query"]["kernel"],
        llama.layers.attention.query.kernel[...],
    ):
        assert not np.array_equal(kernel[0], kernel[1])
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.3)


@pytest.mark.slow
@pytest.mark.witness("llama")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters_on_scanned_layers_are_those_on_unrolled_ones(name):
    names = NAMES[name]
    scanned, stacked, trained = adapted(name, True)
    assert {x.shape[0] for p, x in flatten(trained).items() if p.startswith("layers/")} == {2}
    recipe, rows = aj.unstack_layers((RECIPE, trained), names)
    assert recipe == RECIPE  # its patterns mean both
    own = aj.unstack_layers(trained, names)
    model, params, _ = adapted(name, False, recipe, own)
    expected = logits(name, model, params)
    np.testing.assert_allclose(logits(name, scanned, stacked), expected, atol=1e-6, rtol=1e-6)
    assert np.abs(expected - logits(name, *loaded(name, False))).max() > 0.1
    assert flatten(rows).keys() == flatten(own).keys()
    equal(aj.stack_layers(own, names), trained)
    counts = [aj.audit(model, params), aj.audit(scanned, stacked)]
    for field in ("adapter_parameters", "trainable_parameters", "optimizer_bytes", "frozen_bytes"):
        assert getattr(counts[0], field) == getattr(counts[1], field) > 0


@pytest.mark.weekly
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_steps_and_merging_are_those_of_unrolled_layers(name):
    recipe = aj.lora(2, alpha=6.0)
    scanned, stacked, trained = adapted(name, True, recipe, remat="dots_saveable")
    model, params, _ = adapted(name, False, recipe, aj.unstack_layers(trained, NAMES[name]))
    inputs = inputs_of(name)

    def loss(subject, batch, key):
        if name in DECODERS:
            return (subject(**batch) ** 2).mean()
        return (apply({"params": subject}, **batch) ** 2).mean()

    after = []
    for one, tree in ((model, params), (scanned, stacked)):
        apply = getattr(one, "apply", None)
        state = aj.TrainState.create(one, tree, tx=optax.sgd(0.1), key=jax.random.key(0))
        after.append(aj.make_train_step(loss)(state, inputs)[0].trained)
    moved = aj.stack_layers(after[0], NAMES[name])
    check = partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5)
    jax.tree.map(check, moved, after[1])
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), moved, trained)
    assert min(jax.tree.leaves(apart)) > 1e-4

    ids = inputs["input_ids"]
    if name in DECODERS:
        one, two = (nnx.state(aj.merge(m), nnx.Param) for m in (model, scanned))
    else:
        one, two = aj.merge(model, params, ids), aj.merge(scanned, stacked, ids)
    jax.tree.map(check, aj.stack_layers(one, NAMES[name]), two)
    assert np.abs(two["layers"]["attention"]["query"]["kernel"][...]).max() > 0.1


@pytest.mark.slow
def test_every_layer_drops_by_itself():
    config = bert.BertConfig(20, 8, 3, 2, 12, hidden_dropout_prob=0.5, max_position_embeddings=10)
    model = bert.Bert(config, scan=True)
    ids = jnp.arange(12).reshape(2, 6)
    params = drawn_like(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    _, seen = model.apply(
        {"params": params},
        ids,
        deterministic=False,
        rngs={"dropout": jax.random.key(1)},
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    (out,) = seen["intermediates"]["layers"]["attention"]["output"]["Dropout_0"]["__call__"]
    dropped = np.asarray(out == 0)
    assert dropped.shape == (3, 2, 6, 8)
    assert 0.3 < dropped.mean() < 0.7
    assert all((dropped[i] != dropped[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))


def products(name, scan, remat):
    """How many matrix products a gradient takes."""
    model, params = loaded(name, scan)
    ids = jnp.ones((1, 4), int)
    if name in DECODERS:
        new = lambda: Decoder(model.config, scan=scan, remat=remat, rngs=nnx.Rngs(0))  # noqa: E731
        graphdef = nnx.split(nnx.eval_shape(new))[0]
        run = lambda params: nnx.merge(graphdef, params, copy=True)(ids)  # noqa: E731
    else:
        run = lambda params: model.clone(remat=remat).apply({"params": params}, ids)  # noqa: E731
    gradient = jax.grad(lambda params: (run(params) ** 2).sum())
    return str(jax.make_jaxpr(gradient)(params)).count("dot_general")


@pytest.mark.slow
@pytest.mark.witness("llama-True")
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_policies_choose_what_is_computed_again(name, scan):
    nothing, without_batch, dots = (products(name, scan, x) for x in (True, *blocks.POLICIES[1:3]))
    assert nothing > without_batch > dots


def test_an_unknown_policy_is_refused():
    with raises(aj.UserError, "remat='dots'", "'dots_saveable'"):
        Decoder(DecoderConfig(num_hidden_layers=1), remat="dots", rngs=nnx.Rngs(0))
    with raises(aj.UserError, "remat='dots'", "'dots_saveable'"):
        jax.eval_shape(
            bert.Bert(bert.BERT_BASE, remat="dots").init, jax.random.key(0), jnp.ones((1, 2), int)
        )


@pytest.mark.slow
def test_generation_with_a_stacked_cache():
    prompts, mask = jnp.array([[9, 9, 3, 4], [5, 6, 7, 8]]), jnp.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    recipe = aj.Recipe(RECIPE.methods[:2])
    scanned, _, trained = adapted("llama", True, recipe)
    model, _, _ = adapted("llama", False, recipe, aj.unstack_layers(trained, decoder.NAMES))
    expected = generate(model, prompts, mask, max_new_tokens=6)
    got = generate(scanned, prompts, mask, max_new_tokens=6)
    assert got.ids.tolist() == expected.ids.tolist()
    assert len(set(expected.ids.ravel().tolist())) > 4


@pytest.mark.slow
def test_an_adapter_file_goes_onto_the_other_form_in_one_call(tmp_path):
    names, ids = bert.NAMES, inputs_of("bert")["input_ids"]
    scanned, stacked, trained = adapted("bert", True)
    state = aj.TrainState.create(scanned, stacked, tx=optax.sgd(0.1), key=jax.random.key(0))
    saved = aj.save_adapter(tmp_path / "scanned", state)
    base, params = loaded("bert", False)
    model, whole = aj.load_adapter(saved, base, params, ids, names=names)
    expected = logits("bert", scanned, stacked)
    np.testing.assert_allclose(logits("bert", model, whole), expected, atol=1e-6, rtol=1e-6)
    again, same = aj.load_adapter(saved, *loaded("bert", True), ids, names=names)
    assert again == scanned
    equal(aj.partition(same, RECIPE)[0], trained)

    with raises(aj.OtherBaseError, "names=NAMES"):
        aj.load_adapter(saved, base, params, ids)
    anonymous = aj.save_adapter(tmp_path / "anonymous", trained, RECIPE)
    with raises(AdapterMismatchError, "names=NAMES"):
        aj.load_adapter(anonymous, base, params, ids)
    other = {**params, "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}
    with raises(aj.OtherBaseError, "tree_sha256"):
        aj.load_adapter(saved, base, other, ids, names=names)


@pytest.mark.slow
def test_a_file_of_unrolled_layers_goes_onto_scanned_ones(tmp_path):
    names, ids = decoder.NAMES, inputs_of("llama")["input_ids"]
    model, _, trained = adapted("llama", False)
    state = aj.TrainState.create(model, tx=optax.sgd(0.1), key=jax.random.key(0))
    saved = aj.save_adapter(tmp_path / "unrolled", state)
    scanned = aj.load_adapter(saved, loaded("llama", True)[0], None, ids, names=names)
    expected = logits("llama", model)
    np.testing.assert_allclose(logits("llama", scanned), expected, atol=1e-6, rtol=1e-6)
    recipe, _ = aj.stack_layers(aj.read_adapter(saved), names)
    assert recipe == RECIPE

    some = aj.lora(2, targets="layers/1/attention/query")
    model, _, trained = adapted("llama", False, some)
    saved = aj.save_adapter(tmp_path / "some", trained, some)
    with raises(AdapterMismatchError, "query/lora/a is in layers 1,"):
        aj.load_adapter(saved, loaded("llama", True)[0], None, ids, names=names)
    uneven = aj.LoRA("**/query", 2, alpha_pattern={"layers/0/**": 3.0})
    model, _, trained = adapted("llama", False, uneven)
    saved = aj.save_adapter(tmp_path / "uneven", trained, uneven)
    with raises(AdapterRecipeError, "layers/attention/query", "alpha=3.0", None):
        aj.load_adapter(saved, loaded("llama", True)[0], None, ids, names=names)


STACK = aj.Stack("layer_{}", "layers")


def lora_tree(*modules, rank=2):
    leaves = {"a": np.ones((4, rank)), "b": np.zeros((rank, 4))}
    return unflatten(
        {f"{module}/lora/{name}": x for module in modules for name, x in leaves.items()}
    )


def test_patterns_of_one_form_become_those_of_the_other():
    modules = ["bert/layer_0/query", "bert/layer_1/query", "head"]
    recipe = aj.Recipe(
        aj.LoRA(tuple(modules), 2, rank_pattern={"bert/layer_{0,1}/query": 2, "head": 2}),
    )
    stacked, tree = aj.stack_layers((recipe, lora_tree(*modules)), STACK)
    assert set(stacked.methods[0].targets) == {"bert/layers/query", "head"}
    assert flatten(tree)["bert/layers/query/lora/a"].shape == (2, 4, 2)
    back, _ = aj.unstack_layers((stacked, tree), STACK)
    assert set(back.methods[0].targets) == set(modules)
    # Methods that differ in nothing but their layer are one.
    each = aj.Recipe(aj.LoRA("layer_0/q", 2), aj.LoRA("layer_1/q", 2))
    one, _ = aj.stack_layers((each, lora_tree("layer_0/q", "layer_1/q")), STACK)
    assert one == aj.Recipe(aj.LoRA("layers/q", 2))
    # Excluded paths are left out of the targets.
    less = aj.LoRA(("**/q", "!layers/b/**"), 2)
    recipe, _ = aj.unstack_layers((less, {"layers": {"a": {"q": {"lora": STACKED}}}}), STACK)
    assert recipe.methods[0].targets == ("layer_0/a/q", "layer_1/a/q")
    ranks = aj.LoRA("**/{q,k}", 4, rank_pattern={"layers/q": 2}, alpha_pattern={"*/k": 8.0})
    tree = {"layers": {"q": {"lora": STACKED}, "k": {"lora": STACKED}}}
    (method,) = aj.unstack_layers((ranks, tree), STACK)[0]
    assert method.targets == ("**/{q,k}",)
    assert [method.rank_at(f"layer_{i}/{name}") for i in (0, 1) for name in "qk"] == [2, 4, 2, 4]
    assert [method.scale_at(f"layer_1/{name}") for name in "qk"] == [1.0, 2.0]
    free = aj.Unfreeze("layers/norm/*")
    tree = {"layers": {"norm": {"scale": np.ones((2, 3))}}}
    recipe, _ = aj.unstack_layers((free, tree), STACK)
    assert recipe == aj.Recipe(aj.Unfreeze(("layer_0/norm/scale", "layer_1/norm/scale")))


def test_patterns_change_only_where_they_no_longer_match():
    tree = {"layers": {"q": {"lora": STACKED}, "k": {"lora": STACKED}}, "head": {"lora": ALONE}}
    ranks = {"{layers/q,head}": 2}
    recipe = aj.LoRA("**/{q,k,head}", 4, rank_pattern=ranks, alpha_pattern={"**/k": 8.0})
    (method,) = aj.unstack_layers((recipe, tree), STACK)[0]
    assert method.targets == ("**/{q,k,head}",)
    assert dict(method.alpha_pattern) == {"**/k": 8.0}
    assert dict(method.rank_pattern) == {"layer_0/q": 2, "layer_1/q": 2, "head": 2}
    outside = aj.LoRA(("head", "tail"), 2)
    recipe, same = aj.unstack_layers((outside, {"head": {"lora": ALONE}}), STACK)
    assert recipe == aj.Recipe(aj.LoRA("head", 2)) and same == {"head": {"lora": ALONE}}


ALONE = {"a": np.ones((4, 2)), "b": np.ones((2, 4))}
STACKED = {"a": np.ones((2, 4, 2)), "b": np.ones((2, 2, 4))}


@pytest.mark.parametrize(
    ("recipe", "data"),
    [
        ((aj.LoRA("*_0/q", 2, dropout=0.1), aj.LoRA("*_1/q", 2)), "dropout=0.1 0.0"),
        ((aj.LoRA("*/q", 2, alpha_pattern={"layer_1/*": 4}),), "alpha=None 4"),
        ((aj.LoRA("*_0/q", 2, alpha=4), aj.LoRA("*_1/q", 2)), "alpha=4 None"),
    ],
)
def test_layers_with_different_settings_in_the_recipe(recipe, data):
    tree = lora_tree("layer_0/q", "layer_1/q")
    with raises(aj.RecipeError, "layers/q ", *data.split(), "scan=False"):
        aj.stack_layers((aj.Recipe(*recipe), tree), STACK)


def test_of_many_problems_the_first_six_are_named():
    tree = {f"layer_{i}": {f"{j}": np.ones(1 + i) for j in range(8)} for i in range(2)}
    with pytest.raises(aj.MismatchError) as error:
        aj.stack_layers(tree, STACK)
    assert "layers/5 " in str(error.value) and "layers/6 " not in str(error.value)
    assert "and 2 more" in str(error.value)


def test_trees_that_cannot_be_stacked_or_unstacked():
    uneven = aj.merge_trees(lora_tree("layer_0/q"), lora_tree("layer_1/q", rank=3))
    with raises(
        aj.MismatchError, "layers/q/lora/a", "float64[4, 2]", "layer 0", "float64[4, 3]", "layer 1"
    ):
        aj.stack_layers(uneven, STACK)
    for tree, data in (
        (lora_tree("layer_1/q"), ("q/lora/a is in layers 1,", "0 to 1")),
        ({"layers": {"x": np.ones(2)}}, ("layers/x",)),
    ):
        with raises(aj.MismatchError, *data):
            aj.stack_layers(tree, STACK)
    with raises(aj.MismatchError, "0 to 2"):
        aj.stack_layers(lora_tree("layer_0/q", "layer_1/q"), STACK, length=3)
    for tree, data in (
        ({"layers": {"x": np.ones(2), "y": np.ones(3)}}, ("layers/x", "(2,)")),
        ({"layers": {"x": np.ones(())}}, ("layers/x",)),
        ({"layer_0": {"x": np.ones(2)}}, ("layer_0/x",)),
    ):
        with raises(aj.MismatchError, *data):
            aj.unstack_layers(tree, STACK)
    with raises(aj.UserError, "NAMES"):
        aj.stack_layers({}, {"q_proj": "query"})
    head = {"head": {"bias": np.ones(2)}}
    equal(aj.stack_layers(head, STACK), head)


@pytest.mark.slow
@pytest.mark.witness("bert")
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_state_of_an_optimiser_goes_along(name):
    _, params, trained = adapted(name, True, aj.lora(2))
    for tx in (optax.adamw(1e-3), aj.freeze_base(optax.adam(1e-3), aj.lora(2))):
        tree = trained if params is None else params
        state = jax.tree.map(lambda x: x + 1, tx.init(tree))
        other = aj.unstack_layers(state, NAMES[name])
        expected = tx.init(aj.unstack_layers(tree, NAMES[name]))
        assert jax.tree.structure(other) == jax.tree.structure(expected)
        assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, expected)
        equal(aj.stack_layers(other, NAMES[name]), state)


@pytest.mark.slow
def test_a_quantised_base_goes_along():
    pytest.importorskip("qwix")
    model, params = loaded("bert", True)
    base = aj.adapt(model, aj.Recipe())
    packed = aj.quantize(base, params, inputs_of("bert")["input_ids"], dtype="int8")
    rows = aj.unstack_layers(packed, bert.NAMES)
    equal(aj.stack_layers(rows, bert.NAMES), packed)
    kernel = rows["layer_1"]["mlp"]["intermediate"]["kernel"]
    assert kernel.shape == (32, 48) and kernel.array.qvalue.dtype == jnp.int8
    stacked = packed["layers"]["mlp"]["intermediate"]["kernel"].unbox()
    np.testing.assert_array_equal(kernel.unbox(), stacked[1])


FILES = {
    "peft": (load_peft, save_peft, ("bert_dora", "bert_embedding", "bert_head", "llama_embedding")),
    "adapterhub": (load_adapterhub, save_adapterhub, ("bert_lora", "gpt2_double", "llama_par")),
}


@pytest.mark.parametrize("fixture", [f"{kind}/{name}" for kind in FILES for name in FILES[kind][2]])
def test_files_of_other_libraries_on_scanned_layers(fixture, tmp_path):
    """What the unrolled model reads is read as its stack, and both are written as one file."""
    kind, name = fixture.split("/")
    load, save, _ = FILES[kind]
    names, unrolled, scanned = base_of(name.split("_")[0])
    rows, stacked = (load(FIXTURES / fixture, names, base) for base in (unrolled, scanned))
    recipe, tree = aj.stack_layers(rows, names, length=2)
    assert stacked[0] == recipe
    equal(stacked[1], tree)
    one = save(tmp_path / "unrolled", *rows, names, unrolled)
    two = save(tmp_path / "scanned", *stacked, names, scanned)
    assert len(sorted(one.iterdir())) >= 2
    for file in one.iterdir():
        if file.suffix == ".json":
            assert file.read_text() == (two / file.name).read_text()
        else:
            equal(*map(safetensors.numpy.load_file, (file, two / file.name)))


@pytest.mark.parametrize(
    ("fixture", "data"),
    [
        ("peft/gpt2", ("attention/key/lora/a is in layers 1,", "0 to 1")),
        ("peft/llama_rslora", ("mlp/up/lora/a", "float32[32, 4]", "float32[32, 3]")),
        ("adapterhub/bert_seq", ("mlp_norm/adapter/down/bias is in layers 1,", "0 to 1")),
        ("adapterhub/llama_lora", ("query/lora/a is in layers 1,", "0 to 1")),
    ],
)
def test_files_whose_layers_are_not_alike_are_for_unrolled_models(fixture, data):
    kind, name = fixture.split("/")
    names, _, scanned = base_of(name.split("_")[0])
    with raises(AdapterFileError, *data, "unrolled"):
        FILES[kind][0](FIXTURES / fixture, names, scanned)


def base_of(name):
    """The names of a model, and its parameters unrolled and scanned."""
    if name != "bert":
        return NAMES[name], loaded(name, False)[1], loaded(name, True)[1]
    ids = jnp.ones((1, 4), jnp.int32)
    params = [
        drawn_like(
            jax.eval_shape(
                bert.BertClassifier(
                    bert.BertConfig.from_json(FIXTURES / "bert" / "config.json"),
                    3,
                    "pooler",
                    scan=scan,
                ).init,
                jax.random.key(0),
                ids,
            )["params"]
        )
        for scan in (False, True)
    ]
    stacked = aj.stack_layers(params[0], bert.FAMILY.classifier.names)
    assert jax.tree.map(jnp.shape, params[1]) == jax.tree.map(jnp.shape, stacked)
    return bert.FAMILY.classifier.names, params[0], stacked


def test_layers_by_number_are_for_unrolled_models():
    scanned = nnx.eval_shape(lambda: Decoder(LLAMA, scan=True, rngs=nnx.Rngs(0)))
    every = aj.llama_adapter()
    assert aj.audit(aj.adapt(scanned, every, rngs=nnx.Rngs(0))).adapter_parameters == 2 * (80 + 2)
    assert aj.audit(aj.adapt(scanned, aj.prefix_tuning(5), rngs=nnx.Rngs(0))).entries[0].path == (
        "layers/attention"
    )
    for recipe in (
        aj.llama_adapter(last=1, num_layers=2),
        aj.last_layers(1, 2, layer="layers/{}"),
        aj.Recipe(aj.LoRA("layers/0/attention/query")),
        aj.Recipe(aj.LoRA("layers/{0,1}/attention/{query,value}")),
    ):
        with raises(aj.TargetError, "scan=False"):
            aj.adapt(scanned, recipe, rngs=nnx.Rngs(0))
    with raises(aj.TargetError, "'layers/0/attention/qury'") as error:
        aj.adapt(scanned, aj.LoRA("layers/0/attention/qury"), rngs=nnx.Rngs(0))
    assert "scan=False" not in str(error.value)


LLAMA = DecoderConfig(11, 8, 12, 2, 2)


def test_a_checkpoint_is_read_layer_by_layer():
    mesh = aj.make_mesh("data=-1")
    model = nnx.eval_shape(lambda: Decoder(LLAMA, scan=True, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "data"))
    plain = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.bfloat16, sharding=where if len(x.shape) == 3 else plain
        ),
        shapes,
    )
    tree = drawn_like(shapes)
    arrays = to_tensors(tree, decoder.NAMES)
    assert arrays["model.layers.1.mlp.down_proj.weight"].shape == (8, 12)
    read = []

    def stored(name):
        def fetch():
            read.append(name)
            return arrays[name]

        return Stored(arrays[name].shape, arrays[name].dtype, fetch)

    got = from_tensors({name: stored(name) for name in arrays}, decoder.NAMES, like)
    jax.tree.map(
        lambda x, y, z: np.testing.assert_array_equal(x, y.astype(z.dtype)), got, tree, like
    )
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, got, like)))
    assert sorted(read) == sorted(arrays)
    del arrays["model.layers.1.mlp.up_proj.weight"]
    with raises(aj.MismatchError, "1 missing: layers/1/mlp/up/kernel (layers.1.mlp"):
        from_tensors(arrays, decoder.NAMES, like)
