"""The base's own parameters in PEFT's files: heads, biases, norms, rows of embeddings."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.arrays import drawn
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, UserError
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
    config = {"peft_type": "LORA", "peft_version": "0.21.2"} | config
    config |= {"r": 2, "lora_alpha": 6} if config["peft_type"] == "LORA" else {}
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
    with raises(AdapterFileError, "classifier.modules_to_save.dense.bias"):
        load_peft(other, names, PARAMS)


# What PEFT adds to the base's own parameters, on a model with an embedding, a layer and a norm.

NET = {
    **{"words": "words", "q": "query", "plain": "plain", "norm": "norm", "lm_head": "out"},
}
NET_PARAMS = tree(
    words__embedding=(9, 4),
    query__kernel=(4, 4),
    query__bias=(4,),
    plain__kernel=(4, 4),
    norm__scale=(4,),
    norm__bias=(4,),
    out__kernel=(4, 9),
)
QUERY = {"q.lora_A.weight": drawn((2, 4)), "q.lora_B.weight": drawn((4, 2), seed=1)}
PLAIN = {name.replace("q.", "plain."): leaf for name, leaf in QUERY.items()}
B_BIAS = {"q.lora_B.bias": drawn((4,), seed=2)}


def read(tmp_path, tensors, params=NET_PARAMS, names=NET, **fields):
    source = written(tmp_path / str(len(list(tmp_path.iterdir()))), tensors, **fields)
    recipe, leaves = load_peft(source, names, params)
    return recipe, flatten(leaves)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("fields", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / 2**0.5)])
def test_the_bias_of_b_is_added_to_the_bias_of_the_base(tmp_path, own, fields, scale):
    more = {"q.base_layer.bias": drawn((4,), seed=8)} if own else {}
    fields |= {"bias": "lora_only"} if own else {}
    about = {"target_modules": ["q"], "lora_bias": True, **fields}
    recipe, found = read(tmp_path, QUERY | B_BIAS | more, **about)
    before = more["q.base_layer.bias"] if own else NET_PARAMS["query"]["bias"]
    expected = before + scale * B_BIAS["q.lora_B.bias"]
    np.testing.assert_allclose(found["query/bias"], expected, rtol=1e-6)
    assert recipe.trains("query/bias")


@pytest.mark.parametrize(
    ("tensors", "fields", "data"),
    [
        (PLAIN | {"plain.lora_B.bias": drawn((4,))}, {}, ["plain.lora_B.bias", "lora_bias=False"]),
        (QUERY | {"q.lora_B.bias": drawn((3,))}, {}, ["q.lora_B.bias", [3], [4]]),
        (QUERY | B_BIAS, {"lora_bias": False}, ["q.lora_B.bias", "lora_bias=True"]),
        (QUERY | B_BIAS, {"lora_bias": 1}, ["lora_bias=1"]),
    ],
)
def test_biases_of_b_that_cannot_be_kept_are_named(tmp_path, tensors, fields, data):
    fields = {"target_modules": ["q", "plain"], "lora_bias": True} | fields
    with raises(AdapterFileError, *data):
        read(tmp_path, tensors, **fields)


ROWS = drawn((2, 4), seed=3)
TOKENS = {"words.token_adapter.trainable_tokens_delta": ROWS}


def test_rows_of_tokens_replace_those_of_the_embedding_and_of_the_output_layer(tmp_path):
    both = TOKENS | {"lm_head.token_adapter.trainable_tokens_delta": ROWS[:1]}
    for tokens, tensors in (
        ([7, 2], TOKENS),
        ({"words": [7, 2]}, TOKENS),
        ({"words": [7, 2], "lm_head": [5]}, both),
    ):
        fields = {"target_modules": ["q"], "trainable_token_indices": tokens}
        recipe, found = read(tmp_path, QUERY | tensors, **fields)
        whole = np.array(NET_PARAMS["words"]["embedding"])
        whole[7], whole[2] = ROWS
        np.testing.assert_array_equal(found["words/embedding"], whole)
        assert recipe.trains("words/embedding")
        out = np.array(NET_PARAMS["out"]["kernel"])
        out[:, 5] = ROWS[0]
        if tensors is both:
            np.testing.assert_array_equal(found["out/kernel"], out)
    alone = {"words.trainable_tokens_delta": ROWS}
    fields = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [7, 2]}
    found = read(tmp_path, alone, target_modules=["words"], **fields)[1]
    assert list(found) == ["words/embedding"]
    np.testing.assert_array_equal(found["words/embedding"], whole)


TIED = ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")


@pytest.mark.parametrize("alone", [True, False])
def test_rows_of_a_tied_embedding_are_those_of_all_modules_that_hold_it(alone, tmp_path):
    """PEFT writes them for each of these, where nothing else trains; on a T5 it applies them."""
    names, base = FAMILIES["t5"].names, tree(embeddings__embedding=(9, 4))
    fields = {
        "target_modules": ["shared"],
        "token_indices": [7, 2],
        "peft_type": "TRAINABLE_TOKENS",
    }
    tensors = {f"{name}.trainable_tokens_delta": ROWS for name in ("shared", *TIED)}
    if not alone:
        base |= tree(encoder__layers__0__attention__query__kernel=(4, 4))
        fields = {"target_modules": ["q"], "trainable_token_indices": [7, 2]}
        tensors = {"shared.token_adapter.trainable_tokens_delta": ROWS}
        factors = {"lora_A.weight": drawn((2, 4)), "lora_B.weight": drawn((4, 2), seed=1)}
        tensors |= {f"encoder.block.0.layer.0.SelfAttention.q.{k}": x for k, x in factors.items()}
    _, found = load_peft(written(tmp_path / "a", tensors, **fields), names, base)
    whole = np.array(base["embeddings"]["embedding"])
    whole[7], whole[2] = ROWS
    np.testing.assert_array_equal(found["embeddings"]["embedding"], whole)
    if alone:
        tensors |= {"lm_head.trainable_tokens_delta": ROWS + 1}
        with raises(AdapterFileError, "lm_head"):
            load_peft(written(tmp_path / "b", tensors, **fields), names, base)
        base |= tree(head__kernel=(4, 9))  # where PEFT's rows reach no module that is called
        with raises(AdapterFileError, "'shared'"):
            tensors = {"shared.trainable_tokens_delta": ROWS}
            load_peft(written(tmp_path / "c", tensors, **fields), names, base)


@pytest.mark.parametrize(
    ("tokens", "data"),
    [
        ([7, 9], ["words", [7, 9], 9, "resize_token_embeddings"]),
        ([7, -1], ["words", [7, -1]]),
        ([7], ["words", [2, 4], [7]]),
        ([7, True], ["words"]),
        ({"other": [7, 2]}, ["words", None]),
        ("all", ["trainable_token_indices='all'"]),
        (None, ["words", None]),
    ],
)
def test_rows_of_tokens_that_do_not_fit_are_named(tmp_path, tokens, data):
    fields = {"target_modules": ["q"], "trainable_token_indices": tokens}
    with raises(AdapterFileError, *data):
        read(tmp_path, QUERY | TOKENS, **fields)


def test_what_changes_the_base_needs_its_values(tmp_path):
    shapes = jax.eval_shape(lambda: NET_PARAMS)
    for tensors, field, path in (
        (TOKENS, {"trainable_token_indices": [7, 2]}, "words/embedding"),
        (B_BIAS, {"lora_bias": True}, "query/bias"),
    ):
        with raises(AdapterFileError, path, "values"):
            read(tmp_path, QUERY | tensors, shapes, target_modules=["q"], **field)
    with raises(AdapterFileError, "names maps other"):
        other = {"other.token_adapter.trainable_tokens_delta": ROWS}
        read(tmp_path, QUERY | other, target_modules=["q"], trainable_token_indices=[1, 2])


def test_a_vocabulary_that_grew_is_named(tmp_path):
    larger = {"words.weight": drawn((11, 4)), "lm_head.weight": drawn((11, 4))}
    fields = {"target_modules": ["q"], "modules_to_save": ["words", "lm_head"]}
    with raises(AdapterFileError, "words.weight", [11, 4], [9, 4], "resize_token_embeddings"):
        read(tmp_path, QUERY | larger, **fields)


def test_a_parameter_that_peft_cannot_train_is_named_by_both(tmp_path):
    recipe = aj.Recipe(LORA, aj.Unfreeze("{experts|other}/bias"))
    base = tree(layer__query__kernel=(4, 4), experts__bias=(3, 4), other__bias=(4,))
    base["experts"]["kernel"] = drawn((3, 4, 4))
    names = {"q": "layer/query", "experts.up_bias": "experts/bias"}
    leaves = {
        f"layer/query/lora/{name}": drawn((4, 2)[:: 1 if name == "a" else -1]) for name in "ab"
    }
    leaves |= {"experts/bias": drawn((3, 4)), "other/bias": drawn((4,))}
    with raises(UserError, "experts/bias", "experts.up_bias", "leave it out") as caught:
        save_peft(tmp_path / "a", recipe, unflatten(leaves), names, base)
    assert "names has no module name for other/bias; add it" in str(caught.value)
    assert "no module name for experts" not in str(caught.value)


def test_norms_alone_go_both_ways(tmp_path):
    own = {"norm/scale": drawn((4,), seed=7), "norm/bias": drawn((4,), seed=8)}
    recipe = aj.Recipe(aj.Unfreeze("norm/scale"))
    leaves = unflatten({"norm/scale": own["norm/scale"]})
    directory = save_peft(tmp_path / "a", recipe, leaves, NET, NET_PARAMS)
    config = json.loads((directory / PEFT.config).read_text())
    assert (config["peft_type"], config["target_modules"]) == ("LN_TUNING", ["norm"])
    assert "bias" not in config
    found = tensors_of(directory)
    assert found.keys() == {"norm.ln_tuning_layers.weight", "norm.ln_tuning_layers.bias"}
    np.testing.assert_array_equal(found["norm.ln_tuning_layers.bias"], NET_PARAMS["norm"]["bias"])
    recipe, back = load_peft(directory, NET, NET_PARAMS)
    assert recipe == aj.Recipe(aj.Unfreeze(("norm/bias", "norm/scale")))
    equal(back, unflatten(own | {"norm/bias": NET_PARAMS["norm"]["bias"]}))
    with raises(UserError, "query/kernel", "LN_TUNING"):
        kernel = unflatten({"query/kernel": drawn((4, 4))})
        save_peft(tmp_path / "b", aj.Recipe(aj.Unfreeze("query/kernel")), kernel, NET, NET_PARAMS)
    tuned = {"norm.ln_tuning_layers.weight": drawn((4,))}
    for fields, data in (
        ({"peft_type": "LN_TUNING", "target_modules": ["other"]}, ["norm.ln_tuning_layers.weight"]),
        ({"target_modules": ["q"]}, ["norm.ln_tuning_layers.weight"]),
        ({"peft_type": "LN_TUNING", "target_modules": 3}, ["target_modules=3"]),
    ):
        with raises(AdapterFileError, *data):
            read(tmp_path, tuned if "peft_type" in fields else QUERY | tuned, **fields)
