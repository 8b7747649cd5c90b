"""(IA)^3: its numbers by hand, merged and unmerged, beside other methods, and in PEFT's files."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers.arrays import drawn
from helpers.errors import raises
from safetensors.numpy import load_file, save_file
from test_peft import base_of

import adapters_jax as aj
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.config import is_target, number_at
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.shapes import count_parameters
from adapters_jax.nnx import AdapterParam
from adapters_jax.trees import flatten, unflatten

X = drawn((5, 4), 1)
IN, OUT = drawn(4, 2), drawn(3, 3)
KERNEL, BIAS = drawn((4, 3), 4), drawn(3, 5)
INNER = aj.IA3("**", feed_forward="**")


def dense(method, scale):
    """A dense layer with a method on it, of both APIs: its output and what it merges to."""
    params = {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}
    model = aj.adapt(nn.Dense(3), method)
    whole = {**params, "ia3": {"scale": jnp.asarray(scale)}}
    yield model.apply({"params": whole}, X), aj.merge(model, whole, X)
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    other.kernel[...], other.bias[...] = params["kernel"], params["bias"]
    other = aj.adapt(other, method, rngs=nnx.Rngs(1))
    other.ia3["scale"][...] = jnp.asarray(scale)
    merged = aj.merge(other)
    yield other(X), {"kernel": merged.kernel[...], "bias": merged.bias[...]}


def test_outputs_are_scaled_with_their_bias():
    for y, merged in dense(aj.IA3("**"), OUT):
        np.testing.assert_allclose(y, (X @ KERNEL + BIAS) * OUT, atol=1e-5)
        np.testing.assert_allclose(merged["kernel"], KERNEL * OUT, atol=1e-6)
        np.testing.assert_allclose(merged["bias"], BIAS * OUT, atol=1e-6)


def test_inputs_are_scaled_without_it():
    for y, merged in dense(INNER, IN):
        np.testing.assert_allclose(y, (X * IN) @ KERNEL + BIAS, atol=1e-5)
        np.testing.assert_allclose(merged["kernel"], KERNEL * IN[:, None], atol=1e-6)
        np.testing.assert_array_equal(merged["bias"], BIAS)


def trained(model, recipe, x, seed=0):
    """A linen model's base and whole tree, with noise on every leaf of the adapters."""
    model = aj.adapt(model, recipe)
    base = model.inner.init(jax.random.key(seed), x)["params"]
    params = flatten(aj.init_adapters(model, base, jax.random.key(1), x))
    for i, path in enumerate(sorted(params.keys() - flatten(base).keys())):
        params[path] = params[path] + 0.5 * drawn(params[path].shape, i)
    return model, base, unflatten(params)


def test_a_convolution_scales_its_input_channels():
    x = drawn((2, 6, 4), 1)
    model, base, params = trained(nn.Conv(3, (3,)), INNER, x)
    assert params["ia3"]["scale"].shape == (4,)
    expected = nn.Conv(3, (3,)).apply({"params": base}, x * params["ia3"]["scale"])
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)
    merged = aj.merge(model, params, x)
    np.testing.assert_allclose(nn.Conv(3, (3,)).apply({"params": merged}, x), expected, atol=1e-5)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_beside_lora_the_order_of_the_recipe_counts(inner, last, api):
    methods = [aj.LoRA("**", 2), INNER if inner else aj.IA3("**")]
    recipe = aj.Recipe(methods if last else methods[::-1])
    model, _, params = trained(nn.Dense(3), recipe, X)
    scale, change = params["ia3"]["scale"], params["lora"]["a"] @ params["lora"]["b"]
    by_hand = scale[:, None] if inner else scale
    kernel, bias = params["kernel"], params["bias"] * (1 if inner else scale)
    kernel = (kernel + change) * by_hand if last else kernel * by_hand + change
    np.testing.assert_allclose(aj.merge(model, params, X)["kernel"], kernel, atol=1e-5)
    if api == "linen":
        y = model.apply({"params": params}, X)
    else:
        other = aj.adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
        nnx.update(other, params)
        y = other(X)
    np.testing.assert_allclose(y, X @ kernel + bias, atol=1e-5)


