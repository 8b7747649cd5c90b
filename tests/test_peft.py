"""Adapters of Hugging Face PEFT: its logits and tensors both ways, and an error for each misfit."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from helpers.arrays import read_arrays
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files import directories
from adapters_jax.files.directories import PEFT
from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.config import is_target
from adapters_jax.files.peft.convert import from_peft
from adapters_jax.files.peft.ia3 import scales_input
from adapters_jax.finetune.models import FAMILIES, bert, decoder
from adapters_jax.finetune.models.decoder import Decoder
from adapters_jax.finetune.tensors import from_tensors, to_tensors
from adapters_jax.transforms.stacking import Stack
from adapters_jax.trees import flatten, unflatten

CONFIG, TENSORS, PICKLE = *PEFT.files, PEFT.pickle
BASES = Path(__file__).parent / "fixtures"
FIXTURES = BASES / "peft"
MOE = NameTable(
    (Rule("embed", "embed"), Rule("gate", "mlp.gate")),
    parameters=tuple(
        ParameterRule(f"experts/{name}", f"mlp.experts.{name}", swapped=True)
        for name in ("up", "down")
    ),
)
NET = {"embed": "embed", "line": "line", "plane": "plane", "head": "head"}
FIXTURE_NAMES = sorted(path.name for path in FIXTURES.glob("*") if (path / CONFIG).exists())


class Net(nn.Module):
    """The convolutional network of the script that wrote the fixtures."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 6, name="embed")(ids)
        x = nn.relu(nn.Conv(8, (3,), padding=1, name="line")(x))
        x = nn.Conv(4, (3, 3), padding=1, name="plane")(x.transpose(0, 2, 1)[..., None])
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Experts(nn.Module):
    """The experts of the script that wrote the fixtures, as `(experts, in, out)`."""

    @nn.compact
    def __call__(self, x):
        up = self.param("up", nn.initializers.normal(), (3, 5, 5))
        down = self.param("down", nn.initializers.normal(), (3, 5, 4))
        x = nn.relu(jnp.einsum("nd,edf->enf", x, up))
        return jnp.einsum("enf,efd->end", x, down)


