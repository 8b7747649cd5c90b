"""Adapters of Hugging Face PEFT: its logits and tensors, both ways, and every misfit named."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from helpers.arrays import read_arrays

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError
from adapters_jax.interop.peft import CONFIG, PICKLE, TENSORS, load_peft, save_peft
from adapters_jax.interop.peft.config import means
from adapters_jax.models import bert, gpt2, llama
from adapters_jax.models.bert import classifier
from adapters_jax.models.llama import Llama
from adapters_jax.trees import flatten, unflatten

BASES = Path(__file__).parent / "fixtures"
FIXTURES = BASES / "peft"
NET = {"embed": "embed", "line": "line", "plane": "plane", "head": "head"}
HAVE = sorted(path.name for path in FIXTURES.glob("*") if (path / CONFIG).exists())


class Net(nn.Module):
    """The net of convolutions that the fixtures' script has."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="embed")(ids)
        x = nn.relu(nn.Conv(8, (3,), padding=1, name="line")(x))
        x = nn.Conv(4, (3, 3), padding=1, name="plane")(x.transpose(0, 2, 1)[..., None])
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def inputs_of(base):
    with np.load(BASES / base / "expected.npz") as file:
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        return {name: file[name] for name in names if name in file}


@cache
def base_of(fixture):
    """The model that a fixture is for: its table, itself, its parameters and its inputs."""
    kind = fixture.split("_")[0]
    if kind == "bert":
        config, params = bert.load_bert(BASES / "bert", pooler=True)
        head = read_arrays(BASES / "bert")
        head = {"kernel": head["classifier.weight"].T, "bias": head["classifier.bias"]}
        model = classifier.BertClassifier(config, 3, pooling="pooler")
        return classifier.NAMES, model, {"bert": params, "head": head}, inputs_of("bert")
    if kind == "gpt2":
        config, params = gpt2.load_gpt2(BASES / "gpt2")
        return gpt2.NAMES, gpt2.GPT2(config), params, inputs_of("gpt2")
    if kind == "llama":
        _, model = llama.load_llama(BASES / "llama")
        inputs = inputs_of("llama")
        inputs["positions"] = inputs.pop("position_ids")
        return llama.NAMES, model, model, inputs
    tensors = read_arrays(FIXTURES / "net")
    params = {}
    for name, tensor in tensors.items():
        module, leaf = name.split(".")
        turned = tensor.transpose(*range(2, tensor.ndim), 1, 0) if tensor.ndim > 1 else tensor
        key = "bias" if leaf == "bias" else "embedding" if module == "embed" else "kernel"
        params.setdefault(module, {})[key] = tensor if key == "embedding" else turned
    return NET, Net(), params, {"ids": jnp.arange(24).reshape(3, 8) % 11}


def adapted_logits(fixture, recipe, adapters, tmp_path):
    _, model, params, inputs = base_of(fixture)
    if isinstance(model, Llama):
        grown = aj.load_adapter(aj.save_adapter(tmp_path / "ours", adapters, recipe), model)
        return grown(**inputs)
    whole = aj.merge_trees(adapters, aj.partition(params, recipe)[1])
    return aj.adapt(model, recipe).apply({"params": whole}, **inputs)


def tensors_of(directory):
    return safetensors.numpy.load_file(Path(directory) / TENSORS)


