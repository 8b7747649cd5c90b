"""A quantised base: its numbers against numpy's, its gradients against floats', and its memory."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import linen as nn
from flax import nnx
from helpers import contract
from helpers.arrays import double, drawn, drawn_like, shapes
from helpers.contract import APIS, CASES, VARIANTS, ids, shaken
from helpers.errors import raises
from helpers.packed import check_gradients, with_base
from helpers.tiny import write_llama, write_meanings, write_model, write_reviews
from jax.sharding import PartitionSpec as P

import adapters_jax as aj
from adapters_jax.distributed.plan import abstract_state, plan
from adapters_jax.errors import MissingPackageError
from adapters_jax.finetune.cli.finetune import Finetune
from adapters_jax.finetune.cli.merge import Merge
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_generator, load_predictor
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.options.data import DataOptions
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.pretrained.decoder import load_pretrained_decoder
from adapters_jax.finetune.shapes import adapted_shape
from adapters_jax.transforms.stacking import Stack
from adapters_jax.trees import flatten
from adapters_jax.weights.quantized import Quantized, _in_rows, _nf4_floats, is_quantized, once

NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
X = drawn((2, 3, 8), 1)
KINDS = {  # the layer, its input, where its weight is, and its shape with a block's numbers last
    "dense": (nn.Dense(5), X, "kernel", (2, 4, 5), (0, 2, 1)),
    "general_in": (nn.DenseGeneral(5, axis=(-2, -1)), X, "kernel", (6, 4, 5), (0, 2, 1)),
    "einsum_outputs_first": (nn.Einsum((5, 8), "btd,fd->btf", False), X, "kernel", (5, 2, 4), None),
    "conv": (nn.Conv(5, (3,)), X, "kernel", (6, 4, 5), (0, 2, 1)),
    "embed": (nn.Embed(7, 8), np.array([[1, 6]]), "embedding", (7, 2, 4), None),
}


def check_blocks(found, blocks, dtype):
    """Blocks as they are read again: in float64, each number is the nearest that there is."""
    most = np.abs(blocks).max(-1, keepdims=True)
    if dtype == "nf4":
        nearest = np.abs((blocks / most)[..., None] - NF4).argmin(-1)
        np.testing.assert_allclose(found, np.array(NF4)[nearest] * most, atol=1e-6)
        return
    steps = {"int8": 127.5, "int4": 7.5}[dtype]
    counts = found / most * steps
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
    assert np.abs(counts - blocks / most * steps).max() < 0.5001 and np.abs(counts).max() > 6.99


@pytest.mark.witness(
    "dense-nf4",
    "dense-int8",
    "conv-int4",
    "embed-int8",
    "general_in-nf4",
    "einsum_outputs_first-int4",
)
@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_has_the_numbers_that_numpy_gives_it(kind, dtype):
    base, x, name, blocks, order = KINDS[kind]
    params = drawn_like(jax.eval_shape(base.init, jax.random.key(0), x)["params"])
    small = aj.quantize(base, params, x, dtype=dtype, block=4)
    weights = (double(tree[name]).reshape(blocks) for tree in (aj.dequantize(small), params))
    check_blocks(*(w.transpose(order or range(len(blocks))) for w in weights), dtype)
    assert small[name].array.qvalue.dtype == {"nf4": "uint4"}.get(dtype, dtype)
    assert set(small) == set(params) and all(small[k] is params[k] for k in params if k != name)


def test_int8_has_a_scale_for_each_output_and_for_each_row_of_a_table():
    linen, stack = APIS["linen"](CASES["lora_embed"]), APIS["nnx"](CASES["lora_dense"], **SCAN)
    small = flatten(aj.quantize(linen.base, linen.base_params, ids()))
    assert {p: x.array.scale.shape for p, x in small.items() if is_quantized(x)} == {
        "embed/embedding": (contract.VOCAB, 1),
        "layer_0/mix/kernel": (1, contract.D),
    }
    model = aj.quantize(stack.base)  # three layers in one weight
    weight = model.layers.mlp.up.kernel.get_raw_value()
    assert weight.array.scale.shape == (3, 1, contract.HIDDEN)
    np.testing.assert_array_equal(  # each layer as it would be alone
        nnx.vmap(lambda m: aj.quantize(m).kernel[...])(stack.base.layers.mlp.up), weight.unbox()
    )


SCAN = VARIANTS["scan"]
GRADIENTS = [
    *((api, "lora_dense_general", "plain", "int4") for api in APIS),
    *((api, "lora_conv", "plain", "int8") for api in APIS),
    *((api, "dora", "plain", "nf4") for api in APIS),
    *((api, "together", "scan_remat", "nf4") for api in APIS),
    ("linen", "lora_embed", "plain", "int4"),
    ("linen", "llama_adapter", "plain", "nf4"),
    ("linen", "lora_dense", "bf16", "int8"),
    ("nnx", "lora_einsum", "plain", "nf4"),
    ("nnx", "unfreeze", "plain", "int8"),
]


@pytest.mark.witness("nnx-lora_conv-plain-int8", "linen-lora_embed-plain-int4")
@pytest.mark.parametrize(("api", "case", "variant", "dtype"), GRADIENTS)
def test_outputs_and_gradients_are_those_of_a_float_base_of_the_same_numbers(
    api, case, variant, dtype
):
    check_gradients(api, case, variant, dtype)


@pytest.mark.slow
def test_a_pattern_for_everything_meets_each_layer_once():
    """A tied table too, which is called by another name at the end."""
    found = []
    for quantized in (True, False):
        subject = APIS["linen"](contract.Case("mlp", aj.Recipe(aj.LoRA("**", 2))))
        subject = with_base(subject, quantized, dtype="int4", block=4)
        found.append(jax.jit(subject.run)(shaken(subject.adapters), subject.frozen))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_batch_of_adapters_does_not_make_a_batch_of_weights():
    base = nn.Dense(16)
    params = drawn_like(jax.eval_shape(base.init, jax.random.key(0), X)["params"])
    model = aj.adapt(base, aj.LoRA("**", 2))
    small = aj.quantize(base, params, X, dtype="nf4", block=8)
    adapters, frozen = aj.partition(
        aj.init_adapters(model, small, jax.random.key(1), X), model.recipe
    )
    stacked = drawn_like(jax.tree.map(lambda x: jnp.zeros((5, *x.shape)), adapters))

    def run(adapters, x):
        return model.apply({"params": aj.merge_trees(adapters, frozen)}, x)

    x = drawn((5, 2, 8))
    each = [run(jax.tree.map(lambda a: a[i], stacked), x[i]) for i in range(5)]  # noqa: B023
    np.testing.assert_allclose(jax.vmap(run)(stacked, x), each, atol=1e-5)
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda a, x: run(a, x).sum())))(stacked, x))
    assert "[8,16]" in text and "[5,8,16]" not in text


def test_reading_a_weight_waits_and_changes_nothing_for_any_number():
    weight = aj.quantize(nn.Dense(2), {"kernel": drawn((2, 2)), "bias": np.ones(2)}, X[..., :2])
    for x in (1.0, -0.0, np.inf, np.nan, 1e-40):
        y = once(lambda w, inputs: w, weight["kernel"], (jnp.float32([x]),))
        np.testing.assert_array_equal(y, weight["kernel"].unbox())


def trained(api, recipe, **options):
    """A state after three steps on a quantised base, the subject, and its frozen bits before."""
    subject = with_base(APIS[api](contract.Case("mlp", aj.Recipe(recipe))), True, **options)
    state = subject.state(optax.adam(0.02))
    before = contract.bits(state.base)

    def loss(whole, batch, key):
        return jnp.mean(jnp.square(subject.logits_of(whole, batch) - 1.0))

    step, losses = aj.make_train_step(loss), []
    for _ in range(3):
        state, metrics = step(state, ids())
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[1] < losses[0]
    assert contract.bits(state.base) == before
    assert step.jitted._cache_size() == 1
    return state, subject


@pytest.mark.slow
@pytest.mark.witness("nnx")
@pytest.mark.parametrize("api", APIS)
def test_a_training_its_checkpoint_its_file_and_its_merge(api, tmp_path):
    recipe = aj.Recipe(aj.LoRA("**/mlp/{up,output}", 2), aj.Unfreeze("**/norm/scale"))
    state, subject = trained(api, recipe, dtype="int4", block=4)
    with aj.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state)
        restored = checkpoints.restore(subject.state(optax.adam(0.02))).state
    assert contract.bits(restored.adapters) == contract.bits(state.adapters)
    aj.save_adapter(tmp_path / "adapter", state)
    linen = api == "linen"
    whole = state.params if linen else state.model
    expected = subject.logits_of(whole, ids())
    quantized = aj.quantize(subject.base, *([subject.base_params, ids()] if linen else []))
    for base in (quantized, aj.dequantize(quantized)):  # of another dtype, and of floats
        place = (subject.base, base) if linen else (base, None)
        loaded = aj.load_adapter(tmp_path / "adapter", *place, ids())
        model, params = loaded if linen else (loaded, None)
        run = (lambda x: model.apply({"params": params}, x)) if linen else model  # noqa: B023
        assert 1e-4 < np.abs(run(ids()) - expected).max() < 1.0
    with raises(aj.RecipeError, "kernel is quantised", "aj.merge(", "aj.dequantize("):
        aj.merge(subject.model, whole, ids()) if linen else aj.merge(whole)
    if linen:
        merged = aj.merge(subject.model, aj.dequantize(whole), ids())
        logits = subject.base.apply({"params": merged}, ids())
        assert shapes(merged) == shapes(subject.base_params)
    else:
        merged = aj.merge(aj.dequantize(whole))
        logits = merged(ids())
        assert contract.classes_of(merged) == contract.classes_of(subject.base)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.witness("linen")
@pytest.mark.parametrize("api", APIS)
def test_an_audit_and_an_identity_are_those_of_the_float_base(api):
    case, linen = CASES["lora_dense"], api == "linen"
    plain = APIS[api](case)
    before = plain.audit()
    identity = aj.base_identity(plain.base_params if linen else plain.base)
    small = with_base(APIS[api](case), True, dtype="nf4", block=4)
    after = small.audit()
    assert after.adapter_parameters == before.adapter_parameters == case.per_layer
    assert after.frozen_parameters == before.frozen_parameters
    mlp, table = 2 * contract.D * contract.HIDDEN, contract.VOCAB * contract.D
    assert after.quantized_parameters == mlp + table
    assert before.frozen_bytes - after.frozen_bytes == (4 - 0.5 - 4 / 4) * (mlp + table)
    floats = before.frozen_parameters - mlp - table
    assert f"quantized {mlp + table:,} of the frozen, float {floats:,}" in repr(after)
    base = small.whole(small.adapters) if linen else small.model
    assert aj.base_identity(base, small.recipe) == identity


@pytest.mark.parametrize("api", APIS)
def test_where_shapes_are_enough_no_weight_becomes_floats(api, monkeypatch, tmp_path):
    case, read, unbox = CASES["lora_dense"], [], Quantized.unbox
    scanned, subject = APIS[api](case, scan=True, layers=2), APIS[api](case, layers=2)
    saved = aj.save_adapter(tmp_path / "adapter", scanned.state(optax.sgd(0.1)))
    given = [subject.base_params, ids()] if api == "linen" else []
    base = aj.quantize(subject.base, *given, dtype="int4", block=4)
    subject = with_base(subject, True, dtype="int4", block=4)

    def watched(weight):
        if not isinstance(weight.array.qvalue, jax.core.Tracer):
            read.append(weight.shape)
        return unbox(weight)

    monkeypatch.setattr(Quantized, "unbox", watched)
    subject.bank(2)
    adapter = aj.read_adapter(saved)
    adapter = aj.unstack_layers(adapter, Stack("layer_{}"))
    aj.combine(base, [adapter] * 2, [0.5, 0.5])
    place = (subject.base, base, ids()) if given else (base, None, ids())
    aj.load_adapter(saved, *place, names=Stack("layer_{}"))
    assert read == []


@pytest.mark.slow
def test_an_adapted_model_is_quantised_but_for_what_trains():
    """As PiSSA needs it: its factors come out of the float weight, and the rest is quantised."""
    pissa = aj.LoRA("**/attention/query", 2, a_init="pissa")
    recipe = aj.Recipe(pissa, aj.Unfreeze("**/attention/out/kernel"))
    case = contract.Case("attention", recipe)
    linen, other = APIS["linen"](case), APIS["nnx"](case)
    params = aj.quantize(linen.model, linen.whole(linen.adapters), ids(), dtype="nf4", block=4)
    model = aj.quantize(other.model, dtype="nf4", block=4)
    mine, theirs = flatten(params), flatten(nnx.state(model, nnx.Param))
    names = {path for path, leaf in mine.items() if is_quantized(leaf)}
    assert names == {path for path, leaf in theirs.items() if is_quantized(leaf)}
    attention = "layer_0/attention"
    assert names == {f"{attention}/{name}/kernel" for name in ("query", "key", "value")} | {
        "embed/embedding"
    }
    expected = other.logits_of(aj.dequantize(model), ids())
    np.testing.assert_allclose(other.logits_of(model, ids()), expected, atol=1e-5)
    for api in APIS.values():
        with raises(aj.RecipeError, "'layer_0/attention/query'"):
            with_base(api(contract.Case("attention", aj.Recipe(pissa))), True, block=4)


@pytest.mark.parametrize("api", APIS)
def test_a_quantised_weight_is_not_trained(api):
    with raises(aj.RecipeError, "layer_0/mlp/up/kernel", "aj.quantize"):
        trained(api, aj.Unfreeze("**/up/kernel"))


class Annotated(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(8, kernel_init=init)(x)


def test_a_layout_splits_numbers_and_such_scales_as_divide():
    mesh = aj.make_mesh("data=-1,model=1")
    params = Annotated().init(jax.random.key(0), X)["params"]
    small = aj.quantize(Annotated(), params, X, dtype="int4", block=4)
    laid = aj.shard(small, mesh)["Dense_0"]["kernel"]
    assert isinstance(laid, Quantized)
    for part in (laid.array.qvalue, laid.array.scale):
        assert part.sharding.spec == P(None, "model")
    back = aj.dequantize(small)["Dense_0"]["kernel"]
    assert isinstance(back, nn.Partitioned) and back.names == (None, "model")
    rules = {"kernel": P("model", None)}
    model = aj.shard(aj.quantize(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), mesh, rules)
    assert model.kernel.get_raw_value().array.qvalue.sharding.spec == P("model", None)


def test_stacked_layers_do_not_keep_the_names_of_the_axes_of_one():
    params = Annotated().init(jax.random.key(0), X)["params"]
    small = aj.quantize(Annotated(), params, X, dtype="int4", block=4)
    for tree in (params, small):
        layers = {"layer_0": tree, "layer_1": tree}
        stacked = aj.stack_layers(layers, Stack("layer_{}"))
        weight = aj.dequantize(stacked)["layers"]["Dense_0"]["kernel"]
        assert nn.get_partition_spec(weight) == P() and weight.shape == (2, 8, 8)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(48, name="up")(x)
        return nn.LayerNorm(name="norm")(nn.DenseGeneral((3, 4), name="out")(x))


def test_mistakes_raise_errors_that_name_them():
    base, x = Wide(), np.ones((1, 96), np.float32)
    params = drawn_like(jax.eval_shape(base.init, jax.random.key(0), x)["params"])

    def wrong(error, data, *args, **options):
        with raises(error, "quantize", *data) as caught:
            aj.quantize(*(args or (base, params, x)), **options)
        assert "\n" not in str(caught.value)

    blocks = ("out/kernel", [48, 3, 4], "64", "48 numbers", "1 others", "up/kernel", "block=48")
    wrong(aj.UserError, (*blocks, "targets=('**', '!out')"), dtype="nf4")
    axes = nn.DenseGeneral(2, axis=(-2, -1), name="two")  # blocks have to be adjacent numbers
    two = jax.ShapeDtypeStruct((1, 32, 48), jnp.float32)
    abstract = jax.eval_shape(axes.init, jax.random.key(0), two)["params"]
    wrong(aj.UserError, ("64", "32 x 48 numbers"), axes, abstract, two, dtype="nf4")
    coprime = nn.Sequential([nn.Dense(5), nn.Dense(2)])
    seven = jax.ShapeDtypeStruct((1, 7), jnp.float32)
    abstract = jax.eval_shape(coprime.init, jax.random.key(0), seven)["params"]
    wrong(aj.UserError, ("64", "7 numbers", "block=1,"), coprime, abstract, seven, dtype="nf4")
    wrong(aj.UserError, ("dtype='int3'", "int8, int4, nf4"), dtype="int3")
    wrong(aj.UserError, ("block=0",), block=0)
    wrong(aj.TargetError, ("'dwn'", "up"), targets="dwn")
    wrong(aj.TargetError, ("'norm'", "norm (it has no weight"), targets="norm")
    bare = {**params, "norm": {"scale": x[0, :4]}}
    with raises(aj.MismatchError, "1 missing: norm/bias"):
        aj.quantize(base, bare, x)
    wrong(TypeError, ("params = aj.quantize(model, params, *example_inputs)",), base)
    wrong(TypeError, ("got dict",), params)
    small = aj.quantize(base, params, x)
    wrong(aj.UserError, ("out/kernel", "quantised already"), base, small, x)
    with raises(TypeError, "aj.dequantize"):
        nn.meta.replace_boxed(small, params)
    with raises(TypeError, "aj.dequantize"):
        aj.quantize(nnx.Linear(2, 2, rngs=nnx.Rngs(0))).kernel[...] = np.ones((2, 2))


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with raises(MissingPackageError, "qwix", "pip install ", "[quant]'"):
        aj.quantize(nnx.Linear(6, 7, rngs=nnx.Rngs(0)))


@pytest.mark.weekly
def test_experts_are_quantised_where_a_command_loads_or_plans_them(tmp_path):
    fixture = Path(__file__).parent / "fixtures/decoders/qwen3_moe"
    write_llama(tmp_path / "a")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "a" / name).write_bytes((fixture / name).read_bytes())
    model = load_pretrained_decoder(str(tmp_path / "a"), quantize="int8").model
    planned, _ = adapted_shape(str(tmp_path / "a"), MethodOptions("lora"), "int8")
    for found in (model, planned):
        weights = nnx.to_flat_state(nnx.state(found, nnx.Param))
        kinds = {type(weight) for path, weight in weights if "experts" in path}
        assert kinds == {aj.nnx.QuantizedParam}
    floats = aj.dequantize(model)
    np.testing.assert_allclose(model(ids()), floats(ids()), atol=1e-6)


@pytest.mark.slow
def test_a_run_keeps_its_base_quantised_from_training_to_prediction(tmp_path):
    write_model(tmp_path / "tiny")
    write_reviews(tmp_path / "reviews.jsonl", rows=40)

    def prepared(dtype):
        data = DataOptions(train=(tmp_path / "reviews.jsonl",), text="review")
        options = {
            "model": str(tmp_path / "tiny"),
            "runs": tmp_path,
            "dtype": "bfloat16",
            "max_length": 8,
        }
        return Finetune(**options, data=data, quantize=dtype, name=dtype).prepare(
            Console(json=True)
        )

    job = prepared("int8")
    problem, config = job.problem, json.loads(job.run.config.read_text())
    assert config["quantize"] == "int8" and config["options"]["quantize"] == "int8"
    trained, frozen = aj.partition(problem.params, problem.recipe)
    assert not any(map(is_quantized, flatten(trained).values()))
    kernel = frozen["bert"]["layer_0"]["attention"]["query"]["kernel"]
    assert is_quantized(kernel) and kernel.dtype == jnp.bfloat16
    aj.save_adapter(job.run.adapter, trained, problem.recipe, base=job.identity)
    predictor = load_predictor(job.run.path)
    assert contract.bits(predictor.params) == contract.bits(problem.params)
    assert jax.tree.structure(predictor.params) == jax.tree.structure(problem.params)
    with raises(aj.UserError, "blocks of 64", "targets=("):
        prepared("nf4")
    assert not (tmp_path / "nf4").exists()


@pytest.mark.weekly
def test_a_decoders_run_is_merged_into_floats_with_the_flag(tmp_path):
    write_llama(tmp_path / "tiny")
    data = DataOptions(
        train=(write_meanings(tmp_path / "rows.csv"),), prompt="mr", completion="ref"
    )
    options = {"model": str(tmp_path / "tiny"), "runs": tmp_path, "max_length": 24}
    options |= {
        "method": MethodOptions("lora", targets=("**/{query,value}",)),
        "quantize": "int8",
        "exact_match": 0,
    }
    job = Finetune(**options, data=data, name="run").prepare(Console(json=True))
    parts = nnx.split(job.problem.model, aj.nnx.AdapterParam, ...)
    adapters = shaken(parts[1])
    aj.save_adapter(job.run.adapter, adapters, job.problem.recipe, base=job.identity)
    command = Merge(job.run.path, tmp_path / "merged")
    with raises(aj.UserError, "int8", "--dequantize"):
        command.prepare(Console(json=True))
    dataclasses.replace(command, dequantize=True).prepare(Console(json=True))()
    tokens = jnp.array([[4, 9, 5, 6]])
    merged, adapted = load_decoder(tmp_path / "merged")[1], nnx.merge(parts[0], adapters, parts[2])
    np.testing.assert_allclose(merged(tokens), adapted(tokens), atol=1e-4)
    assert is_quantized(load_generator(job.run.path).model.layers[0].mlp.up.kernel.get_raw_value())


LAYERS, WIDTH, ROWS = (2, 6), 256, 8
KERNEL = WIDTH * WIDTH * 4


class LinenNet(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = nn.gelu(nn.Dense(WIDTH, name=f"layer_{i}")(x))
        return x


class NnxNet(nnx.Module):
    def __init__(self, layers):
        self.layers = layers
        for i in range(layers):
            setattr(self, f"layer_{i}", nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(i)))

    def __call__(self, x):
        for i in range(self.layers):
            x = nnx.gelu(getattr(self, f"layer_{i}")(x))
        return x


def training(api, layers, dtype):
    """The abstract state of a training with LoRA, its loss and its batch."""
    x, recipe = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32), aj.LoRA("layer_*", 2)
    tx = optax.adam(1e-3)
    if api == "nnx":
        small = aj.quantize(nnx.eval_shape(lambda: NnxNet(layers)), dtype=dtype)
        model = aj.adapt(small, recipe, rngs=nnx.Rngs(0))
        return abstract_state(model, tx=tx), lambda model, x, key: jnp.mean(model(x) ** 2), x
    base = LinenNet(layers)
    params = jax.eval_shape(base.init, jax.random.key(0), x)["params"]
    model = aj.adapt(base, recipe)
    small = aj.quantize(base, params, x, dtype=dtype)
    params = aj.init_adapters(model, small, jax.random.key(0), x)

    def loss(params, x, key):
        return jnp.mean(model.apply({"params": params}, x) ** 2)

    return abstract_state(model, params, tx=tx), loss, x


def memory_of_a_step(api, layers, dtype):
    """The bytes of the base as XLA takes it, and of what a step works with."""
    state, loss, x = training(api, layers, dtype)
    step, split = aj.make_train_step(loss), dataclasses.replace(state, base=None)
    found = step.jitted.lower(split, state.base, x).compile().memory_analysis()
    trained = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split.adapters))
    rest = 3 * trained + 4 + 4 + 8 + x.size * 4  # Adam's moments and count, the step, the key
    return found.argument_size_in_bytes - rest, found.temp_size_in_bytes


@pytest.mark.weekly
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("api", "dtype"), [("linen", "nf4"), ("nnx", "int8")])
def test_a_step_holds_one_float_weight_at_a_time_whatever_the_number_of_layers(api, dtype):
    """By XLA's analysis; with each layer come rows of activations, and no kernel in floats."""
    few, many = (memory_of_a_step(api, layers, dtype) for layers in LAYERS)
    bits = {"int8": 8 + 32 / WIDTH}.get(dtype, 4 + 32 / 64)  # with the scales
    assert many[0] == LAYERS[1] * (WIDTH * WIDTH * bits / 8 + 4 * WIDTH)
    assert many[0] / (LAYERS[1] * (KERNEL + 4 * WIDTH)) < {"int8": 0.26}.get(dtype, 0.145)
    assert KERNEL <= few[1] < 1.5 * KERNEL
    assert many[1] - few[1] < (LAYERS[1] - LAYERS[0]) * KERNEL / 4


