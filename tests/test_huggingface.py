"""Reading checkpoints: what is found, what is renamed, and every way a file can be wrong."""

import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises
from safetensors.numpy import load_file, save_file

from adapters_jax.errors import (
    AdapterWarning,
    BaseFileError,
    MismatchError,
    MissingPackageError,
    UserError,
)
from adapters_jax.files.names import NameTable, Rule
from adapters_jax.finetune.base_files.huggingface import resolve
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.bert import NAMES, Bert, load_bert
from adapters_jax.finetune.models.decoder import load_decoder, save_decoder
from adapters_jax.finetune.tensors import from_tensors, to_tensors
from adapters_jax.transforms.stacking import Stack

FIXTURES = Path(__file__).parent / "fixtures"
TABLE = NameTable(
    (Rule(r"part_(\d)", r"fused", part=None), Rule(r"norm", r"LayerNorm")),
    prefixes=("model.",),
    ignored=(r"buffer\..*",),
)
LIKE = {
    "norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)},
    "part_0": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)},
}
KERNEL = np.arange(6, dtype=np.float32).reshape(3, 2)
GOOD = {"fused.weight": KERNEL, "LayerNorm.weight": np.ones(3, np.float32)}


@pytest.fixture
def tiny(tmp_path):
    """A copy of the tiny BERT, to be damaged."""
    return Path(shutil.copytree(FIXTURES / "bert", tmp_path / "bert"))


def rewrite(directory, change):
    """Reads the tensors, applies the change in place and writes them back."""
    tensors = read_arrays(directory)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_same_tree(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_tensors_are_transposed_and_take_the_models_dtype():
    loaded = from_tensors(GOOD, TABLE, LIKE)
    assert loaded["part_0"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded["part_0"]["kernel"].astype(np.float32), KERNEL.T)


def test_prefixes_old_names_and_listed_leftovers_are_accepted():
    tensors = {
        "model.fused.weight": KERNEL,
        "model.LayerNorm.gamma": np.full(3, 2.0),
        "model.buffer.ids": np.arange(3),
    }
    np.testing.assert_array_equal(from_tensors(tensors, TABLE, LIKE)["norm"]["scale"], [2, 2, 2])


def test_one_error_lists_every_difference_by_both_names():
    tensors = {"fused.weight": KERNEL.T, "strange.weight": KERNEL, "buffer.ids": KERNEL}
    different = "part_0/kernel (fused.weight) is [2, 3], expected [3, 2]"
    with raises(
        MismatchError, "norm/scale (LayerNorm.weight)", "strange.weight", different
    ) as caught:
        from_tensors(tensors, TABLE, LIKE)
    assert "buffer" not in str(caught.value)


def test_two_names_of_one_tensor_raise():
    with raises(UserError, "model.fused.weight", " fused.weight"):
        from_tensors({"model.fused.weight": KERNEL, **GOOD}, TABLE, LIKE)


def test_a_path_without_a_rule_is_named():
    with raises(UserError, "'other'"):
        from_tensors(GOOD, TABLE, {"other": {"kernel": LIKE["norm"]["scale"]}})


def test_fused_tensors_are_split_in_either_layout():
    fused = np.arange(12, dtype=np.float32).reshape(2, 6)
    like = {name: {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)} for name in "ab"}
    rules = (Rule("a", "ab", (0, 2)), Rule("b", "ab", (1, 2)))
    straight = from_tensors({"ab.weight": fused}, NameTable(rules, fan_in_fan_out=True), like)
    turned = from_tensors({"ab.weight": fused.T}, NameTable(rules), like)
    np.testing.assert_array_equal(straight["b"]["kernel"], fused[:, 3:])
    assert_same_tree(straight, turned)


def fused_layers(scan):
    """Projections of unequal widths, as of grouped queries, and their two layers in one tree."""
    draw = np.random.default_rng(0).normal
    widths = {"query": 6, "key": 2, "value": 2}
    rules = (Rule(rf"layer_(\d+)/{name}", r"h.\1.qkv", (i, 3)) for i, name in enumerate(widths))
    names = NameTable(tuple(rules), prefixes=("model.",), stack=Stack("layer_{}", "layers"))
    layers = [
        {
            name: {"kernel": draw(size=(4, width)), "bias": draw(size=width)}
            for name, width in widths.items()
        }
        for _ in range(2)
    ]
    if scan:
        return names, layers, {"layers": jax.tree.map(lambda *rows: np.stack(rows), *layers)}
    return names, layers, {f"layer_{i}": layer for i, layer in enumerate(layers)}