class Moe(nn.Module):
    """Experts whose outputs a router weighs."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 5, name="embed")(ids.ravel())
        weights = nn.softmax(nn.Dense(3, name="gate")(x))
        return jnp.einsum("ne,end->nd", weights, Experts(name="experts")(x))


def inputs_of(base):
    with np.load(BASES / base / "expected.npz") as file:
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
        return {name: file[name] for name in names if name in file}


@cache
def base_of(fixture):
    """The name table, model, parameters and inputs that belong to a fixture."""
    kind = fixture.split("_")[0]
    if kind == "bert":
        config, params = bert.load_bert(BASES / "bert", pooler=True)
        head = read_arrays(BASES / "bert")
        head = {"kernel": head["classifier.weight"].T, "bias": head["classifier.bias"]}
        model = bert.BertClassifier(config, 3, pooling="pooler")
        return (
            bert.FAMILY.classifier.names,
            model,
            {"bert": params, "head": head},
            inputs_of("bert"),
        )
    if kind in ("gpt2", "llama"):
        _, model = decoder.load_decoder(BASES / kind)
        inputs = inputs_of(kind)
        inputs["positions"] = inputs.pop("position_ids")
        return FAMILIES[kind].names, model, model, inputs
    if kind == "moe":
        ids = jnp.arange(24).reshape(3, 8) % 11
        like = jax.eval_shape(Moe().init, jax.random.key(0), ids)["params"]
        params = from_tensors(read_arrays(FIXTURES / "moe"), MOE, like)
        return MOE, Moe(), params, {"ids": ids}
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
    if isinstance(model, Decoder):
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


@pytest.mark.witness("gpt2", "llama_prompt", "moe_experts", "bert_head", "net_lora")
@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_logits_are_those_of_peft(fixture, tmp_path):
    names, model, params, inputs = base_of(fixture)
    recipe, adapters = load_peft(FIXTURES / fixture, names, params)
    logits = adapted_logits(fixture, recipe, adapters, tmp_path)
    expected = np.load(FIXTURES / fixture / "logits.npy")
    plain = (
        model(**inputs) if isinstance(model, Decoder) else model.apply({"params": params}, **inputs)
    )
    seen = slice(None)
    if logits.ndim == 3:
        seen = inputs["attention_mask"] == 1
    np.testing.assert_allclose(logits[seen], expected[seen], atol=1e-4)
    assert np.abs(plain[seen] - expected[seen]).max() > 0.05  # the adapter matters


@pytest.mark.parametrize("fixture", FIXTURE_NAMES)
def test_an_export_has_the_tensors_of_the_original_and_loads_again(fixture, tmp_path):
    names, _, params, _ = base_of(fixture)
    recipe, adapters = load_peft(FIXTURES / fixture, names, params)
    written = save_peft(tmp_path / "theirs", recipe, adapters, names, params)
    original = tensors_of(FIXTURES / fixture)
    kept = {k: t for k, t in original.items() if "embed_tokens.base_layer" not in k}
    equal(tensors_of(written), kept)
    again, leaves = load_peft(written, names, params)
    equal(flatten(leaves), flatten(adapters))
    owners = [(recipe.owner(leaf), again.owner(leaf)) for leaf in flatten(leaves)]
    for first, second, path in {(x.method, y.method, x.path) for x, y in owners if x}:
        if first.slot != "lora":
            continue
        assert first.rank_at(path) == second.rank_at(path)
        assert first.scale_at(path) == pytest.approx(second.scale_at(path), abs=1e-9)
        assert (type(first), first.dropout, first.a_init) == (
            type(second),
            second.dropout,
            second.a_init,
        )


def test_all_fixtures_are_there():
    assert len(FIXTURE_NAMES) == 13


def test_recipes_follow_the_configurations():
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


# Adapters written by hand, for cases that no fixture covers.

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
CONFIGURATION = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["h.0.q"]}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hand_made(directory, tensors=None, **fields):
    """Writes an adapter of h.0.q with some tensors and fields changed."""
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


def test_a_whole_tree_is_one_problem_that_says_what_to_give(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    whole = aj.merge_trees(adapters, PARAMS)
    with raises(UserError, f" {len(flatten(PARAMS))} ", "aj.partition(params, recipe)") as caught:
        save_peft(tmp_path / "b", recipe, whole, NAMES, PARAMS)
    assert len(str(caught.value)) < 300


def test_a_directory_of_ours_is_named(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    ours = aj.save_adapter(tmp_path / "ours", adapters, recipe)
    with raises(AdapterFileError, ours, TENSORS, "aj.load_adapter"):
        load_peft(ours, NAMES, PARAMS)
    (tmp_path / "ours" / "adapter.safetensors").unlink()
    with raises(AdapterFileError, ours) as caught:
        load_peft(ours, NAMES, PARAMS)
    assert "aj.load_adapter" not in str(caught.value)


def test_half_precision_becomes_float32(tmp_path):
    low = {"h.0.q.lora_A.weight": drawn(2, 6).astype(jnp.bfloat16)}
    _, adapters = load_peft(hand_made(tmp_path / "a", low), NAMES, PARAMS)
    assert adapters["block_0"]["q"]["lora"]["a"].dtype == jnp.float32


def test_a_layer_of_heads_is_their_linear_layer(tmp_path):
    heads = {"heads.lora_A.weight": drawn(2, 6), "heads.lora_B.weight": drawn(6, 2, seed=1)}
    source = hand_made(tmp_path / "a", heads, target_modules=["0.q", "heads"])
    recipe, adapters = load_peft(source, NAMES, PARAMS)
    assert adapters["heads"]["lora"]["b"].shape == (2, 2, 3)
    equal(
        tensors_of(save_peft(tmp_path / "b", recipe, adapters, NAMES, PARAMS)), tensors_of(source)
    )


def test_a_layer_of_one_input(tmp_path):
    own = factors("line", width=1, out=4)
    params = {"line": {"kernel": jnp.ones((1, 4))}}
    source = save_peft(tmp_path / "a", aj.LoRA("line", 2), unflatten(own), {"l": "line"}, params)
    equal(flatten(load_peft(source, {"l": "line"}, params)[1]), own)


class Gated(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="up")(x) * nn.Dense(1, use_bias=False, name="gate")(
            x
        )


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_above_the_sizes_of_a_layer_goes_both_ways(rank, tmp_path):
    """As "all-linear" gives it to Qwen3-Next's gates of one output; the tensors stay."""
    own = factors("gate", rank, width=6, out=1) | factors("up", width=6, out=4)
    x, names = jnp.ones((1, 6)), {"l.gate": "gate", "l.up": "up"}
    params = Gated().init(jax.random.key(0), x)["params"]
    lora = aj.LoRA("*", 2, 3, rank_pattern={"gate": rank})
    source = save_peft(tmp_path / "a", lora, unflatten(own), names, params)
    config = json.loads((source / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (rank, {} if rank == 2 else {"l.up": 2})
    recipe, adapters = load_peft(source, names, params)
    assert dict(recipe.methods[0].rank_pattern)["gate"] == rank
    equal(flatten(adapters), own)
    again = save_peft(tmp_path / "b", recipe, adapters, names, params)
    equal(tensors_of(again), tensors_of(source))
    assert json.loads((again / CONFIG).read_text()) == config
    native = aj.save_adapter(tmp_path / "native", adapters, recipe)
    model, loaded = aj.load_adapter(native, Gated(), params, x)
    assert aj.audit(model, loaded).adapter_parameters == rank * 7 + 2 * 10
    merged = aj.merge(model, loaded, x)
    for name, scale in (("gate", 3 / rank), ("up", 1.5)):
        change = scale * own[f"{name}/lora/a"] @ own[f"{name}/lora/b"]
        np.testing.assert_allclose(
            merged[name]["kernel"] - params[name]["kernel"], change, atol=1e-5
        )
    expected = Gated().apply({"params": merged}, x)
    np.testing.assert_allclose(model.apply({"params": loaded}, x), expected, rtol=1e-5)
    with raises(aj.RecipeError, "rank 2", "'gate'", "min(6, 1)"):  # said for no target
        aj.init_adapters(aj.adapt(Gated(), aj.LoRA("*", 2)), params, jax.random.key(0), x)


def test_fields_at_their_default_do_no_harm(tmp_path):
    fields = {"new": None, "newer": False, "dict": {}, "list": [], "megatron_core": "megatron.core"}
    fields |= {"rank_pattern": None, "bias": None, "init_lora_weights": None, "lora_dropout": None}
    recipe, _ = load_peft(hand_made(tmp_path / "a", **fields), NAMES, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("block_0/q", 2, 4, a_init="uniform"))


def test_fields_of_training_and_of_others_are_one_warning(tmp_path):
    fields = {"some_future_field": 0.5, "unsloth_fixed": True, "eva_config": {"rho": 2.0}}
    with pytest.warns(aj.AdapterWarning) as seen:
        recipe, _ = load_peft(hand_made(tmp_path / "a", **fields), NAMES, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("block_0/q", 2, 4, a_init="uniform"))
    (warning,) = seen
    assert "some_future_field=0.5, unsloth_fixed=True is ignored" in str(warning.message)


@pytest.mark.parametrize(
    ("fields", "more", "data"),
    [
        ({"target_modules": ["q"]}, {}, "h.1.q"),
        ({"target_modules": ["q", "words"]}, {}, "h.1.q, words"),
        ({"target_modules": ".*q"}, {}, "h.1.q"),
        ({"target_modules": "all-linear"}, {}, "h.1.q"),
        ({"target_modules": ["q"], "exclude_modules": ["1.q"]}, {}, None),
        ({"target_modules": ["q"], "modules_to_save": ["h.1.q"]}, {"h.1.q": (4, 6)}, None),
        ({"target_modules": ["q", "other"]}, {"h.1.q.lora": (4, 2)}, None),
        ({"target_modules": ["0.q", "ln"]}, {}, None),  # PEFT has no LoRA of a norm
    ],
)
def test_modules_that_a_file_lacks_are_named(tmp_path, fields, more, data, recwarn):
    tensors = {}
    for name, (out, width) in more.items():
        if name.endswith("lora"):
            tensors = {f"{name}_A.weight": drawn(width, 6), f"{name}_B.weight": drawn(out, width)}
        else:
            tensors = {f"{name}.weight": drawn(out, width), f"{name}.bias": drawn(out)}
    directory = hand_made(tmp_path / "a", tensors, **fields)
    if data is None:
        load_peft(directory, NAMES, PARAMS)
        return
    with pytest.warns(aj.AdapterWarning, match=f"stay as they are: {data}$"):
        load_peft(directory, NAMES, PARAMS)


def test_vectors_that_a_file_lacks_are_named(tmp_path):
    scales = {"block_0/q/ia3/scale": drawn(4)}
    directory = save_peft(tmp_path / "a", aj.IA3("block_0/q"), unflatten(scales), NAMES, PARAMS)
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"target_modules": ["q"]}))
    with pytest.warns(aj.AdapterWarning, match=r"stay as they are: h\.1\.q$"):
        load_peft(directory, NAMES, PARAMS)
    (directory / CONFIG).write_text(json.dumps(config | {"target_modules": None}))
    with raises(AdapterFileError, "target_modules=null", "['q'] and feedforward_modules"):
        load_peft(directory, NAMES, PARAMS)


def test_tensors_of_modules_that_were_to_be_saved_are_needed(tmp_path):
    for tensors, lacking in (({}, "ln.weight"), ({"ln.weight": drawn(4)}, "ln.bias")):
        directory = hand_made(tmp_path / lacking, tensors, modules_to_save=["ln", "classifier"])
        with raises(AdapterFileError, directory, "'ln'", lacking):
            load_peft(directory, NAMES, PARAMS)


