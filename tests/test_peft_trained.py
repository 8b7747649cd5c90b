"""The base's own parameters in PEFT's files: heads, biases, norms, rows of embeddings."""

import json

import numpy as np
import pytest
import safetensors.numpy
from helpers.arrays import drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError
from adapters_jax.files.directories import PEFT
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.trees import flatten, unflatten

ROOT = "base_model.model."


def tree(**shapes):
    """Arrays by path, with `__` for `/`."""
    found = {path.replace("__", "/"): drawn(x, seed=len(path)) for path, x in shapes.items()}
    return unflatten(found)


def tensors_of(directory):
    found = safetensors.numpy.load_file(directory / PEFT.tensors)
    return {name.removeprefix(ROOT): tensor for name, tensor in found.items()}


def written(directory, tensors, **config):
    """A directory of PEFT's."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2"} | config
    (directory / PEFT.config).write_text(json.dumps(config))
    whole = {ROOT + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, directory / PEFT.tensors)
    return directory


def equal(left, right):
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


LORA = aj.LoRA("**/query", 2)
DISTILBERT = FAMILIES["distilbert"].classifier.names
PARAMS = tree(
    bert__layer_0__attention__query__kernel=(4, 4),
    bert__layer_0__attention__query__bias=(4,),
    bert__pooler__dense__kernel=(4, 4),
    bert__pooler__dense__bias=(4,),
    head__kernel=(4, 3),
    head__bias=(3,),
)
FACTORS = {
    "bert/layer_0/attention/query/lora/a": drawn((4, 2)),
    "bert/layer_0/attention/query/lora/b": drawn((2, 4), seed=1),
}
HEAD = {"head/kernel": drawn((4, 3), seed=5), "head/bias": drawn((3,), seed=6)}


def test_the_head_of_distilbert_is_saved_with_the_layer_before_it(tmp_path):
    recipe = aj.Recipe(LORA, aj.Unfreeze("head/*"))
    directory = save_peft(tmp_path / "a", recipe, unflatten(FACTORS | HEAD), DISTILBERT, PARAMS)
    found = tensors_of(directory)
    before = PARAMS["bert"]["pooler"]["dense"]
    np.testing.assert_array_equal(found["pre_classifier.weight"], before["kernel"].T)
    np.testing.assert_array_equal(found["pre_classifier.bias"], before["bias"])
    np.testing.assert_array_equal(found["classifier.weight"], HEAD["head/kernel"].T)
    config = json.loads((directory / PEFT.config).read_text())
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    back = load_peft(directory, DISTILBERT, PARAMS)[1]
    also = {f"bert/pooler/dense/{name}": leaf for name, leaf in before.items()}
    equal(back, unflatten(FACTORS | HEAD | also))


@pytest.mark.parametrize(("task", "whole"), [("SEQ_CLS", True), ("FEATURE_EXTRACTION", False)])
def test_a_classifier_of_peft_has_its_head_whether_it_trained_or_not(task, whole, tmp_path):
    names = FAMILIES["bert"].classifier.names
    bias = {"head/bias": HEAD["head/bias"]}
    recipe = aj.Recipe(LORA, aj.Unfreeze("head/bias"))
    for trained in ({}, bias):
        own = recipe if trained else LORA
        leaves = unflatten(FACTORS | trained)
        where = tmp_path / str(len(trained))
        found = tensors_of(save_peft(where, own, leaves, names, PARAMS, task_type=task))
        assert ("classifier.weight" in found) is whole
        assert ("classifier.bias" in found) is (whole or bool(trained))
        if whole:
            np.testing.assert_array_equal(found["classifier.weight"], PARAMS["head"]["kernel"].T)


def test_a_head_that_peft_saves_twice_is_read_once(tmp_path):
    names = FAMILIES["roberta"].classifier.names
    factors = {"lora_A.weight": drawn((2, 4)), "lora_B.weight": drawn((4, 2))}
    query = "roberta.encoder.layer.0.attention.self.query"
    tensors = {f"{query}.{name}": leaf for name, leaf in factors.items()}
    dense = {"dense.weight": drawn((4, 4)), "dense.bias": drawn((4,))}
    dense |= {"out_proj.weight": drawn((3, 4)), "out_proj.bias": drawn((3,))}
    tensors |= {f"classifier.{name}": leaf for name, leaf in dense.items()}
    again = {f"classifier.modules_to_save.default.{n}": x for n, x in dense.items() if "bias" in n}
    fields = {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "all"}
    source = written(tmp_path / "a", tensors | again, **fields)
    back = flatten(load_peft(source, names, PARAMS)[1])
    np.testing.assert_array_equal(back["bert/pooler/dense/bias"], dense["dense.bias"])
    np.testing.assert_array_equal(back["head/bias"], dense["out_proj.bias"])
    again["classifier.modules_to_save.default.dense.bias"] = drawn((4,), seed=9)
    other = written(tmp_path / "b", tensors | again, **fields)
    with raises(AdapterFileError, "classifier.modules_to_save.default.dense.bias"):
        load_peft(other, names, PARAMS)