@pytest.mark.parametrize("scan", [False, True])
def test_arrays_of_unequal_widths_are_fused_and_taken_apart(scan):
    names, layers, tree = fused_layers(scan)
    tensors = to_tensors(tree, names)
    assert sorted(tensors) == [
        f"model.h.{i}.qkv.{leaf}" for i in (0, 1) for leaf in ("bias", "weight")
    ]
    whole = np.concatenate([layers[1][name]["kernel"].T for name in ("query", "key", "value")])
    np.testing.assert_array_equal(tensors["model.h.1.qkv.weight"], whole)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), tree)
    read = from_tensors(tensors, names, like)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.float32(y)), read, tree)
    tensors["model.h.1.qkv.weight"] = whole[:-1]
    with raises(UserError, "h.1.qkv.weight", [9, 4], [10, 4]):
        from_tensors(tensors, names, like)


def test_a_fused_tensor_needs_all_of_its_parts():
    names, (layer, _), _ = fused_layers(scan=False)
    some = {"layer_0": {"query": layer["query"], "value": layer["value"]}}
    with raises(UserError, "h.0.qkv", 3, 2):
        to_tensors(some, names)
    whole = {"h.0.qkv.weight": np.ones((10, 4)), "h.0.qkv.bias": np.ones(10)}
    with raises(MismatchError, "h.0.qkv.weight", [10, 4], [8, 4]):
        from_tensors(whole, names, some)


def test_bfloat16_and_float16_are_read(tmp_path):
    stored = {"a": np.array([1.5], ml_dtypes.bfloat16), "b": np.array([2.5], np.float16)}
    save_file(stored, tmp_path / "model.safetensors")
    tensors = read_arrays(tmp_path)
    assert tensors["a"].dtype == ml_dtypes.bfloat16
    assert tensors["b"].dtype == np.float16
    assert float(tensors["a"][0]) == 1.5
    assert float(tensors["b"][0]) == 2.5


def shard(directory):
    """Splits the file into two shards and an index."""
    tensors = read_arrays(directory)
    (directory / "model.safetensors").unlink()
    files = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_shards_are_one_checkpoint(tiny):
    _, whole = load_bert(tiny, pooler=True)
    shard(tiny)
    _, parts = load_bert(tiny, pooler=True)
    assert_same_tree(parts, whole)


def test_a_sharded_llama_is_the_whole_one(tmp_path):
    whole = shutil.copytree(FIXTURES / "llama", tmp_path / "llama")
    _, expected = load_decoder(whole)
    shard(whole)
    assert len(list(whole.glob("part-*.safetensors"))) == 2
    _, parts = load_decoder(whole)
    assert_same_tree(nnx.to_pure_dict(nnx.state(parts)), nnx.to_pure_dict(nnx.state(expected)))


def test_a_large_checkpoint_is_written_as_shards(tmp_path):
    config, model = load_decoder(FIXTURES / "llama")
    most = 3000
    save_decoder(tmp_path, config, model, max_shard_size=most)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    held = [load_file(tmp_path / name) for name in files]
    assert all(sum(x.nbytes for x in each.values()) <= most or len(each) == 1 for each in held)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for e in held for x in e.values())
    assert index["weight_map"] == {
        name: file for file, each in zip(files, held, strict=True) for name in each
    }
    _, parts = load_decoder(tmp_path)
    assert_same_tree(nnx.to_pure_dict(nnx.state(parts)), nnx.to_pure_dict(nnx.state(model)))
    with raises(UserError, "max_shard_size", "-1"):
        save_decoder(tmp_path, config, model, max_shard_size=-1)


@pytest.mark.slow
def test_a_checkpoint_replaces_one_of_other_shards(tmp_path):
    config, model = load_decoder(FIXTURES / "llama")
    state = nnx.state(model)
    (tmp_path / "tokenizer.json").write_text("{}")
    for times, most in ((1.0, 3000), (2.0, 9000), (3.0, 10**6), (4.0, 3000)):
        nnx.update(model, jax.tree.map(lambda x, times=times: x * times, state))
        save_decoder(tmp_path, config, model, max_shard_size=most)
        read = nnx.to_pure_dict(nnx.state(load_decoder(tmp_path)[1]))
        assert_same_tree(read, nnx.to_pure_dict(nnx.state(model)))
        assert (tmp_path / "tokenizer.json").is_file()


def test_an_absent_shard_is_named(tiny):
    shard(tiny)
    (tiny / "part-1.safetensors").unlink()
    with raises(UserError, tiny, "part-1.safetensors"):
        load_bert(tiny)