def test_keys_with_the_name_of_the_adapter_are_read(tmp_path):
    plain = hand_made(tmp_path / "a", {"ln.weight": drawn(4), "ln.bias": drawn(4, seed=1)})
    expected = load_peft(plain, NAMES, PARAMS)
    named = {
        "h.0.q.lora_A.weight": None,
        "h.0.q.lora_B.weight": None,
        "h.0.q.lora_A.default.weight": drawn(2, 6),
        "h.0.q.lora_B.default.weight": drawn(4, 2),
        "ln.original_module.weight": drawn(4, seed=5),
        "ln.modules_to_save.default.weight": drawn(4),
        "ln.modules_to_save.default.bias": drawn(4, seed=1),
    }
    recipe, adapters = load_peft(hand_made(tmp_path / "b", named), NAMES, PARAMS)
    assert recipe == expected[0]
    equal(flatten(adapters), flatten(expected[1]))


def test_two_spellings_of_one_module_are_refused(tmp_path):
    twice = {"h.0.q.lora_A.default.weight": drawn(2, 6, seed=1)}
    with raises(AdapterFileError, "lora_A.default.weight", "lora_A.weight", "remove"):
        load_peft(hand_made(tmp_path / "a", twice), NAMES, PARAMS)
    for key, value in (
        ("model.layers.1.mlp.up_proj.lora_A.weight", drawn(2, 32)),
        ("model.norm.modules_to_save.default.weight", drawn(32)),
    ):
        names, _, model, _ = base_of("llama")
        directory = shutil.copytree(FIXTURES / "llama_rslora", tmp_path / key)
        tensors = tensors_of(directory) | {
            f"base_model.model.{key}": value,
            "base_model.model.model.norm.weight": drawn(32, seed=1),
            f"base_model.model.{key.removeprefix('model.')}": value + 1,
        }
        safetensors.numpy.save_file(tensors, directory / TENSORS)
        with raises(AdapterFileError, "are the same in this base", "remove"):
            load_peft(directory, names, model)


def of_llama(directory, targets, names=("q_proj", "v_proj"), prefix="model."):
    """A LoRA on both layers of a Llama."""
    tensors = {}
    for name in (f"{prefix}layers.{i}.self_attn.{n}" for i in (0, 1) for n in names):
        out = 32 if "q_proj" in name or "o_proj" in name else 16
        tensors |= {f"{name}.lora_A.weight": drawn(2, 32), f"{name}.lora_B.weight": drawn(out, 2)}
    nothing = {"h.0.q.lora_A.weight": None, "h.0.q.lora_B.weight": None}
    return hand_made(directory, nothing | tensors, target_modules=targets)


def test_modules_that_peft_chooses_are_those_of_its_families(tmp_path, recwarn):
    names, _, model, _ = base_of("llama")
    expected = load_peft(of_llama(tmp_path / "a", ["q_proj", "v_proj"]), names, model)
    recipe, adapters = load_peft(of_llama(tmp_path / "b", None), names, model)
    assert recipe == expected[0] and not len(recwarn)
    equal(flatten(adapters), flatten(expected[1]))
    with pytest.warns(aj.AdapterWarning, match=r"layers\.0\.self_attn\.v_proj"):
        load_peft(of_llama(tmp_path / "c", None, ("q_proj",)), names, model)
    with raises(AdapterFileError, "target_modules=null", "['o_proj', 'q_proj']"):
        load_peft(of_llama(tmp_path / "d", None, ("q_proj", "o_proj")), names, model)


def test_an_adapter_of_a_base_without_its_output_layer_is_a_warning(tmp_path):
    names, _, model, _ = base_of("llama")
    with pytest.warns(aj.AdapterWarning, match=r"layers\.0\.self_attn\.q_proj has no prefix"):
        load_peft(of_llama(tmp_path / "a", ["q_proj", "v_proj"], prefix=""), names, model)


def test_one_sentence_names_many_modules(tmp_path):
    names, _, model, _ = base_of("llama")
    unknown = [f"{name}_x" for name in ("q", "k", "v", "o", "up", "down")]
    directory = of_llama(tmp_path / "a", unknown, unknown)
    data = "layers.0.self_attn.q_x", "and 8 more", "FAMILIES['llama'].names"
    with raises(AdapterFileError, *data) as caught:
        load_peft(directory, names, model)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 450
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "me/mine"}))
    with raises(AdapterFileError, "'me/mine'"):
        load_peft(directory, names, model)


def test_a_tied_embedding_alone_says_how_to_train_it():
    name, t5 = {"model.words": "words", "lm_head": "words"}, FAMILIES["t5"]
    params = {"words": {"embedding": jnp.ones((9, 6))}}
    pair = {"lora_embedding_A": drawn(2, 9), "lora_embedding_B": drawn(6, 2)}
    config = CONFIGURATION | {"target_modules": ["words", "shared"]}
    tensors = {f"base_model.model.model.words.{key}": x for key, x in pair.items()}
    with raises(AdapterFileError, "ensure_weight_tying=True and 'lm_head' among its modules"):
        from_peft(config, tensors, name, params)
    shapes = t5.shapes(t5.config.from_json(BASES / "t5" / "t5" / "config.json"))
    vocabulary = shapes["embeddings"]["embedding"].shape
    pair = {
        "lora_embedding_A": drawn(2, vocabulary[0]),
        "lora_embedding_B": drawn(vocabulary[1], 2),
    }
    tensors = {f"base_model.model.shared.{key}": x for key, x in pair.items()}
    with raises(AdapterFileError, "shared", "adapt other modules") as caught:
        from_peft(config, tensors, t5.names, shapes)
    assert "ensure_weight_tying" not in str(caught.value)


