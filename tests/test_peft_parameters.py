"""PEFT's `target_parameters` and `ensure_weight_tying`: experts, and weights of two uses.

The tensors are made by hand here by PEFT's formulas; `test_peft.py` has adapters that PEFT wrote.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from test_peft import FIXTURES, MOE, base_of, drawn, tensors_of

import adapters_jax as aj
from adapters_jax.errors import AdapterFileError, UserError
from adapters_jax.files.directories import PEFT
from adapters_jax.files.layouts import ParameterReference
from adapters_jax.files.names import NameTable, ParameterRule, Rule
from adapters_jax.files.peft import load_peft, save_peft
from adapters_jax.files.peft.parameters import WRITTEN, our_pair, their_pair
from adapters_jax.finetune.tensors import from_tensors, to_tensors
from adapters_jax.transforms.stacking import Stack
from adapters_jax.trees import flatten, unflatten

CONFIG, TENSORS = PEFT.files
ROOT = "base_model.model."
PARAMS = {
    "experts": {"w1": jnp.ones((3, 4, 6)), "w2": jnp.ones((3, 6, 4)), "w3": jnp.ones((3, 4, 6))},
    "gate": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    "words": {"embedding": jnp.ones((9, 4))},
    "vector": jnp.ones((4, 6)),
}
# PyTorch's module defines w1, w3, w2 in this order.
NAMES = {f"mlp.experts.{name}": f"experts/{name}" for name in ("w1", "w3", "w2")}
NAMES |= {"mlp.gate": "gate", "words": "words"}
W1, W3, W2 = list(NAMES)[:3]


def written(directory, tensors, **fields):
    """An adapter of PEFT's with these tensors."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "peft_version": "0.21.2"}
    (directory / CONFIG).write_text(json.dumps(config | {"target_modules": []} | fields))
    whole = {ROOT + name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, directory / TENSORS)
    return directory


def pair(key, inputs, outputs, rows=6, seed=0):
    """PEFT's factors of one parameter; three experts have six rows for a rank of 2."""
    a, b = drawn(rows, inputs, seed=seed), drawn(outputs, rows, seed=seed + 1)
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}


def product(leaves):
    """A B of each expert."""
    return leaves["a"] @ leaves["b"]


def delta_of_peft(a, b, count, swapped_in_out):
    """`ParamWrapper.get_delta_weight` of PEFT, without its scale."""
    a = a.reshape(count, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, count)
    order = "ore,eri->eoi" if swapped_in_out else "ore,eri->eio"
    return np.einsum(order, b, a)


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 6), (5, 5)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.20.0", "0.21.2.dev0"])
def test_experts_change_as_in_each_version_of_peft(
    version, swapped, is_transposed, inputs, outputs
):
    swaps = {None: False, "0.18.1": False, "0.19.0": is_transposed}.get(version, not is_transposed)
    theirs = (outputs, inputs) if swapped else (inputs, outputs)
    own = theirs[::-1] if swaps else theirs
    found = {"a": drawn(6, own[0]), "b": drawn(own[1], 6, seed=1)}
    delta = delta_of_peft(found["a"], found["b"], 3, swaps)
    assert delta.shape == (3, *theirs)
    reference = ParameterReference("experts/w", (3, inputs, outputs), swapped, is_transposed)
    ours = our_pair(reference, found, version)
    assert ours["a"].shape == (3, inputs, 2) and ours["b"].shape == (3, 2, outputs)
    expected = delta.transpose(0, 2, 1) if swapped else delta
    np.testing.assert_allclose(product(ours), expected, rtol=1e-5, atol=1e-6)
    again = our_pair(
        reference, dict(zip("ab", their_pair(reference, **ours), strict=True)), WRITTEN
    )
    np.testing.assert_array_equal(again["a"], ours["a"])
    np.testing.assert_array_equal(again["b"], ours["b"])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_square_matrix_changes_as_in_peft(swapped):
    found = {"a": drawn(2, 4), "b": drawn(4, 2, seed=1)}
    ours = our_pair(ParameterReference("w", (4, 4), swapped, True), found, WRITTEN)
    delta = found["b"] @ found["a"]
    np.testing.assert_allclose(product(ours), delta.T if swapped else delta, rtol=1e-6)