def test_names_of_the_oldest_files_load_alike(tiny):
    def age(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("weight", "gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["cls.predictions.bias"] = np.zeros(60, np.float32)
        tensors["bert.embeddings.position_ids"] = np.arange(16)[None]

    _, expected = load_bert(tiny)
    rewrite(tiny, age)
    assert_same_tree(load_bert(tiny)[1], expected)


def test_missing_unexpected_and_misshaped_tensors_are_named(tiny):
    def damage(tensors):
        del tensors["bert.encoder.layer.1.attention.self.query.bias"]
        tensors["bert.encoder.layer.1.extra.weight"] = np.zeros(3, np.float32)
        tensors["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((40, 32), np.float32)

    rewrite(tiny, damage)
    with raises(
        MismatchError,
        "layer_1/attention/query/bias (encoder.layer.1.attention.self.query.bias)",
        "1 unexpected: encoder.layer.1.extra.weight",
        "(encoder.layer.0.intermediate.dense.weight) is [40, 32], expected [48, 32]",
    ):
        load_bert(tiny)


def test_a_pooler_that_is_asked_for_must_be_there():
    load_bert(FIXTURES / "roberta")
    with raises(MismatchError, "2 missing", "pooler/dense/bias (classifier.dense.bias)"):
        load_bert(FIXTURES / "roberta", pooler=True)


@pytest.mark.parametrize(
    ("load", "name", "config"),
    [
        (load_bert, "gpt2", "BertConfig"),
        (load_decoder, "bert", "DecoderConfig"),
    ],
)
def test_another_architecture_is_recognised_by_its_config(load, name, config):
    with raises(UserError, config, f"model_type={name!r}"):
        load(FIXTURES / name)


def test_weights_of_another_architecture_give_short_lists():
    config, _ = load_bert(FIXTURES / "bert")
    like = jax.eval_shape(Bert(config).init, jax.random.key(0), jnp.ones((1, 1), int))["params"]
    with raises(MismatchError, "37 missing", "28 unexpected", "25 more") as caught:
        from_tensors(read_arrays(FIXTURES / "gpt2"), NAMES, like)
    assert len(str(caught.value)) < 3000


def test_a_directory_is_taken_as_it_is():
    assert resolve(FIXTURES / "bert") == FIXTURES / "bert"
    assert resolve(str(FIXTURES / "bert")) == FIXTURES / "bert"


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("config.json", ["config.json", "expected.npz"]),
        ("model.safetensors", ["model.safetensors", "model.safetensors.index.json"]),
    ],
)
def test_what_an_incomplete_directory_lacks_is_named(tiny, file, data):
    (tiny / file).unlink()
    with raises(UserError, tiny, *data):
        resolve(tiny)


def test_a_pickle_is_never_opened(tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    with raises(UserError, "model.safetensors", "pytorch_model.bin", "save_pretrained"):
        load_bert(tiny)


def test_a_damaged_file_is_named(tiny):
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with raises(UserError, weights):
        load_bert(tiny)


@pytest.mark.parametrize(
    ("text", "datum"), [(b"{", "column 2"), (b"[]", "list"), (b'"\xff"', "0xff")]
)
def test_a_damaged_config_is_named(tiny, text, datum):
    (tiny / "config.json").write_bytes(text)
    with raises(UserError, tiny / "config.json", datum):
        load_bert(tiny)


def test_only_safe_files_are_requested_from_the_hub(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    request = {}

    def snapshot_download(name, **options):
        request.update(name=name, **options)
        return str(FIXTURES / "bert")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve("owner/model", "v1") == FIXTURES / "bert"
    assert (request["name"], request["revision"]) == ("owner/model", "v1")
    assert not any("bin" in pattern for pattern in request["allow_patterns"])


@pytest.mark.parametrize("name", ["owner/absent", "../absent/directory/here"])
def test_an_unreachable_id_is_one_clear_error(name, monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with raises(UserError, repr(name)):
        resolve(name)


def test_without_huggingface_hub_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises(MissingPackageError, "huggingface_hub", "[finetune]"):
        resolve("owner/model")


LATER = {
    "bert": "bert",
    "decoders/gpt2": "gpt2",
    "decoders/llama": "llama",
    "towers/gemma3": "gemma3_text",
    "t5/t5": "t5",
    "vit": "vit",
}


@pytest.mark.witness("bert-6.0.0", "decoders/llama-12.1.0.dev0")
@pytest.mark.parametrize("version", ["6.0.0", "12.1.0.dev0"])
@pytest.mark.parametrize("name", LATER)
def test_a_later_transformers_is_a_warning(name, version, tmp_path):
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "later"))
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"transformers_version": version}))
    load = FAMILIES[LATER[name]].load
    config = load(FIXTURES / name)[0]
    with pytest.warns(AdapterWarning, match=rf"config\.json is of transformers '{version}'; files"):
        assert load(directory)[0] == config


@pytest.mark.parametrize("version", ["5.24.0", "4.57.6", "mine", None, 6, "x" + "9" * 5000])
def test_other_versions_are_not(version, tiny):
    values = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(values | {"transformers_version": version}))
    load_bert(tiny)


@pytest.mark.parametrize("name", LATER)
def test_a_later_layout_of_settings_is_refused(name, tmp_path):
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "later"))
    values = json.loads((directory / "config.json").read_text())
    kept = {"model_type": values["model_type"], "transformers_version": "6.1.0"}
    inner = {"text_config": {"sizes": {}}, "vision_config": values.get("vision_config")}
    inner = inner if name == "towers/gemma3" else {}
    (directory / "config.json").write_text(json.dumps({**kept, **inner, "sizes": values}))
    with raises(BaseFileError, "config.json", "'6.1.0'", "neither vocab_size nor hidden_size"):
        FAMILIES[LATER[name]].load(directory)