ENDLESS = "(([a-z]|[a-z_.0-9])+)+!"


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"target_modules": ENDLESS}, ["not among the target modules"]),
        ({"rank_pattern": {ENDLESS: 4}, "layers_pattern": "h"}, None),
        ({"alpha_pattern": {ENDLESS: 4}, "exclude_modules": ENDLESS}, None),
        ({"layers_pattern": ENDLESS, "layers_to_transform": [0]}, ["layers_pattern='(([a-z]"]),
        ({"modules_to_save": [ENDLESS]}, ["modules_to_save=['(([a-z]", "names of modules"]),
        ({"target_modules": r"(a)\1"}, ["target_modules=", r"it has \1"]),
        ({"target_modules": "(" * 3000 + "a" + ")" * 3000}, ["target_modules='(((("]),
        ({"rank_pattern": {f".*{n}": 1 for n in range(65)}}, ["at most 64", "are 65"]),
        ({"rank_pattern": {f"{'a' * 900}*{n}": 1 for n in range(20)}}, [2**14, "are 20"]),
    ],
)
def test_expressions_that_take_for_ever_elsewhere_end(tmp_path, fields, data):
    names = {**NAMES, "h.0." + "q" * 200: "block_0/q"}
    del names["h.0.q"]
    factors = {"h.0.q.lora_A.weight": None, "h.0.q.lora_B.weight": None}
    factors |= {f"h.0.{'q' * 200}.lora_A.weight": drawn(2, 6)}
    factors |= {f"h.0.{'q' * 200}.lora_B.weight": drawn(4, 2)}
    fields = {"target_modules": ["h.0." + "q" * 200], **fields}
    directory = hand_made(tmp_path / "a", factors, **fields)
    if data is None:
        assert len(load_peft(directory, names, PARAMS)[0]) == 1
        return
    with raises(AdapterFileError, *data) as caught:
        load_peft(directory, names, PARAMS)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ({"peft_type": "BOFT"}, ["AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload"]),
        (
            {"peft_type": "BOFT", "task_type": "SEQ_CLS"},
            ["from peft import AutoPeftModelForSequenceClassification;", "save_pretrained"],
        ),
        ({"peft_type": "BOFT"}, ["peft_type='BOFT'", "LORA", "ADAPTION_PROMPT", "IA3"]),
        ({"use_bdlora": True, "use_qalora": True}, ["use_bdlora=True", "use_qalora=True"]),
        ({"alora_invocation_tokens": ["a"]}, ["alora_invocation_tokens=['a']", "whole numbers"]),
        (
            {"alora_invocation_tokens": [1], "use_dora": True},
            ["use_dora=True with alora_invocation_tokens"],
        ),
        (
            {"target_parameters": ["q.weight"], "alora_invocation_tokens": [1]},
            ["alora_invocation_tokens=[1]"],
        ),
        ({"lora_bias": True}, ["lora_bias=True"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication=[[0, 2]]"]),
        ({"trainable_token_indices": [3]}, ["rows", [3]]),
        ({"trainable_token_indices": {"words": [3]}}, ["rows", "words", [3]]),
        ({"target_parameters": ["w"]}, ["target_parameters=['w']"]),
        ({"target_parameters": "w"}, ["target_parameters='w'", "list"]),
        ({"target_parameters": ["q.weight"], "lora_dropout": 0.1}, ["lora_dropout=0.1"]),
        ({"target_parameters": ["q.weight"], "use_dora": True}, ["use_dora=True"]),
        ({"target_parameters": ["q.weight"], "fan_in_fan_out": True}, ["fan_in_fan_out=True"]),
        ({"ensure_weight_tying": 1}, ["ensure_weight_tying=1", "bool"]),
        (
            {"init_lora_weights": "pissa"},
            ["init_lora_weights='pissa'", "path_initial_model_for_weight_conversion"],
        ),
        ({"bias": "some"}, ["bias='some'", "'none' or 'all' or 'lora_only'"]),
        ({"r": "8"}, ["r='8'"]),
        ({"r": -1}, ["r=-1"]),
        ({"lora_alpha": True}, ["lora_alpha=True"]),
        ({"lora_alpha": 0}, ["alpha=0"]),
        ({"rank_pattern": [1]}, ["rank_pattern=[1]", "dict"]),
        ({"rank_pattern": {"q": "x"}}, ["rank_pattern={'q': 'x'}"]),
        ({"target_modules": "("}, ["target_modules='('", "position 0"]),
        ({"r": 3}, ["h.0.q", "rank 2", 3]),
        ({"target_modules": ["k"]}, ["h.0.q", "target modules"]),
        ({"target_modules": ["q"], "layers_to_transform": [1]}, ["h.0.q", "target modules"]),
        ({"use_dora": True}, ["h.0.q", "a, b", "['a', 'b', 'magnitude']"]),
    ],
)
def test_unsupported_settings_raise_an_error_that_names_them(tmp_path, fields, data):
    with raises(AdapterFileError, tmp_path / "a", *data):
        load_peft(hand_made(tmp_path / "a", **fields), NAMES, PARAMS)


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
    with raises(AdapterFileError, tmp_path / "a") as error:
        load_peft(hand_made(tmp_path / "a", spoilt), NAMES, PARAMS)
    problems = str(error.value).split("; ")
    expected = (
        ("h.0.q", [2, 6], [5, 2], "block_0/q", [6, 4]),
        ("h.1.q", "['a', 'b']"),
        ("h.7.q",),
        ("ln.weight", [3], "norm"),
        ("h.1.q.weight", [6, 4], "block_1/q"),
        ("unknown.bias",),
    )
    assert len(problems) == len(expected)
    for data in expected:
        assert any(all(str(datum) in problem for datum in data) for problem in problems), data


@pytest.mark.parametrize(
    ("tensors", "data"),
    [
        ({"h.0.q.lora_A.weight": drawn(2)}, ["h.0.q", "A [2]"]),
        ({"h.0.q.lora_B.weight": drawn(4, 3)}, ["h.0.q", "B [4, 3]"]),
        ({"h.0.q.lora_B.weight": drawn(4, 2, 2)}, ["h.0.q", "B [4, 2, 2]"]),
        ({"h.0.q.ia3_l": drawn(4, 1)}, ["h.0.q.ia3_l"]),
        ({"h.1.q.weight": drawn(1, 24)}, ["h.1.q.weight", [1, 24], "block_1/q [6, 4]"]),
        ({"h.0.q.lora_A.weight": None, "h.0.q.lora_B.weight": None}, ["LoRA"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, tensors, data):
    with raises(AdapterFileError, tmp_path / "a", *data):
        load_peft(hand_made(tmp_path / "a", tensors), NAMES, PARAMS)


def test_a_magnitude_that_does_not_fit_is_named(tmp_path):
    source = hand_made(tmp_path / "a", {"h.0.q.lora_magnitude_vector": drawn(5)}, use_dora=True)
    with raises(AdapterFileError, "h.0.q", "magnitude [5]", [6, 4]):
        load_peft(source, NAMES, PARAMS)


def test_a_tensor_outside_of_the_model_is_named(tmp_path):
    source = hand_made(tmp_path / "a")
    tensors = tensors_of(source) | {"h.1.q.lora_A.weight": drawn(2, 6)}
    safetensors.numpy.save_file(tensors, source / TENSORS)
    with raises(AdapterFileError, "h.1.q.lora_A.weight", "base_model.model."):
        load_peft(source, NAMES, PARAMS)


def test_old_buffers_and_originals_are_ignored(tmp_path):
    more = {"h.0.attn.bias": drawn(3), "h.0.attn.masked_bias": drawn(1)}
    more["ln.original_module.weight"] = drawn(9)
    recipe, _ = load_peft(hand_made(tmp_path / "a", more), NAMES, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("block_0/q", 2, 4, a_init="uniform"))


@pytest.mark.parametrize(
    ("modules", "module", "expected"),
    [
        (["mlp.q"], "h.0.mlp.q", True),
        (["q"], "h.0.mlp.sq", True),
        (["mlp"], "h.0.mlp.q", False),
        (r".*\.q", "h.0.q", True),
        ("q", "h.0.q", False),
        (None, "h.0.q", False),
    ],
)
def test_feed_forward_modules_are_those_of_peft(modules, module, expected):
    assert scales_input({"feedforward_modules": modules}, module) is expected


def test_ia3_on_a_fused_module(tmp_path):
    fused = {"h.qk": ("block_0/q", "block_1/q")}
    recipe = aj.IA3(("block_0/q", "block_1/q"), feed_forward=("block_0/q", "block_1/q"))
    scales = {f"block_{i}/q/ia3/scale": drawn(6) for i in (0, 1)}
    source = save_peft(tmp_path / "a", recipe, unflatten(scales), fused, PARAMS)
    (vector,) = tensors_of(source).values()
    np.testing.assert_array_equal(vector, drawn(6)[None])
    equal(flatten(load_peft(source, fused, PARAMS)[1]), scales)
    unlike = scales | {"block_1/q/ia3/scale": drawn(6, seed=1)}
    first = dict(list(scales.items())[:1])
    for wrong in (unlike, first):
        with raises(UserError, "h.qk"):
            save_peft(tmp_path / "b", recipe, unflatten(wrong), fused, PARAMS)
    with raises(UserError, "block_0/q", [5], [6, 4]):
        misfit = unflatten(dict.fromkeys(scales, drawn(5)))
        save_peft(tmp_path / "b", recipe, misfit, fused, PARAMS)
    odd = {"base_model.model.h.qk.ia3_l": drawn(7, 1)}
    safetensors.numpy.save_file(odd, source / TENSORS)
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"feedforward_modules": []}))
    with raises(AdapterFileError, "h.qk", [7, 1], "block_0/q", "block_1/q"):
        load_peft(source, fused, PARAMS)