def test_a_plan_counts_what_a_quantised_base_holds():
    state, loss, x = training("linen", 1, "nf4")
    found = plan(state, loss, x)
    assert found.base == WIDTH * WIDTH * (4 + 32 / 64) / 8 + 4 * WIDTH
    assert found.parameters - found.trainable_parameters == (WIDTH + 1) * WIDTH


@pytest.mark.weekly
@pytest.mark.parametrize("tiles", [{0: 32}, {1: 16, 2: 64}, {}])
def test_nf4_by_the_bits_of_its_numbers_is_that_of_qwix(tiles):
    weight = jax.random.normal(jax.random.key(0), (128, 96, 64))
    array = qwix.quantize(weight, "nf4", channelwise_axes=(), tiled_axes=tiles)
    assert len(np.unique(array.qvalue.astype(jnp.int32))) == 16
    np.testing.assert_array_equal(_nf4_floats(array), qwix.dequantize(array))


def test_programs_are_those_of_their_platform():
    model, x, read = nn.Dense(8, use_bias=False), jnp.ones((2, 64)), {}
    params = {"kernel": jnp.ones((64, 8))}
    for dtype in ("int4", "nf4"):
        weight = aj.quantize(model, params, x, dtype=dtype)["kernel"]
        traced = jax.jit(lambda w, x: once(lambda w, x: x @ w, w, x)).trace(weight, x)
        for platform in ("cpu", "tpu", "cuda"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            read[dtype, platform] = ("xor" in text, "gather" in text, "tensor<512xi4>" in text)
    assert all(xor == (platform == "cpu") for (_, platform), (xor, *_) in read.items())
    table = {key for key, (_, gather, _) in read.items() if gather}
    assert table == {("nf4", "cpu"), ("nf4", "cuda")}
    assert {key for key, (*_, rows) in read.items() if rows} == {("int4", "cuda")}


@pytest.mark.slow
def test_numbers_in_rows_are_the_same_numbers():
    values = jnp.arange(-8, 8).reshape(2, 2, 4).astype(jnp.int4)
    np.testing.assert_array_equal(_in_rows(values).astype(jnp.int8), values.astype(jnp.int8))
