"""Layouts over many devices and several processes: equal losses, and no exchange of the base."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import contract, layouts
from helpers.errors import raises
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import adapters_jax as aj
from adapters_jax.distributed.mesh import ShardingError, batch_parts, make_mesh, shard_batch
from adapters_jax.distributed.sharding import layout, shard
from adapters_jax.finetune.cli.serve import Serve
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig, save_decoder
from adapters_jax.finetune.options.settings import Settings

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "finetune_llama_sharded.py"
LAYOUTS = ("data=8", "fsdp=8", "model=8", "data=2,model=4", "data=2,fsdp=2,model=2")
SOME = [
    ("linen", "lora_dense_general", "plain", "data=2,model=4"),
    ("nnx", "lora_embed", "plain", "data=8"),
    ("linen", "llama_adapter", "plain", "data=8"),
    ("nnx", "dora", "plain", "fsdp=8"),
    ("linen", "adalora", "plain", "data=2,model=4"),
    ("linen", "ia3", "plain", "data=2,fsdp=2,model=2"),
]


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": path, "XLA_FLAGS": flags}
    return {**os.environ, **quick}


def start(devices, **job):
    return subprocess.Popen(
        [sys.executable, HERE / "helpers" / "layouts.py", json.dumps(job)],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    found = [json.loads(line) for line in out.splitlines() if line.startswith("[[")]
    return {tuple(row): result for row, result in found}


@pytest.fixture(scope="module")
def trained():
    """A recipe of four methods on every layout, and others on one."""
    rows = [("nnx", "together", "plain", layout) for layout in (None, *LAYOUTS)]
    for *subject, laid in SOME:
        rows += [(*subject, None), (*subject, laid)]
    return finish(start(8, rows=list(dict.fromkeys(rows))))


@pytest.mark.slow
def test_every_layout_gives_the_losses_of_one_device(trained):
    compared = 0
    for (*subject, laid), result in trained.items():
        if laid is not None:
            alone = trained[(*subject, None)]["losses"]
            assert len(set(alone)) == 20
            np.testing.assert_allclose(
                result["losses"], alone, rtol=1e-5, err_msg=f"{subject} {laid}"
            )
            compared += 1
    assert compared >= len(SOME) + len(LAYOUTS)


@pytest.mark.slow
def test_devices_exchange_gradients_of_the_adapters_and_the_loss(trained):
    # Used twice, these have two gradients each: a prompt (keys, values), a tied embedding, a norm.
    again = {"llama_adapter": contract.K * contract.D, "together": contract.D}
    again["lora_embed"] = contract.R * (contract.VOCAB + contract.D)
    rows = {row: result for row, result in trained.items() if row[2:] == ("plain", "data=8")}
    assert len(rows) >= 3
    for (_, case, _, _), result in rows.items():
        sent = result["trained_bytes"] + 4 * again.get(case, 0)
        assert result["exchanged"] == {"all-reduce": sent + 4}, case


MESH = AbstractMesh((2, 2, 4), ("data", "fsdp", "model"))


def specs(params, *args, mesh=MESH, **options):
    return {path: s.spec for path, s in layout(params, mesh, *args, **options).items()}


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_base_without_rules_is_split_along_what_divides():
    tree = {
        "wide": shape(8, 512),
        "equal": shape(512, 512),
        "odd": shape(3, 4096),
        "model_alone": shape(7, 36, 4096 // 4 * 3 + 1),
        "nothing": shape(4097, 4099),
        "bias": shape(512),
    }
    assert specs(tree, small=1000) == {
        "wide": P("fsdp", "model"),
        "equal": P("fsdp", "model"),
        "odd": P(None, "model"),
        "model_alone": P(None, "model", None),
        "nothing": P(None, None),
        "bias": P(),
    }
    assert specs(tree) == {**specs(tree, small=1000), "wide": P(), "odd": P()}
    data = AbstractMesh((8,), ("data",))
    assert set(specs(tree, mesh=data, small=0).values()) <= {
        P(),
        P(None),
        P(None, None),
        P(*[None] * 3),
    }


def test_leaves_of_2_to_the_16_elements_are_split_and_smaller_ones_are_not():
    tree = {"at": shape(256, 256), "below": shape(4, 2**14 - 4)}
    assert specs(tree) == {"at": P("fsdp", "model"), "below": P()}


def lora_of(base, recipe, x):
    params = jax.eval_shape(lambda: base.init(jax.random.key(0), x))["params"]
    return aj.init_adapters(aj.adapt(base, recipe), params, jax.random.key(0), x)


def test_factors_inherit_and_all_else_that_trains_is_everywhere():
    recipe = aj.Recipe(aj.LoRA("**/{query,out}", 3), aj.Bottleneck("attention", 8), aj.DoRA("*", 2))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(4, name="attention")(x)
            return nn.Dense(32, name="dense")(x)

    params = lora_of(Model(), aj.Recipe(recipe.methods[0], recipe.methods[1]), jnp.ones((1, 2, 16)))
    rules = {
        "attention/query/kernel": P("fsdp", "model"),
        "**/out/kernel": P("model", None, "fsdp"),
    }
    found = specs(params, rules, recipe=recipe, small=0)
    assert found["attention/query/lora/a"] == P("fsdp", None)  # (16, 3) of (16, 4, 4)
    assert found["attention/query/lora/b"] == P(None, "model", None)  # (3, 4, 4)
    assert found["attention/out/lora/a"] == P("model", None, None)  # (4, 4, 3) of (4, 4, 16)
    assert found["attention/out/lora/b"] == P(None, "fsdp")
    assert found["attention/adapter/down/kernel"] == found["attention/adapter/up/kernel"] == P()
    few = specs(params, rules, recipe=recipe, small=10_000)
    assert few["attention/query/lora/a"] == few["dense/kernel"] == P()
    given = {**rules, "**/lora/b": P(None, "data"), "**/down/kernel": P("model")}
    assert specs(params, given, recipe=recipe)["attention/out/lora/b"] == P(None, "data")
    assert specs(params, given, recipe=recipe)["attention/adapter/down/kernel"] == P("model")


def test_factors_inherit_no_axis_that_only_looks_like_the_weights():
    params = {
        "q": {"kernel": shape(8, 4), "lora": {"a": shape(8, 4), "b": shape(4, 4)}},
        "cut": {"kernel": shape(8, 16), "lora": {"a": shape(8, 4), "b": shape(4, 11)}},
    }
    recipe = aj.Recipe(aj.LoRA("q", 4), aj.LoRA("cut", 4, slices=((0, 11),)))
    found = specs(params, {"*/kernel": P("fsdp", "model")}, recipe=recipe, small=0)
    assert found["q/lora/a"] == P("fsdp", None) and found["q/lora/b"] == P(None, "model")
    assert found["cut/lora/a"] == P("fsdp", None) and found["cut/lora/b"] == P(None, None)


def test_factors_of_stacked_layers_inherit_the_layer_axis_too():
    case = contract.CASES["lora_dense"]
    subject = contract.Linen(case, scan=True, layers=4)
    params = subject.whole(subject.adapters)
    rules = {"layers/mlp/up/kernel": P("data", "fsdp", "model")}
    found = specs(params, rules, recipe=subject.recipe, small=0)
    assert found["layers/mlp/up/lora/a"] == P("data", "fsdp", None)
    assert found["layers/mlp/up/lora/b"] == P("data", None, "model")


def test_annotations_come_first():
    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    base = nn.Sequential([nn.Dense(8, kernel_init=init), nn.Dense(8)])
    recipe = aj.Recipe(aj.LoRA("*", 2))
    params = lora_of(base, recipe, jnp.ones((1, 8)))
    found = specs(params, {"*/kernel": P("fsdp")}, recipe=recipe, small=0)
    assert found["layers_0/kernel"] == P(None, "model")
    assert found["layers_1/kernel"] == P("fsdp")
    assert found["layers_0/lora/b"] == P(None, "model")
    assert found["layers_1/lora/a"] == P("fsdp", None)

    class Model(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.ones, ("fsdp", "model"))
            self.annotated = nnx.Linear(8, 8, kernel_init=init, rngs=rngs)
            self.plain = nnx.Linear(8, 8, rngs=rngs)

    with jax.set_mesh(make_mesh({"fsdp": 1, "model": 1})):
        model = aj.adapt(Model(nnx.Rngs(0)), recipe, rngs=nnx.Rngs(1))
    found = specs(nnx.state(model, nnx.Param), recipe=recipe, small=0)
    assert found["annotated/kernel"] == P("fsdp", "model")
    assert found["plain/kernel"] == P("fsdp", "model")
    assert found["annotated/lora/a"] == P("fsdp", None)


def test_a_rule_without_axes_keeps_a_parameter_whole():
    lora = aj.LoRA("*", 2)
    params = lora_of(nn.Sequential([nn.Dense(8), nn.Dense(8)]), lora, jnp.ones((1, 8)))
    rules = {"layers_0/kernel": P(), "layers_1/lora/a": P()}
    found = specs(params, rules, recipe=lora, small=0)
    assert found["layers_0/kernel"] == found["layers_1/lora/a"] == P()
    assert found["layers_0/lora/a"] == found["layers_0/lora/b"] == P(None, None)
    assert found["layers_1/kernel"] == P("fsdp", "model")
    assert found["layers_1/lora/b"] == P(None, "model")


@pytest.mark.parametrize(
    ("rules", "data"),
    [
        ({"q/kernel": P("tensor")}, ("'q/kernel'", "'tensor'", "data, fsdp, model", "tensor=1")),
        ({"**": P(None, "model")}, ("'**'", [8, 6], "splits 6 into 4 parts")),
        ({"q/*": P(None, None, "data")}, ("'q/*'", [8, 6], "3 axes")),
    ],
)
def test_rules_that_do_not_fit_name_the_parameter(rules, data):
    with raises(ShardingError, "q/kernel", *data):
        layout({"q": {"kernel": shape(8, 6)}}, MESH, rules)
    with raises(aj.TargetError, "sharding rules", "'qq/*'"):
        layout({"q": {"kernel": shape(8, 6)}}, MESH, {"qq/*": P()})


def test_hosts_of_gpus_are_no_slices_and_those_of_tpus_are(monkeypatch):
    """Both kinds of devices have the number `slice_index`."""

    def devices(platform):
        return [SimpleNamespace(platform=platform, slice_index=i // 2) for i in range(4)]

    monkeypatch.setattr(jax, "make_mesh", lambda sizes, names, *_, **__: (names, sizes))
    assert make_mesh("fsdp=-1", devices("gpu")) == (("fsdp",), (4,))
    with raises(ShardingError, "2 slices", "slice=2,fsdp=-1"):
        make_mesh("fsdp=-1", devices("tpu"))


def test_meshes_that_do_not_fit_the_devices():
    mesh = make_mesh("data=-1, model=1")
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert dict(make_mesh({"data": 1}).shape) == {"data": 1}
    for text in ("data=4,model=2", "data=0", "data=-1,model=3", "data=-1,model=-1,x=-1"):
        with raises(ShardingError, repr(text), "1 devices", "data=1"):
            make_mesh(text)
    for text in ("data", "data=two", "data=1,data=1", "4", ""):
        with raises(ShardingError, repr(text), "NAME=SIZE"):
            make_mesh(text)


def test_a_batch_is_split_over_data_and_fsdp():
    assert batch_parts({"data": 2, "fsdp": 3, "model": 4}) == 6
    assert batch_parts({"model": 4}) == 1


def test_a_batch_has_the_axes_that_the_mesh_has():
    rows = shape(8, 3)
    for sizes, names, spec in (
        ((2, 2), ("data", "fsdp"), P(("data", "fsdp"))),
        ((2, 2), ("data", "model"), P(("data",))),
        ((1, 4), ("data", "fsdp"), P(("fsdp",))),
        ((4,), ("model",), P()),
    ):
        assert shard_batch(rows, AbstractMesh(sizes, names)).sharding.spec == spec


def test_a_batch_that_does_not_split_raises():
    with raises(ShardingError, "6 rows", "4 parts", "data=2, fsdp=2"):
        shard_batch({"x": np.ones((6, 3))}, MESH)


def test_a_mesh_that_names_no_axis_for_batches_raises():
    with raises(ShardingError, "it has batch,", "data, fsdp"):
        shard_batch(shape(8, 3), AbstractMesh((2,), ("batch",)))
    for sizes, names in (((1, 2), ("data", "batch")), ((1,), ("batch",))):
        assert shard_batch(shape(8, 3), AbstractMesh(sizes, names)).sharding.spec == P()


@pytest.mark.parametrize("flag", ["--rows", "--batch-size"])
def test_a_command_names_the_flag_whose_rows_do_not_split(flag, monkeypatch):
    made = AbstractMesh((4, 2), ("data", "model"))
    monkeypatch.setattr("adapters_jax.distributed.mesh.make_mesh", lambda text: made)
    with raises(ShardingError, "multiple of 4") as caught:
        if flag == "--rows":
            Serve("base", mesh="data=4,model=2", rows=6)._completing({}, "base", None, None)
        else:
            Settings(mesh="data=4,model=2").make_mesh(6)
    assert str(caught.value).startswith(f"{flag} 6: a batch of 6 rows does not split into 4 parts")


def test_a_model_on_a_mesh_is_the_same_model():
    base = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    for model in (base, aj.adapt(base, aj.LoRA("layers/0", 2), rngs=nnx.Rngs(2))):
        laid = shard(model, make_mesh("data=1"))
        laid.eval(), model.eval()
        x = jnp.ones((2, 8))
        np.testing.assert_array_equal(laid(x), model(x))
        assert laid.layers[0].kernel.sharding.mesh.axis_names == ("data",)
        assert laid.layers[0].kernel is not model.layers[0].kernel


@pytest.mark.weekly
def test_two_processes_are_one_job_and_its_losses_those_of_one_device():
    rows = [("linen", "together", "plain", "data=2"), ("nnx", "lora_dense", "plain", "model=2")]
    job = {"rows": rows, "processes": 2, "address": f"localhost:{free_port()}"}
    both = [start(1, process=i, **job) for i in range(2)]
    alone = [layouts.train(*row[:3], None)["losses"] for row in rows]
    first, second = map(finish, both)
    assert first == second and list(first) == rows
    for result, losses in zip(first.values(), alone, strict=True):
        np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


LOADING = """
import json, sys, threading, jax, numpy as np
from adapters_jax.finetune.cli.serve import Serve
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.distributed.mesh import make_mesh
from flax import nnx

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