def test_a_fused_tensor_is_not_written_in_parts():
    with raises(UserError, "h.0.attn.c_attn.weight"):
        query = {"layers": {"0": {"attention": {"query": {"kernel": drawn(6, 4)}}}}}
        to_tensors(query, FAMILIES["gpt2"].names)


def test_a_module_of_scanned_layers_is_saved_whole(tmp_path):
    table = NameTable((Rule(r"layer_(\d+)/(\w+)", r"h.\1.\2"),), stack=Stack("layer_{}"))
    norm = {"scale": drawn(2, 4, seed=1), "bias": drawn(2, 4, seed=2)}
    base = {"layers": {"q": {"kernel": drawn(2, 6, 4)}, "norm": norm}}
    recipe = aj.Recipe(aj.LoRA("layers/q", 2), aj.Unfreeze("layers/norm/scale"))
    own = {"layers/q/lora/a": drawn(2, 6, 2), "layers/q/lora/b": drawn(2, 2, 4)}
    own["layers/norm/scale"] = drawn(2, 4, seed=3)
    source = save_peft(tmp_path / "a", recipe, unflatten(own), table, base)
    for i in (0, 1):
        for kind, rows in (("weight", own["layers/norm/scale"]), ("bias", norm["bias"])):
            found = tensors_of(source)[f"base_model.model.h.{i}.norm.{kind}"]
            np.testing.assert_array_equal(found, rows[i])
    shapes = jax.eval_shape(lambda: base)
    for one in (base, shapes):
        found = flatten(load_peft(source, table, one)[1])
        equal(found, own | {"layers/norm/bias": norm["bias"]})
    with raises(UserError, "layer_0/norm/bias", "layer_1/norm/bias"):
        save_peft(tmp_path / "b", recipe, unflatten(own), table, shapes)


def test_dora_on_an_embedding_raises(tmp_path):
    table = {
        "h.0.q.lora_magnitude_vector": drawn(4),
        "words.lora_embedding_A": drawn(2, 9),
        "words.lora_embedding_B": drawn(6, 2),
        "words.lora_magnitude_vector": drawn(6),
    }
    with raises(AdapterFileError, "words", "DoRA"):
        source = hand_made(tmp_path / "a", table, use_dora=True, target_modules=["0.q", "words"])
        load_peft(source, NAMES, PARAMS)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_the_error_names_its_conversion(tmp_path):
    directory = hand_made(tmp_path / "a")
    (directory / TENSORS).rename(directory / PICKLE)
    (directory / PICKLE).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with raises(AdapterFileError, directory / PICKLE, "'os.system'", "save_pretrained"):
        load_peft(directory, NAMES, PARAMS)
    (directory / PICKLE).unlink()
    with raises(AdapterFileError, directory, TENSORS, PICKLE):
        load_peft(directory, NAMES, PARAMS)


def test_a_pickle_of_tensors_is_read_where_there_is_nothing_else(tmp_path):
    names, _, params, _ = base_of("bert_head")
    expected = load_peft(FIXTURES / "bert_head", names, params)
    directory = shutil.copytree(FIXTURES / "bert_head", tmp_path / "a")
    (directory / TENSORS).unlink()
    shutil.copy(BASES / "pickled" / "bert_head.bin", directory / PICKLE)
    recipe, adapters = load_peft(directory, names, params)
    assert recipe == expected[0]
    equal(flatten(adapters), flatten(expected[1]))
    shutil.copy(FIXTURES / "bert_head" / TENSORS, directory)
    (directory / PICKLE).write_bytes(b"no pickle")
    load_peft(directory, names, params)