def equal(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


@pytest.mark.parametrize("fixture", HAVE)
def test_logits_are_those_of_peft(fixture, tmp_path):
    names, model, params, inputs = base_of(fixture)
    recipe, adapters = load_peft(FIXTURES / fixture, names, params)
    logits = adapted_logits(fixture, recipe, adapters, tmp_path)
    expected = np.load(FIXTURES / fixture / "logits.npy")
    plain = (
        model(**inputs) if isinstance(model, Llama) else model.apply({"params": params}, **inputs)
    )
    seen = slice(None)
    if logits.ndim == 3:
        seen = inputs["attention_mask"] == 1
    np.testing.assert_allclose(logits[seen], expected[seen], atol=1e-4)
    assert np.abs(plain[seen] - expected[seen]).max() > 0.05  # the adapter matters


@pytest.mark.parametrize("fixture", HAVE)
def test_an_export_has_the_tensors_of_the_original_and_loads_again(fixture, tmp_path):
    names, _, params, _ = base_of(fixture)
    recipe, adapters = load_peft(FIXTURES / fixture, names, params)
    written = save_peft(tmp_path / "theirs", recipe, adapters, names, params)
    original = tensors_of(FIXTURES / fixture)
    kept = {k: t for k, t in original.items() if "embed_tokens.base_layer" not in k}
    equal(tensors_of(written), kept)
    again, leaves = load_peft(written, names, params)
    equal(flatten(leaves), flatten(adapters))
    for path in {path.rpartition("/lora/")[0] for path in flatten(leaves) if "/lora/" in path}:
        (first,), (second,) = recipe.at(path), again.at(path)
        assert first.rank_at(path) == second.rank_at(path)
        assert first.scale_at(path) == pytest.approx(second.scale_at(path), abs=1e-9)
        assert (type(first), first.dropout, first.a_init) == (
            type(second),
            second.dropout,
            second.a_init,
        )


def test_all_fixtures_are_there():
    assert len(HAVE) == 10


def test_recipes_say_what_the_configurations_say():
    def recipe(fixture):
        names, _, params, _ = base_of(fixture)
        return load_peft(FIXTURES / fixture, names, params)[0]

    assert recipe("bert_head") == aj.Recipe(
        aj.LoRA(("**/query", "**/value"), 4, 6, 0.1, "uniform"),
        aj.Unfreeze(("head/bias", "head/kernel")),
    )
    prompts = aj.LlamaAdapter("layers/1/attention", 3, "layer", "identity")
    assert recipe("llama_prompt") == aj.Recipe(prompts)
    (ranked,) = recipe("llama_rslora")
    assert ranked.rank_stabilized and ranked.rank_at("layers/1/mlp/up") == 3
    assert (
        ranked.rank_at("layers/0/mlp/up") == 4 and ranked.rank_at("layers/1/attention/query") == 2
    )
    assert ranked.scale_at("layers/0/attention/value") == 5 / 2
    dora, *_, biases = recipe("bert_dora")
    assert isinstance(dora, aj.DoRA) and biases == aj.Unfreeze("**/bias")


# Adapters written by hand, for what the fixtures have not.

PARAMS = {
    "block_0": {"q": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}},
    "block_1": {"q": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "heads": {"kernel": jnp.ones((6, 2, 3))},
    "words": {"embedding": jnp.ones((9, 6))},
}
NAMES = {
    "h.0.q": "block_0/q",
    "h.1.q": "block_1/q",
    "ln": "norm",
    "words": "words",
    "heads": "heads",
}
CONFIGURATION = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "words"]}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hand_made(directory, tensors=None, **fields):
    """An adapter of h.0.q, changed as asked."""
    directory.mkdir()
    root = "base_model.model."
    whole = {"h.0.q.lora_A.weight": drawn(2, 6), "h.0.q.lora_B.weight": drawn(4, 2)}
    whole |= tensors or {}
    whole = {root + name: np.ascontiguousarray(t) for name, t in whole.items() if t is not None}
    safetensors.numpy.save_file(whole, directory / TENSORS)
    (directory / CONFIG).write_text(json.dumps(CONFIGURATION | fields))
    return directory


def test_factors_are_transposed_and_scaled(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("block_0/q", 2, 4, a_init="uniform"))
    np.testing.assert_array_equal(adapters["block_0"]["q"]["lora"]["a"], drawn(2, 6).T)
    np.testing.assert_array_equal(adapters["block_0"]["q"]["lora"]["b"], drawn(4, 2).T)
    assert recipe.attached[0].scale_at("block_0/q") == 2.0