mesh = make_mesh("model=8")
jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[-1]))
before, peak, done = anonymous(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
_, model = load_decoder(sys.argv[1], mesh=mesh)
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
done.set()
watcher.join()
whole = sum(x.nbytes for x in leaves)
held = [sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == d)
        for d in jax.devices()]
total = [float(np.abs(np.asarray(x)).sum(dtype=np.float64)) for x in leaves]
print(json.dumps([whole, max(held), peak[0] - before, sum(total)]))
"""


@pytest.mark.weekly
def test_a_base_loads_straight_into_shards_and_is_never_there_twice(tmp_path):
    config = DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), nnx.state(model))
    nnx.update(model, state)
    save_decoder(tmp_path, config, model)
    run = [sys.executable, "-c", LOADING, tmp_path]
    ran = subprocess.run(run, env=environment(8), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    whole, held, grown, total = json.loads(ran.stdout)
    assert whole == 4 * sum(x.size for x in jax.tree.leaves(state)) > 200e6
    assert held < whole / 8 * 1.01  # what every device has is small
    assert total == 0.5 * whole / 4
    assert grown < 1.25 * whole, f"{grown / whole:.2f} times the parameters"


ROWS = """
import contextlib, json, re, sys, jax, jax.numpy as jnp, numpy as np, optax
from dataclasses import replace
from flax import nnx
import adapters_jax as aj
from adapters_jax.distributed.plan import abstract_state
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.cli.serve import Serve
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig

ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes["intermediate_size"] = 96
if sys.argv[1] == "decoder":
    model, params = nnx.eval_shape(lambda: aj.adapt(
        Decoder(DecoderConfig(**sizes), scan=True, remat=True, rngs=nnx.Rngs(0)),
        aj.LoRA("**/{query,value}", 4), rngs=nnx.Rngs(0))), None
    loss = lambda model, ids, key: jnp.mean(model.hidden(ids) ** 2)
