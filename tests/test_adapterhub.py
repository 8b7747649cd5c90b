"""Adapters of AdapterHub: its logits and tensors, both ways, and every misfit named."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers.arrays import read_arrays
from test_peft import inputs_of

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError
from adapters_jax.interop.adapterhub import (
    CONFIG,
    HEAD_CONFIG,
    HEAD_TENSORS,
    TENSORS,
    load_adapterhub,
    save_adapterhub,
)
from adapters_jax.models import bert, gpt2, llama
from adapters_jax.models.bert import classifier
from adapters_jax.models.llama import Llama
from adapters_jax.trees import flatten, unflatten

BASES = Path(__file__).parent / "fixtures"
FIXTURES = BASES / "adapterhub"
HAVE = sorted(path.name for path in FIXTURES.glob("*"))


def pooling_of(fixture):
    """What the head of a fixture reads."""
    return "cls" if fixture in ("bert_gelu", "bert_legacy") else "pooler"


@cache
def base_of(base, pooling="pooler"):
    """A model: its table, itself, its parameters and its inputs."""
    if base in ("bert", "roberta"):
        own = base == "bert" and pooling == "pooler"
        config, params = bert.load_bert(BASES / base, pooler=own)
        head = {"kernel": np.zeros((32, 3), np.float32), "bias": np.zeros(3, np.float32)}
        if base == "bert":
            tensors = read_arrays(BASES / base)
            head = {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]}
        elif pooling == "pooler":
            params["pooler"] = {"dense": {"kernel": jnp.zeros((32, 32)), "bias": jnp.zeros(32)}}
        model = classifier.BertClassifier(config, 3, pooling=pooling)
        return classifier.NAMES, model, {"bert": params, "head": head}, inputs_of(base)
    if base == "gpt2":
        config, params = gpt2.load_gpt2(BASES / "gpt2")
        return gpt2.NAMES, gpt2.GPT2(config), params, inputs_of("gpt2")
    _, model = llama.load_llama(BASES / "llama")
    inputs = inputs_of("llama")
    inputs["positions"] = inputs.pop("position_ids")
    return llama.NAMES, model, model, inputs


def of_fixture(fixture):
    return base_of(fixture.split("_")[0], pooling_of(fixture))


def loaded(fixture, **options):
    names, _, params, _ = of_fixture(fixture)
    return load_adapterhub(
        FIXTURES / fixture, names, params, **{"pooling": pooling_of(fixture)} | options
    )


def logits_of(of, recipe, adapters, tmp_path, by_file=True):
    """Through our own adapter files, in linen and NNX alike, or put together by hand."""
    _, model, params, inputs = of
    if isinstance(model, Llama):
        directory = aj.save_adapter(tmp_path / "ours", adapters, recipe)
        return aj.load_adapter(directory, model, None, *inputs.values())(**inputs)
    adapted = aj.adapt(model, recipe)
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    if by_file:
        directory = aj.save_adapter(tmp_path / "ours", adapters, recipe)
        adapted, whole = aj.load_adapter(directory, model, params, **inputs)
    return adapted.apply({"params": whole}, **inputs)


def plain_logits(of, changed):
    """Those of the base with some of its own parameters changed."""
    _, model, params, inputs = of
    if isinstance(model, Llama):
        return model(**inputs)
    return model.apply({"params": unflatten(flatten(params) | changed)}, **inputs)


def seen(of, logits):
    """Without what padding computes, and of the first eight words."""
    logits = np.asarray(logits)
    return logits[of[3]["attention_mask"] == 1][:, :8] if logits.ndim == 3 else logits


def tensors_of(directory, name=TENSORS):
    return safetensors.numpy.load_file(Path(directory) / name)


def config_of(directory, name=CONFIG):
    return json.loads((Path(directory) / name).read_text())


def equal(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


@pytest.mark.parametrize("fixture", HAVE)
def test_logits_are_those_of_adapterhub(fixture, tmp_path):
    of = of_fixture(fixture)
    recipe, adapters = loaded(fixture)
    by_file = fixture in ("bert_union", "gpt2_par")
    logits = seen(of, logits_of(of, recipe, adapters, tmp_path, by_file))
    expected = seen(of, np.load(FIXTURES / fixture / "logits.npy"))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    head = {path: x for path, x in flatten(adapters).items() if recipe.owner(path) is None}
    assert np.abs(seen(of, plain_logits(of, head)) - expected).max() > 0.05  # the adapter matters


@pytest.mark.parametrize("fixture", HAVE)
def test_an_export_has_the_tensors_of_the_original_and_loads_again(fixture, tmp_path):
    names, _, params, _ = of_fixture(fixture)
    recipe, adapters = loaded(fixture)
    options = {"name": "task", "pooling": pooling_of(fixture)}
    if fixture.startswith("roberta"):
        options["prefix"] = "roberta."
    written = save_adapterhub(tmp_path / "theirs", recipe, adapters, names, params, **options)
    current = "bert_gelu" if fixture == "bert_legacy" else fixture  # of which it is the old form
    equal(tensors_of(written), tensors_of(FIXTURES / current))
    again, leaves = load_adapterhub(written, names, params, pooling=pooling_of(fixture))
    assert set(again) == set(recipe)
    equal(flatten(leaves), flatten(adapters))
    if fixture in ("bert_legacy", "bert_union"):
        return  # written in today's form; in the order of the layers
    idle = {"reduction_factor", "attn_matrices"}  # a default, an order
    idle |= {"original_ln_after", "residual_before_ln"} if fixture == "gpt2_after" else set()
    mine, theirs = config_of(written)["config"], config_of(FIXTURES / fixture)["config"]
    assert {k: v for k, v in mine.items() if k not in idle} == {
        k: theirs.get(k) for k in mine if k not in idle
    }


def test_all_fixtures_are_there():
    assert len(HAVE) == 19


def test_recipes_say_what_the_configurations_say():
    bottleneck, head = aj.Bottleneck, aj.Unfreeze(("head/bias", "head/kernel"))
    pooler = ("bert/pooler/dense/bias", "bert/pooler/dense/kernel")
    assert loaded("bert_double")[0] == aj.Recipe(
        bottleneck(
            ("bert/layer_0/attention/output", "bert/layer_0/mlp/output"),
            reduction_factor=8,
            activation="silu",
        ),
        bottleneck(
            ("bert/layer_1/attention/output", "bert/layer_1/mlp/output"),
            reduction_factor=4,
            activation="silu",
        ),
        aj.Unfreeze((*pooler, "head/bias", "head/kernel")),
    )
    norm = bottleneck(
        "bert/layer_1/mlp_norm", reduction_factor=8, placement="norm", activation="relu"
    )
    assert loaded("bert_seq")[0] == aj.Recipe(norm, head)
    beside = bottleneck(
        ("**/attention_sum", "**/mlp_sum"),
        reduction_factor=8,
        placement="parallel",
        scale=4.0,
        activation="relu",
    )
    assert loaded("llama_par")[0] == aj.Recipe(beside)
    assert loaded("gpt2_lora")[0].attached[0].scale_at("layer_0/attention/query") == 1.5
    assert loaded("bert_legacy")[0].attached[0].activation == "gelu"
    assert loaded("bert_gelu")[0].attached[0].activation == "gelu_exact"
    assert loaded("bert_union", with_head=False)[0].attached[0] == aj.LoRA(
        ("**/query", "**/value"), 2, 3, a_init="uniform"
    )
    assert [type(m).__name__ for m in loaded("bert_union")[0]] == [
        *("LoRA", "Bottleneck", "Bottleneck", "Unfreeze")
    ]


def copied(tmp_path, fixture, change=None, tensors=None, **fields):
    """A fixture with some settings and tensors changed."""
    place = shutil.copytree(FIXTURES / fixture, tmp_path / "copy", dirs_exist_ok=True)
    whole = config_of(place) | fields
    whole["config"] = whole["config"] | (change or {}) if whole["config"] else None
    (place / CONFIG).write_text(json.dumps(whole))
    kept = {k: v for k, v in (tensors_of(place) | (tensors or {})).items() if v is not None}
    safetensors.numpy.save_file(kept, place / TENSORS)
    return place


def loading(place, message, fixture="bert_double", **options):
    names, _, params, _ = of_fixture(fixture)
    with pytest.raises(AdapterFileError, match=message):
        load_adapterhub(place, names, params, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "reft"},
            "architecture='reft', expected lora, union, or null for a bottle",
        ),
        ({"phm_layer": True}, "phm_layer=True is not supported"),
        (
            {"use_gating": True, "inv_adapter": "nice"},
            "inv_adapter='nice' is not .*use_gating=True",
        ),
        ({"some_future_field": 0.5}, "some_future_field=0.5 is not supported"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.1, expected 0.0"),
        ({"dropout": 0.1}, "dropout=0.1, expected 0.0: theirs acts behind the up-projection"),
        ({"cross_adapter": True}, "cross_adapter=True is not supported"),
        ({"scaling": "learned"}, "scaling='learned', expected a number"),
        ({"non_linearity": "mish"}, "non_linearity='mish', expected one of relu, gelu, gelu_new"),
        ({"reduction_factor": 0}, "reduction_factor=0, expected a number above 0"),
        ({"reduction_factor": {"1": 4}}, "reduction_factor has neither layer 0 nor a default"),
        ({"leave_out": ["1"]}, r"leave_out=\['1'\], expected a list of layers' numbers"),
        ({"leave_out": [1]}, "encoder.layer.1.output.adapters has tensors that the configuration"),
        ({"mh_adapter": 1}, "mh_adapter=1, expected True or False"),
        ({"mh_adapter": False}, "layer.0.attention.output.adapters has tensors that the configura"),
        ({"original_ln_after": False}, "original_ln_before=False, original_ln_after=False, resid"),
        (
            {"residual_before_ln": "post_add"},
            "residual_before_ln='post_add', expected True or False",
        ),
        (
            {"original_ln_before": True, "residual_before_ln": False},
            "before_ln=False, is_parallel=",
        ),
        ({"is_parallel": True, "original_ln_after": False}, "is_parallel=True together are not su"),
        ({"ln_after": True, "adapter_residual_before_ln": True}, "ln_after with adapter_residual_"),
        ({"ln_before": True}, r"layer.0.output has .* wanted .*'adapter_norm_before.weight': .32."),
        (
            {"reduction_factor": 4},
            r"layer.0.output has .*'adapter_down.0.weight': .4, 32.*: .8, 32",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, change, message):
    place = copied(tmp_path, "bert_double", change)
    loading(place, message)
    loading(place, "copy cannot be read as it is meant: ")


def test_a_placement_that_is_refused_is_the_only_problem(tmp_path):
    place = copied(tmp_path, "bert_double", {"original_ln_after": False})
    loading(
        place,
        "meant: original_ln_before=False, original_ln_after=False, residual_before_ln=True, "
        "is_parallel=False together are not supported$",
    )


@pytest.mark.parametrize("configs", [None, "text", [3], [{"architecture": "union"}]])
def test_unions_of_what_is_no_configuration(tmp_path, configs):
    place = copied(tmp_path, "bert_double", {"architecture": "union", "configs": configs})
    loading(place, "architecture=.*, expected lora, union, or null for a bottleneck")


def test_invertible_adapters_are_refused_where_they_are_used(tmp_path):
    nice = {"invertible_adapter": {"block_type": "nice"}}
    loading(copied(tmp_path, "bert_double", nice), "invertible_adapter=.*nice.* is not supported")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"composition_mode": "scale"}, "composition_mode='scale', expected 'add'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"vera_d": 0.1}, "vera_d=0.1 is not supported"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16', expected 'float32'"),
        ({"r": "3"}, "r='3', expected a whole number"),
        ({"r": 2}, r"has A .3, 32. and B .32, 3., which do not fit .* of .32, 32. with r=2"),
        ({"attn_matrices": ["o"]}, r"attn_matrices=\['o'\], expected a list of q, k and v"),
        ({"attn_matrices": ["q"]}, "attention.self.key.loras has tensors that the configuration"),
        ({"attn_matrices": ["q", "k", "v"]}, r"self.value has the tensors .., expected lora_A and"),
        ({"alpha": 0}, "LoRA: alpha=0, expected a finite number > 0"),
    ],
)
def test_settings_of_lora_that_cannot_be_honoured_are_named(tmp_path, change, message):
    loading(copied(tmp_path, "bert_lora", change), message)


def test_fields_at_their_default_do_no_harm(tmp_path):
    change = {"new": None, "newer": False, "dict": {}, "list": [], "text": "", "leave_out": None}
    place = copied(tmp_path, "bert_double", change, meta="of the writer's own")
    names, _, params, _ = of_fixture("bert_double")
    assert load_adapterhub(place, names, params)[0] == loaded("bert_double")[0]
    lacking = {"version": "adapters.1.3.0", "name": "task", "config": {"mh_adapter": True}}
    (place / CONFIG).write_text(json.dumps(lacking))
    loading(place, "output_adapter is missing; reduction_factor is missing; non_linearity is miss")
    (place / CONFIG).write_text(json.dumps(lacking | {"config": "pfeiffer"}))
    loading(place, "config='pfeiffer', expected an object with the settings")


def test_lora_of_the_versions_that_did_not_scale(tmp_path):
    names, _, params, _ = of_fixture("bert_lora")
    for version, alpha in (("adapters.1.0.1", 3), ("adapters.1.1.0", 6), ("3.2.1", 6)):
        place = copied(tmp_path, "bert_lora", version=version)
        recipe, _ = load_adapterhub(place, names, params)
        assert recipe.attached[0].alpha == alpha, version


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    root = "bert.encoder.layer"
    change = {
        f"{root}.0.output.adapters.task.adapter_up.bias": None,
        f"{root}.1.output.adapters.task.adapter_up.bias": np.zeros(3, np.float32),
        f"{root}.7.output.adapters.task.adapter_up.bias": np.zeros(32, np.float32),
        f"{root}.0.output.adapters.other.adapter_up.bias": np.zeros(32, np.float32),
        "bert.invertible_adapters.task.F.0.weight": np.zeros(3, np.float32),
    }
    names, _, params, _ = of_fixture("bert_double")
    with pytest.raises(AdapterFileError) as error:
        load_adapterhub(copied(tmp_path, "bert_double", tensors=change), names, params)
    for part in (
        "encoder.layer.0.output has {'adapter_down.0.bias': [4], 'adapter_down.0.weight': [4, 32]",
        "'adapter_up.bias': [3], 'adapter_up.weight': [32, 8]}, expected {'adapter_down.0.weight'",
        "encoder.layer.7.output.adapters has tensors that the configuration does not place",
        "layer.0.output.adapters.other.adapter_up.bias is no bottleneck's or LoRA's tensor of an",
        "bert.invertible_adapters.task.F.0.weight is no bottleneck's or LoRA's tensor",
    ):
        assert part in str(error.value)


def test_the_two_names_of_a_norm_must_agree(tmp_path):
    root = "bert.encoder.layer.0.output.adapters.task."
    names, _, params, _ = of_fixture("bert_norms")
    twice = {f"{root}adapter_down.0.bias": np.ones(32, np.float32)}
    place = copied(tmp_path, "bert_norms", tensors=twice)
    loading(place, "output: adapter_down.0 and adapter_norm_before differ")
    once = {f"{root}adapter_norm_before.{kind}": None for kind in ("weight", "bias")}
    place = copied(tmp_path, "bert_norms", tensors=once)
    equal(flatten(load_adapterhub(place, names, params)[1]), flatten(loaded("bert_norms")[1]))


def with_head(tmp_path, fixture, change=None, tensors=None):
    place = copied(tmp_path, fixture)
    whole = config_of(place, HEAD_CONFIG)
    whole["config"] = (whole["config"] | change) if change else whole["config"]
    (place / HEAD_CONFIG).write_text(json.dumps(whole))
    if tensors:
        safetensors.numpy.save_file(tensors, place / HEAD_TENSORS)
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head_type": "tagging"},
            "head's head_type='tagging', expected 'classification' or 'multi",
        ),
        ({"layers": 3}, "the head's layers=3, expected 1 or 2"),
        ({"use_pooler": True}, "the head's layers=2, expected 1; .*with_head=False"),
        ({"activation_function": "relu"}, "head's activation_function='relu', expected 'tanh'"),
        (
            {"bias": False, "dropout_prob": 0.5},
            "bias=False, expected True.*dropout_prob=0.5 is not",
        ),
        ({"layers": 1}, r"has \['heads.task.1.bias', .*, expected \['heads.task.1.bias', 'heads"),
    ],
)
def test_heads_that_cannot_be_honoured_are_named(tmp_path, change, message):
    place = with_head(tmp_path, "bert_double", change)
    loading(place, message)
    names, _, params, _ = of_fixture("bert_double")
    assert load_adapterhub(place, names, params, with_head=False)[0].unfrozen == ()


def test_a_head_and_the_base_must_read_the_same(tmp_path):
    loading(FIXTURES / "bert_gelu", "its head reads 'cls': build BertClassifier", "bert_gelu")
    loading(
        FIXTURES / "bert_seq", "its head reads 'pooler': build Bert", "bert_gelu", pooling="cls"
    )
    wide = {"classifier.weight": np.zeros((4, 32), np.float32)}
    place = with_head(tmp_path, "bert_par", tensors=wide)
    loading(place, r"the head's classifier.weight is .4, 32., which does not fit head", "bert_par")
    other = {"qa_outputs.weight": np.zeros((2, 32), np.float32)}
    place = with_head(tmp_path, "bert_par", tensors=other)
    loading(place, "the base has no qa_outputs that names knows; load_adapterhub.*with_head=False")


def test_output_layers_that_are_repeated_are_left_alone(tmp_path):
    assert loaded("gpt2_seq")[0].unfrozen == loaded("llama_seq")[0].unfrozen == ()
    words = {"lm_head.weight": np.ones((60, 32), np.float32)}
    place = with_head(tmp_path, "gpt2_seq", tensors=words)
    loading(place, "lm_head.weight is not the base's, and here it is the word embeddings", "gpt2_x")
    place = with_head(tmp_path, "llama_seq", tensors=words)
    names, _, params, _ = of_fixture("llama_seq")
    shutil.rmtree(tmp_path / "copy" / "none", ignore_errors=True)
    whole = config_of(place) | {"model_type": "llama"}
    (place / CONFIG).write_text(json.dumps(whole))
    recipe, adapters = load_adapterhub(
        copied_head(place, FIXTURES / "llama_seq", tmp_path), names, params
    )
    assert recipe.unfrozen == (("head/kernel",),)
    np.testing.assert_array_equal(adapters["head"]["kernel"], 1)


def copied_head(source, fixture, tmp_path):
    """A fixture with another's head."""
    place = shutil.copytree(fixture, tmp_path / "other")
    shutil.copy(source / HEAD_TENSORS, place / HEAD_TENSORS)
    return place