def test_factors_of_one_module_nest_in_its_order(tmp_path):
    every = {"target_parameters": ["experts.w1", "experts.w2", "experts.w3"]}
    inner = [f"mlp.experts{'.base_layer' * depth}" for depth in (2, 1, 0)]
    first, second, last = pair(inner[0], 4, 6), pair(inner[1], 4, 6, seed=4), pair(inner[2], 6, 4)
    source = written(tmp_path / "a", first | second | last, **every)
    recipe, adapters = load_peft(source, NAMES, PARAMS)
    targets = ("experts/w1", "experts/w2", "experts/w3")
    assert recipe == aj.Recipe(aj.LoRA(targets, 2, 6, a_init="uniform"))
    for name, tensors in (("w1", first), ("w3", second), ("w2", last)):
        delta = delta_of_peft(*tensors.values(), 3, False)
        own = adapters["experts"]["lora"][name]
        np.testing.assert_allclose(product(own), delta, rtol=1e-5, atol=1e-6)
    directory = save_peft(tmp_path / "b", recipe, adapters, NAMES, PARAMS)
    for name, tensor in tensors_of(source).items():
        np.testing.assert_array_equal(tensors_of(directory)[name], tensor)
    config = json.loads((directory / CONFIG).read_text())
    assert config["target_parameters"] == [W1, W2, W3] and config["target_modules"] == []
    one = written(tmp_path / "c", pair("mlp.experts", 4, 6), target_parameters=["w3"])
    assert list(flatten(load_peft(one, NAMES, PARAMS)[1])) == [
        "experts/lora/w3/a",
        "experts/lora/w3/b",
    ]


def test_weights_of_plain_modules_by_their_name(tmp_path):
    gate, words = pair("mlp.gate", 4, 5, rows=3), pair("words", 4, 9, rows=2, seed=4)
    fields = {"target_parameters": ["gate.weight", "words.weight"]}
    fields |= {"rank_pattern": {"gate.weight": 3}, "alpha_pattern": {"words.weight": 4}}
    recipe, adapters = load_peft(written(tmp_path / "a", gate | words, **fields), NAMES, PARAMS)
    a, b = words.values()
    np.testing.assert_allclose(product(adapters["words"]["lora"]), b @ a, rtol=1e-5)
    a, b = gate.values()
    np.testing.assert_allclose(product(adapters["gate"]["lora"]), (b @ a).T, rtol=1e-5)
    (lora,) = recipe
    assert (lora.rank_at("gate"), lora.scale_at("gate")) == (3, 2)
    assert (lora.rank_at("words"), lora.scale_at("words")) == (2, 2)


class Layer(nn.Module):
    """Experts that hold two square weights themselves."""

    @nn.compact
    def __call__(self, x, _=None):
        up = self.param("up", nn.initializers.normal(), (3, 4, 4))
        down = self.param("down", nn.initializers.normal(), (3, 4, 4))
        x = jnp.einsum("ecf,efd->ecd", nn.relu(jnp.einsum("ecd,edf->ecf", x, up)), down)
        return x, None


class Layers(nn.Module):
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        if self.scan:
            whole = nn.scan(Layer, {"params": 0}, split_rngs={"params": True}, length=2)
            return whole(name="layers")(x, None)[0]
        for i in range(2):
            x, _ = Layer(name=f"layer_{i}")(x)
        return x


STACKED = NameTable(
    (),
    stack=Stack("layer_{}", "layers"),
    parameters=tuple(
        ParameterRule(rf"layer_(\d+)/{name}", rf"h.\1.experts.{name}") for name in ("up", "down")
    ),
)


