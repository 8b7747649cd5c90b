"""Counts against the published figures, tables as text, and trees that are not what they say."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers.errors import raises
from rich.console import Console

import adapters_jax as aj
from adapters_jax.finetune.models import KNOWN
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.shapes import adapted_shape
from adapters_jax.texts import bytes_text
from adapters_jax.trees import flatten, unflatten
from adapters_jax.weights.quantized import bits_of

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
RECIPE = aj.Recipe(
    aj.LoRA("layer_*", rank=2), aj.Bottleneck("layer_1", 3), aj.Unfreeze(("**/bias", "head/*"))
)
GOLDEN = """
path          method      shapes                                                            formula        count  parameters
layer_0       LoRA        a [4, 2], b [2, 6]                                                2*(4 + 6)          1          20
layer_1       Bottleneck  down/kernel [6, 3], down/bias [3], up/kernel [3, 6], up/bias [6]  2*6*3 + 6 + 3      1          45
layer_*       LoRA        a [6, 2], b [2, 6]                                                2*(6 + 6)         10         240
head/bias     Unfreeze    bias [2]                                                          2                  1           2
head/kernel   Unfreeze    kernel [6, 2]                                                     6*2                1          12
layer_*/bias  Unfreeze    bias [6]                                                          6                 11          66
trainable 385 (82.97 % of the base), of them in adapters 305; frozen 384
bytes: trainable 1.5 KiB, gradients 1.5 KiB, optimizer 3.0 KiB, frozen 1.5 KiB
"""  # noqa: E501


class Net(nn.Module):
    """Eleven hidden layers and a head, the first layer of another shape than the rest."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i in range(11):
            x = nn.Dense(6, name=f"layer_{i}", param_dtype=self.dtype)(x)
        return nn.Dense(2, name="head", param_dtype=self.dtype)(x)


@functools.cache
def small(dtype=jnp.float32):
    """The adapted model and its abstract parameters."""
    model = aj.adapt(Net(dtype), RECIPE)
    base = jax.eval_shape(model.inner.init, jax.random.key(0), X)["params"]
    return model, aj.init_adapters(model, base, jax.random.key(0), X)


def known(name, recipe):
    """A published shape with adapters, abstract."""
    base, inputs = KNOWN[name]()
    model = aj.adapt(base, recipe)
    return model, jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


@pytest.mark.witness("bert-base-recipe1-894528-0-12")
@pytest.mark.parametrize(
    ("name", "recipe", "adapters", "unfrozen", "points"),
    [
        ("bert-base", aj.houlsby(64), 2_379_264, 38_400, 24),
        ("bert-base", aj.pfeiffer(reduction_factor=16), 894_528, 0, 12),
        ("roberta-base", aj.lora(8), 294_912, 0, 24),
    ],
)
def test_published_counts(name, recipe, adapters, unfrozen, points):
    audit = aj.audit(*known(name, recipe))
    assert audit.adapter_parameters == adapters
    assert audit.trainable_parameters == adapters + unfrozen
    assert audit.trainable_bytes == audit.gradient_bytes == 4 * (adapters + unfrozen)
    assert audit.optimizer_bytes == 2 * audit.trainable_bytes + 4
    assert len([entry for entry in audit.entries if entry.method != "Unfreeze"]) == points
    assert audit.unmatched == ()


def test_published_counts_of_gpt3():
    model, _ = adapted_shape("gpt3-175b", MethodOptions("lora", rank=4), scan=True)
    audit = aj.audit(model)
    assert audit.adapter_parameters == audit.trainable_parameters == 18_874_368
    assert 174e9 < audit.frozen_parameters < 176e9
    assert audit.percent == 100 * 18_874_368 / audit.frozen_parameters < 0.011

    def widened(path, x):
        axes = {"lora/a": (*x.shape[:-1], 8), "lora/b": (96, 8, *x.shape[2:])}
        return shape(*axes.get(path[-6:], x.shape))

    whole = flatten(nnx.to_pure_dict(nnx.state(model)))
    wider = {path: widened(path, x) for path, x in whole.items()}
    audit = aj.audit(aj.lora(8), unflatten(wider))
    assert audit.adapter_parameters == 37_748_736
    assert [row[3:] for row in audit.rows()] == [("96*(8*(12288 + 12288))", "1", "18,874,368")] * 2
    with raises(aj.MismatchError, "layers/attention/value (LoRA)", "18,874,368", "4*(12288 "):
        aj.audit(aj.lora(4), unflatten(wider))


