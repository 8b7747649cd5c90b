"""Adapters of AdapterHub: its logits and tensors both ways, and an error for each misfit."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers import arrays
from helpers.arrays import read_arrays
from helpers.errors import raises
from test_peft import inputs_of

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files.adapterhub import load_adapterhub, reft, save_adapterhub
from adapters_jax.files.directories import ADAPTERHUB, ADAPTERHUB_HEAD
from adapters_jax.finetune.models import FAMILIES, bert, decoder
from adapters_jax.finetune.models.decoder import Decoder
from adapters_jax.trees import flatten, unflatten

(CONFIG, TENSORS), (HEAD_CONFIG, HEAD_TENSORS) = ADAPTERHUB.files, ADAPTERHUB_HEAD.files
BASES = Path(__file__).parent / "fixtures"
FIXTURES = BASES / "adapterhub"
FIXTURE_NAMES = sorted(path.name for path in FIXTURES.glob("*"))


def pooling_of(fixture):
    """The pooling that the head of a fixture reads."""
    return "cls" if fixture in ("bert_gelu", "bert_legacy") else "pooler"


@cache
def base_of(base, pooling="pooler"):
    """The name table, model, parameters and inputs of a base."""
    if base in ("bert", "roberta"):
        own = base == "bert" and pooling == "pooler"
        config, params = bert.load_bert(BASES / base, pooler=own)
        head = {"kernel": np.zeros((32, 3), np.float32), "bias": np.zeros(3, np.float32)}
        if base == "bert":
            tensors = read_arrays(BASES / base)
            head = {"kernel": tensors["classifier.weight"].T, "bias": tensors["classifier.bias"]}
        elif pooling == "pooler":
            params["pooler"] = {"dense": {"kernel": jnp.zeros((32, 32)), "bias": jnp.zeros(32)}}
        model = bert.BertClassifier(config, 3, pooling=pooling)
        return bert.FAMILY.classifier.names, model, {"bert": params, "head": head}, inputs_of(base)
    _, model = decoder.load_decoder(BASES / base)
    inputs = inputs_of(base)
    inputs["positions"] = inputs.pop("position_ids")
    return FAMILIES[base].names, model, model, inputs


def of_fixture(fixture):
    return base_of(fixture.split("_")[0], pooling_of(fixture))


def loaded(fixture, **options):
    names, _, params, _ = of_fixture(fixture)
    return load_adapterhub(
        FIXTURES / fixture, names, params, **{"pooling": pooling_of(fixture)} | options
    )


def logits_of(of, recipe, adapters, tmp_path, by_file=True):
    """The logits of an adapted model, loaded from our own adapter files or merged by hand."""
    _, model, params, inputs = of
    if isinstance(model, Decoder):
        directory = aj.save_adapter(tmp_path / "ours", adapters, recipe)
        adapted = aj.load_adapter(directory, model, None, *inputs.values())
        adapted.eval()
        return adapted(**inputs)
    adapted = aj.adapt(model, recipe)
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    if by_file:
        directory = aj.save_adapter(tmp_path / "ours", adapters, recipe)
        adapted, whole = aj.load_adapter(directory, model, params, **inputs)
    return adapted.apply({"params": whole}, **inputs)


def plain_logits(of, changed):
    """The logits of the base with some of its parameters changed."""
    _, model, params, inputs = of
    if isinstance(model, Decoder):
        return model(**inputs)
    return model.apply({"params": unflatten(flatten(params) | changed)}, **inputs)


def seen(of, logits):
    """The logits without those of padding, of the first eight words."""
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


@pytest.mark.witness("bert_double", "gpt2_lora", "roberta_seq")
@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_logits_are_those_of_adapterhub(fixture, tmp_path):
    of = of_fixture(fixture)
    recipe, adapters = loaded(fixture)
    by_file = fixture in ("bert_union", "gpt2_par")
    logits = seen(of, logits_of(of, recipe, adapters, tmp_path, by_file))
    expected = seen(of, np.load(FIXTURES / fixture / "logits.npy"))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    head = {path: x for path, x in flatten(adapters).items() if recipe.owner(path) is None}
    assert np.abs(seen(of, plain_logits(of, head)) - expected).max() > 0.05  # the adapter matters


@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_an_export_has_the_tensors_of_the_original_and_loads_again(fixture, tmp_path):
    names, _, params, _ = of_fixture(fixture)
    recipe, adapters = loaded(fixture)
    options = {"name": "task", "pooling": pooling_of(fixture)}
    if fixture.startswith("roberta"):
        options["prefix"] = "roberta."
    written = save_adapterhub(tmp_path / "theirs", recipe, adapters, names, params, **options)
    current = (
        "bert_gelu" if fixture == "bert_legacy" else fixture
    )  # bert_legacy is bert_gelu in the old form
    equal(tensors_of(written), tensors_of(FIXTURES / current))
    again, leaves = load_adapterhub(written, names, params, pooling=pooling_of(fixture))
    assert set(again) == set(recipe)
    equal(flatten(leaves), flatten(adapters))
    if fixture in ("bert_legacy", "bert_union"):
        return  # these are written in the new form, and in the order of layers
    idle = {"reduction_factor", "attn_matrices"}  # a default, an order
    idle |= {"original_ln_after", "residual_before_ln"} if fixture == "gpt2_after" else set()
    mine, theirs = config_of(written)["config"], config_of(FIXTURES / fixture)["config"]
    assert {k: v for k, v in mine.items() if k not in idle} == {
        k: theirs.get(k) for k in mine if k not in idle
    }


def test_all_fixtures_are_there():
    assert len(FIXTURE_NAMES) == 19


def test_recipes_follow_the_configurations():
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
    assert loaded("gpt2_lora")[0].attached[0].scale_at("layers/0/attention/query") == 1.5
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
    directory = shutil.copytree(FIXTURES / fixture, tmp_path / "copy", dirs_exist_ok=True)
    whole = config_of(directory) | fields
    whole["config"] = whole["config"] | (change or {}) if whole["config"] else None
    (directory / CONFIG).write_text(json.dumps(whole))
    kept = {k: v for k, v in (tensors_of(directory) | (tensors or {})).items() if v is not None}
    safetensors.numpy.save_file(kept, directory / TENSORS)
    return directory


def loading(directory, *data, fixture="bert_double", **options):
    """Expects an error of loading that names the directory and all data."""
    names, _, params, _ = of_fixture(fixture)
    with raises(AdapterFileError, directory, *data) as caught:
        load_adapterhub(directory, names, params, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"architecture": "mtl_lora"}, ["architecture='mtl_lora'", "reft, union"]),
        ({"phm_layer": 1}, ["phm_layer=1"]),
        ({"phm_layer": True}, ["adapter_down.0.W_left"]),
        ({"phm_dim": 0}, ["phm_dim=0"]),
        ({"use_gating": True, "inv_adapter": "glow"}, ["inv_adapter='glow'", "use_gating=True"]),
        ({"inv_adapter": "nice"}, ["invertible_adapters has no tensors", "'F.0.weight': [8, 16]"]),
        ({"some_future_field": 0.5}, ["some_future_field=0.5"]),
        ({"stochastic_depth": 0.1}, ["stochastic_depth=0.1", "0.0"]),
        ({"dropout": 0.1}, ["dropout=0.1", "0.0"]),
        ({"cross_adapter": True}, ["cross_adapter=True"]),
        ({"scaling": "learned"}, ["scaling='learned'"]),
        ({"non_linearity": "mish"}, ["non_linearity='mish'", "relu, gelu, gelu_new"]),
        ({"reduction_factor": 0}, ["reduction_factor=0"]),
        ({"reduction_factor": {"1": 4}}, ["reduction_factor", "layer 0"]),
        ({"leave_out": ["1"]}, ["leave_out=['1']"]),
        ({"leave_out": [1]}, ["encoder.layer.1.output.adapters"]),
        ({"mh_adapter": 1}, ["mh_adapter=1"]),
        ({"mh_adapter": False}, ["encoder.layer.0.attention.output.adapters"]),
        ({"original_ln_after": False}, ["original_ln_before=False, original_ln_after=False"]),
        ({"residual_before_ln": "post_add"}, ["residual_before_ln='post_add'"]),
        (
            {"original_ln_before": True, "residual_before_ln": False},
            ["original_ln_before=True", "residual_before_ln=False, is_parallel=False"],
        ),
        (
            {"is_parallel": True, "original_ln_after": False},
            ["original_ln_after=False", "is_parallel=True"],
        ),
        (
            {"ln_after": True, "adapter_residual_before_ln": True},
            ["ln_after", "adapter_residual_before_ln=True"],
        ),
        ({"ln_before": True}, ["encoder.layer.0.output", "'adapter_norm_before.weight': [32]"]),
        (
            {"reduction_factor": 4},
            [
                "encoder.layer.0.output",
                "'adapter_down.0.weight': [4, 32]",
                "'adapter_down.0.weight': [8, 32]",
            ],
        ),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(tmp_path, change, data):
    loading(copied(tmp_path, "bert_double", change), *data)


def test_an_unsupported_placement_is_the_only_problem(tmp_path):
    message = loading(copied(tmp_path, "bert_double", {"original_ln_after": False}), "=False")
    assert ";" not in message and "encoder" not in message


@pytest.mark.parametrize("configs", [None, "text", [3], [{"architecture": "union"}]])
def test_unions_without_configurations_raise(tmp_path, configs):
    directory = copied(tmp_path, "bert_double", {"architecture": "union", "configs": configs})
    loading(directory, "architecture=", "lora, reft, union")


def test_invertible_adapters_raise(tmp_path):
    nice = {"invertible_adapter": {"block_type": "nice"}}
    loading(copied(tmp_path, "bert_double", nice), "invertible_adapter={'block_type': 'nice'}")


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"composition_mode": "scale"}, ["composition_mode='scale'", "r=3", "dropout=0.1"]),
        (
            {"composition_mode": "scale", "r": 1, "dropout": 0.0},
            ["attention.self.query", "['lora_A', 'lora_B']", "path and lora_B"],
        ),
        ({"composition_mode": "mul"}, ["composition_mode='mul'", "'add' or 'scale'"]),
        ({"attn_matrices": ["k"]}, ["attn_matrices=['k']", "with q"]),
        ({"use_dora": True}, ["use_dora=True"]),
        ({"vera_d": 0.1}, ["vera_d=0.1"]),
        ({"dtype": "bfloat16"}, ["dtype='bfloat16'", "'float32'"]),
        ({"r": "3"}, ["r='3'"]),
        ({"r": 2}, ["A [3, 32]", "B [32, 3]", "[32, 32]", "r=2"]),
        ({"attn_matrices": ["o"]}, ["attn_matrices=['o']"]),
        ({"attn_matrices": ["q"]}, ["attention.self.key.loras"]),
        ({"attn_matrices": ["q", "k", "v"]}, ["attention.self.value", "[]", "lora_A"]),
        ({"alpha": 0}, ["alpha=0"]),
    ],
)
def test_unsupported_settings_of_lora_raise_an_error_that_names_them(tmp_path, change, data):
    loading(copied(tmp_path, "bert_lora", change), *data)


def test_fields_at_their_default_do_no_harm(tmp_path):
    change = {"new": None, "newer": False, "dict": {}, "list": [], "text": "", "leave_out": None}
    directory = copied(tmp_path, "bert_double", change, meta="of the writer's own")
    names, _, params, _ = of_fixture("bert_double")
    assert load_adapterhub(directory, names, params)[0] == loaded("bert_double")[0]
    lacking = {"version": "adapters.1.3.0", "name": "task", "config": {"mh_adapter": True}}
    (directory / CONFIG).write_text(json.dumps(lacking))
    loading(directory, "output_adapter", "reduction_factor", "non_linearity")
    (directory / CONFIG).write_text(json.dumps(lacking | {"config": "pfeiffer"}))
    loading(directory, "config='pfeiffer'")


def test_lora_of_the_versions_that_did_not_scale(tmp_path):
    names, _, params, _ = of_fixture("bert_lora")
    for version, alpha in (("adapters.1.0.1", 3), ("adapters.1.1.0", 6), ("3.2.1", 6)):
        directory = copied(tmp_path, "bert_lora", version=version)
        recipe, _ = load_adapterhub(directory, names, params)
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
    message = loading(copied(tmp_path, "bert_double", tensors=change))
    problems = message.split("; ")
    expected = (
        ("encoder.layer.0.output", "'adapter_down.0.weight': [4, 32]"),
        ("encoder.layer.1.output", "'adapter_up.bias': [3]", "'adapter_up.bias': [32]"),
        ("encoder.layer.7.output.adapters",),
        (f"{root}.0.output.adapters.other.adapter_up.bias", "'task'"),
        ("invertible_adapters has tensors, but the configuration does not adapt it",),
    )
    assert len(problems) == len(expected)
    for data in expected:
        assert any(all(datum in problem for datum in data) for problem in problems), data


def test_every_module_without_factors_is_named_at_once(tmp_path):
    root = "bert.encoder.layer.0.attention.self"
    lost = {f"{root}.{name}.loras.task.lora_A": None for name in ("query", "key")}
    problems = loading(copied(tmp_path, "bert_lora", tensors=lost)).split("; ")
    assert [sorted({"query", "key"} & set(p.replace(".", " ").split())) for p in problems] == [
        *(["query"], ["key"])
    ]
    assert all("['lora_B']" in problem for problem in problems)


def test_the_two_names_of_a_norm_must_agree(tmp_path):
    root = "bert.encoder.layer.0.output.adapters.task."
    names, _, params, _ = of_fixture("bert_norms")
    twice = {f"{root}adapter_down.0.bias": np.ones(32, np.float32)}
    directory = copied(tmp_path, "bert_norms", tensors=twice)
    loading(directory, "encoder.layer.0.output", "adapter_down.0", "adapter_norm_before")
    once = {f"{root}adapter_norm_before.{kind}": None for kind in ("weight", "bias")}
    directory = copied(tmp_path, "bert_norms", tensors=once)
    equal(flatten(load_adapterhub(directory, names, params)[1]), flatten(loaded("bert_norms")[1]))


def with_head(tmp_path, fixture, change=None, tensors=None):
    directory = copied(tmp_path, fixture)
    whole = config_of(directory, HEAD_CONFIG)
    whole["config"] = (whole["config"] | change) if change else whole["config"]
    (directory / HEAD_CONFIG).write_text(json.dumps(whole))
    if tensors:
        safetensors.numpy.save_file(tensors, directory / HEAD_TENSORS)
    return directory


@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"head_type": "causal_lm"}, ["head_type='causal_lm'", "'classification' or 'multilabel_"]),
        ({"head_type": "tagging"}, ["layers=2, expected 1"]),
        ({"layers": 3}, ["layers=3", "1 or 2"]),
        ({"layers": [1]}, ["layers=[1]", "1 or 2"]),
        ({"use_pooler": True}, ["layers=2", "1"]),
        ({"activation_function": "relu"}, ["activation_function='relu'", "'tanh'"]),
        ({"bias": False, "dropout_prob": 0.5}, ["bias=False", "dropout_prob=0.5"]),
        ({"layers": 1}, ["'heads.task.4.bias'", "['heads.task.1.bias', 'heads.task.1.weight']"]),
    ],
)
def test_unsupported_heads_raise_an_error_that_names_the_settings(tmp_path, change, data):
    directory = with_head(tmp_path, "bert_double", change)
    loading(directory, "with_head=False", *data)
    names, _, params, _ = of_fixture("bert_double")
    assert load_adapterhub(directory, names, params, with_head=False)[0].unfrozen == ()


def test_a_head_without_settings_raises(tmp_path):
    directory = with_head(tmp_path, "bert_double")
    whole = config_of(directory, HEAD_CONFIG) | {"config": "pfeiffer"}
    (directory / HEAD_CONFIG).write_text(json.dumps(whole))
    loading(directory, "config='pfeiffer'")


def test_a_head_and_the_base_must_read_the_same(tmp_path):
    loading(FIXTURES / "bert_gelu", "pooling='cls'", fixture="bert_gelu")
    pooled = FIXTURES / "bert_seq"
    loading(pooled, "pooling='pooler'", fixture="bert_gelu", pooling="cls")
    wide = {"classifier.weight": np.zeros((4, 32), np.float32)}
    directory = with_head(tmp_path, "bert_par", tensors=wide)
    loading(directory, "classifier.weight", [4, 32], "with_head=False", fixture="bert_par")
    other = {"qa_outputs.weight": np.zeros((2, 32), np.float32)}
    directory = with_head(tmp_path, "bert_par", tensors=other)
    loading(directory, "qa_outputs", "with_head=False")


def test_output_layers_that_only_repeat_the_base_do_not_train(tmp_path):
    assert loaded("gpt2_seq")[0].unfrozen == loaded("llama_seq")[0].unfrozen == ()
    words = {"lm_head.weight": np.ones((60, 32), np.float32)}
    directory = with_head(tmp_path, "gpt2_seq", tensors=words)
    loading(directory, "lm_head.weight", "with_head=False", fixture="gpt2_x")
    directory = with_head(tmp_path, "llama_seq", tensors=words)
    names, _, params, _ = of_fixture("llama_seq")
    shutil.rmtree(tmp_path / "copy" / "none", ignore_errors=True)
    whole = config_of(directory) | {"model_type": "llama"}
    (directory / CONFIG).write_text(json.dumps(whole))
    recipe, adapters = load_adapterhub(
        copied_head(directory, FIXTURES / "llama_seq", tmp_path), names, params
    )
    assert recipe.unfrozen == (("head/kernel",),)
    np.testing.assert_array_equal(adapters["head"]["kernel"], 1)


def copied_head(source, fixture, tmp_path):
    """Copies a fixture with the head of another."""
    directory = shutil.copytree(fixture, tmp_path / "other")
    shutil.copy(source / HEAD_TENSORS, directory / HEAD_TENSORS)
    return directory


def test_pickles_of_more_than_tensors_are_refused_and_the_error_names_their_conversion(tmp_path):
    pickle = b"cos\nsystem\n(S'false'\ntR."
    directory = copied(tmp_path, "bert_double")
    (directory / HEAD_TENSORS).unlink()
    (directory / "pytorch_model_head.bin").write_bytes(pickle)
    loading(directory, "pytorch_model_head.bin", "'os.system'", "use_safetensors=True")
    (directory / TENSORS).unlink()
    (directory / "pytorch_adapter.bin").write_bytes(pickle)
    loading(directory, "pytorch_adapter.bin", "'os.system'", "use_safetensors=True")


@pytest.mark.parametrize(
    ("spoil", "data"),
    [
        (shutil.rmtree, ["Hugging Face Hub"]),
        (lambda d: (d / CONFIG).write_text("{"), [CONFIG, "line 1"]),
        (lambda d: (d / CONFIG).write_text("{}"), [CONFIG, "config", "name", "load_adapter"]),
        (lambda d: (d / TENSORS).write_bytes(b"PK" * 99), [TENSORS, 198]),
    ],
)
def test_a_damaged_directory_raises_an_error_that_names_the_file(tmp_path, spoil, data):
    directory = copied(tmp_path, "bert_double")
    spoil(directory)
    loading(directory, *data)


def drawn(path, method, width=32, seed=0):
    """Random leaves for one module."""
    rng = np.random.default_rng(seed)
    point = aj.methods.base.AttachmentPoint("output", path, width=width)
    if isinstance(method, aj.Bottleneck):
        shapes = {name: leaf.shape for name, leaf in method.leaves(point).items()}
    else:
        shapes = {"a": (32, method.rank), "b": (method.rank, 32)}
    return {
        f"{path}/{method.slot}/{name}": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_unsupported_recipes_raise_an_error_that_names_them(tmp_path):
    def saving(base, recipe, flat, *data, **options):
        names, _, params, _ = base_of(base, options.get("pooling", "pooler"))
        with raises(UserError, *data):
            save_adapterhub(tmp_path / "a", recipe, unflatten(flat), names, params, **options)
        assert not (tmp_path / "a").exists()

    path = "bert/layer_0/mlp/output"
    good = aj.Bottleneck(path, 4)
    own = drawn(path, good)

    def bottleneck(where, *data, base="bert", **fields):
        method = aj.Bottleneck(where, 4, **fields)
        saving(base, method, drawn(where, method), f"{where}:", *data)

    bottleneck(path, "dropout=0.1", "dropout=0.0", dropout=0.1)
    bottleneck(path, "activation='softplus'", "relu", activation="softplus")
    bottleneck("bert/layer_0/mlp_sum", "sequential", "placement='norm'")
    bottleneck("layers/0/mlp", "placement='parallel'", base="gpt2", placement="parallel")
    bottleneck("layers/0/mlp_norm", "sequential", base="gpt2")
    bottleneck("bert/layer_0/mlp/intermediate", "sequential")
    second = aj.Bottleneck("bert/layer_0/mlp_norm", 4, placement="norm")
    both = own | drawn("bert/layer_0/mlp_norm", second)
    saving("bert", aj.Recipe(good, second), both, "bert/layer_0/mlp_norm:")
    saving("bert", good, drawn(path, good, 16), f"{path}:")
    saving(
        "bert", good, {k: x for k, x in own.items() if "up" not in k}, path, "up/bias, up/kernel"
    )
    saving("bert", good, own, "name='a.b'", name="a.b")
    saving("bert", aj.Unfreeze("head/*"), {"head/bias": np.zeros(3)}, "adds nothing;")
    dora = aj.DoRA("bert/layer_0/attention/query", 2)
    factors = drawn("bert/layer_0/attention/query", dora)
    magnitude = {"bert/layer_0/attention/query/lora/magnitude": np.ones(32)}
    saving("bert", dora, factors | magnitude, "adds DoRA;")
    norm = {"bert/layer_0/mlp_norm/scale": np.ones(32)}
    houlsby = good, aj.Unfreeze("**/mlp_norm/scale")
    saving("bert", houlsby, own | norm, "bert/layer_0/mlp_norm/scale", "layer_norms=None")
    head = aj.Recipe(good, aj.Unfreeze("head/*"))
    trained = own | {"head/bias": np.ones(3, np.float32)}
    names, _, params, _ = base_of("bert", "cls")
    with raises(UserError, 'pooling="cls"'):
        save_adapterhub(tmp_path / "a", head, unflatten(trained), names, params)
    saving("bert", head, trained, 'pooling="cls"', pooling="mean")

    def lora(datum, *methods):
        flat = {}
        for method in methods:
            flat |= drawn(method.targets[0], method)
        saving("bert", methods, flat, datum)

    query, value = "bert/layer_0/attention/query", "bert/layer_0/attention/value"
    output, second = "bert/layer_0/attention/output/dense", query.replace("_0", "_1")
    lora("q, v", aj.LoRA(query, 2), aj.LoRA(value, 3))
    lora(f"{output}:", aj.LoRA(output, 2))
    for start in ("pissa", "olora"):
        lora(f"{query}: a_init={start!r}", aj.LoRA(query, 2, a_init=start))
    lora("one LoRA", aj.LoRA(query, 2), aj.LoRA(second, 3))
    wrong = {f"{query}/lora/a": np.ones((5, 2)), f"{query}/lora/b": np.ones((2, 32))}
    saving("bert", aj.LoRA(query, 2), wrong, query, "[5, 2]")


def test_what_save_adapterhub_writes_and_what_it_replaces(tmp_path):
    names, _, params, _ = of_fixture("bert_par")
    recipe, adapters = loaded("bert_par")
    with raises(TypeError, "save_adapterhub", "list", "aj.partition(params, recipe)"):
        save_adapterhub(tmp_path / "b", recipe, [], names, params)
    directory = save_adapterhub(
        tmp_path / "x" / "b", recipe, adapters, names, params, prefix="roberta.", model_name="org/b"
    )
    about = config_of(directory, HEAD_CONFIG)
    assert (about["model_name"], about["model_class"]) == ("org/b", "RobertaAdapterModel")
    assert all(name.startswith("roberta.encoder.") for name in tensors_of(directory))
    assert set(tensors_of(directory, HEAD_TENSORS)) == {
        f"heads.adapter.1.{k}" for k in ("weight", "bias")
    }
    save_adapterhub(directory, recipe, adapters, names, params)
    assert config_of(directory)["model_class"] != "RobertaAdapterModel"
    (directory / "notes.txt").touch()
    with raises(UserError, directory, "AdapterHub", "notes.txt"):
        save_adapterhub(directory, recipe, adapters, names, params)
    ours = aj.save_adapter(tmp_path / "ours", adapters, recipe)  # the names of its files are theirs
    with raises(UserError, ours, "AdapterHub", "adapter.safetensors"):
        save_adapterhub(ours, recipe, adapters, names, params)


@pytest.mark.parametrize("m", [1, 3, 5, 7, 11, 16, 29, 32, 33, 64, 100])
def test_a_width_becomes_a_reduction_factor_that_gives_it_back(m, tmp_path):
    names, _, params, _ = base_of("bert")
    path = "bert/layer_1/mlp/output"
    method = aj.Bottleneck(path, m)
    directory = save_adapterhub(
        tmp_path / "a", method, unflatten(drawn(path, method)), names, params
    )
    recipe, _ = load_adapterhub(directory, names, params)
    assert recipe.attached[0].width(32) == m
    config = config_of(directory)["config"]
    assert config["leave_out"] == [0]
    if 32 % m == 0:
        assert config["reduction_factor"] == 32 / m


def test_our_presets_become_a_union(tmp_path):
    """Adapters after or beside a whole sublayer; layers that differ become a union."""
    names, _, params, _ = base_of("bert")
    recipe = aj.parallel(4, targets="**/layer_0/mlp", activation="relu") + aj.pfeiffer(
        4, targets="**/layer_1/mlp"
    )
    flat = drawn("bert/layer_0/mlp", recipe.attached[0]) | drawn(
        "bert/layer_1/mlp", recipe.attached[1]
    )
    directory = save_adapterhub(tmp_path / "a", recipe, unflatten(flat), names, params)
    first, second = config_of(directory)["config"]["configs"]
    assert (first["is_parallel"], first["scaling"], first["leave_out"]) == (True, 4.0, [1])
    assert (second["is_parallel"], second["non_linearity"], second["leave_out"]) == (
        *(False, "gelu_new", [0]),
    )
    again, leaves = load_adapterhub(directory, names, params)
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
        expected, adapters = loaded(fixture)
        recipe, leaves = load_adapterhub(FIXTURES / fixture, own, model, with_head=False)
        assert recipe == expected
        equal(flatten(leaves), flatten(adapters))
        directory = save_adapterhub(tmp_path / fixture, recipe, leaves, own, model, name="task")
        equal(tensors_of(directory), tensors_of(FIXTURES / fixture))
    with raises(AdapterFileError, "names", "sum", "layers.0.attention_adapters"):
        load_adapterhub(FIXTURES / "llama_par", OWN, model)
    with raises(AdapterFileError, "names", "sum", "layers.0.output_adapters"):
        load_adapterhub(FIXTURES / "llama_par", sums | KEY, model)
    with raises(UserError, "names", "bert, gpt2, llama"):
        load_adapterhub(FIXTURES / "llama_par", {"a.b": "norm"}, model)


def test_abstract_bases_are_enough(tmp_path):
    names, _, model, _ = base_of("gpt2")
    shapes = nnx.eval_shape(lambda: model)
    recipe, adapters = load_adapterhub(FIXTURES / "gpt2_par", names, shapes)
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, names, shapes, name="task")
    equal(tensors_of(directory), tensors_of(FIXTURES / "gpt2_par"))


def test_scales_go_both_ways_and_what_adapterhub_cannot_scale_is_named(tmp_path):
    names, _, params, _ = base_of("gpt2")
    recipe = aj.Recipe(aj.IA3("**/{key,value}"))
    tree = {
        f"layers/{n}/attention/{name}/ia3/scale": arrays.drawn((32,), seed=n + len(name))
        for n in range(2)
        for name in ("key", "value")
    }
    directory = save_adapterhub(tmp_path / "a", recipe, unflatten(tree), names, params, name="own")
    config = json.loads((directory / CONFIG).read_text())["config"]
    assert (config["composition_mode"], config["r"], config["alpha"]) == ("scale", 1, 1)
    assert config["attn_matrices"] == ["k", "v"] and config["init_weights"] == "ia3"
    found = safetensors.numpy.load_file(directory / TENSORS)
    assert {x.shape for x in found.values()} == {(64, 1)} and len(found) == 2
    back = flatten(load_adapterhub(directory, names, params)[1])
    assert back.keys() == tree.keys()
    for path, leaf in tree.items():
        np.testing.assert_array_equal(back[path], leaf)
    change = json.loads((directory / CONFIG).read_text())
    change["config"]["alpha"] = 2
    (directory / CONFIG).write_text(json.dumps(change))
    with raises(AdapterFileError, "h.0.attn.c_attn", "alpha=2"):
        load_adapterhub(directory, names, params)
    inner = aj.Recipe(aj.IA3("**/mlp/up", feed_forward="**/mlp/up"))
    leaves = {f"layers/{n}/mlp/up/ia3/scale": arrays.drawn((32,)) for n in range(2)}
    with raises(UserError, "layers/0/mlp/up", "outputs"):
        save_adapterhub(tmp_path / "b", inner, unflatten(leaves), names, params, name="own")


SHARED = "bert.shared_parameters.own."


def compacter_tree(recipe, params):
    adapted = aj.adapt(base_of("bert")[1], recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(0), jnp.ones((1, 4), int))
    return arrays.drawn_like(aj.adapters_of(whole, recipe), 2)


@pytest.mark.slow
@pytest.mark.witness("settings0", "settings2")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shared_weights": True, "factored_rule": True, "train_rule": False},
        {"shared_rule": False, "full": True, "bias": False, "norm_before": True},
    ],
)
def test_compacter_goes_both_ways(settings, tmp_path):
    names, _, params, _ = base_of("bert")
    recipe = aj.compacter(reduction_factor=4, **settings)
    tree = compacter_tree(recipe, params)
    saved = save_adapterhub(tmp_path / "a", recipe, tree, names, params, name="own")
    found, leaves = load_adapterhub(saved, names, params)
    assert [
        {*vars(m).items()} - {*vars(n).items()} for m, n in zip(found, recipe, strict=True)
    ] == [{("targets", found.attached[0].targets)}]
    equal(flatten(leaves), flatten(tree))
    shared = {name for name in tensors_of(saved) if name.startswith(SHARED)}
    assert len(shared) == len(recipe.attached[0].shared_leaves)


def test_what_compacters_share_in_adapterhub_is_one(tmp_path):
    names, _, params, _ = base_of("bert")
    several = aj.Recipe(
        aj.Compacter("**/layer_0/mlp/output", 8, name="one"),
        aj.Compacter("**/layer_1/mlp/output", 8, name="two"),
    )
    tree = compacter_tree(several, params)
    with raises(UserError, "layer_1/mlp/output", "one rule for all"):
        save_adapterhub(tmp_path / "a", several, tree, names, params)
    same = unflatten(flatten(tree) | {"compacter_two/rule": flatten(tree)["compacter_one/rule"]})
    saved = save_adapterhub(tmp_path / "b", several, same, names, params, name="own")
    assert len(tensors_of(saved)) == 2 * 6 + 1
    whole = config_of(saved)
    whole["config"]["reduction_factor"] = {"0": 4, "1": 2}
    (saved / CONFIG).write_text(json.dumps(whole))
    with raises(AdapterFileError, "reduction_factor={'0': 4, '1': 2} with shared_phm_rule"):
        load_adapterhub(saved, names, params)
    both = aj.Recipe(aj.Bottleneck("**/layer_0/mlp/output", 8), several.methods[0])
    with raises(UserError, "two adapters of bert/layer_0/mlp/output"):
        save_adapterhub(tmp_path / "c", both, compacter_tree(both, params), names, params)


def loreft_tree(recipe, params):
    adapted = aj.adapt(base_of("bert")[1], recipe)
    whole = aj.init_adapters(adapted, params, jax.random.key(0), jnp.ones((1, 4), int))
    return aj.adapters_of(whole, recipe)


@pytest.mark.parametrize(
    "settings",
    [
        {"suffix_positions": 2, "dropout": 0.1},
        {"prefix_positions": 0, "suffix_positions": 1, "activation": "gelu_exact"},
        {"suffix_positions": 1, "tied": True, "orthogonal": False, "layers": [1]},
    ],
)
def test_loreft_goes_both_ways(settings, tmp_path):
    names, _, params, _ = base_of("bert")
    recipe = aj.loreft(3, **{"num_layers": 2, **settings})
    tree = loreft_tree(recipe, params)
    saved = save_adapterhub(tmp_path / "a", recipe, tree, names, params, name="own")
    config = config_of(saved)["config"]
    assert config["architecture"] == "reft" and config["r"] == 3
    assert config["layers"] == ([1] if "layers" in settings else "all")
    found, leaves = load_adapterhub(saved, names, params)
    (mine,), (again,) = recipe, found
    for field in ("rank", "prefix_positions", "suffix_positions", "orthogonal", "activation"):
        assert getattr(mine, field) == getattr(again, field)
    assert mine.units == again.units and mine.dropout == again.dropout
    flat, back = flatten(tree), flatten(leaves)
    assert flat.keys() == back.keys()
    for path, leaf in flat.items():
        np.testing.assert_allclose(back[path], leaf, atol=1e-6, err_msg=path)


def test_an_orthonormal_projection_of_torch():
    """By its definition: reflections at the columns below the diagonal, times base and signs."""
    original, base = arrays.drawn((2, 6), 1), np.linalg.qr(arrays.drawn((6, 6), 2))[0]
    original[0, 0], original[1, 1] = -1.0, 1.9
    whole = np.eye(6)
    for i in range(2):
        axis = np.where(np.arange(6) < i, 0, original[i])
        axis[i] = 1.0
        whole = whole @ (np.eye(6) - 2 * np.outer(axis, axis) / (axis @ axis))
    expected = (base @ whole)[:, :2] * [-1.0, 1.0]
    np.testing.assert_allclose(reft._turned(original, base), expected, atol=1e-6)


@pytest.mark.witness("change0-data0", "change2-data2", "change5-data5", "change8-data8")
@pytest.mark.parametrize(
    ("change", "data"),
    [
        ({"layers": [5]}, ["layer 5"]),
        ({"layers": ["all"]}, ["layers=['all']"]),
        ({"r": 2}, ["encoder.layer.0.reft_layer", "(3, 32)", "(2, 32)"]),
        ({"subtract_projection": False}, ["subtract_projection=False"]),
        ({"output_reft": False, "dtype": "float16"}, ["output_reft=False", "dtype='float16'"]),
        ({"tied_weights": True}, ["encoder.layer.1.reft_layer", "units.1"]),
        ({"non_linearity": "glu"}, ["non_linearity='glu'"]),
        ({"new": 1}, ["new=1"]),
        ({"orthogonality": False}, ["parametrizations", "projection.weight"]),
    ],
)
def test_unsupported_settings_of_reft_raise_an_error_that_names_them(tmp_path, change, data):
    names, _, params, _ = base_of("bert")
    recipe = aj.loreft(3, num_layers=2, suffix_positions=1)
    saved = save_adapterhub(
        tmp_path / "a", recipe, loreft_tree(recipe, params), names, params, name="own"
    )
    whole = config_of(saved)
    whole["config"] |= change
    (saved / CONFIG).write_text(json.dumps(whole))
    with raises(AdapterFileError, *data):
        load_adapterhub(saved, names, params)


@pytest.mark.slow
def test_what_adapterhubs_reft_does_not_have(tmp_path):
    names, _, params, _ = base_of("bert")
    cases = [
        (aj.Recipe(aj.LoReFT("**/mlp/output", 2)), ["bert/layer_0/mlp/output", "whole layers"]),
        (aj.loreft(2, num_layers=2, subtract=False), ["bert/layer_1", "subtract=False"]),
        (aj.loreft(2, num_layers=2, activation="elu"), ["activation='elu'"]),
        (aj.loreft(2, layers=[0]) + aj.loreft(3, layers=[1]), ["one LoReFT"]),
        (aj.loreft(32, num_layers=2), ["rank=32"]),
    ]
    for recipe, data in cases:
        with raises(UserError, *data):
            save_adapterhub(tmp_path / "a", recipe, loreft_tree(recipe, params), names, params)


def test_a_whole_layer_by_names_of_ones_own(tmp_path):
    params = base_of("bert")[2]
    recipe = aj.loreft(2, layers=[0])
    tree = loreft_tree(recipe, params)
    own = {
        "encoder.layer.0.attention.self.query": "bert/layer_0/attention/query",
        "encoder.layer.0.output.dense": "bert/layer_0/mlp/output/dense",
    }
    saved = save_adapterhub(tmp_path / "a", recipe, tree, own, params, name="own")
    found, leaves = load_adapterhub(saved, own, params)
    assert found.attached[0].targets == ("bert/layer_0",)
    one = {"encoder.layer.0.output.dense": "bert/layer_0/mlp/output/dense"}
    with raises(AdapterFileError, "no path for encoder.layer.0"):
        load_adapterhub(saved, one, params)
    explicit = load_adapterhub(saved, one | {"encoder.layer.0": "bert/layer_0"}, params)
    equal(flatten(explicit[1]), flatten(leaves))


def single(name):
    return {"type": "single", "children": [name]}


SINGLE = single("task")


def setup_of(tmp_path, setup, **fields):
    """A directory of one adapter, `task`, with a setup."""
    directory = tmp_path / "setup"
    copied(directory, "bert_double").rename(directory / "task")
    (directory / "adapter_setup.json").write_text(
        json.dumps({"adapter_setup": setup, "head_setup": None, **fields})
    )
    return directory


def test_a_setup_of_one_adapter_is_that_adapter(tmp_path):
    names, _, params, _ = of_fixture("bert_double")
    stack = setup_of(tmp_path, {"type": "Stack", "children": [SINGLE]})
    recipe, tree = load_adapterhub(stack, names, params, pooling="pooler")
    alone, leaves = loaded("bert_double")
    assert [m.name for m in recipe.attached] == ["task"] * len(alone.attached)
    named = {path.replace("/adapter/", "/adapter_task/") for path in flatten(leaves)}
    assert flatten(tree).keys() == named


@pytest.mark.filterwarnings("ignore::adapters_jax.AdapterWarning")  # of a head that is not read
@pytest.mark.parametrize(
    ("setup", "words"),
    [
        ([], "describes no composition"),
        ({"type": "Stack"}, "describes no composition"),
        ({"type": "Split", "children": [SINGLE], "kwargs": [1]}, "describes no composition"),
        ({"type": "Split", "children": [SINGLE], "kwargs": {"splits": [{}]}}, "no composition"),
        ({"type": "Split", "children": [SINGLE], "kwargs": {"splits": [2.7]}}, "parts of [2.7]"),
        ({"type": "Stack", "children": [{"type": "single", "children": ["../task"]}]}, "'../task'"),
        ({"type": "Stack", "children": [{"type": "single", "children": [".."]}]}, "'..'"),
        ({"type": "Stack", "children": [{"type": "single", "children": ["x" * 999]}]}, "the name"),
        ({"type": "Stack", "children": [SINGLE] * 300}, "more than 256 adapters"),
        ({"type": "Stack", "children": [SINGLE, SINGLE]}, "task stands in it twice"),
        ({"type": "Average", "children": [SINGLE]}, "divides an average"),
        ({"type": "MultiTask", "children": [SINGLE]}, "'MultiTask' is no composition of ours"),
        ({"type": "Stack", "children": [{"type": "single", "children": ["gone"]}]}, "gone lacks"),
        ({"type": "Fuse", "children": [SINGLE]}, "lacks adapter_fusion_config.json"),
        ({"type": "Split", "children": [SINGLE], "kwargs": {"splits": [1, 2]}}, "a size for each"),
        (single("\u00e9" * 100), "the name"),
        ({"type": "Fuse", "children": [single(f"{i:090}") for i in range(3)]}, "too long"),
    ],
    ids=range(17),
)
def test_setups_that_are_wrong(setup, words, tmp_path):
    names, _, params, _ = of_fixture("bert_double")
    with raises(AdapterFileError, words):
        load_adapterhub(setup_of(tmp_path, setup), names, params, pooling="pooler")


def test_names_that_ours_would_make_one_are_kept_apart(tmp_path):
    names, _, params, _ = of_fixture("bert_double")
    theirs = ["a-b", "a_b_0", "a_b", "stack"]
    inner = {"type": "Stack", "children": [single(name) for name in theirs[2:]]}
    setup = {"type": "Stack", "children": [*(single(name) for name in theirs[:2]), inner]}
    directory = setup_of(tmp_path, setup)
    for name in theirs:
        copied(tmp_path / "one", "bert_double").rename(directory / name)
        fields = json.loads((directory / name / CONFIG).read_text())
        tensors = tensors_of(directory / name)
        own = {key.replace(f".{fields['name']}.", f".{name}."): x for key, x in tensors.items()}
        safetensors.numpy.save_file(own, directory / name / TENSORS)
        (directory / name / CONFIG).write_text(json.dumps({**fields, "name": name}))
        for head in ADAPTERHUB_HEAD.files:
            (directory / name / head).unlink(missing_ok=True)
    recipe, _ = load_adapterhub(directory, names, params)
    members = [m.members for m in recipe if m.members]
    assert len({m.name for m in recipe.attached if not m.members}) == 4
    assert members[-1][-1] not in {m.name for m in recipe.attached if not m.members}


@pytest.mark.filterwarnings("ignore::adapters_jax.AdapterWarning")  # of task's head
def test_a_head_of_a_name_of_its_own_is_named(tmp_path):
    names, _, params, _ = of_fixture("bert_double")
    directory = setup_of(tmp_path, {"type": "Stack", "children": [SINGLE]}, head_setup="other")
    with raises(AdapterFileError, "'other'", "with_head=False"):
        load_adapterhub(directory, names, params, pooling="pooler")


UNWRITTEN = {
    "parallel compacters": (
        (
            aj.Compacter("**/mlp", 4, phm_dim=2, placement="parallel", name="a"),
            aj.Compacter("**/mlp", 4, phm_dim=2, placement="parallel", name="b"),
            aj.stack("a", "b"),
        ),
        ("layer 0 has a parallel bottleneck",),
    ),
    "an invertible adapter that is not the first": (
        (
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", name="a"),
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", name="b"),
            aj.methods.Invertible("**/embeddings", name="b"),
            aj.stack("a", "b"),
        ),
        ("b has an invertible adapter", "first adapter of a stack"),
    ),
    "LoRA in two adapters": (
        (
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", name="a"),
            aj.LoRA("**/query", 2, name="a"),
            aj.Bottleneck("**/mlp_norm", 4, placement="norm", name="b"),
            aj.LoRA("**/query", 2, name="b"),
            aj.stack("a", "b"),
        ),
        ("several adapters have LoRA",),
    ),
}


@pytest.mark.parametrize("case", UNWRITTEN)
def test_setups_that_adapterhub_would_run_otherwise_are_not_written(case, tmp_path):
    names, model, params, inputs = base_of("bert")
    entries, words = UNWRITTEN[case]
    recipe = aj.Recipe(*entries)
    whole = aj.init_adapters(aj.adapt(model, recipe), params, jax.random.key(0), **inputs)
    with raises(UserError, *words):
        save_adapterhub(tmp_path / "a", recipe, aj.partition(whole, recipe)[0], names, params)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [True, False])
def test_a_fusion_keeps_its_settings_and_arrays(value, tmp_path):
    names, model, params, inputs = base_of("bert")
    one = {"targets": "**/mlp_norm", "bottleneck_dim": 4, "placement": "norm", "activation": "relu"}
    members = [aj.Bottleneck(name=name, **one) for name in "ab"]
    recipe = aj.Recipe(*members, aj.fuse("a", "b", value=value, dropout=0.25))
    whole = aj.init_adapters(aj.adapt(model, recipe), params, jax.random.key(0), **inputs)
    trained, _ = aj.partition(whole, recipe)
    saved = save_adapterhub(tmp_path / "a", recipe, trained, names, params)
    again, tree = load_adapterhub(saved, names, params)
    (fusion,) = (m for m in again if m.members)
    assert (fusion.value, fusion.dropout, fusion.members) == (value, 0.25, ("a", "b"))
    equal(flatten(tree), flatten(trained))
    config = saved / "a,b" / "adapter_fusion_config.json"
    whole = json.loads(config.read_text())
    for field in ("query_before_ln", "residual_before", "temperature"):
        changed = whole | {"config": whole["config"] | {field: True}}
        config.write_text(json.dumps(changed))
        with raises(AdapterFileError, f"{field}=True"):
            load_adapterhub(saved, names, params)


def test_a_fusion_without_its_adapters_says_what_to_save(tmp_path):
    names, _, params, _ = of_fixture("bert_double")
    (tmp_path / "adapter_fusion_config.json").write_text("{}")
    with raises(AdapterFileError, "model.save_adapter_setup(directory, Fuse(...))"):
        load_adapterhub(tmp_path, names, params)