def test_pickles_are_not_opened_and_the_way_round_it_is_named(tmp_path):
    pickle = b"cos\nsystem\n(S'false'\ntR."
    place = copied(tmp_path, "bert_double")
    (place / HEAD_TENSORS).unlink()
    (place / "pytorch_model_head.bin").write_bytes(pickle)
    loading(
        place, r"lacks model_head.safetensors; a pickled pytorch_model_head.bin is never opened"
    )
    (place / TENSORS).unlink()
    (place / "pytorch_adapter.bin").write_bytes(pickle)
    loading(place, r"lacks adapter.safetensors; a pickled .*, name, use_safetensors=True\)")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "neither a directory here nor an adapter on the Hugging Face Hub, whose"),
        (lambda d: (d / CONFIG).write_text("{"), f"{CONFIG} is damaged: Expecting"),
        (lambda d: (d / CONFIG).write_text("{}"), "has no config and no name, .* is for load_adap"),
        (lambda d: (d / TENSORS).write_bytes(b"PK" * 99), f"{TENSORS} is damaged: it has 198"),
    ],
)
def test_a_damaged_directory_says_what_is_wrong(tmp_path, spoil, message):
    place = copied(tmp_path, "bert_double")
    spoil(place)
    loading(place, message)


def drawn(path, method, width=32, seed=0):
    """Leaves for one site."""
    rng = np.random.default_rng(seed)
    site = aj.methods.base.AttachmentPoint(path, "__call__", width)
    if isinstance(method, aj.Bottleneck):
        shapes = {name: leaf.shape for name, leaf in method.leaves(site).items()}
    else:
        shapes = {"a": (32, method.rank), "b": (method.rank, 32)}
    return {
        f"{path}/{method.slot}/{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_what_adapterhub_cannot_express_is_named(tmp_path):
    def saving(base, recipe, flat, message, **options):
        names, _, params, _ = base_of(base, options.get("pooling", "pooler"))
        with pytest.raises(ValueError, match=message):
            save_adapterhub(tmp_path / "a", recipe, unflatten(flat), names, params, **options)
        assert not (tmp_path / "a").exists()

    path = "bert/layer_0/mlp/output"
    good = aj.Bottleneck(path, 4)
    own = drawn(path, good)

    def bottleneck(where, message, base="bert", **fields):
        method = aj.Bottleneck(where, 4, **fields)
        saving(base, method, drawn(where, method), message)

    bottleneck(path, "mlp/output: dropout=0.1 acts between the projections", dropout=0.1)
    bottleneck(path, "activation='softplus', AdapterHub has .*relu", activation="softplus")
    bottleneck("bert/layer_0/mlp_sum", "no sequential bottleneck there: target .* placement='norm'")
    bottleneck("layer_0/mlp", "no parallel bottleneck there: target", "gpt2", placement="parallel")
    bottleneck("layer_0/mlp_norm", "AdapterHub has no sequential bottleneck there", "gpt2")
    bottleneck("bert/layer_0/mlp/intermediate", "AdapterHub has no sequential bottleneck there")
    second = aj.Bottleneck("bert/layer_0/mlp_norm", 4, placement="norm")
    both = own | drawn("bert/layer_0/mlp_norm", second)
    saving("bert", aj.Recipe(good, second), both, "AdapterHub has one bottleneck a sublayer")
    saving("bert", good, drawn(path, good, 16), "its leaves are not of one layer of this base")
    saving("bert", good, {k: x for k, x in own.items() if "up" not in k}, "lacks up/bias, up/kern")
    saving("bert", good, own, "name='a.b', expected one without dots", name="a.b")
    saving("bert", aj.Unfreeze("head/*"), {"head/bias": np.zeros(3)}, "it adds nothing; bottlene")
    dora = aj.DoRA("bert/layer_0/attention/query", 2)
    factors = drawn("bert/layer_0/attention/query", dora)
    magnitude = {"bert/layer_0/attention/query/lora/magnitude": np.ones(32)}
    saving("bert", dora, factors | magnitude, "it adds DoRA; bottlenecks and LoRA are what can be")
    norm = {"bert/layer_0/mlp_norm/scale": np.ones(32)}
    houlsby = good, aj.Unfreeze("**/mlp_norm/scale")
    saving("bert", houlsby, own | norm, "mlp_norm/scale trains as well; AdapterHub's files hold ad")
    head = aj.Recipe(good, aj.Unfreeze("head/*"))
    trained = own | {"head/bias": np.ones(3, np.float32)}
    names, _, params, _ = base_of("bert", "cls")
    with pytest.raises(
        ValueError, match="do not show that its head does; if it does, say pooling="
    ):
        save_adapterhub(tmp_path / "a", head, unflatten(trained), names, params)
    saving("bert", head, trained, "do not show that its head does", pooling="mean")

    def lora(message, *methods, base="bert"):
        flat = {}
        for method in methods:
            flat |= drawn(method.targets[0], method)
        saving(base, methods, flat, message)

    query, value = "bert/layer_0/attention/query", "bert/layer_0/attention/value"
    lora("one rank, alpha and dropout for the q, v of an", aj.LoRA(query, 2), aj.LoRA(value, 3))
    lora(
        "attention/output/dense: AdapterHub has no LoRA",
        aj.LoRA(path[:12] + "/attention/output/dense", 2),
    )
    lora("query: a_init='pissa' took its factors out", aj.LoRA(query, 2, a_init="pissa"))
    lora(
        "AdapterHub has one LoRA in an adapter",
        aj.LoRA(query, 2),
        aj.LoRA(query[:11] + "1" + query[12:], 3),
    )
    wrong = {f"{query}/lora/a": np.ones((5, 2)), f"{query}/lora/b": np.ones((2, 32))}
    saving("bert", aj.LoRA(query, 2), wrong, "query: its factors are not of its weight")


def test_where_a_directory_may_be_written(tmp_path):
    names, _, params, _ = of_fixture("bert_par")
    recipe, adapters = loaded("bert_par")
    with pytest.raises(TypeError, match=r"save_adapterhub: list is not a tree of adapters; write"):
        save_adapterhub(tmp_path / "b", recipe, [], names, params)
    place = save_adapterhub(
        tmp_path / "x" / "b", recipe, adapters, names, params, prefix="roberta.", model_name="org/b"
    )
    about = config_of(place, HEAD_CONFIG)
    assert (about["model_name"], about["model_class"]) == ("org/b", "RobertaAdapterModel")
    assert all(name.startswith("roberta.encoder.") for name in tensors_of(place))
    assert set(tensors_of(place, HEAD_TENSORS)) == {
        f"heads.adapter.1.{k}" for k in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="b exists and is not empty; give another directory"):
        save_adapterhub(place, recipe, adapters, names, params)


@pytest.mark.parametrize("m", [1, 3, 5, 7, 11, 16, 29, 32, 33, 64, 100])
def test_a_width_becomes_a_reduction_factor_that_gives_it_back(m, tmp_path):
    names, _, params, _ = base_of("bert")
    path = "bert/layer_1/mlp/output"
    method = aj.Bottleneck(path, m)
    place = save_adapterhub(tmp_path / "a", method, unflatten(drawn(path, method)), names, params)
    recipe, _ = load_adapterhub(place, names, params)
    assert recipe.attached[0].width(32) == m
    assert config_of(place)["config"]["leave_out"] == [0]


def test_our_presets_go_over(tmp_path):
    """Whole sublayers are adapted behind or beside; layers that differ become a union."""
    names, _, params, _ = base_of("bert")
    recipe = aj.parallel(4, targets="**/layer_0/mlp", activation="relu") + aj.pfeiffer(
        4, targets="**/layer_1/mlp"
    )
    flat = drawn("bert/layer_0/mlp", recipe.attached[0]) | drawn(
        "bert/layer_1/mlp", recipe.attached[1]
    )
    place = save_adapterhub(tmp_path / "a", recipe, unflatten(flat), names, params)
    first, second = config_of(place)["config"]["configs"]
    assert (first["is_parallel"], first["scaling"], first["leave_out"]) == (True, 4.0, [1])
    assert (second["is_parallel"], second["non_linearity"], second["leave_out"]) == (
        *(False, "gelu_new", [0]),
    )
    again, leaves = load_adapterhub(place, names, params)
    assert {method.targets for method in again} == {
        *(("bert/layer_0/mlp_sum",), ("bert/layer_1/mlp/output",)),
    }
    renamed = {
        k.replace("mlp_sum", "mlp").replace("mlp/output", "mlp"): x
        for k, x in flatten(leaves).items()
    }
    equal(renamed, flat)


OWN = {
    "model.layers.0.self_attn.o_proj": "layers/0/attention/output",
    "model.layers.1.self_attn.o_proj": "layers/1/attention/output",
    "model.layers.0.mlp.down_proj": "layers/0/mlp/output",
    "model.layers.1.mlp.down_proj": "layers/1/mlp/output",
}


KEY = {"model.layers.0.self_attn.k_proj": "layers/0/attention/key"}


def test_names_of_ones_own(tmp_path):
    _, _, model, _ = base_of("llama")
    sums = {
        f"model.layers.{i}.{name}_adapters": f"layers/{i}/{ours}_sum"
        for i in (0, 1)
        for name, ours in (("attention", "attention"), ("output", "mlp"))
    }
    for fixture, own in (("llama_double", OWN), ("llama_seq", OWN | sums)):
        wanted, adapters = loaded(fixture)
        recipe, leaves = load_adapterhub(FIXTURES / fixture, own, model, with_head=False)
        assert recipe == wanted
        equal(flatten(leaves), flatten(adapters))
        place = save_adapterhub(tmp_path / fixture, recipe, leaves, own, model, name="task")
        equal(tensors_of(place), tensors_of(FIXTURES / fixture))
    with pytest.raises(
        AdapterFileError, match="names has no path for the sum of layers.0.attention_"
    ):
        load_adapterhub(FIXTURES / "llama_par", OWN, model)
    with pytest.raises(
        AdapterFileError, match="layers.0.output_adapters, or for the projection be"
    ):
        load_adapterhub(FIXTURES / "llama_par", sums | KEY, model)
    with pytest.raises(ValueError, match="names has no blocks .* bert, gpt2, llama"):
        load_adapterhub(FIXTURES / "llama_par", {"a.b": "norm"}, model)


def test_abstract_bases_are_enough(tmp_path):
    names, _, params, _ = base_of("gpt2")
    shapes = jax.eval_shape(lambda: params)
    recipe, adapters = load_adapterhub(FIXTURES / "gpt2_par", names, shapes)
    place = save_adapterhub(tmp_path / "a", recipe, adapters, names, shapes, name="task")
    equal(tensors_of(place), tensors_of(FIXTURES / "gpt2_par"))