def test_abstract_bases_are_enough(tmp_path):
    shapes = jax.eval_shape(lambda: PARAMS)
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, shapes)
    save_peft(tmp_path / "b", recipe, adapters, NAMES, shapes)
    equal(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a"))


def test_half_precision_becomes_float32(tmp_path):
    low = {"h.0.q.lora_A.weight": drawn(2, 6).astype(jnp.bfloat16)}
    _, adapters = load_peft(hand_made(tmp_path / "a", low), NAMES, PARAMS)
    assert adapters["block_0"]["q"]["lora"]["a"].dtype == jnp.float32


def test_a_layer_of_heads_is_their_linear_layer(tmp_path):
    heads = {"heads.lora_A.weight": drawn(2, 6), "heads.lora_B.weight": drawn(6, 2, seed=1)}
    source = hand_made(tmp_path / "a", heads, target_modules=["q", "heads"])
    recipe, adapters = load_peft(source, NAMES, PARAMS)
    assert adapters["heads"]["lora"]["b"].shape == (2, 2, 3)
    equal(
        tensors_of(save_peft(tmp_path / "b", recipe, adapters, NAMES, PARAMS)), tensors_of(source)
    )


def test_fields_at_their_default_do_no_harm(tmp_path):
    fields = {"new": None, "newer": False, "dict": {}, "list": [], "megatron_core": "megatron.core"}
    fields |= {"rank_pattern": None, "bias": None, "init_lora_weights": None, "lora_dropout": None}
    recipe, _ = load_peft(hand_made(tmp_path / "a", **fields), NAMES, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("block_0/q", 2, 4, a_init="uniform"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type='VERA', expected LORA or ADAPTION_PROMPT or IA3"),
        ({"lora_bias": True, "use_qalora": True}, "lora_bias=True is not supported; use_qalora=Tr"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_parameters": ["w"]}, r"target_parameters=\['w'\] is not supported"),
        ({"some_future_field": 0.5}, "some_future_field=0.5 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', expected one of .*conversion"),
        ({"bias": "some"}, "bias='some', expected one of 'none', 'all', 'lora_only'"),
        ({"r": "8"}, "r='8', expected a whole number"),
        ({"lora_alpha": True}, "lora_alpha=True, expected a number"),
        ({"lora_alpha": 0}, "LoRA: alpha=0, expected a finite number > 0"),
        ({"rank_pattern": [1]}, r"rank_pattern=\[1\], expected dict"),
        ({"rank_pattern": {"q": "x"}}, "rank_pattern=.*expected a number for each pattern"),
        ({"target_modules": "("}, "target_modules='\\(', and '\\(' is no regular expression"),
        ({"r": 3}, "h.0.q has the rank 2, the configuration says 3"),
        (
            {"target_modules": ["k"]},
            "h.0.q has factors and is not among the configuration's target",
        ),
        (
            {"layers_to_transform": [1]},
            "h.0.q has factors and is not among the configuration's tar",
        ),
        ({"use_dora": True}, r"h.0.q has the tensors of a, b, expected \['a', 'b', 'magnitude'\]"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, fields, message):
    with pytest.raises(AdapterFileError, match=message) as error:
        load_peft(hand_made(tmp_path / "a", **fields), NAMES, PARAMS)
    assert str(error.value).startswith(f"{tmp_path / 'a'} cannot be read as it is meant: ")


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
    spoilt = {
        "h.0.q.lora_B.weight": drawn(5, 2),
        "h.1.q.lora_A.weight": drawn(2, 6),
        "h.7.q.lora_A.weight": drawn(2, 6),
        "h.7.q.lora_B.weight": drawn(4, 2),
        "ln.weight": drawn(3),
        "h.1.q.weight": drawn(6, 4),
        "unknown.bias": drawn(3),
    }
    with pytest.raises(AdapterFileError) as error:
        load_peft(hand_made(tmp_path / "a", spoilt), NAMES, PARAMS)
    for part in (
        "h.0.q has A [2, 6] and B [5, 2], which do not fit block_0/q of [6, 4]",
        "h.1.q has the tensors of a, expected ['a', 'b']",
        "h.7.q is no layer of the base that names knows",
        "ln.weight is [3], which does not fit norm",
        "h.1.q.weight is [6, 4], which does not fit block_1/q",
        "unknown.bias: unknown is no module of the base that names knows",
    ):
        assert part in str(error.value)


def test_dora_on_an_embedding_is_refused(tmp_path):
    table = {
        "h.0.q.lora_magnitude_vector": drawn(4),
        "words.lora_embedding_A": drawn(2, 9),
        "words.lora_embedding_B": drawn(6, 2),
        "words.lora_magnitude_vector": drawn(6),
    }
    with pytest.raises(AdapterFileError, match="words: DoRA on an embedding is not supported"):
        load_peft(hand_made(tmp_path / "a", table, use_dora=True), NAMES, PARAMS)


def test_tied_embeddings_are_refused_both_ways(tmp_path):
    names, _, params, _ = base_of("gpt2")
    shapes = params["embeddings"]["word"]["embedding"].shape
    table = {"transformer.wte.lora_embedding_A": drawn(2, shapes[0])}
    table |= {"transformer.wte.lora_embedding_B": drawn(shapes[1], 2)}
    table |= dict.fromkeys(("h.0.q.lora_A.weight", "h.0.q.lora_B.weight"))
    source = hand_made(tmp_path / "a", table, target_modules=["wte"])
    with pytest.raises(
        AdapterFileError, match="transformer.wte: PEFT adapts the word embeddings al"
    ):
        load_peft(source, names, params)
    leaves = {"a": drawn(shapes[0], 2), "b": drawn(2, shapes[1])}
    tree = {"embeddings": {"word": {"lora": leaves}}}
    with pytest.raises(ValueError, match="embeddings/word: PEFT adapts the word embeddings alone"):
        save_peft(tmp_path / "b", aj.LoRA("**/word", 2), tree, names, params)


def test_a_pickle_is_not_opened_and_the_way_round_it_is_named(tmp_path):
    directory = hand_made(tmp_path / "a")
    (directory / TENSORS).rename(directory / PICKLE)
    (directory / PICKLE).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(
        AdapterFileError, match=r"lacks .*model.safetensors; a pickled .*save_pretra"
    ):
        load_peft(directory, NAMES, PARAMS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "neither a directory here nor an adapter on the Hugging Face Hub, whose"),
        (lambda d: (d / CONFIG).write_text("{"), f"{CONFIG} is damaged: Expecting"),
        (lambda d: (d / CONFIG).write_text("{}"), "has no peft_type, .* is for load_adapter"),
        (
            lambda d: (d / TENSORS).write_bytes(b"PK" * 99),
            f"{TENSORS} is damaged: it has 198",
        ),
    ],
)
def test_a_damaged_directory_says_what_is_wrong(tmp_path, spoil, message):
    directory = hand_made(tmp_path / "a")
    spoil(directory)
    with pytest.raises(AdapterFileError, match=message):
        load_peft(directory, NAMES, PARAMS)


def test_names_that_do_not_fit_the_base(tmp_path):
    directory = hand_made(tmp_path / "a")
    with pytest.raises(
        ValueError, match="'h.0.q' to 'block/q' .nearest: block_[01]/q, block_[01]/q"
    ):
        load_peft(directory, {"h.0.q": "block/q"}, PARAMS)
    with pytest.raises(ValueError, match="names knows none of the base's modules block_0/q"):
        load_peft(directory, bert.NAMES, PARAMS)


def factors(path, rank=2, width=32, out=32, seed=0):
    return {f"{path}/lora/a": drawn(width, rank, seed=seed), f"{path}/lora/b": drawn(rank, out)}


def test_parts_of_a_fused_module_go_side_by_side(tmp_path):
    names, _, params, _ = base_of("gpt2")
    recipe = aj.Recipe(aj.LoRA("layer_1/*/query", 2, 6), aj.LoRA("layer_1/*/value", 3, 3))
    own = factors("layer_1/attention/query") | factors("layer_1/attention/value", 3, seed=4)
    directory = save_peft(tmp_path / "a", recipe, unflatten(own), names, params)
    tensors = tensors_of(directory)
    config = json.loads((directory / CONFIG).read_text())
    root = "base_model.model.transformer.h.1.attn.c_attn.lora_"
    a, b = tensors[f"{root}A.weight"], tensors[f"{root}B.weight"]
    assert a.shape == (5, 32) and b.shape == (96, 5) and config["fan_in_fan_out"]
    delta = config["lora_alpha"] / config["r"] * (b @ a).T
    query, key, value = np.split(delta, 3, axis=1)
    made = {}
    for name in ("query", "value"):
        path = f"layer_1/attention/{name}/lora"
        made[name] = own[f"{path}/a"] @ own[f"{path}/b"]
    np.testing.assert_allclose(query, 3 * made["query"], atol=1e-5)
    np.testing.assert_allclose(value, made["value"], atol=1e-5)
    np.testing.assert_array_equal(key, 0)
    only = {k: v for k, v in own.items() if "query" in k}
    only["layer_1/attention/query/lora/magnitude"] = drawn(32)
    with pytest.raises(ValueError, match="c_attn: PEFT's DoRA adapts all of its parts, or none"):
        save_peft(tmp_path / "b", aj.DoRA("layer_1/*/query", 2), unflatten(only), names, params)


def test_slices_become_rows_of_zeros(tmp_path):
    sliced = aj.LoRA("block_0/q", 2, slices=((1, 3),))
    leaves = factors("block_0/q", width=6, out=2)
    directory = save_peft(tmp_path / "a", sliced, unflatten(leaves), NAMES, PARAMS)
    b = tensors_of(directory)["base_model.model.h.0.q.lora_B.weight"]
    np.testing.assert_array_equal(b[1:3], leaves["block_0/q/lora/b"].T)
    assert b.shape == (4, 2) and not b[[0, 3]].any()


@pytest.mark.parametrize(
    ("paths", "bias", "saved", "keys"),
    [
        (("block_0/q/bias",), "lora_only", None, ["h.0.q.base_layer.bias"]),
        (("block_1/q/bias", "norm/bias"), "all", None, ["h.1.q.bias", "ln.bias"]),
        (("norm/scale",), "none", ["ln"], ["ln.bias", "ln.weight"]),
        (("block_1/q/kernel",), "none", ["h.1.q"], ["h.1.q.bias", "h.1.q.weight"]),
    ],
)
def test_the_bases_own_leaves_are_biases_or_modules(tmp_path, paths, bias, saved, keys):
    own = factors("block_0/q", width=6, out=4)
    own |= {path: drawn(*flatten(PARAMS)[path].shape, seed=7) for path in paths}
    recipe = aj.Recipe(aj.LoRA("block_0/q", 2), aj.Unfreeze(paths))
    directory = save_peft(tmp_path / "a", recipe, unflatten(own), NAMES, PARAMS)
    config = json.loads((directory / CONFIG).read_text())
    assert (config["bias"], config["modules_to_save"]) == (bias, saved)
    found = {k.removeprefix("base_model.model.") for k in tensors_of(directory) if "lora" not in k}
    assert sorted(found) == keys
    _, again = load_peft(directory, NAMES, PARAMS)
    for path in paths:
        np.testing.assert_array_equal(flatten(again)[path], own[path])


LLAMA_GATES = aj.LlamaAdapter("layers/{0,1}/attention", 3)


def test_what_peft_cannot_express_is_named(tmp_path):
    def saving(recipe, flat, message, names=NAMES, params=PARAMS):
        with pytest.raises(ValueError, match=message):
            save_peft(tmp_path / "a", recipe, unflatten(flat), names, params)
        assert not (tmp_path / "a").exists()

    own = factors("block_0/q", width=6, out=4)
    both = own | factors("block_1/q", width=6, out=4)
    lora, other = aj.LoRA("block_0/q", 2), aj.LoRA("block_1/q", 2, dropout=0.5)
    saving(aj.Recipe(lora, other), both, "dropout and rank_stabilized are one for all in PEFT")
    mixed = both | {"block_1/q/lora/magnitude": drawn(4)}
    saving(aj.Recipe(lora, aj.DoRA("block_1/q", 2)), mixed, "it adds DoRA, LoRA; PEFT has LoRA alo")
    saving(aj.Unfreeze("norm/**"), {"norm/bias": drawn(4)}, "it adds nothing; PEFT has LoRA alone")
    prefix = {"block_0/q/adapter/down/bias": drawn(4)}
    saving(aj.Bottleneck("block_0/q", 4), prefix, "it adds Bottleneck; PEFT has LoRA alone")
    saving(lora, {"block_0/q/lora/a": drawn(6, 2)}, "block_0/q lacks b")
    saving(lora, factors("block_0/q", width=5, out=4), r"its factors are not of its weight .6, 4.")
    pissa = aj.LoRA("block_0/q", 2, a_init="pissa")
    saving(pissa, own, "a_init='pissa' took its factors out of the base, which PEFT has whole")
    saving(lora, own | {"norm/bias": drawn(4)}, "norm/bias is not trained by the recipe")
    taken = own | {"block_0/q/kernel": drawn(6, 4)}
    recipe = aj.Recipe(lora, aj.Unfreeze("block_0/q/kernel"))
    saving(recipe, taken, "h.0.q has factors, and its weight trains as well")
    partial = {name: path for name, path in NAMES.items() if name != "h.0.q"}
    saving(lora, own, "block_0/q has no name in PEFT's files; add it to names", partial)
    shapes = jax.eval_shape(lambda: PARAMS)
    recipe = aj.Recipe(lora, aj.Unfreeze("norm/scale"))
    lone = own | {"norm/scale": drawn(4)}
    saving(recipe, lone, "norm/bias goes with what trains: give a base with its", params=shapes)


def test_prompts_that_peft_cannot_express(tmp_path):
    names, _, model, _ = base_of("llama")

    def prompts(layers, gates=1, length=3):
        leaves = {"embedding": drawn(length, 32), "gate": drawn(gates)}
        return {f"layers/{i}/attention/prompt/{k}": v for i in layers for k, v in leaves.items()}

    def saving(recipe, flat, message):
        with pytest.raises(ValueError, match=message):
            save_peft(tmp_path / "a", recipe, unflatten(flat), names, model)

    saving(LLAMA_GATES, prompts([0, 1], 4), "layers/0/attention has 4 gates; PEFT has one a layer")
    first = aj.LlamaAdapter("layers/0/attention", 3, "layer")
    saving(first, prompts([0]), "in the last layers; layers/0/attention, layers/1/attention differ")
    more = aj.Recipe(first, aj.LlamaAdapter("layers/1/attention", 2, "layer"))
    saving(more, prompts([0]) | prompts([1], length=2), r"of one length in PEFT, here of \[2, 3\]")
    trained = aj.Recipe(aj.LlamaAdapter("layers/1/attention", 3, "layer"), aj.Unfreeze("norm/*"))
    saving(trained, prompts([1]) | {"norm/scale": drawn(32)}, "norm/scale: PEFT's prompts go with")


def test_a_gate_behind_tanh_is_written_open(tmp_path):
    names, _, model, _ = base_of("llama")
    recipe = aj.LlamaAdapter("layers/1/attention", 3, "layer")
    site = "layers/1/attention/prompt"
    leaves = {f"{site}/embedding": drawn(3, 32), f"{site}/gate": drawn(1)}
    directory = save_peft(tmp_path / "a", recipe, unflatten(leaves), names, model)
    gate = tensors_of(directory)["base_model.model.model.layers.1.self_attn.adaption_gate"]
    np.testing.assert_allclose(gate, np.tanh(drawn(1)), rtol=1e-6)
    config = json.loads((directory / CONFIG).read_text())
    assert (config["adapter_len"], config["adapter_layers"]) == (3, 1)
    assert config["target_modules"] == "self_attn"


def test_prompts_of_another_length_or_number_are_refused(tmp_path):
    names, _, model, _ = base_of("llama")
    source = FIXTURES / "llama_prompt"
    config = json.loads((source / CONFIG).read_text())
    spoilt = shutil.copytree(source, tmp_path / "a")
    (spoilt / CONFIG).write_text(json.dumps(config | {"adapter_len": 4, "adapter_layers": 2}))
    with pytest.raises(
        AdapterFileError, match=r"expected a prompt \[1, 4, d\] .*; it has prompts of 1"
    ):
        load_peft(spoilt, names, model)


def test_where_a_directory_may_be_written(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    with pytest.raises(ValueError, match="a exists and is not empty; give another directory"):
        save_peft(tmp_path / "a", recipe, adapters, NAMES, PARAMS)
    with pytest.raises(TypeError, match=r"list is not a tree of adapters; write"):
        save_peft(tmp_path / "b", recipe, [], NAMES, PARAMS)
    more = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    save_peft(tmp_path / "x" / "b", recipe, adapters, NAMES, PARAMS, **more)
    config = json.loads((tmp_path / "x" / "b" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["inference_mode"]


def test_the_prefix_is_the_callers(tmp_path):
    params = {"layer_0": {"attention": {"query": {"kernel": jnp.ones((6, 4))}}}}
    leaves = unflatten(factors("layer_0/attention/query", width=6, out=4))
    for prefix, name in ((None, "bert."), ("roberta.", "roberta."), ("", "")):
        directory = tmp_path / f"{prefix}x"
        save_peft(directory, aj.LoRA("**/query", 2), leaves, bert.NAMES, params, prefix=prefix)
        key = f"base_model.model.{name}encoder.layer.0.attention.self.query.lora_A.weight"
        assert key in tensors_of(directory)
        load_peft(directory, bert.NAMES, params)


def test_an_nnx_state_is_saved(tmp_path):
    model = nnx.Dict(q=nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    grown = aj.adapt(model, aj.LoRA("q", 2), rngs=nnx.Rngs(1))
    state = nnx.state(grown, aj.nnx.AdapterParam)
    directory = save_peft(tmp_path / "a", aj.LoRA("q", 2), state, {"q": "q"}, model)
    factor = tensors_of(directory)["base_model.model.q.lora_A.weight"]
    np.testing.assert_array_equal(factor, flatten(state)["q/lora/a"].T)


@pytest.mark.parametrize(
    ("fields", "module", "meant"),
    [
        ({"target_modules": ["q"]}, "h.0.q", True),
        ({"target_modules": ["q"]}, "h.0.sq", False),
        ({"target_modules": r".*\.q"}, "h.0.q", True),
        ({"target_modules": r"q"}, "h.0.q", False),
        ({"target_modules": "all-linear"}, "h.0.q", True),
        ({"target_modules": ["q"], "exclude_modules": ["0.q"]}, "h.0.q", False),
        ({"target_modules": ["q"], "exclude_modules": r".*0\.q"}, "h.0.q", False),
        ({"target_modules": ["q"], "modules_to_save": ["h.0"]}, "h.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 0}, "a.h.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [1, 2]}, "a.h.0.q", False),
        (
            {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "g"},
            "a.h.0.q",
            0,
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h"},
            "a.h.0.q",
            1,
        ),
        ({"target_modules": ["a.h.0.q"], "layers_to_transform": [9]}, "a.h.0.q", True),
    ],
)
def test_modules_are_meant_as_peft_means_them(fields, module, meant):
    assert means(fields, module) == meant


def test_prompts_by_a_mapping_of_ones_own(tmp_path):
    table, _, model, _ = base_of("llama")
    wanted, adapters = load_peft(FIXTURES / "llama_prompt", table, model)
    own = {f"model.layers.{i}.self_attn": f"layers/{i}/attention" for i in (0, 1)}
    recipe, leaves = load_peft(FIXTURES / "llama_prompt", own, model)
    assert recipe == wanted
    equal(flatten(leaves), flatten(adapters))
    directory = save_peft(tmp_path / "a", recipe, leaves, own, model)
    equal(tensors_of(directory), tensors_of(FIXTURES / "llama_prompt"))


def test_a_fused_layer_by_a_mapping_of_ones_own():
    _, _, params, _ = base_of("gpt2")
    own = {}
    for i in (0, 1):
        parts = (f"layer_{i}/attention/{name}" for name in ("query", "key", "value"))
        own[f"transformer.h.{i}.attn.c_attn"] = tuple(parts)
    recipe, leaves = load_peft(FIXTURES / "gpt2_dora", own, params)
    wanted, adapters = load_peft(FIXTURES / "gpt2_dora", gpt2.NAMES, params)
    assert recipe == wanted
    equal(flatten(leaves), flatten(adapters))