def sharded(directory, parts, index=None):
    """Splits an adapter's tensors into files, and writes their index."""
    whole = tensors_of(directory)
    (directory / TENSORS).unlink()
    for name, keys in parts.items():
        kept = {key: whole[key] for key in whole if key.endswith(tuple(keys))}
        safetensors.numpy.save_file(kept, directory / name)
    if index is None:
        index = {key: next(n for n in parts if key.endswith(tuple(parts[n]))) for key in whole}
    (directory / f"{TENSORS}.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def test_shards_are_read_as_one_file(tmp_path):
    expected = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    parts = {"1.safetensors": ["A.weight"], "2.safetensors": ["B.weight"]}
    found = load_peft(sharded(hand_made(tmp_path / "b"), parts), NAMES, PARAMS)
    assert found[0] == expected[0]
    equal(flatten(found[1]), flatten(expected[1]))


KEY_A, KEY_B = (f"base_model.model.h.0.q.lora_{n}.weight" for n in "AB")


@pytest.mark.parametrize(
    ("parts", "index", "data"),
    [
        ({"1": "AB", "2": "B"}, {KEY_A: "1", KEY_B: "2"}, ["1", "2", KEY_B, "both"]),
        ({"1": "A"}, {KEY_A: "1", KEY_B: "2"}, ["2.safetensors is missing"]),
        ({"1": "A"}, {KEY_A: "1", KEY_B: "1"}, ["differ", KEY_B]),
        ({"1": "AB"}, {KEY_A: "1"}, ["differ", KEY_B]),
        ({"1": "AB"}, {}, ["weight_map is missing"]),
        ({"1": "AB"}, {KEY_A: "../1"}, ["'../1.safetensors'"]),
    ],
)
def test_shards_that_overlap_or_lack_something_are_named(tmp_path, parts, index, data):
    parts = {f"{n}.safetensors": [f"{x}.weight" for x in keys] for n, keys in parts.items()}
    index = {key: f"{name}.safetensors" for key, name in index.items()}
    directory = sharded(hand_made(tmp_path / "a"), parts, index)
    with raises(AdapterFileError, directory, *data):
        load_peft(directory, NAMES, PARAMS)


@pytest.mark.parametrize(
    ("spoil", "data"),
    [
        (shutil.rmtree, ["Hugging Face Hub"]),
        (lambda d: (d / CONFIG).write_text("{"), [CONFIG, "line 1"]),
        (lambda d: (d / CONFIG).write_text("{}"), [CONFIG, "peft_type", "load_adapter"]),
        (lambda d: (d / TENSORS).write_bytes(b"PK" * 99), [TENSORS, 198]),
    ],
)
def test_a_damaged_directory_raises_an_error_that_names_the_file(tmp_path, spoil, data):
    directory = hand_made(tmp_path / "a")
    spoil(directory)
    with raises(AdapterFileError, directory, *data):
        load_peft(directory, NAMES, PARAMS)


def test_names_that_do_not_fit_the_base_raise(tmp_path):
    directory = hand_made(tmp_path / "a")
    with raises(UserError, "'h.0.q'", "'block/q'", "block_0/q", "block_1/q"):
        load_peft(directory, {"h.0.q": "block/q"}, PARAMS)
    with raises(UserError, "block_0/q", "NAMES"):
        load_peft(directory, bert.NAMES, PARAMS)


def factors(path, rank=2, width=32, out=32, seed=0):
    return {f"{path}/lora/a": drawn(width, rank, seed=seed), f"{path}/lora/b": drawn(rank, out)}


def test_parts_of_a_fused_module_go_side_by_side(tmp_path):
    names, _, params, _ = base_of("gpt2")
    recipe = aj.Recipe(aj.LoRA("layers/1/*/query", 2, 6), aj.LoRA("layers/1/*/value", 3, 3))
    own = factors("layers/1/attention/query") | factors("layers/1/attention/value", 3, seed=4)
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
        path = f"layers/1/attention/{name}/lora"
        made[name] = own[f"{path}/a"] @ own[f"{path}/b"]
    np.testing.assert_allclose(query, 3 * made["query"], atol=1e-5)
    np.testing.assert_allclose(value, made["value"], atol=1e-5)
    np.testing.assert_array_equal(key, 0)
    only = {k: v for k, v in own.items() if "query" in k}
    only["layers/1/attention/query/lora/magnitude"] = drawn(32)
    with raises(UserError, "h.1.attn.c_attn", "DoRA"):
        save_peft(tmp_path / "b", aj.DoRA("layers/1/*/query", 2), unflatten(only), names, params)


def test_parts_of_unequal_widths_take_their_own_rows(tmp_path):
    params = {"q": {"kernel": drawn(4, 6)}, "k": {"kernel": drawn(4, 2)}}
    fused, recipe = {"h.qk": ("q", "k")}, aj.Recipe(aj.DoRA(("q", "k"), 2, 2))
    own = {
        f"{path}/lora/{leaf}": drawn(*shape, seed=width)
        for path, width in (("q", 6), ("k", 2))
        for leaf, shape in (("a", (4, 2)), ("b", (2, width)), ("magnitude", (width,)))
    }
    directory = save_peft(tmp_path / "a", recipe, unflatten(own), fused, params)
    tensors = tensors_of(directory)
    delta = (
        tensors["base_model.model.h.qk.lora_B.weight"]
        @ tensors["base_model.model.h.qk.lora_A.weight"]
    )
    for path, columns in (("q", slice(0, 6)), ("k", slice(6, 8))):
        made = own[f"{path}/lora/a"] @ own[f"{path}/lora/b"]
        np.testing.assert_allclose(delta[columns], made.T, atol=1e-5)
    _, back = load_peft(directory, fused, params)
    for path in ("q", "k"):
        leaves = back[path]["lora"]
        np.testing.assert_array_equal(leaves["magnitude"], own[f"{path}/lora/magnitude"])
        made = own[f"{path}/lora/a"] @ own[f"{path}/lora/b"]
        np.testing.assert_allclose(leaves["a"] @ leaves["b"], made, atol=1e-5)
    scales = {"q/ia3/scale": drawn(6), "k/ia3/scale": drawn(2)}
    directory = save_peft(tmp_path / "b", aj.IA3(("q", "k")), unflatten(scales), fused, params)
    equal(flatten(load_peft(directory, fused, params)[1]), scales)


def test_convolutions_that_theirs_fuses_take_their_own_rows(tmp_path):
    widths = {"q": 4, "k": 5}
    params = {path: {"kernel": drawn(3, 3, 2, width)} for path, width in widths.items()}
    fused, recipe = {"h.qk": ("q", "k")}, aj.LoRA(("q", "k"), 2, 2)
    own = {
        f"{path}/lora/{leaf}": drawn(*shape, seed=width)
        for path, width in widths.items()
        for leaf, shape in (("a", (3, 3, 2, 2)), ("b", (2, width)))
    }
    made = {
        path: np.einsum("hwir,ro->oihw", own[f"{path}/lora/a"], own[f"{path}/lora/b"])
        for path in widths
    }
    directory = save_peft(tmp_path / "a", recipe, unflatten(own), fused, params)
    tensors = tensors_of(directory)
    a, b = (tensors[f"base_model.model.h.qk.lora_{each}.weight"] for each in "AB")
    assert (a.shape, b.shape) == ((4, 2, 3, 3), (9, 4, 1, 1))
    delta = np.einsum("orxy,rihw->oihw", b, a)
    np.testing.assert_allclose(delta, np.concatenate([made["q"], made["k"]]), atol=1e-5)
    _, back = load_peft(directory, fused, params)
    for path in widths:
        leaves = back[path]["lora"]
        again = np.einsum("hwir,ro->oihw", leaves["a"], leaves["b"])
        np.testing.assert_allclose(again, made[path], atol=1e-5)


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


def test_unsupported_recipes_raise_an_error_that_names_them(tmp_path):
    def saving(recipe, flat, *data, names=NAMES, params=PARAMS):
        with raises(UserError, *data):
            save_peft(tmp_path / "a", recipe, unflatten(flat), names, params)
        assert not (tmp_path / "a").exists()

    own = factors("block_0/q", width=6, out=4)
    both = own | factors("block_1/q", width=6, out=4)
    lora, other = aj.LoRA("block_0/q", 2), aj.LoRA("block_1/q", 2, dropout=0.5)
    saving(aj.Recipe(lora, other), both, "dropout", "rank_stabilized")
    mixed = both | {"block_1/q/lora/magnitude": drawn(4)}
    saving(aj.Recipe(lora, aj.DoRA("block_1/q", 2)), mixed, "adds DoRA, LoRA;")
    saving(aj.Unfreeze("block_0/q/*"), {"block_0/q/kernel": drawn(6, 4)}, "LN_TUNING", "block_0/q")
    saving(aj.Unfreeze("norm/**"), {}, "adds nothing;")
    prefix = {"block_0/q/adapter/down/bias": drawn(4)}
    saving(aj.Bottleneck("block_0/q", 4), prefix, "adds Bottleneck;")
    saving(lora, {"block_0/q/lora/a": drawn(6, 2)}, "block_0/q lacks b")
    saving(lora, factors("block_0/q", width=5, out=4), "block_0/q", [6, 4])
    for start in ("pissa", "olora"):
        saving(aj.LoRA("block_0/q", 2, a_init=start), own, f"a_init={start!r}")
    saving(lora, own | {"norm/bias": drawn(4)}, "norm/bias", "recipe")
    taken = own | {"block_0/q/kernel": drawn(6, 4)}
    recipe = aj.Recipe(lora, aj.Unfreeze("block_0/q/kernel"))
    saving(recipe, taken, "h.0.q")
    partial = {name: path for name, path in NAMES.items() if name != "h.0.q"}
    saving(lora, own, "block_0/q", "names", names=partial)
    shapes = jax.eval_shape(lambda: PARAMS)
    recipe = aj.Recipe(lora, aj.Unfreeze("norm/scale"))
    lone = own | {"norm/scale": drawn(4)}
    saving(recipe, lone, "norm/bias", params=shapes)


def test_unsupported_prompts_raise_an_error_that_names_them(tmp_path):
    names, _, model, _ = base_of("llama")

    def prompts(layers, gates=1, length=3):
        leaves = {"embedding": drawn(length, 32), "gate": drawn(gates)}
        return {f"layers/{i}/attention/prompt/{k}": v for i in layers for k, v in leaves.items()}

    def saving(recipe, flat, *data):
        with raises(UserError, *data):
            save_peft(tmp_path / "a", recipe, unflatten(flat), names, model)

    saving(LLAMA_GATES, prompts([0, 1], 4), "layers/0/attention has 4", 'gate="layer"')
    first = aj.LlamaAdapter("layers/0/attention", 3, "layer")
    saving(first, prompts([0]), "layers/0/attention, layers/1/attention")
    more = aj.Recipe(first, aj.LlamaAdapter("layers/1/attention", 2, "layer"))
    saving(more, prompts([0]) | prompts([1], length=2), [2, 3])
    unnamed = {"model.norm": "norm"}
    with raises(UserError, "names", "layers/0/attention") as caught:
        save_peft(tmp_path / "a", first, unflatten(prompts([0])), unnamed, model)
    assert "layers/1" not in str(caught.value)
    trained = aj.Recipe(aj.LlamaAdapter("layers/1/attention", 3, "layer"), aj.Unfreeze("norm/*"))
    saving(trained, prompts([1]) | {"norm/scale": drawn(32)}, "norm/scale")


def test_a_gate_behind_tanh_is_written_open(tmp_path):
    names, _, model, _ = base_of("llama")
    recipe = aj.LlamaAdapter("layers/1/attention", 3, "layer")
    path = "layers/1/attention/prompt"
    leaves = {f"{path}/embedding": drawn(3, 32), f"{path}/gate": drawn(1)}
    directory = save_peft(tmp_path / "a", recipe, unflatten(leaves), names, model)
    gate = tensors_of(directory)["base_model.model.model.layers.1.self_attn.adaption_gate"]
    np.testing.assert_allclose(gate, np.tanh(drawn(1)), rtol=1e-6)
    config = json.loads((directory / CONFIG).read_text())
    assert (config["adapter_len"], config["adapter_layers"]) == (3, 1)
    assert config["target_modules"] == "self_attn"


def test_prompts_of_a_gpt2_are_refused_both_ways(tmp_path):
    """In PEFT they are added behind the output projection, and would compute something else."""
    names, _, model, _ = base_of("gpt2")
    path, d = "layers/1/attention", 32
    leaves = {f"{path}/prompt/embedding": drawn(3, d), f"{path}/prompt/gate": drawn(1)}
    recipe = aj.LlamaAdapter(path, 3, "layer", "identity")
    with raises(UserError, "GPT-2", "projected"):
        save_peft(tmp_path / "a", recipe, unflatten(leaves), names, model)
    (tmp_path / "b").mkdir()
    key = "base_model.model.transformer.h.1.attn.adaption"
    tensors = {f"{key}_prompt": drawn(3, d)[None], f"{key}_gate": drawn(1)}
    safetensors.numpy.save_file(tensors, tmp_path / "b" / TENSORS)
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 3, "adapter_layers": 1}
    (tmp_path / "b" / CONFIG).write_text(json.dumps({**config, "target_modules": "attn"}))
    with raises(AdapterFileError, "GPT-2", "projected"):
        load_peft(tmp_path / "b", names, model)


