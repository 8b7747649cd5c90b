"""Adapters on encoder-decoders: what presets adapt, generation, merging, and files of others."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.arrays import drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError
from adapters_jax.files.adapterhub import load_adapterhub, save_adapterhub
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.models.generation import generate
from adapters_jax.finetune.models.t5 import NAMES, T5Config, load_t5
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures" / "t5"
PROMPTS = jnp.array([[5, 8, 9, 1], [0, 7, 6, 1]]), jnp.array([[1, 1, 1, 1], [0, 1, 1, 1]])


def grown(recipe, name="mt5", **options):
    """An adapted model whose adapters have values, and these adapters."""
    _, model = load_t5(FIXTURES / name, **options)
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=PROMPTS[:1])
    state = nnx.state(adapted, AdapterParam)
    noise = drawn_like(state)
    nnx.update(adapted, jax.tree.map(lambda x, y: x + jnp.asarray(0.2 * y), state, noise))
    return adapted, nnx.state(adapted, AdapterParam)


def modules(adapters, slot):
    """The paths of the modules that have leaves in a slot."""
    return {path.partition(f"/{slot}/")[0] for path in flatten(adapters) if f"/{slot}/" in path}


ATTENTIONS = [
    *("encoder/layers/0/attention", "decoder/layers/0/attention"),
    "decoder/layers/0/cross_attention",
]
MLPS = ["encoder/layers/0/mlp", "decoder/layers/0/mlp"]


@pytest.mark.slow
def test_presets_adapt_the_modules_that_they_adapt_in_other_libraries():
    lora = grown(aj.lora(2))[1]
    assert modules(lora, "lora") == {f"{at}/{x}" for at in ATTENTIONS for x in ("query", "value")}
    houlsby = grown(aj.houlsby(4, layer_norms=None))[1]
    assert modules(houlsby, "adapter") == {f"{at}/output" for at in (*ATTENTIONS[:2], *MLPS)}
    pfeiffer = grown(aj.pfeiffer(4))[1]
    assert modules(pfeiffer, "adapter") == {f"{at}/output" for at in MLPS}
    ia3 = grown(aj.ia3())[1]
    scaled = {f"{at}/{x}" for at in ATTENTIONS for x in ("key", "value")}
    assert modules(ia3, "ia3") == scaled | {f"{at}/output" for at in MLPS}


@pytest.mark.parametrize(
    ("method", "encoder", "decoder"),
    [
        (MethodOptions("prefix-tuning"), {0}, {0, 1, 2, 3}),
        (MethodOptions("llama-adapter"), {0}, {2, 3}),
        (MethodOptions("loreft", last=1), {0}, {3}),
        (MethodOptions("last-layers", layers=1), {0}, {3}),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_layers_are_counted_in_each_stack(method, encoder, decoder):
    config = T5Config(16, 8, 4, 12, num_layers=1, num_decoder_layers=4, num_heads=2)
    family = FAMILIES["t5"]
    model, inputs = family.shape(config)
    recipe = method.build(layers=family.layers(config))
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0), example_inputs=inputs)
    trained = recipe.trained(list(flatten(nnx.state(adapted, nnx.Param))))
    parts = [path.split("/") for path in trained]
    assert {int(part[2]) for part in parts if part[0] == "encoder"} == encoder
    assert {int(part[2]) for part in parts if part[0] == "decoder"} == decoder


RECIPES = {
    "lora": aj.lora(
        4,
        targets=("**/{query,value}", "**/mlp/*", "embeddings", "**/position_bias"),
        rank_pattern={"**/position_bias": 2},
    ),
    "prompts": aj.Recipe(
        aj.PrefixTuning("**/layers/*/{attention,cross_attention}", 3),
        aj.Bottleneck("decoder/layers/*/cross_attention", 4),
    ),
}


@pytest.mark.weekly
@pytest.mark.parametrize("kind", RECIPES)
def test_an_adapted_model_generates_what_it_computes_without_a_cache(kind):
    adapted, _ = grown(RECIPES[kind])
    new = 5
    made = generate(adapted, *PROMPTS, max_new_tokens=new)
    written = jnp.concatenate([jnp.zeros((2, 1), int), made.ids[:, :-1]], axis=1)
    logits = nnx.jit(lambda model, written: model(*PROMPTS, written))(adapted, written)
    assert made.ids.tolist() == jnp.argmax(logits, -1).tolist()
    _, base = load_t5(FIXTURES / "mt5")
    assert made.ids.tolist() != generate(base, *PROMPTS, max_new_tokens=new).ids.tolist()


@pytest.mark.slow
def test_a_merged_model_with_scanned_layers_computes_the_same():
    adapted, _ = grown(RECIPES["lora"], "t5", scan=True)
    run = nnx.jit(lambda model: model(*PROMPTS))
    logits = run(adapted)
    np.testing.assert_allclose(run(aj.merge(adapted)), logits, atol=2e-4)
    assert np.abs(run(load_t5(FIXTURES / "t5", scan=True)[1]) - logits).max() > 0.05


def assert_same(adapters, again):
    one, other = flatten(adapters), flatten(again)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(other[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.slow
def test_files_of_peft_hold_the_same_leaves(tmp_path):
    recipe = aj.Recipe(aj.LoRA("**/{query,value,output}", 2))
    _, adapters = grown(recipe)
    directory = save_peft(tmp_path / "a", recipe, adapters, NAMES, load_t5(FIXTURES / "mt5")[1])
    again = load_peft(directory, NAMES, load_t5(FIXTURES / "mt5")[1])[1]
    assert_same(adapters, again)


@pytest.mark.witness("method0")
@pytest.mark.parametrize("method", [aj.LoRA("embeddings", 2), aj.Unfreeze("embeddings/*")])
def test_an_embedding_that_peft_would_change_in_vain_is_not_written(method, tmp_path):
    recipe = aj.Recipe(aj.LoRA("**/query", 2), method)
    _, adapters = grown(recipe)
    with raises(aj.UserError, "embeddings", "'shared'"):
        save_peft(tmp_path / "a", recipe, adapters, NAMES, load_t5(FIXTURES / "mt5")[1])


@pytest.mark.slow
def test_one_configuration_of_adapterhub_holds_both_stacks(tmp_path):
    recipe = aj.Recipe(
        aj.Bottleneck("**/{attention,cross_attention,mlp}/output", 4),
        aj.LoRA("**/{query,value}", 2),
    )
    _, adapters = grown(recipe)
    _, model = load_t5(FIXTURES / "mt5")
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, NAMES, model)
    settings = json.loads((directory / "adapter_config.json").read_text())["config"]["configs"]
    assert [each.get("cross_adapter") for each in settings] == [True, None]
    assert [each["leave_out"] for each in settings] == [[], []]
    assert_same(adapters, load_adapterhub(directory, NAMES, model)[1])


def test_a_mapping_without_the_encoder_has_no_numbers_for_the_decoder(tmp_path):
    _, adapters = grown(aj.Recipe(aj.LoRA("decoder/layers/0/attention/query", 2)))
    names = {"decoder.block.0.layer.0.SelfAttention.q": "decoder/layers/0/attention/query"}
    with raises(aj.UserError, "encoder.block", "decoder.block"):
        recipe, model = aj.LoRA("**/query", 2), load_t5(FIXTURES / "mt5")[1]
        save_adapterhub(tmp_path / "a", recipe, adapters, names, model)


@pytest.mark.slow
def test_blocks_of_the_decoder_are_numbered_after_those_of_the_encoder(tmp_path):
    recipe = aj.Recipe(aj.Bottleneck("decoder/layers/1/mlp/output", 4))
    _, adapters = grown(recipe, "t5")  # three blocks encode, two decode
    _, model = load_t5(FIXTURES / "t5")
    directory = save_adapterhub(tmp_path / "a", recipe, adapters, NAMES, model)
    path = directory / "adapter_config.json"
    whole = json.loads(path.read_text())
    assert whole["config"]["leave_out"] == [0, 1, 2, 3]
    assert_same(adapters, load_adapterhub(directory, NAMES, model)[1])
    whole["config"]["leave_out"] = [0, 1, 2, 4]
    path.write_text(json.dumps(whole))
    with raises(AdapterFileError, "decoder.block.0.layer.2 has no tensors"):
        load_adapterhub(directory, NAMES, model)