def test_the_table_as_text():
    assert repr(aj.audit(*small())) == GOLDEN.strip()


def test_numbers_that_all_paths_of_a_row_share_are_shown():
    scale = {"scale": jnp.ones(3)}
    params = {f"block_{i}": {"norm1": scale, "norm2": scale} for i in range(2)}
    audit = aj.audit(aj.adapt(Net(), aj.Unfreeze("**/norm1/scale")), params)
    assert [(row[0], row[4]) for row in audit.rows()] == [("block_*/norm1/scale", "2")]


def test_a_star_in_a_name_is_no_number():
    found = aj.audit(aj.Unfreeze("**"), {"a*": {"x": jnp.ones(3)}, "a1": {"x": jnp.ones(3)}})
    assert {row[0] for row in found.rows()} == {"a*/x", "a1/x"}


def test_rich_prints_the_same_rows_and_totals():
    audit = aj.audit(*small())
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(audit)
    printed = [" ".join(line.replace("│", " ").split()) for line in stream.getvalue().splitlines()]
    for row in audit.rows():
        assert " ".join(row) in printed
    for line in audit.totals():
        assert line in printed


def test_rich_takes_no_path_for_markup():
    params = {"[bold]": {"kernel": shape(4, 4), "lora": {"a": shape(4, 2), "b": shape(2, 4)}}}
    stream = io.StringIO()
    audit = aj.audit(aj.Recipe(aj.LoRA("**", 2)), params)
    Console(file=stream, width=120, color_system=None).print(audit)
    assert "[bold]" in stream.getvalue() and "a [4, 2], b [2, 4]" in stream.getvalue()


def test_to_dict_is_json_and_holds_everything():
    audit = aj.audit(*small())
    fields = json.loads(json.dumps(audit.to_dict()))
    for kind in ("adapter", "trainable", "frozen"):
        assert fields[f"{kind}_parameters"] == getattr(audit, f"{kind}_parameters")
    assert fields["percent"] == pytest.approx(100 * 385 / 464)
    assert fields["optimizer_bytes"] == 2 * 385 * 4 + 4
    assert fields["frozen_bytes"] == 384 * 4
    assert fields["unmatched"] == []
    assert len(fields["entries"]) == 12 + 13
    assert fields["entries"][0] == {
        "path": "layer_0",
        "method": "LoRA",
        "shapes": {"a": [4, 2], "b": [2, 6]},
        "formula": "2*(4 + 6)",
        "expected": 20,
        "actual": 20,
        "reads": [],
        "name": "",
        "trained": True,
    }


def test_entries_are_in_the_order_of_layers():
    paths = [entry.path for entry in aj.audit(*small()).entries if entry.method == "LoRA"]
    assert paths == [f"layer_{i}" for i in range(11)]


def test_arrays_and_shapes_count_the_same():
    model, params = small()
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    assert aj.audit(model, arrays) == aj.audit(model.recipe, arrays) == aj.audit(model, params)


def test_bytes_follow_the_dtype_and_the_optimiser():
    audit = aj.audit(*small(jnp.bfloat16))
    assert audit.trainable_bytes == audit.gradient_bytes == 4 * 385  # half precision in full
    assert audit.optimizer_bytes == 2 * 4 * 385 + 4
    assert audit.frozen_bytes == 2 * 384
    assert aj.audit(*small(), tx=optax.sgd(1.0)).optimizer_bytes == 0
    assert aj.audit(*small(), tx=optax.sgd(1.0, momentum=0.9)).optimizer_bytes == 4 * 385
    half = optax.adam(1.0, mu_dtype=jnp.bfloat16)
    assert aj.audit(*small(), tx=half).optimizer_bytes == (2 + 4) * 385 + 4


def test_an_int8_base_is_counted_in_its_own_bytes():
    params = {
        "kernel": shape(4, 6, dtype=jnp.int8),
        "lora": {"a": shape(4, 2), "b": shape(2, 6)},
    }
    audit = aj.audit(aj.Recipe(aj.LoRA("**", 2)), params)
    assert (audit.frozen_parameters, audit.frozen_bytes, audit.trainable_bytes) == (24, 24, 80)