def test_dora_reads_the_weight_and_so_comes_first():
    recipe = aj.Recipe(aj.IA3("**"), aj.DoRA("**", 2))
    with raises(aj.RecipeError, "DoRA", "''"):
        aj.adapt(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    model, _, params = trained(nn.Dense(3), aj.Recipe(recipe.methods[::-1]), X)
    merged = nn.Dense(3).apply({"params": aj.merge(model, params, X)}, X)
    np.testing.assert_allclose(model.apply({"params": params}, X), merged, atol=1e-5)


def test_unmerging_divides_unless_a_scale_is_zero():
    model, base, params = trained(nn.Dense(3), aj.IA3("**"), X)
    merged = aj.merge(model, params, X)
    back, bound = aj.unmerge(model, {**params, **merged}, X)
    for name in ("kernel", "bias"):
        assert np.abs(back[name] - base[name]).max() <= bound < 1e-5
    params["ia3"]["scale"] = jnp.asarray([1.0, 0.0, 0.0])
    with raises(aj.RecipeError, "IA3", "''", 2):
        aj.unmerge(model, {**params, **merged}, X)


class Offset(nn.Module):
    """A linear layer with a bias of another name."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (4, 3))
        return x @ kernel + self.param("offset", nn.initializers.ones, (3,))


@pytest.mark.parametrize("method", [aj.IA3("**"), INNER], ids=["outputs", "inputs"])
def test_a_layer_of_another_library(method):
    """What is added to the product is scaled as a bias, whatever its name."""
    model, base, params = trained(Offset(), method, X)
    scale = params["ia3"]["scale"]
    if method is INNER:
        kernel, offset = base["kernel"] * scale[:, None], base["offset"]
    else:
        kernel, offset = base["kernel"] * scale, base["offset"] * scale
    np.testing.assert_allclose(model.apply({"params": params}, X), X @ kernel + offset, atol=1e-5)
    merged = aj.merge(model, params, X)
    np.testing.assert_allclose(merged["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(merged["offset"], offset, atol=1e-6)


class Added(nn.Module):
    """A product, and a bias with axes of one entry."""

    bias: tuple[int, ...]
    product: Callable[..., Any]
    kernel: tuple[int, ...] = (4, 3)

    @nn.compact
    def __call__(self, x):
        noise = nn.initializers.normal(1.0)
        y = self.product(x, self.param("kernel", noise, self.kernel))
        return y + self.param("bias", noise, self.bias)


@pytest.mark.parametrize(
    ("base", "x", "scaled"),
    [
        (Added((1, 3), jnp.matmul), X[:3], lambda y, scale: y * scale),
        (
            Added((1, 3, 1), lambda x, w: jax.lax.conv(x, w, (1,), "SAME"), (3, 2, 2)),
            drawn((3, 2, 5), 1),
            lambda y, scale: y * scale[:, None],
        ),
    ],
)
def test_a_bias_has_the_outputs_on_one_of_its_axes(base, x, scaled):
    model, frozen, params = trained(base, aj.IA3("**"), x)
    (scale,) = flatten(params["ia3"]).values()
    expected = scaled(base.apply({"params": frozen}, x), scale)
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=1e-5)
    merged = aj.merge(model, params, x)
    assert merged["bias"].shape == base.bias
    np.testing.assert_allclose(base.apply({"params": merged}, x), expected, atol=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(4, bias_init=nn.initializers.normal(1.0))(x)), None


def layers(length):
    """Layers whose weights and biases are stacked on their second axis."""
    stacked = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
    return nn.scan(Layer, **stacked, length=length)()


def test_the_layers_of_a_bias_may_be_on_another_axis():
    model, frozen, params = trained(layers(3), aj.IA3("**"), X)
    dense, (scale,) = frozen["Dense_0"], flatten(params["Dense_0"]["ia3"]).values()
    expected = X
    for i in range(3):
        product = expected @ dense["kernel"][:, i] + dense["bias"][:, i]
        expected = np.tanh(product * scale[i])
    np.testing.assert_allclose(model.apply({"params": params}, X)[0], expected, atol=1e-5)
    merged = aj.merge(model, params, X)
    y = layers(3).apply({"params": merged}, X)[0]
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "bias"),
    [
        (layers(4), [4, 4]),
        (Added((3,), lambda x, w: jnp.tensordot(x, w, 1), (4, 2, 3)), [3]),
    ],
    ids=["as many layers as outputs", "one number for several outputs"],
)
def test_a_bias_whose_axes_are_not_plain_is_refused(base, bias):
    model, _, params = trained(base, aj.IA3("**"), X)
    with raises(aj.RecipeError, "IA3", "'bias'", f"{bias}", "feed_forward"):
        model.apply({"params": params}, X)


class Gained(nn.Module):
    """A linear layer whose outputs are multiplied by a gain of the bias's shape."""

    @nn.compact
    def __call__(self, x):
        ones = nn.initializers.ones
        kernel, gain = self.param("kernel", ones, (4, 3)), self.param("gain", ones, (3,))
        return (x @ kernel + self.param("offset", ones, (3,))) * gain


class NnxGained(nnx.Module):
    def __init__(self):
        self.kernel, self.gain = nnx.Param(jnp.ones((4, 3))), nnx.Param(jnp.ones(3))
        self.offset = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return (x @ self.kernel[...] + self.offset[...]) * self.gain[...]


def test_a_gain_is_no_bias():
    """The program says what is added to the product; a shape does not."""
    x, method = jnp.ones((1, 4)), aj.IA3("**")
    base = Gained()
    frozen = base.init(jax.random.key(0), x)["params"]
    model = aj.adapt(base, method)
    params = aj.init_adapters(model, frozen, jax.random.key(0), x)
    params = {**params, "ia3": {"scale": jnp.full(3, 2.0)}}
    np.testing.assert_allclose(model.apply({"params": params}, x), np.full((1, 3), 10.0))
    merged = aj.merge(model, params)
    np.testing.assert_allclose(base.apply({"params": merged}, x), np.full((1, 3), 10.0))
    assert float(merged["gain"][0]) == 1.0 and float(merged["offset"][0]) == 2.0
    model = aj.adapt(NnxGained(), method, rngs=nnx.Rngs(0), example_inputs=(x,))
    model.ia3["scale"][...] = jnp.full(3, 2.0)
    np.testing.assert_allclose(model(x), np.full((1, 3), 10.0))


def test_a_linen_model_that_did_not_run_does_not_guess_its_biases():
    x, method = jnp.ones((1, 4)), aj.IA3("**")
    params = Gained().init(jax.random.key(0), x)["params"] | {"ia3": {"scale": jnp.ones(3)}}
    fresh = aj.adapt(Gained(), method)
    with raises(aj.RecipeError, "IA3", "gain", "offset", "aj.linen.points(model"):
        fresh.apply({"params": params}, x)
    aj.linen.points(fresh, x)
    fresh.apply({"params": params}, x)


def test_feed_forward_matches_targets_and_is_stacked_with_them():
    with raises(aj.TargetError, "feed_forward", "'nowhere'"):
        trained(nn.Dense(3), aj.IA3("**", feed_forward="nowhere"), X)
    stack = aj.Stack("layer_{}")
    leaves = {f"layer_{i}/{name}/ia3/scale": drawn(3, i) for i in (0, 1) for name in ("k", "down")}
    targets = tuple(f"layer_{i}/{name}" for i in (0, 1) for name in ("k", "down"))
    one = aj.IA3(targets, feed_forward=("layer_0/down", "layer_1/down"))
    recipe, tree = aj.stack_layers((one, unflatten(leaves)), stack)
    (method,) = recipe
    assert method.scales_input("layers/down") and not method.scales_input("layers/k")
    assert tree["layers"]["down"]["ia3"]["scale"].shape == (2, 3)
    (again,) = aj.unstack_layers((recipe, tree), stack)[0]
    assert [again.scales_input(path) for path in targets] == [False, True, False, True]
    unlike = aj.IA3(targets, feed_forward="layer_0/down")
    with raises(aj.RecipeError, "layers/down"):
        aj.stack_layers((unlike, unflatten(leaves)), stack)


@pytest.mark.slow
def test_the_papers_targets_on_our_models():
    """BERT-base: keys, values and the 3072 inner activations of 12 layers."""
    counts = count_parameters("bert-base", MethodOptions("ia3"))
    assert counts.adapter_parameters == 12 * (768 + 768 + 3072)
    inner = [entry for entry in counts.entries if entry.path.endswith("mlp/output/dense")]
    assert {entry.formula for entry in inner} == {"3072"}
    counts = count_parameters("llama-7b", MethodOptions("ia3"))
    assert counts.adapter_parameters == 32 * (4096 + 4096 + 11008)


BASE = {
    "q": {"kernel": np.ones((6, 4)), "bias": np.ones(4)},
    "k": {"kernel": np.ones((6, 4)), "bias": np.ones(4)},
    "heads": {"kernel": np.ones((6, 2, 3))},
    "conv": {"kernel": np.ones((3, 3, 5, 4))},
    "down": {"kernel": np.ones((6, 4))},
    "word": {"embedding": np.ones((7, 6))},
    "norm": {"scale": np.ones(6)},
}
NAMES = {
    "h.0.attn.qk": ("q", "k"),
    "h.0.heads": "heads",
    "h.0.conv": "conv",
    "h.0.down": "down",
    "word": "word",
    "norm": "norm",
}


def leaves(**scales):
    return {path: {"ia3": {"scale": scale}} for path, scale in scales.items()}


def test_what_is_written_for_peft_and_comes_back(tmp_path):
    recipe = aj.IA3(("k", "heads", "conv", "down"), feed_forward=("conv", "down"))
    own = leaves(k=drawn(4, 1), heads=drawn((2, 3), 2), conv=drawn(5, 3), down=drawn(6, 4))
    directory = save_peft(tmp_path / "a", recipe, own, NAMES, BASE)
    tensors = load_file(directory / "adapter_model.safetensors")
    root = "base_model.model.h.0"
    assert {key: x.shape for key, x in tensors.items()} == {
        f"{root}.attn.qk.ia3_l": (8, 1),
        f"{root}.heads.ia3_l": (6, 1),
        f"{root}.conv.ia3_l": (1, 5, 1, 1),
        f"{root}.down.ia3_l": (1, 6),
    }
    fused = tensors[f"{root}.attn.qk.ia3_l"].ravel()
    np.testing.assert_array_equal(fused, np.concatenate([np.ones(4), drawn(4, 1)]))
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3" and "bias" not in config
    assert config["target_modules"] == ["h.0.attn.qk", "h.0.conv", "h.0.down", "h.0.heads"]
    assert config["feedforward_modules"] == ["h.0.conv", "h.0.down"]
    again, adapters = load_peft(directory, NAMES, BASE)
    (method,) = again
    flat = flatten(adapters)
    for path, scale in flatten(own).items():
        np.testing.assert_array_equal(flat[path], scale)
        module = path.split("/")[0]
        assert method.scales_input(module) == recipe.scales_input(module)
    np.testing.assert_array_equal(flat["q/ia3/scale"], np.ones(4))


@pytest.mark.parametrize(
    ("kernel", "inner", "numbers", "shape"),
    [
        ((3, 5, 4), "conv", 5, (1, 5, 1)),
        ((3, 5, 4), (), 4, (1, 4, 1)),
        ((3, 3, 5, 4), (), 4, (1, 4, 1, 1)),
    ],
)
def test_scales_of_convolutions_for_peft_and_back(tmp_path, kernel, inner, numbers, shape):
    base = {"conv": {"kernel": np.ones(kernel)}}
    recipe, own = aj.IA3("conv", feed_forward=inner), leaves(conv=drawn(numbers, 1))
    directory = save_peft(tmp_path / "a", recipe, own, {"h.conv": "conv"}, base)
    (tensor,) = load_file(directory / "adapter_model.safetensors").values()
    assert tensor.shape == shape
    again, adapters = load_peft(directory, {"h.conv": "conv"}, base)
    (method,) = again
    assert method.scales_input("conv") == bool(inner)
    np.testing.assert_array_equal(flatten(adapters)["conv/ia3/scale"], drawn(numbers, 1))


@pytest.mark.parametrize(
    ("recipe", "own", "named"),
    [
        (aj.IA3("word"), leaves(word=np.ones(6)), "word"),
        (aj.IA3("q", feed_forward="q"), leaves(q=np.ones(6)), "h.0.attn.qk"),
        (aj.IA3("heads"), leaves(heads=np.ones((3, 3))), "heads/ia3"),
        (
            aj.Recipe(aj.IA3("down"), aj.Unfreeze("q/bias")),
            {**leaves(down=np.ones(4)), "q": {"bias": np.ones(4)}},
            "q/bias",
        ),
        (
            aj.Recipe(aj.IA3("down"), aj.LoRA("q", 1)),
            {
                **leaves(down=np.ones(4)),
                "q": {"lora": {"a": np.ones((6, 1)), "b": np.ones((1, 4))}},
            },
            "IA3, LoRA",
        ),
    ],
)
def test_what_peft_cannot_hold_is_named(recipe, own, named, tmp_path):
    with raises(aj.UserError, named):
        save_peft(tmp_path / "a", recipe, own, NAMES, BASE)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("key", "shape", "fields", "named"),
    [
        ("h.0.down", (5, 1), {}, "[5, 1]"),
        ("h.0.down", (1, 4), {}, "[1, 4]"),
        ("h.0.down", (4, 1), {"feedforward_modules": ["down"]}, "[4, 1]"),
        ("h.0.down", (4, 1), {"target_modules": ["heads"]}, "h.0.down"),
        ("h.0.down", (4, 1), {"feedforward_modules": 3}, "feedforward_modules=3"),
        ("h.0.down", (4, 1), {"feedforward_modules": "("}, "feedforward_modules='('"),
        ("h.0.down", (4, 1), {"init_ia3_weights": "x"}, "init_ia3_weights='x'"),
        ("word", (6, 1), {"target_modules": ["word"]}, "word"),
        ("nowhere", (4, 1), {}, "nowhere"),
    ],
)
def test_peft_files_that_do_not_fit(key, shape, fields, named, tmp_path):
    config = {"peft_type": "IA3", "target_modules": ["down"], "feedforward_modules": [], **fields}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{key}.ia3_l": np.ones(shape, np.float32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with raises(aj.AdapterFileError, named):
        load_peft(tmp_path, NAMES, BASE)