def test_prompts_of_another_length_or_number_raise(tmp_path):
    names, _, model, _ = base_of("llama")
    source = FIXTURES / "llama_prompt"
    config = json.loads((source / CONFIG).read_text())
    spoilt = shutil.copytree(source, tmp_path / "a")
    (spoilt / CONFIG).write_text(json.dumps(config | {"adapter_len": 4, "adapter_layers": 2}))
    with raises(
        AdapterFileError, "layers.1.self_attn", "[1, 3, 32]", "[1, 4, d]", "adapter_layers=2"
    ):
        load_peft(spoilt, names, model)


def test_a_second_run_replaces_the_adapter_of_the_first_one_and_nothing_else(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "theirs"), NAMES, PARAMS)
    directory, card = tmp_path / "a", {"README.md": "A card."}
    save_peft(directory, recipe, adapters, NAMES, PARAMS, beside=card)
    again = jax.tree.map(lambda leaf: leaf + 1, adapters)
    save_peft(directory, recipe, again, NAMES, PARAMS, beside=card)
    jax.tree.map(np.testing.assert_array_equal, load_peft(directory, NAMES, PARAMS)[1], again)
    with raises(UserError, directory, "PEFT", "README.md"):
        save_peft(directory, recipe, adapters, NAMES, PARAMS)
    assert (directory / "README.md").read_text() == "A card."
    (directory / "README.md").unlink()
    (directory / "README.md").mkdir()
    with raises(UserError, directory, "README.md/"):
        save_peft(directory, recipe, adapters, NAMES, PARAMS, beside=card)
    assert (directory / "README.md").is_dir()
    ours = aj.save_adapter(tmp_path / "ours", adapters, recipe)
    with raises(UserError, ours, "PEFT", "adapter.safetensors"):
        save_peft(ours, recipe, adapters, NAMES, PARAMS)


def test_an_adapter_that_another_process_replaces_is_replaced(tmp_path, monkeypatch):
    recipe, adapters = load_peft(hand_made(tmp_path / "theirs"), NAMES, PARAMS)
    directory = save_peft(tmp_path / "a", recipe, adapters, NAMES, PARAMS)

    def gone(path):
        raise AdapterFileError(f"{path} cannot be read") from FileNotFoundError()

    monkeypatch.setattr(directories, "read_json", gone)
    again = jax.tree.map(lambda leaf: leaf + 1, adapters)
    save_peft(directory, recipe, again, NAMES, PARAMS)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, load_peft(directory, NAMES, PARAMS)[1], again)


