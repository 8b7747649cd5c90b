"""Experts: the plain formula and its gradient, adapters on stacked weights, what PEFT lacks."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from helpers.arrays import double, drawn, drawn_like
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.errors import MismatchError, UserError
from adapters_jax.files.directories import PEFT
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.finetune.models.decoder import (
    ARCHITECTURES,
    Decoder,
    DecoderConfig,
    load_decoder,
)
from adapters_jax.finetune.tensors import from_tensors
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten

FIXTURES = Path(__file__).parent / "fixtures" / "decoders"
IDS = np.array([[4, 9, 5, 6, 11, 7]])


@pytest.fixture(scope="module")
def model():
    return load_decoder(FIXTURES / "mixtral")[1]


def by_hand(mixture, x):
    """The mixture in float64: every expert for every token, weighted by what the router says."""
    logits = x @ double(mixture.router.kernel[...])
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    taken = np.argsort(-chances, axis=-1)[..., : mixture.taken]
    weights = np.zeros_like(chances)
    np.put_along_axis(weights, taken, np.take_along_axis(chances, taken, -1), -1)
    weights /= weights.sum(-1, keepdims=True)
    experts = mixture.experts
    gate, up, output = (double(w[...]) for w in (experts.gate, experts.up, experts.output))
    gates = np.einsum("bld,edi->blei", x, gate)
    inner = gates / (1 + np.exp(-gates)) * np.einsum("bld,edi->blei", x, up)
    return np.einsum("blei,eid,ble->bld", inner, output, weights)


@pytest.mark.slow
def test_a_mixture_is_the_weighted_sum_of_the_experts_that_a_token_takes(model):
    mixture, x = model.layers[0].mlp, drawn((2, 5, 16))
    np.testing.assert_allclose(mixture(x), by_hand(mixture, double(x)), atol=1e-5)
    along = drawn((2, 5, 16), seed=1)
    _, slope = jax.jvp(mixture, (x,), (along,))
    step = 1e-6 * double(along)
    ahead, behind = (by_hand(mixture, double(x) + s) for s in (step, -step))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, atol=1e-4)


@pytest.mark.slow
def test_all_tokens_may_take_the_same_experts(model):
    mixture = nnx.clone(model.layers[0].mlp)
    mixture.router.kernel[...] = jnp.zeros_like(mixture.router.kernel[...]).at[0, :2].set(50.0)
    x = jnp.abs(drawn((2, 5, 16)))
    np.testing.assert_allclose(mixture(x), by_hand(mixture, double(x)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.witness("True")
@pytest.mark.parametrize("scan", [False, True])
def test_adapters_of_experts_merge_into_them(scan):
    _, base = load_decoder(FIXTURES / "mixtral", scan=scan)
    recipe = aj.LoRA("**/{experts/*,router}", 2)
    adapted = aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=(IDS,))
    state = nnx.state(adapted, AdapterParam)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (3, 4, 16, 2) in shapes if scan else (4, 16, 2) in shapes  # a pair for each expert
    nnx.update(adapted, jax.tree.map(lambda x: jnp.asarray(0.3 * x), drawn_like(state)))
    logits = nnx.jit(lambda model: model(IDS))
    merged = aj.merge(adapted)
    np.testing.assert_allclose(logits(adapted), logits(merged), atol=1e-4)
    assert (
        np.abs(logits(load_decoder(FIXTURES / "mixtral", scan=scan)[1]) - logits(merged)).max()
        > 0.1
    )


def test_adapters_of_experts_go_to_peft_and_back(model, tmp_path):
    names = ARCHITECTURES["mixtral"].names.of_version(4)
    recipe = aj.LoRA("layers/1/mlp/experts/up", 2, 3.0)
    leaves = {"a": drawn((4, 16, 2)), "b": drawn((4, 2, 8), seed=1)}
    tree = {"layers": {"1": {"mlp": {"experts": {"lora": {"up": leaves}}}}}}
    directory = save_peft(tmp_path / "a", recipe, tree, names, model)
    tensors = safetensors.numpy.load_file(directory / PEFT.tensors)
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.{}.w3.lora_{}.weight"
    assert tensors.keys() == {name.format(i, factor) for i in range(4) for factor in "AB"}
    for i in range(4):
        np.testing.assert_array_equal(tensors[name.format(i, "A")], leaves["a"][i].T)
        np.testing.assert_array_equal(tensors[name.format(i, "B")], leaves["b"][i].T)
    again, back = load_peft(directory, names, model)
    (method,) = again.attached
    assert (method.rank, method.alpha) == (2, 3.0)
    got = flatten(back)
    for key, leaf in flatten(tree).items():
        np.testing.assert_array_equal(got[key], leaf)
    del tensors[name.format(2, "A")], tensors[name.format(2, "B")]
    safetensors.numpy.save_file(tensors, directory / PEFT.tensors)
    with raises(UserError, "layers/1/mlp/experts/up", "layers.1.block_sparse_moe.experts.2.w3"):
        load_peft(directory, names, model)


STACKS = "base_model.model.model.layers.1.mlp.{}.lora_{}.weight"


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_of_experts_go_to_peft_as_the_stacks_of_transformers_5(model, shared, tmp_path):
    names = ARCHITECTURES["mixtral"].names
    sizes = {"gate": (16, 2, 8), "up": (16, 2, 8), "output": (8, 3, 16)}
    parts = {
        name: {"a": drawn((4, i, r), seed=i), "b": drawn((4, r, o), seed=len(name))}
        for name, (i, r, o) in sizes.items()
    }
    if not shared:
        parts["up"]["a"] = drawn((4, 16, 2), seed=5)
    router = {"a": drawn((16, 2)), "b": drawn((2, 4), seed=1)}
    mlp = {"experts": {"lora": parts}, "router": {"lora": router}}
    recipe = aj.LoRA(
        "layers/1/mlp/{experts/*,router}",
        2,
        3.0,
        rank_pattern={"**/output": 3},
        alpha_pattern={"**/up": 5.0},
    )
    tree = {"layers": {"1": {"mlp": mlp}}}
    directory = save_peft(tmp_path / "a", recipe, tree, names.of_version("5.1"), model)
    tensors = safetensors.numpy.load_file(directory / PEFT.tensors)
    keys = ("experts.base_layer", "experts", "gate")
    assert tensors.keys() == {STACKS.format(key, factor) for key in keys for factor in "AB"}
    again, back = load_peft(directory, names, model)
    (method,) = again.attached
    found = flatten(back)
    rank = 2 if shared else 4
    assert found["layers/1/mlp/experts/lora/gate/a"].shape == (4, 16, rank)
    for name, leaves in (*parts.items(), (None, router)):
        path = f"layers/1/mlp/experts/{name}" if name else "layers/1/mlp/router"
        node = f"layers/1/mlp/experts/lora/{name}" if name else f"{path}/lora"
        change = method.scale_at(path) * found[f"{node}/a"] @ found[f"{node}/b"]
        expected = recipe.scale_at(path) * leaves["a"] @ leaves["b"]
        np.testing.assert_allclose(change, expected, atol=1e-5)
    key = STACKS.format("experts.base_layer", "B")
    tensors[key] = tensors[key][:15]
    safetensors.numpy.save_file(tensors, directory / PEFT.tensors)
    with raises(UserError, "layers.1.mlp.experts.gate_up_proj", [4, 16, 8], [15, 4 * rank]):
        load_peft(directory, names, model)


def test_stacks_that_peft_cannot_write_are_named(model, tmp_path):
    names, path = ARCHITECTURES["mixtral"].names.of_version(5), "layers/0/mlp/experts/up"
    sliced = {"a": drawn((4, 16, 2)), "b": drawn((4, 2, 3))}
    tree = {"layers": {"0": {"mlp": {"experts": {"lora": {"up": sliced}}}}}}
    with raises(UserError, path, [4, 16, 8], [4, 2, 3]):
        save_peft(tmp_path / "a", aj.LoRA(path, 2, slices=((0, 3),)), tree, names, model)


def test_an_expert_that_a_checkpoint_lacks_is_named(model):
    up = {"layers": {"1": {"mlp": {"experts": {"up": model.layers[1].mlp.experts.up[...]}}}}}
    names = [f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight" for i in (0, 1, 3)]
    lacking = "layers/1/mlp/experts/up (layers.1.block_sparse_moe.experts.2.w3.weight)"
    with raises(MismatchError, "1 missing", lacking):
        from_tensors({name: drawn((8, 16)) for name in names}, ARCHITECTURES["mixtral"].names, up)


@pytest.mark.witness("5.24")
@pytest.mark.parametrize("version", ["4.57", "5.24"])
def test_square_stacks_are_read_along_the_axes_that_another_stack_tells(version, tmp_path):
    config = DecoderConfig.from_json(FIXTURES / "gpt_oss" / "config.json")
    config = replace(config.with_layers(1), intermediate_size=16)
    model, names = Decoder(config, rngs=nnx.Rngs(0)), ARCHITECTURES["gpt_oss"].names
    sizes = {"gate_up": (16, 32), "output": (16, 16)}
    parts = {
        name: {"a": drawn((4, i, 2), seed=i), "b": drawn((4, 2, o), seed=o)}
        for name, (i, o) in sizes.items()
    }
    tree = {"layers": {"0": {"mlp": {"experts": {"lora": parts}}}}}
    recipe = aj.LoRA("**/experts/{gate_up,output}", 2, 3.0)
    directory = save_peft(tmp_path / "both", recipe, tree, names.of_version(version), model)
    got = flatten(load_peft(directory, names, model)[1])
    for key, leaf in flatten(tree).items():
        np.testing.assert_array_equal(got[key], leaf)
    del parts["gate_up"]
    recipe = aj.LoRA("**/experts/output", 2, 3.0)
    directory = save_peft(tmp_path / "one", recipe, tree, names.of_version(version), model)
    with raises(UserError, "layers.0.mlp.experts.down_proj", "transformers 4"):
        load_peft(directory, names, model)


def test_a_router_that_is_a_parameter_of_theirs_is_our_module_again(tmp_path):
    base, names = load_decoder(FIXTURES / "deepseek_v3")[1], ARCHITECTURES["deepseek_v3"].names
    width, experts = base.layers[1].mlp.router.kernel.shape
    leaves = {"a": drawn((width, 2)), "b": drawn((2, experts), seed=1)}
    tree = {"layers": {"1": {"mlp": {"router": {"lora": leaves}}}}}
    recipe = aj.LoRA("layers/1/mlp/router", 2, 3.0)
    again, back = load_peft(save_peft(tmp_path / "a", recipe, tree, names, base), names, base)
    assert again.attached[0].targets == ("layers/1/mlp/router",)
    got = flatten(back)
    assert got.keys() == flatten(tree).keys()
    for key, leaf in flatten(tree).items():
        np.testing.assert_array_equal(got[key], leaf)