def test_peft_matches_ends_of_names_for_feed_forward_modules(tmp_path):
    """`c_proj` means `mlp.c_proj` to PEFT, and so the input of both."""
    config = {"peft_type": "IA3", "target_modules": ["down"], "feedforward_modules": ["wn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"base_model.model.h.0.down.ia3_l": drawn((1, 6), 1)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    recipe, adapters = load_peft(tmp_path, NAMES, BASE)
    assert recipe.methods[0].scales_input("down")
    np.testing.assert_array_equal(adapters["down"]["ia3"]["scale"], drawn((1, 6), 1)[0])


@pytest.mark.slow
def test_our_models_in_peft_names(tmp_path):
    names, model, _, inputs = base_of("gpt2")
    recipe = aj.ia3()
    adapted = aj.adapt(model, recipe, rngs=nnx.Rngs(0))
    state = nnx.state(adapted, AdapterParam)
    nnx.update(adapted, jax.tree.map(lambda x: x + drawn(x.shape, 1), state))
    adapters = nnx.to_pure_dict(nnx.state(adapted, AdapterParam))
    directory = save_peft(tmp_path / "a", recipe, adapters, names, model)
    again, loaded = load_peft(directory, names, model)
    other = aj.load_adapter(aj.save_adapter(tmp_path / "b", loaded, again), model)
    np.testing.assert_allclose(other(**inputs), adapted(**inputs), atol=1e-5)
    assert np.abs(adapted(**inputs) - model(**inputs)).max() > 1e-2


def test_patterns_match_whole_names_from_the_start():
    """PEFT: `^(.*\\.)?(key)$`: neither the end of a word nor the start of a path is enough."""
    config = {"r": 8, "rank_pattern": {"q_proj": 4, "layers.1.k": 2}}
    ranks = {
        "q_proj": 4,
        "layers.0.q_proj": 4,
        "layers.0.my_q_proj": 8,
        "layers.0.q_proj.inner": 8,
        "layers.1.k": 2,
        "model.layers.1.k": 2,
        "model.layers.11.k": 8,
        "model.sublayers.1.k": 8,
    }
    found = {name: number_at(config, "r", name) for name in ranks}
    assert found == ranks
    assert is_target({"target_modules": ["q"]}, "a.q") and not is_target(
        {"target_modules": ["q"]}, "a.bq"
    )


def test_a_scale_of_other_layers_than_its_weight_is_not_counted():
    count = aj.IA3("a").count("a", {"scale": (3, 4)}, (3, 5, 4))
    assert (count.formula, count.parameters, count.copies) == ("4", 4, 3)
    count = aj.IA3("a").count("a", {"scale": (3, 4)}, (2, 5, 4))
    assert (count.formula, count.parameters) == ("an axis of [2, 5, 4]", 0)
