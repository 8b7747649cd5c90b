"""What `save_peft` writes is what PEFT would apply, with the names of transformers 4 and 5."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers.arrays import read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import BaseMismatchError, UserError
from adapters_jax.files.directories import PEFT
from adapters_jax.files.module_map import find_modules
from adapters_jax.files.names import NameTable, Rule, installed
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.applied import differences
from adapters_jax.files.peft.convert import from_peft
from adapters_jax.finetune.formats.base import Adapter
from adapters_jax.finetune.formats.peft import Peft
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.decoder import DecoderConfig
from adapters_jax.finetune.models.t5 import load_t5
from adapters_jax.finetune.pretrained.base_model import load_base_model
from adapters_jax.targets import selects
from adapters_jax.trees import flatten, unflatten

FIXTURES = Path(__file__).parent / "fixtures"
TABLE = NameTable(
    (
        Rule(r"layer_(\d+)/query", r"layers.\1.query"),
        Rule(r"layer_(\d+)/norm", r"layers.\1.norm"),
        Rule("norm", "final_norm"),
    ),
    prefixes=("model.",),
)
PARAMS = {
    **{
        f"layer_{i}": {"query": {"kernel": np.ones((6, 4))}, "norm": {"scale": np.ones(4)}}
        for i in range(2)
    },
    "norm": {"scale": np.ones(4)},
}


def drawn(paths, rank=2):
    """Factors at these modules."""
    draw = np.random.default_rng(0).normal
    leaves = {}
    for path in paths:
        leaves |= {f"{path}/lora/a": draw(size=(6, rank)), f"{path}/lora/b": draw(size=(rank, 4))}
    return {path: leaf.astype(np.float32) for path, leaf in leaves.items()}


def saved(directory, layers=(0, 1), recipe=None, **fields):
    paths = [f"layer_{i}/query" for i in layers]
    recipe = recipe or aj.LoRA(paths, 2, 6.0)
    return save_peft(directory, recipe, unflatten(drawn(paths)), TABLE, PARAMS, **fields)


def test_fields_of_the_caller_may_say_the_same_in_other_words(tmp_path):
    for number, fields in enumerate(
        (
            {"target_modules": ["query"]},
            {"target_modules": r".*\.query"},
            {"target_modules": ["query"], "layers_to_transform": [0, 1]},
            {"r": 8, "rank_pattern": {"query": 2}},
        )
    ):
        directory = saved(tmp_path / str(number), **fields)
        config = json.loads((directory / PEFT.config).read_text())
        assert {name: config[name] for name in fields} == fields
        _, back = load_peft(directory, TABLE, PARAMS)
        for path, leaf in drawn(["layer_0/query", "layer_1/query"]).items():
            np.testing.assert_array_equal(flatten(back)[path], leaf)


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"target_modules": ["query"]}, ["model.layers.1.query"]),
        ({"target_modules": r".*(query|norm)"}, ["model.final_norm", "model.layers.0.norm"]),
        ({"target_modules": ["layers.1.query"]}, ["model.layers.0.query", "model.layers.1.query"]),
        ({"target_modules": "all-linear"}, ["target_modules"]),
        ({"target_modules": None}, ["target_modules"]),
        ({"exclude_modules": ["query"]}, ["model.layers.0.query"]),
        ({"layers_to_transform": [1], "target_modules": ["query"]}, ["model.layers.0.query"]),
        ({"r": 4}, ["r=4", "model.layers.0.query", 2]),
        ({"rank_pattern": {"query": 3}}, ["r=3", 2]),
        ({"lora_alpha": 5}, ["lora_alpha=5", 6]),
        ({"alpha_pattern": {"layers.0.query": 1}}, ["lora_alpha=1", 6]),
        ({"use_rslora": True}, ["use_rslora=True", False]),
        ({"use_dora": True}, ["use_dora=True", False]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out=True", False]),
        ({"peft_type": "IA3"}, ["peft_type='IA3'", "'LORA'"]),
        ({"modules_to_save": ["classifier"]}, ["classifier"]),
        ({"modules_to_save": ["norm"]}, ["model.final_norm", "'norm'"]),
    ],
)
def test_what_peft_would_apply_otherwise_is_an_error_before_a_file_is_written(
    fields, data, tmp_path
):
    with raises(UserError, *data):
        saved(tmp_path / "a", layers=(0,), **fields)
    assert not (tmp_path / "a").exists()


def test_modules_that_are_saved_whole_are_matched_by_the_ends_of_their_names(tmp_path):
    recipe = aj.Recipe(aj.LoRA("layer_0/query", 2, 6.0), aj.Unfreeze("norm/scale"))
    leaves = unflatten(drawn(["layer_0/query"]) | {"norm/scale": np.full(4, 3.0)})
    directory = save_peft(tmp_path / "a", recipe, leaves, TABLE, PARAMS)
    config = json.loads((directory / PEFT.config).read_text())
    assert config["modules_to_save"] == ["model.final_norm"]
    # Without the prefix, and with a name that others end with, PEFT would look for theirs as well.
    table = NameTable((*TABLE.rules[:2], Rule("norm", "norm")))
    with raises(UserError, "layers.0.norm", "layers.1.norm", "'norm'"):
        save_peft(tmp_path / "b", recipe, leaves, table, PARAMS)


def test_factors_of_a_name_that_is_no_target_are_found():
    module_map = find_modules(TABLE, PARAMS)
    name, factors = "model.layers.0.query", {"a": np.ones((2, 6)), "b": np.ones((4, 2))}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["model.layers.1.query"],
    }
    (ignored, more) = differences(config, config, {name: factors}, {}, module_map)
    assert name in ignored
    assert "model.layers.1.query" in more


def test_scales_of_modules_are_not_read_as_those_of_parameters_with_their_name():
    layers = {
        f"layer_{i}": {
            "attention": {"output": {"kernel": np.ones((6, 4))}},
            "experts": {"output": np.ones((3, 6, 4)), "up": np.ones((3, 6, 4))},
        }
        for i in range(2)
    }
    table = NameTable((Rule(r"layer_(\d+)/attention/output", r"layers.\1.o_proj"),))
    config = {"peft_type": "IA3", "target_modules": ["o_proj"], "feedforward_modules": []}
    scale = np.arange(4, dtype=np.float32)[:, None]
    key = "base_model.model.layers.{}.o_proj.ia3_l"
    tensors = {key.format(i): scale + i for i in range(2)}
    (method,), tree = from_peft(config, tensors, table, layers)
    assert flatten(tree).keys() == {f"layer_{i}/attention/output/ia3/scale" for i in range(2)}
    assert selects(method.targets, "layer_1/attention/output")
    assert not selects(method.targets, "layer_1/experts/output")


NAMES_OF = {
    ("vit", 4): {"encoder.layer.0.attention.attention.query", "encoder.layer.1.intermediate.dense"},
    ("vit", 5): {"layers.0.attention.q_proj", "layers.1.mlp.fc1"},
    ("dinov2", 4): {"encoder.layer.0.attention.attention.query", "encoder.layer.1.mlp.fc1"},
    ("dinov2", 5): {"encoder.layer.0.attention.q_proj", "encoder.layer.1.mlp.fc1"},
}


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_image_encoders_have_the_names_of_either_transformers(name, tmp_path):
    family = FAMILIES[name]
    _, params = family.load(FIXTURES / name)
    targets = ("layer_0/attention/query", "layer_1/mlp/intermediate")
    recipe = aj.Recipe(aj.LoRA(targets, 2, 3.0), aj.Unfreeze("layer_0/mlp_norm/*"))
    draw = {}
    for path in targets:
        inputs, outputs = np.shape(flatten(params)[f"{path}/kernel"])
        draw[f"{path}/lora/a"] = np.random.default_rng(1).normal(size=(inputs, 2))
        draw[f"{path}/lora/b"] = np.random.default_rng(2).normal(size=(2, outputs))
    for leaf in ("scale", "bias"):
        draw[f"layer_0/mlp_norm/{leaf}"] = np.random.default_rng(3).normal(size=24)
    draw = {path: x.astype(np.float32) for path, x in draw.items()}
    for version in (4, 5):
        names = family.names.of_version(f"{version}.1.0")
        directory = save_peft(
            tmp_path / str(version), recipe, unflatten(draw), names, params, prefix=""
        )
        config = json.loads((directory / PEFT.config).read_text())
        assert {*config["target_modules"]} == NAMES_OF[name, version]
        _, back = load_peft(directory, family.names, params)
        assert flatten(back).keys() == draw.keys()
        for path, leaf in flatten(back).items():
            np.testing.assert_array_equal(leaf, draw[path], err_msg=path)
    plain = save_peft(tmp_path / "plain", recipe, unflatten(draw), family.names, params, prefix="")
    config = json.loads((plain / PEFT.config).read_text())
    assert {*config["target_modules"]} == NAMES_OF[name, installed() or 5]


def test_a_file_is_compared_with_the_names_of_its_own_version():
    family = FAMILIES["vit"]
    params = family.load(FIXTURES / "vit")[1]
    four, five = "encoder.layer.0.attention.attention.query", "layers.0.attention.q_proj"
    for version, name in ((5, five), (4, four)):
        module_map = find_modules(family.names.of_version(version), params, prefix="")
        for given in (five, f"vit.{five}"):
            assert module_map.spelt_like([given]).full(four) == five
        assert module_map.spelt_like([four]).full(four) == four
        assert module_map.full(four) == name
        assert module_map.bare(f"vit.{five}") == module_map.bare(four) == four


@pytest.mark.parametrize(("written", "version"), [("5.24.0", 5), ("4.57.6", None), ("3.0.2", None)])
def test_a_base_that_transformers_5_wrote_has_its_names(written, version, tmp_path):
    shutil.copytree(FIXTURES / "vit", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"transformers_version": written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_base_model(str(tmp_path)).names.transformers == version


def test_two_spellings_of_a_module_are_refused():
    names = FAMILIES["vit"].names
    one = "encoder.layer.0.attention.attention.query.weight"
    two = "vit.layers.0.attention.q_proj.weight"
    with raises(UserError, one, two):
        names.canonical({one: 1, two: 2})


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_checkpoint_with_the_names_of_transformers_5_is_read(name, tmp_path):
    family = FAMILIES[name]
    five = family.names.of_version(5)
    prefix = family.names.prefixes[0]
    tensors = {
        prefix + five.renamed(key.removeprefix(prefix)): x
        for key, x in read_arrays(FIXTURES / name).items()
    }
    assert any(key.endswith("attention.q_proj.weight") for key in tensors)
    assert not any(re.search(r"\.query\.", key) for key in tensors)
    shutil.copy(FIXTURES / name / "config.json", tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    whole = flatten(family.load(FIXTURES / name)[1])
    for path, leaf in flatten(family.load(tmp_path)[1]).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_experts_of_qwen_have_either_name():
    values = {"model_type": "qwen3_moe", "num_experts_per_tok": 2}
    assert DecoderConfig.from_dict({**values, "num_local_experts": 6}).num_experts == 6
    assert DecoderConfig.from_dict({**values, "num_experts": 6}).num_experts == 6
    assert DecoderConfig.from_dict(values | {"num_experts_per_tok": 8}).num_experts == 128


def test_the_head_of_an_mt5_of_transformers_5_may_be_its_embedding(tmp_path):
    tensors = dict(read_arrays(FIXTURES / "t5" / "mt5"))
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((FIXTURES / "t5" / "mt5" / "config.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"transformers_version": "5.24.0"}))
    _, model = load_t5(tmp_path)
    np.testing.assert_array_equal(model.head.kernel[...], tensors["shared.weight"].T)
    file.write_text(json.dumps(config | {"transformers_version": "4.57.6"}))
    with raises(BaseMismatchError, "lm_head.weight"):
        load_t5(tmp_path)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_an_adapter_of_images_without_a_head_has_the_names_of_a_model_without_one(name, tmp_path):
    base = load_base_model(str(FIXTURES / name))
    recipe = aj.Recipe(aj.LoRA("layer_0/attention/query", 2))
    width = base.params["layer_0"]["attention"]["query"]["kernel"].shape[0]
    ours = {"a": np.ones((width, 2), np.float32), "b": np.ones((2, width), np.float32)}
    leaves = {f"layer_0/attention/query/lora/{factor}": x for factor, x in ours.items()}
    Peft().write(tmp_path / "a", Adapter(recipe, leaves), base)
    (module,) = json.loads((tmp_path / "a" / PEFT.config).read_text())["target_modules"]
    # CLIP's model has a tower of texts as well, whose modules have the names of images' within it.
    assert module.startswith("vision_model.encoder." if name == "clip" else ("encoder.", "layers."))
    keys = safetensors.numpy.load_file(tmp_path / "a" / PEFT.tensors)
    assert all(key.startswith(f"base_model.model.{module}.") for key in keys)