@pytest.mark.slow
def test_a_recipe_of_modules_with_several_weights_and_scanned_layers(tmp_path):
    x = drawn(3, 2, 4)
    adapted = aj.adapt(Layers(), aj.LoRA("layers", 2, 4))
    params = adapted.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * drawn(*leaf.shape, seed=leaf.size), params)
    adapters, base = aj.partition(params, adapted.recipe)
    directory = save_peft(tmp_path / "a", adapted.recipe, adapters, STACKED, base)
    found = tensors_of(directory)
    assert found[f"{ROOT}h.1.experts.base_layer.lora_A.weight"].shape == (6, 4)
    config = json.loads((directory / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["target_parameters"][0] == "h.0.experts.down"
    recipe, again = load_peft(directory, STACKED, base)
    whole = aj.merge_trees(again, base)
    expected = adapted.apply({"params": params}, x)
    np.testing.assert_allclose(
        aj.adapt(Layers(), recipe).apply({"params": whole}, x), expected, rtol=1e-5
    )
    assert np.abs(Layers().apply({"params": base}, x) - expected).max() > 1e-3


class Raw(nnx.Module):
    """A raw parameter in NNX, twice."""

    def __init__(self):
        self.up = nnx.Param(jnp.asarray(drawn(3, 4, 6)))
        self.down = nnx.Param(jnp.asarray(drawn(3, 6, 4)))

    def __call__(self, x):
        return jnp.einsum(
            "ecf,efd->ecd", jnp.einsum("ecd,edf->ecf", x, self.up[...]), self.down[...]
        )


class Net(nnx.Module):
    def __init__(self):
        self.experts = Raw()

    def __call__(self, x):
        return self.experts(x)


def test_raw_parameters_of_an_nnx_module(tmp_path):
    model = Net()
    names = {f"mlp.experts.{name}": f"experts/{name}" for name in ("up", "down")}
    tensors = pair("mlp.experts.base_layer", 4, 6) | pair("mlp.experts", 6, 4, seed=3)
    source = written(tmp_path / "a", tensors, target_parameters=list(names))
    recipe, adapters = load_peft(source, names, model)
    values = list(tensors.values())
    up, down = (3 * delta_of_peft(*values[i : i + 2], 3, False) for i in (0, 2))
    x = drawn(3, 2, 4)
    adapted = aj.load_adapter(aj.save_adapter(tmp_path / "b", adapters, recipe), model, None, x)
    expected = (x @ (drawn(3, 4, 6) + up)) @ (drawn(3, 6, 4) + down)
    np.testing.assert_allclose(adapted(x), expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(aj.merge(adapted)(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("tensors", "fields", "data"),
    [
        (pair("mlp.experts", 4, 6), {"target_parameters": ["w1", "w3"]}, ["mlp.experts", 1, W1]),
        (pair("mlp.experts", 4, 5), {"target_parameters": ["w1"]}, [W1, [6, 4], [5, 6], [3, 4, 6]]),
        (pair("mlp.experts", 4, 6, 7), {"target_parameters": ["w1"]}, [W1, [7, 4], "experts/w1"]),
        (pair("mlp.experts", 4, 6, 9), {"target_parameters": ["w1"]}, [W1, "rank 3", 2]),
        (pair("mlp.experts", 4, 6), {"target_parameters": ["w1", "w9"]}, ["['w9']"]),
        (pair("mlp.experts", 4, 6), {}, ["mlp.experts"]),
    ],
)
def test_factors_that_do_not_fit_are_named(tmp_path, tensors, fields, data):
    with raises(AdapterFileError, *data):
        load_peft(written(tmp_path / "a", tensors, **fields), NAMES, PARAMS)


def leaves_of(method, path, inputs=4, outputs=6):
    own = {"a": drawn(3, inputs, 2), "b": drawn(3, 2, outputs)}
    return unflatten({f"{path}/{name}": leaf for name, leaf in own.items()})


@pytest.mark.parametrize(
    ("method", "leaves", "data"),
    [
        (aj.LoRA("experts/w1", 2, dropout=0.1), {}, [W1, "lora_dropout=0.1"]),
        (aj.DoRA("experts/w1", 2), {"magnitude": drawn(3, 6)}, [W1, "use_dora=True"]),
        (
            aj.LoRA("experts/w1", 2, slices=((0, 2),)),
            {"b": drawn(3, 2, 2)},
            ["experts/w1", [3, 4, 6]],
        ),
    ],
)
def test_what_peft_does_not_do_on_parameters_is_named(tmp_path, method, leaves, data):
    own = {"a": drawn(3, 4, 2), "b": drawn(3, 2, 6)} | leaves
    tree = unflatten({f"experts/lora/w1/{name}": leaf for name, leaf in own.items()})
    with raises(UserError, *data):
        save_peft(tmp_path / "a", method, tree, NAMES, PARAMS)


def test_parameters_that_peft_cannot_wrap_are_named(tmp_path):
    top = unflatten({"lora/vector/a": drawn(4, 2), "lora/vector/b": drawn(2, 6)})
    with raises(UserError, "vector", [4, 6]):
        save_peft(tmp_path / "a", aj.LoRA("vector", 2), top, NAMES | {"v": "vector"}, PARAMS)
    shared = unflatten({"experts/lora/w1/a": drawn(4, 2), "experts/lora/w1/b": drawn(2, 3, 6)})
    with raises(UserError, "experts/w1", [3, 4, 6]):
        save_peft(tmp_path / "b", aj.LoRA("experts/w1", 2), shared, NAMES, PARAMS)
    one = unflatten({"experts/lora/w1/a": drawn(3, 4, 2), "experts/lora/w1/b": drawn(3, 2, 6)})
    with raises(UserError, "experts/w1"):
        save_peft(tmp_path / "c", aj.LoRA("experts/w1", 2), one, {"words": "words"}, PARAMS)


def test_a_module_with_a_parameter_of_its_own(tmp_path):
    table = NameTable(
        (Rule("gate", "gate"),), parameters=(ParameterRule("gate/extra", "gate.extra"),)
    )
    base = {"gate": {"extra": jnp.ones((4, 3)), "kernel": jnp.ones((4, 5))}}
    tensors = pair("gate", 4, 5, rows=2)
    source = written(tmp_path / "a", tensors, target_modules=["gate"])
    recipe, adapters = load_peft(source, table, base)
    assert recipe.attached[0].targets == ("gate/kernel",)
    delta = (tensors["gate.lora_B.weight"] @ tensors["gate.lora_A.weight"]).T
    np.testing.assert_allclose(product(adapters["gate"]["lora"]["kernel"]), delta, rtol=1e-6)
    both = {f"gate/lora/extra/{n}": x for n, x in (("a", drawn(4, 2)), ("b", drawn(2, 3)))}
    own = {f"gate/lora/kernel/{n}": x for n, x in (("a", drawn(4, 2)), ("b", drawn(2, 5)))}
    with raises(UserError, "gate/extra", "gate"):
        save_peft(tmp_path / "b", aj.LoRA("gate", 2), unflatten(both | own), table, base)
    directory = save_peft(tmp_path / "c", aj.LoRA("gate/extra", 2), unflatten(both), table, base)
    (name,) = json.loads((directory / CONFIG).read_text())["target_parameters"]
    assert name == "gate.extra"


def test_a_square_kernel_by_the_name_of_its_weight(tmp_path):
    base = {"q": {"kernel": jnp.ones((4, 4))}}
    tensors = pair("m.q", 4, 4, rows=2)
    source = written(tmp_path / "a", tensors, target_parameters=["q.weight"])
    recipe, adapters = load_peft(source, {"m.q.weight": "q/kernel"}, base)
    a, b = tensors.values()
    np.testing.assert_allclose(product(adapters["q"]["lora"]), (b @ a).T, rtol=1e-6)
    directory = save_peft(tmp_path / "b", recipe, adapters, {"m.q.weight": "q/kernel"}, base)
    for name, tensor in tensors_of(source).items():
        np.testing.assert_array_equal(tensors_of(directory)[name], tensor)


def test_a_square_kernel_that_is_read_turned_is_written_turned(tmp_path):
    own = {"q/lora/:1>0/a": drawn(4, 2), "q/lora/:1>0/b": drawn(2, 4, seed=1)}
    base = {"q": {"kernel": jnp.ones((4, 4))}}
    directory = save_peft(tmp_path / "a", aj.LoRA("q", 2), unflatten(own), {"q": "q"}, base)
    found = tensors_of(directory)
    delta = found[f"{ROOT}q.lora_B.weight"] @ found[f"{ROOT}q.lora_A.weight"]
    # PyTorch's weight is the kernel transposed; here A has the kernel's second axis.
    np.testing.assert_allclose(delta, drawn(4, 2) @ drawn(2, 4, seed=1), rtol=1e-6)


def test_tables_convert_parameters_of_modules():
    _, _, params, _ = base_of("moe_experts")
    tensors = to_tensors(params, MOE)
    with safetensors.safe_open(FIXTURES / "moe" / "model.safetensors", "np") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, file.get_tensor(name))
    with raises(UserError, "experts/up", [3, 5, 5]):
        wrong = {**tensors, "mlp.experts.up": np.ones((3, 5, 4), np.float32)}
        from_tensors(wrong, MOE, params)


# One weight of two uses: the embedding, and the output layer that is tied to it.

TIED = {"model.words": "words", "lm_head": "words", "q": "gate"}
EMBEDDED = {"model.words.lora_embedding_A": drawn(2, 9)}
EMBEDDED |= {"model.words.lora_embedding_B": drawn(4, 2, seed=1)}
HEAD = {"lm_head.lora_A.weight": drawn(4, 2, seed=1).T, "lm_head.lora_B.weight": drawn(2, 9).T}
TARGETS = {"target_modules": ["words"], "ensure_weight_tying": True}


def test_one_pair_for_both_uses_goes_both_ways(tmp_path):
    source = written(tmp_path / "a", EMBEDDED | HEAD, **TARGETS, alpha_pattern={"words": 6})
    recipe, adapters = load_peft(source, TIED, PARAMS)
    assert recipe == aj.Recipe(aj.LoRA("words", 2, 6, a_init="uniform"))
    own = adapters["words"]["lora"]
    np.testing.assert_array_equal(own["a"], drawn(2, 9).T)
    np.testing.assert_array_equal(own["b"], drawn(4, 2, seed=1).T)
    directory = save_peft(tmp_path / "b", recipe, adapters, TIED, PARAMS)
    expected = tensors_of(source)
    assert tensors_of(directory).keys() == expected.keys()
    for name, tensor in tensors_of(directory).items():
        np.testing.assert_array_equal(tensor, expected[name])
    config = json.loads((directory / CONFIG).read_text())
    assert config["ensure_weight_tying"] is True
    assert config["target_modules"] == ["lm_head", "model.words"]


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        (EMBEDDED, {}),
        (HEAD, {"target_modules": ["lm_head"]}),
        (EMBEDDED | HEAD | {"lm_head.lora_A.weight": drawn(2, 4)}, {}),
        (EMBEDDED | HEAD | {"lm_head.lora_B.weight": drawn(9, 2)}, {}),
        (EMBEDDED | HEAD, {"alpha_pattern": {"lm_head": 3}}),
        ({"model.words.weight": drawn(9, 4)}, {"modules_to_save": ["words"]}),
        ({"lm_head.weight": drawn(9, 4)}, {"modules_to_save": ["lm_head"]}),
        (
            {"model.words.weight": drawn(9, 4), "lm_head.weight": drawn(9, 4, seed=1)},
            {"modules_to_save": ["words", "lm_head"]},
        ),
    ],
)
def test_a_tied_weight_that_changes_in_one_use_alone_is_refused(tmp_path, tensors, fields):
    source = written(tmp_path / "a", tensors, **(TARGETS | fields))
    with raises(AdapterFileError, "words", "lm_head", "ensure_weight_tying"):
        load_peft(source, TIED, PARAMS)


def test_a_whole_tied_weight_goes_both_ways(tmp_path):
    whole = {"model.words.weight": drawn(9, 4), "lm_head.weight": drawn(9, 4)}
    whole |= pair("q", 4, 5, rows=2)
    fields = {"target_modules": ["q"], "modules_to_save": ["words"], "ensure_weight_tying": True}
    source = written(tmp_path / "a", whole, **fields)
    recipe, adapters = load_peft(source, TIED, PARAMS)
    np.testing.assert_array_equal(adapters["words"]["embedding"], drawn(9, 4))
    directory = save_peft(tmp_path / "b", recipe, adapters, TIED, PARAMS)
    for name, tensor in tensors_of(source).items():
        np.testing.assert_array_equal(tensors_of(directory)[name], tensor)
    config = json.loads((directory / CONFIG).read_text())
    assert config["modules_to_save"] == ["lm_head", "model.words"]
    assert config["ensure_weight_tying"] is True


def test_a_head_that_repeats_the_base_does_no_harm(tmp_path):
    same = {"lm_head.base_layer.weight": np.ones((9, 4), np.float32)}
    source = written(tmp_path / "a", EMBEDDED | HEAD | same, **TARGETS)
    assert set(flatten(load_peft(source, TIED, PARAMS)[1])) == {"words/lora/a", "words/lora/b"}


def test_methods_that_peft_does_not_tie_are_named(tmp_path):
    own = {"a": drawn(9, 2), "b": drawn(2, 4), "magnitude": drawn(4)}
    tree = {"words": {"lora": own}}
    with raises(UserError, "words", "DoRA"):
        save_peft(tmp_path / "a", aj.DoRA("words", 2), tree, TIED, PARAMS)
    recipe = aj.Recipe(aj.IA3("gate"), aj.Unfreeze("words/*"))
    tree = {"words": {"embedding": drawn(9, 4)}, "gate": {"ia3": {"scale": drawn(5)}}}
    with raises(UserError, "IA3", "tied"):
        save_peft(tmp_path / "b", recipe, tree, TIED, PARAMS)


def test_a_table_ties_only_what_has_no_output_layer_of_its_own(tmp_path):
    table = NameTable((Rule("words", "words"), Rule("head", "lm_head")), tied=("lm_head", "words"))
    base = PARAMS | {"head": {"kernel": jnp.ones((4, 9))}}
    alone = {
        f"words.lora_embedding_{part}": EMBEDDED[f"model.words.lora_embedding_{part}"]
        for part in "AB"
    }
    source = written(tmp_path / "a", alone, target_modules=["words"])
    load_peft(source, table, base)
    with raises(AdapterFileError, "words", "lm_head"):
        load_peft(source, table, PARAMS)
    gate = written(tmp_path / "b", pair("gate", 4, 5, rows=2), target_modules=["gate"])
    part = NameTable((Rule("gate", "gate"),), tied=("lm_head", "words"))
    assert load_peft(gate, part, {"gate": PARAMS["gate"]})[0].attached[0].rank == 2