def test_patterns_that_match_nothing_are_listed():
    _, params = small()
    recipe = RECIPE + aj.LoRA(("layer_1", "stem"), 2) + aj.Unfreeze(("gone/**", "head/*"))
    audit = aj.audit(recipe, params)
    assert audit.unmatched == ("stem", "gone/**")
    lines = repr(audit).splitlines()[-2:]
    assert "'stem'" in lines[0] and "'gone/**'" in lines[1]


def test_stacked_layers_count_every_layer():
    params = {
        "layers": {
            "dense": {
                "kernel": shape(3, 4, 6),
                "lora": {"a": shape(3, 4, 2), "b": shape(3, 2, 6)},
                "adapter": {
                    "down": {"kernel": shape(3, 6, 5), "bias": shape(3, 5)},
                    "up": {"kernel": shape(3, 5, 6), "bias": shape(3, 6)},
                },
            }
        }
    }
    recipe = aj.Recipe(aj.LoRA("**/dense", 2), aj.Bottleneck("**/dense", 5))
    audit = aj.audit(recipe, params)
    assert [(entry.formula, entry.actual) for entry in audit.entries] == [
        ("3*(2*6*5 + 6 + 5)", 3 * 71),
        ("3*(2*(4 + 6))", 60),
    ]
    params["layers"]["dense"]["lora"]["a"] = shape(2, 4, 2)
    with raises(aj.MismatchError, "layers/dense (LoRA)", 52, "3*(2*(4 + 6)) = 60"):
        aj.audit(recipe, params)


def test_factors_of_an_einsum_weight():
    params = {"query": {"kernel": shape(8, 2, 4), "lora": {"a": shape(8, 3), "b": shape(3, 2, 4)}}}
    (entry,) = aj.audit(aj.Recipe(aj.LoRA("query", 3)), params).entries
    assert (entry.formula, entry.expected) == ("3*(8 + 8)", 48)


def tampered(changes):
    """The small model's audit after leaves were changed; None takes a leaf away."""
    model, params = small()
    flat = {**flatten(params), **changes}
    return aj.audit(model, unflatten({path: x for path, x in flat.items() if x is not None}))


def test_every_wrong_adapter_is_named():
    found = {
        "layer_0 (LoRA)": ["24", "2*(4 + 6) = 20"],
        "layer_1 (Bottleneck)": [
            "down/bias, down/kernel, up/kernel",
            "down/kernel, down/bias, up/kernel, up/bias",
        ],
        "layer_2 (LoRA)": ["42", "2*(6 + 6) = 24"],
        "layer_3 (LoRA)": ["a, b, c", "a, b"],
        "layer_4 (LoRA)": ["a, b, magnitude/scale", "a, b"],
    }
    with raises(aj.MismatchError) as error:
        tampered(
            {
                "layer_0/lora/a": shape(4, 3),
                "layer_1/adapter/up/bias": None,
                "layer_2/lora/b": shape(5, 6),
                "layer_3/lora/c": shape(7),
                "layer_4/lora/magnitude/scale": shape(6),
            }
        )
    problems = str(error.value).split("; ")
    assert len(problems) == len(found)
    for problem, (entry, data) in zip(problems, found.items(), strict=True):
        assert all(datum in problem for datum in [entry, *data]), problem


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_5/lora/a": shape(6, 4), "layer_5/lora/b": shape(4, 6)},
        {"layer_5/lora/b": None},
        {"layer_1/adapter/down/kernel": shape(6, 4)},
        {"layer_1/adapter/down/kernel": None},
        {"layer_1/adapter/extra": shape(1)},
        {"layer_5/kernel": shape(6, 7)},
    ],
)
def test_no_wrong_leaf_passes(changes):
    with raises(aj.MismatchError, next(iter(changes))[:7]):
        tampered(changes)


def test_the_model_itself_is_named_where_its_path_is_empty():
    params = {"kernel": shape(4, 6), "lora": {"a": shape(4, 3), "b": shape(3, 6)}}
    with raises(aj.MismatchError, "(the model itself) (LoRA)", 30, "2*(4 + 6) = 20"):
        aj.audit(aj.Recipe(aj.LoRA("**", 2)), params)