else:
    base = Bert(BertConfig(**sizes), scan=True, remat=True)
    params = jax.eval_shape(base.init, jax.random.key(0), ids)["params"]
    model = aj.adapt(base, aj.LoRA("**/{query,value}", 4))
    params = aj.init_adapters(model, params, jax.random.key(0), ids)
    loss = lambda params, ids, key: jnp.mean(model.apply({"params": params}, ids) ** 2)
mesh = aj.make_mesh("fsdp=4", jax.devices()[:4])
state = aj.shard(abstract_state(model, params, tx=optax.adam(0.1)), mesh, small=0)
step = aj.make_train_step(loss)
lowered = step.jitted.lower(replace(state, base=None), state.base, aj.shard_batch(ids, mesh))
kinds = "all-gather|all-reduce|reduce-scatter|all-to-all"
found = re.findall(rf"= (.*) (?:{kinds})(?:-start)?[(]", lowered.compile().as_text())
print(json.dumps([[int(n) for n in dims.split(",") if n]
    for types in found for dims in re.findall(r"[a-z0-9]+[[]([0-9,]*)[]]", types)]))
"""


@pytest.mark.weekly
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_devices_exchange_weights_and_no_activations_in_layers(kind):
    """Each of 4 devices has 2 of 8 rows; a layer's weights are gathered, forward and backward."""
    run = [sys.executable, "-c", ROWS, kind]
    ran = subprocess.run(run, env=environment(4), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    shapes = [[n for n in shape if n > 1] for shape in json.loads(ran.stdout)]
    assert shapes.count([32, 96]) == (4 if kind == "decoder" else 2)
    activations = [shape for shape in shapes if 64 in shape and len(shape) > 2]
    assert not activations


def example(tmp_path, devices, *flags, process=None, port=0):
    """The script of the README, started."""
    env = environment(devices)
    if process is not None:
        env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
        env["JAX_PROCESS_ID"] = str(process)
    return subprocess.Popen(
        [sys.executable, "-u", EXAMPLE, "--run", tmp_path, *flags],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-4000:]
    found = re.findall(r"(step +\d+|held out:) +loss ([\d.]+)", out)
    return {name: float(loss) for name, loss in found}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script on one device: its losses and its adapter."""
    place = tmp_path_factory.mktemp("alone")
    losses = losses_of(example(place, 1))
    assert len(losses) == 21
    return losses, aj.read_adapter(place / "adapter")[1]


def check_same(losses, place, alone):
    for name, loss in losses.items():
        assert loss == pytest.approx(alone[0][name], rel=1e-5), name
    adapter = aj.read_adapter(place / "adapter")[1]
    for path, x in alone[1].items():
        np.testing.assert_allclose(adapter[path], x, atol=1e-4, err_msg=path)


@pytest.mark.weekly
def test_the_script_on_eight_devices_is_that_on_one(alone, tmp_path):
    losses = losses_of(example(tmp_path, 8, "--mesh", "data=2,fsdp=2,model=2"))
    assert len(losses) == 21
    check_same(losses, tmp_path, alone)


@pytest.mark.weekly
def test_when_one_of_two_processes_is_killed_the_other_ends_and_the_run_resumes(alone, tmp_path):
    flags, port = ("--mesh", "data=2"), free_port()
    both = [example(tmp_path, 1, *flags, "--steps", "20", process=i, port=port) for i in range(2)]
    while not [*tmp_path.glob("checkpoints/10/sha256.json")]:
        assert both[0].poll() is None, both[0].communicate()
        time.sleep(0.01)
    both[1].kill()
    began = time.monotonic()
    _, err = both[0].communicate(timeout=60)
    both[1].communicate()
    assert both[0].returncode != 0 and time.monotonic() - began < 60
    assert "Connection closed by peer" in err or "another task died" in err, err
    port = free_port()
    both = [example(tmp_path, 1, *flags, process=i, port=port) for i in range(2)]
    losses, other = map(losses_of, both)
    assert next(iter(losses)) == "step   11" and len(losses) == 11 and not other
    check_same(losses, tmp_path, alone)