def test_what_save_peft_writes(tmp_path):
    recipe, adapters = load_peft(hand_made(tmp_path / "a"), NAMES, PARAMS)
    (tmp_path / "file").touch()
    with raises(UserError, tmp_path / "file"):
        save_peft(tmp_path / "file", recipe, adapters, NAMES, PARAMS)
    with raises(TypeError, "save_peft", "list", "aj.partition(params, recipe)"):
        save_peft(tmp_path / "b", recipe, [], NAMES, PARAMS)
    more = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    save_peft(tmp_path / "x" / "b", recipe, adapters, NAMES, PARAMS, **more)
    config = json.loads((tmp_path / "x" / "b" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base" and config["inference_mode"]
    with safetensors.safe_open(tmp_path / "x" / "b" / TENSORS, "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers reads no other


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
    ("fields", "module", "expected"),
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
        ({"target_modules": ["q"], "layers_to_transform": [2]}, "a.h.2.experts.0.q", True),
        ({"target_modules": ["q"], "layers_to_transform": [0]}, "a.h.2.experts.0.q", False),
        ({"target_modules": ["q"], "layers_to_transform": 2, "layers_pattern": "h"}, "h.2.q", True),
        ({"target_modules": ["q"], "layers_to_transform": 2}, "h.2.q", False),
        ({"target_modules": None, "target_parameters": ["w"]}, "h.2.q", False),
    ],
)
def test_target_modules_are_those_of_peft(fields, module, expected):
    assert is_target(fields, module) == expected


def test_prompts_by_a_mapping_of_ones_own(tmp_path):
    table, _, model, _ = base_of("llama")
    expected, adapters = load_peft(FIXTURES / "llama_prompt", table, model)
    own = {f"model.layers.{i}.self_attn": f"layers/{i}/attention" for i in (0, 1)}
    recipe, leaves = load_peft(FIXTURES / "llama_prompt", own, model)
    assert recipe == expected
    equal(flatten(leaves), flatten(adapters))
    directory = save_peft(tmp_path / "a", recipe, leaves, own, model)
    equal(tensors_of(directory), tensors_of(FIXTURES / "llama_prompt"))


def test_a_prompt_of_an_unknown_module_is_named():
    _, _, model, _ = base_of("llama")
    names = {"model.layers.0.self_attn": "layers/0/attention"}
    with raises(AdapterFileError, "model.layers.1.self_attn"):
        load_peft(FIXTURES / "llama_prompt", names, model)


def test_a_fused_layer_by_a_mapping_of_ones_own():
    _, _, params, _ = base_of("gpt2")
    own = {}
    for i in (0, 1):
        parts = (f"layers/{i}/attention/{name}" for name in ("query", "key", "value"))
        own[f"transformer.h.{i}.attn.c_attn"] = tuple(parts)
    recipe, leaves = load_peft(FIXTURES / "gpt2_dora", own, params)
    expected, adapters = load_peft(FIXTURES / "gpt2_dora", FAMILIES["gpt2"].names, params)
    assert recipe == expected
    equal(flatten(leaves), flatten(adapters))


def test_the_names_of_an_encoder_do_not_fit_its_classifier():
    params = {"bert": {"layer_0": {"attention": {"query": {"kernel": np.ones((2, 3))}}}}}
    recipe, tree = aj.Recipe(aj.LoRA("**/query", 1)), {}
    with raises(UserError, "bert/layer_0/attention/query", "FAMILY.classifier.names"):
        save_peft("nowhere", recipe, tree, bert.NAMES, params)


def roberta_with_lora(head):
    """The recipe, the trained leaves and the parameters of a RoBERTa whose files have no pooler."""
    config, encoder = bert.load_bert(BASES / "roberta")
    model, ids = bert.BertClassifier(config, 2, pooling="pooler"), jnp.ones((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    params["bert"] = {**params["bert"], **encoder}
    recipe = aj.lora(2, head=head)
    whole = aj.init_adapters(aj.adapt(model, recipe), params, jax.random.key(1), ids)
    return recipe, aj.partition(whole, recipe)[0], params


@pytest.mark.slow
@pytest.mark.parametrize("head", [None, "head"])
def test_the_names_of_another_family_lead_to_the_own_ones(tmp_path, head):
    recipe, trained, params = roberta_with_lora(head)
    names = FAMILIES["roberta"].classifier.names
    saved = save_peft(tmp_path / "a", recipe, trained, names, params)
    load_peft(saved, names, params)
    other = "bert" if head else "distilbert"  # BERT has the same layers, but another head
    with raises(AdapterFileError, "names maps", "FAMILIES['roberta'].classifier.names"):
        load_peft(saved, FAMILIES[other].classifier.names, params)


@pytest.mark.slow
def test_a_head_of_two_layers_trains_whole(tmp_path):
    recipe, trained, params = roberta_with_lora("{head,bert/pooler}")
    saved = save_peft(tmp_path / "a", recipe, trained, FAMILIES["roberta"].classifier.names, params)
    tensors, ours = tensors_of(saved), flatten(trained)
    layers = {"dense": "bert/pooler/dense", "out_proj": "head"}
    assert {key for key in tensors if "classifier" in key} == {
        f"base_model.model.classifier.{layer}.{part}"
        for layer in layers
        for part in ("weight", "bias")
    }
    for layer, path in layers.items():
        written = tensors[f"base_model.model.classifier.{layer}.weight"]
        np.testing.assert_array_equal(written.T, ours[f"{path}/kernel"])


def test_a_head_without_the_pooler_that_a_classifier_of_transformers_reads(tmp_path):
    recipe, trained, params = roberta_with_lora("head")
    names = FAMILIES["roberta"].classifier.names
    theirs = save_peft(tmp_path / "theirs", recipe, trained, names, params, task_type="SEQ_CLS")
    mean = {**params, "bert": {k: v for k, v in params["bert"].items() if k != "pooler"}}
    with raises(UserError, "no bert/pooler", "pooling='pooler'", "pooler=True", "'TOKEN_CLS'"):
        save_peft(tmp_path / "mean", recipe, trained, names, mean)
    with raises(AdapterFileError, "no bert/pooler", "pooling='pooler'"):
        load_peft(theirs, names, mean)
    tags = save_peft(tmp_path / "tags", recipe, trained, names, mean, task_type="TOKEN_CLS")
    read, whole = (
        flatten(load_peft(tags, names, mean)[1]),
        flatten(load_peft(theirs, names, params)[1]),
    )
    equal(read, {path: whole[path] for path in read})  # RoBERTa's head holds its pooler, too
    lora, leaves = aj.Recipe(recipe.methods[0]), {"bert": trained["bert"]}
    save_peft(tmp_path / "no-head", lora, leaves, names, mean)


def test_names_that_are_none():
    params = {"line": {"kernel": np.ones((2, 3))}}
    recipe, tree = aj.Recipe(aj.LoRA("line", 1)), {}
    with raises(TypeError, "names is None", "NAMES of the model's package"):
        save_peft("nowhere", recipe, tree, None, params)
    with raises(UserError, "'base_model.model.a.line'", "write 'a.line'"):
        save_peft("nowhere", recipe, tree, {"base_model.model.a.line": "line"}, params)


@pytest.mark.slow
def test_a_state_is_no_tree_of_adapters():
    base = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model = aj.adapt(base, aj.LoRA("**", 1), rngs=nnx.Rngs(1))
    state = aj.TrainState.create(model, tx=optax.sgd(0.1), key=jax.random.key(0))
    with raises(TypeError, "TrainState", "state.trained"):
        save_peft("nowhere", state.recipe, state, {"line": ""}, base)