def test_bits_of_a_number():
    bits = {"int4": 4, "uint8": 8, "int32": 32, "bfloat16": 16, "float32": 32, "bool": 8}
    assert {name: bits_of(jnp.dtype(name)) for name in bits} == bits
    assert bits_of(jax.random.key(0).dtype) == 64


def test_bytes_as_text():
    texts = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536 * 2**20: "1.5 GiB"}
    assert {n: bytes_text(n) for n in texts} == texts
    assert bytes_text(3 * 2**50) == "3072.0 TiB"


def test_a_model_without_adapters():
    params = {"kernel": shape(4, 6)}
    audit = aj.audit(aj.Recipe(), params)
    assert repr(audit).splitlines()[:2] == [
        "path  method  shapes  formula  count  parameters",
        "trainable 0 (0 % of the base), of them in adapters 0; frozen 24",
    ]
    full = aj.audit(aj.full(), params)
    assert (full.adapter_parameters, full.trainable_parameters, full.percent) == (0, 24, 100.0)
    with raises(aj.UserError, "Linear", "aj.adapt"):
        aj.audit(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("args", [(RECIPE,), (None, {}), (aj.adapt(Net(), RECIPE),)])
def test_other_arguments_are_refused(args):
    with raises(TypeError, "aj.audit(model, params)", "aj.audit(recipe, params)"):
        aj.audit(*args)
    with raises(TypeError, "Net", "aj.adapt(model, recipe)"):
        aj.audit(Net(), {})


def test_an_nnx_model_is_counted_by_its_own_parameters():
    def build():
        rngs = nnx.Rngs(0)
        base = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
        return aj.adapt(
            base, aj.Recipe(aj.LoRA("0", 2, dropout=0.5), aj.Unfreeze("1/*")), rngs=rngs
        )

    audit = aj.audit(nnx.eval_shape(build))
    assert [(entry.path, entry.actual) for entry in audit.entries] == [
        ("0", 20),
        ("1/bias", 6),
        ("1/scale", 6),
    ]
    assert (audit.adapter_parameters, audit.frozen_parameters) == (20, 30)


def test_boxed_parameters_are_counted():
    box = functools.partial(nn.Partitioned, names=(None, "model"))
    params = {"kernel": box(shape(4, 6)), "lora": {"a": box(shape(4, 2)), "b": box(shape(2, 6))}}
    audit = aj.audit(aj.Recipe(aj.LoRA("**", 2)), params)
    assert (audit.adapter_parameters, audit.frozen_parameters) == (20, 24)
    np.testing.assert_allclose(audit.percent, 100 * 20 / 24)


class Reads(nn.Module):
    """A tied embedding, a layer, and a weight that is normalised before its product."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(20, 8, name="embed")
        x = nn.Dense(8, name="dense")(embed(ids))
        w = self.param("w", nn.initializers.lecun_normal(), (8, 8))
        x = x @ (w - w.mean(0, keepdims=True))
        return x @ embed.embedding.T


def test_with_inputs_it_shows_how_each_changed_weight_is_computed():
    ids = jnp.ones((2, 3), jnp.int32)
    params = jax.eval_shape(Reads().init, jax.random.key(0), ids)["params"]
    model = aj.adapt(Reads(), aj.LoRA("**", 2))
    params = aj.init_adapters(model, params, jax.random.key(1), ids)
    plain = aj.audit(model, params)
    assert all(entry.reads == () for entry in plain.entries)
    audit = aj.audit(model, params, inputs=(ids,))
    reads = {entry.path: entry.reads for entry in audit.entries}
    assert reads == {
        "": ("reduce_sum: sum", "sub: sum"),
        "dense": ("dot_general: thin",),
        "embed": ("gather: thin", "dot_general: thin"),
    }
    assert audit.computed() == [
        "computed thin: 2 of 3 changed weights",
        "(the model itself) is read by reduce_sum: sum, sub: sum",
        "embed is read by gather: thin, dot_general: thin",
    ]
    assert audit.totals()[:2] == plain.totals()[:2]
    other = aj.adapt(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), aj.LoRA("**", 2), rngs=nnx.Rngs(1))
    (entry,) = aj.audit(other, inputs=aj.inputs(jnp.ones((1, 8)))).entries
    assert entry.reads == ("dot_general: thin",)
