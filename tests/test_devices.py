"""Programs of accelerators that this machine does not have, compiled by their own compilers."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.commands import command_raises
from helpers.errors import raises
from helpers.tiny import write_llama
from jax.sharding import SingleDeviceSharding

import adapters_jax as aj
from adapters_jax.distributed import devices as described
from adapters_jax.distributed.devices import GIB, GPUS, TPUS, memory_of
from adapters_jax.distributed.mesh import ShardingError
from adapters_jax.distributed.program import Hlo, Program, TooLarge, compile_program
from adapters_jax.errors import MissingPackageError, UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.models.bert import Bert, BertConfig
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.shapes import count_parameters

HAVE = described._installed("libtpu") is not None
tpu = pytest.mark.skipif(not HAVE, reason="needs libtpu: pip install 'adapters-jax[tpu]'")


def test_a_name_that_is_no_device_names_those_near():
    for name, *data in (
        ("v5f:2x2", "'v5f'", "v5e", "v5p", "h100"),
        ("h1000", "h100"),
        ("", "''", "tpu7x"),
        (8, "8", "v5e:2x4"),
    ):
        with raises(UserError, *data):
            aj.devices(name)
    for name in ("h100:x", "a100:0", "h200:17", "h100:-1"):
        with raises(UserError, name, f"{name.partition(':')[0]}:8"):
            aj.devices(name)


def test_a_compiler_that_is_absent_or_of_another_version(monkeypatch):
    monkeypatch.setattr(described, "_installed", lambda package: None)
    for name, package, extra in (("v5e:2x2", "libtpu", "tpu"), ("h100", "jax-cuda13", "cuda")):
        with raises(MissingPackageError, name.partition(":")[0], package, f"[{extra}]"):
            aj.devices(name)
    monkeypatch.setattr(described, "_installed", lambda package: "0.0.9")
    monkeypatch.setattr(described, "_pinned", lambda: "0.0.50.*")
    with raises(UserError, "libtpu 0.0.9 ", "0.0.50.*", "[tpu]"):
        aj.devices("v5e:2x2")
    with raises(UserError, "0.0.9", f"jaxlib {described.version('jaxlib')}", "[cuda]"):
        aj.devices("h100")


def test_memory_by_the_kind_of_a_device():
    class Device:
        device_kind = "TPU v5 lite"

    assert memory_of(Device) == 15.75 * GIB
    assert memory_of(jax.devices()[0]) is None
    kinds = [each.kind for each in (*TPUS.values(), *GPUS.values())]
    assert len(set(kinds)) == len(kinds)


LOOP = """HloModule jit_f
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (f32[2]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=3
  %d = f32[4]{0} collective-permute-done(%s)
  %part = f32[4]{0} fusion(%x), kind=kCustom, calls=%fused
}
%fused (q: f32[4]) -> f32[4] {
  %g = bf16[8,2]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7
}
%fused.2 (q: f32[4]) -> f32[4] {
  %g.2 = bf16[8,2]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=7
}
%test (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%test, body=%body
  %again = f32[4]{0} fusion(%x), kind=kCustom, calls=%fused.2
  %r = (f32[2,3]{1,0}, s4[6]{0}) all-reduce(%a, %b)
}"""


def test_the_bytes_of_collectives_over_the_rounds_of_loops():
    module = Hlo(LOOP)
    assert module.loops == {"body": 5}
    found = module.collectives()
    assert found == {"collective-permute": 5 * 16, "all-gather": 5 * 32, "all-reduce": 24 + 3}
    stated = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert Hlo(stated).collectives()["all-gather"] == 9 * 32


MOVES = """HloModule jit_f
%fused (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %twice = f32[4]{0} add(%q, %q)
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %y = f32[4]{0:T(8)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %y)
}
%test (p: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
ENTRY %main (a: f32[8], b: bf16[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %b = bf16[8]{0} parameter(1)
  %w = (s32[], f32[4]) while(%t), condition=%test, body=%body
  %start = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%a)
  %done = f32[8]{0:S(1)} copy-done(%start)
  %joined = f32[8]{0} custom-call(%done, %done), custom_call_target="ConcatBitcast"
  ROOT %r = f32[8]{0} fusion(%joined, %b), kind=kLoop, calls=%fused
}"""


def test_bytes_moved_leave_out_fused_operations_and_copies_ahead():
    body, condition, joined = 5 * (16 + 16), 1 + 4, 32 + 32 + 16
    assert Hlo(MOVES).moved() == body + condition + joined


def test_loops_of_a_compiled_program_are_those_of_its_scans():
    def f(x):
        inner = lambda x, _: (jnp.sin(x @ x), None)  # noqa: E731
        outer = lambda x, _: (jax.lax.scan(inner, x, length=7)[0], None)  # noqa: E731
        return jax.lax.scan(outer, x, length=3)[0]

    lowered = jax.jit(f).lower(jnp.ones((4, 4)))
    module = Hlo(lowered.compile().as_text())
    assert sorted(module.loops.values()) == [3, 7]
    assert max(module.times().values()) == 21
    program = compile_program(lowered)
    assert program.loops == (3, 7)
    parts = program.arguments + program.outputs - program.aliased + program.temporaries
    assert parts <= program.total < parts + 100  # constants


class Refused:
    """A function that a compiler refuses to compile."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_is_too_large_has_its_bytes():
    message = (
        "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (33.01G) exceeds available HBM (15.75G).\nSee more."
    )
    found = compile_program(Refused(message))
    assert found == TooLarge(int(33.01 * GIB), int(15.75 * GIB))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_program(Refused("INTERNAL: no"))


# What follows compiles for TPUs.

SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512}


@tpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_plan_over_a_mesh_of_tpus_and_a_step_that_does_not_fit():
    config = BertConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4)
    model = aj.adapt(Bert(config, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), aj.lora(4))
    ids = jax.ShapeDtypeStruct((8, 32), jnp.int32)
    example = jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(model.inner.init, jax.random.key(0), example)["params"]
    params = aj.init_adapters(model, params, jax.random.key(0), example)
    state = aj.abstract_state(model, params, tx=optax.adamw(1e-3))

    def loss(params, ids, key):
        return jnp.mean(model.apply({"params": params}, ids).astype(jnp.float32) ** 2)

    mesh = aj.make_mesh("fsdp=8", aj.devices("v5e:2x4"))
    found = aj.plan(state, loss, ids, mesh)
    one = aj.plan(state, loss, ids, aj.make_mesh("data=1", aj.devices("v5e")))
    assert found.devices == 8 and found.base < one.base / 4
    assert found.program.collectives["all-gather"] > 0 and not one.program.collectives
    assert one.program.flops > 0 and one.program.seconds > 0


@tpu
@pytest.mark.slow
def test_a_step_that_does_not_fit_a_tpu_has_its_bytes():
    def build():
        base = nnx.Linear(2**17, 2**16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return aj.adapt(base, aj.LoRA("**", rank=2), rngs=nnx.Rngs(1))

    state = aj.abstract_state(nnx.eval_shape(build), tx=optax.sgd(0.1))
    x = jax.ShapeDtypeStruct((8, 2**17), jnp.bfloat16)
    mesh = aj.make_mesh("data=1", aj.devices("v5e"))
    found = aj.plan(state, lambda model, x, key: jnp.mean(model(x).astype(jnp.float32)), x, mesh)
    assert found.program is None and found.base == 2 * (2**33 + 2**16)
    assert 16 * GIB <= found.total < 17 * GIB


@tpu
@pytest.mark.slow
def test_topologies_that_there_are_and_one_that_is_not():
    for name, count in (("v5e:2x4", 8), ("v6e:4x4", 16), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8)):
        found = aj.devices(name)
        tpu = TPUS[name.partition(":")[0]]
        assert len(found) == count and found[0].device_kind == tpu.kind
        assert memory_of(found[0]) == tpu.memory
    for shapes in ((name, shape) for name, tpu in TPUS.items() for shape in tpu.shapes):
        assert aj.devices(":".join(shapes))
    with raises(UserError, "v5e", "'3x3'", "2x4", "16x16"):
        aj.devices("v5e:3x3")
    with raises(UserError, "v5e", "'8'", "2x4"):
        aj.devices("v5e:8")


@tpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_memory_of_tpus_is_what_their_compiler_says():
    for name, tpu in TPUS.items():
        (one, *_) = aj.devices(name)
        x = jax.ShapeDtypeStruct((2**18, 2**20), jnp.int8, sharding=SingleDeviceSharding(one))
        found = compile_program(jax.jit(lambda x: jnp.sort(x, 1) + x).lower(x))
        assert isinstance(found, TooLarge) and found.available == tpu.memory, name


@tpu
@pytest.mark.slow
def test_another_process_may_hold_the_lock_of_the_library():
    code = "import adapters_jax as aj, sys; aj.devices('v5e'); print('loaded', flush=True); input()"
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "loaded\n"
        done = subprocess.run(
            [sys.executable, "-c", code], input="\n", capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout == "loaded\n", done.stderr
    finally:
        first.communicate("\n")


@tpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_any_function_can_be_compiled_for_them():
    sharding = SingleDeviceSharding(aj.devices("v6e")[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
    program = Program.of(jax.jit(lambda x: x @ x).lower(x).compile())
    assert program.flops == pytest.approx(2 * 256**3, rel=0.01)
    assert program.arguments == program.outputs == 2 * 256 * 256


def command(*flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", *map(str, flags), "--json"])
    return status, out.getvalue(), err.getvalue()


def test_flags_of_a_plan_for_a_device_that_do_not_fit():
    with command_raises(UserError, "--quantize int8", "--device"):
        command("--model", "bert-base", "--quantize", "int8")
    with command_raises(UserError, "'v5f'", "v5e"):
        command("--model", "bert-base", "--device", "v5f")


@tpu
@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_command_plans_for_tpus(tmp_path):
    write_llama(tmp_path / "llama")
    flags = ("--model", tmp_path / "llama", "--device", "v5e:2x4", "--length", 16, "--no-full")
    with command_raises(ShardingError, "fsdp=3", "8 devices"):
        command(*flags, "--mesh", "fsdp=3")
    with command_raises(ShardingError, "--batch-size 9", "fsdp=8", "multiple of 8"):
        command(*flags, "--batch-size", 9)
    status, out, err = command(*flags, "--method", "lora", "--no-largest")
    assert status == 0, err
    found = json.loads(out)
    assert found["mesh"] == {"fsdp": 8} and found["memory"] == 15.75 * GIB
    lora = found["plans"]["lora"]
    counted = count_parameters(str(tmp_path / "llama"), MethodOptions("lora"))
    assert lora["base"] == 2 * counted.frozen_parameters  # bfloat16, and all of it is small
    assert lora["total"] == lora["program"]["total"] and lora["batch"] == 8
    costs = found["costs"]["lora"]
    assert lora["program"]["loops"] and costs["flops"] > lora["program"]["flops"]
    assert err.count("compiling lora") == 3 and "fits 15.8 GiB" in err
    memory = lora["total"] / 1e9
    status, out, _ = command(*flags, "--memory", memory, "--quantize", "int8")
    found = json.loads(out)
    assert found["plans"]["lora"]["base"] < lora["base"]
    assert found["largest"]["lora"] is None or found["largest"]["lora"]["batch"] >= 8


@tpu
@pytest.mark.weekly
def test_the_notebook_of_a_chat_model_compiles_its_step_for_a_tpu(capsys):
    path = Path(__file__).parents[1] / "docs" / "notebooks" / "chat-tpu.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = {}
    for text in ("".join(each["source"]) for each in cells if each["cell_type"] == "code"):
        exec(text, found)
    plan, width, of_values, inner = found["found"], 2048, 512, 8192
    of_layer = 2 * (width + width) + 2 * (width + of_values) + 3 * (width + inner)
    assert plan.trainable_parameters == 16 * 8 * of_layer
    assert plan.base == 2 * 1_235_814_400  # bfloat16
    assert plan.base < plan.total < 15.75 * GIB
    assert f"{plan.trainable_parameters:,} parameters of" in capsys.readouterr().out


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_of", "axes"),
    [
        ("v5e:2x2", "slice=2,fsdp=4"),
        ("v5p:2x2x1", "slice=2,fsdp=4"),
        ("v6e:2x2", "fsdp=2,slice=2,model=2"),
    ],
)
def test_only_sums_of_the_size_of_adapters_cross_slices(slice_of, axes):
    config = BertConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4)
    model = aj.adapt(Bert(config, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), aj.lora(4))
    ids, example = jax.ShapeDtypeStruct((8, 32), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(model.inner.init, jax.random.key(0), example)["params"]
    params = aj.init_adapters(model, params, jax.random.key(0), example)
    state = aj.abstract_state(model, params, tx=optax.adamw(1e-3))

    def loss(params, ids, key):
        return jnp.mean(model.apply({"params": params}, ids).astype(jnp.float32) ** 2)

    devices = aj.devices(slice_of, slices=2)
    mesh = aj.make_mesh(axes, devices)
    at = mesh.axis_names.index("slice")
    for number, part in enumerate(np.moveaxis(mesh.devices, at, 0)):
        assert {device.slice_index for device in part.flat} == {number}
    found = aj.plan(state, loss, ids, mesh)
    sent = found.program.collectives["between-slices"]
    size = sum(4 * x.size for x in jax.tree.leaves(state.adapters))
    assert size / 8 < sent <= size + 64  # a device sends its part of the sum; and a few scalars
    assert found.program.collectives["all-gather"] > size  # of the base, inside of each slice
    with raises(ShardingError, "2 slices", "slice=2,fsdp=-1"):
        aj.make_mesh("fsdp=8", devices)


def test_what_crosses_slices_is_counted_by_what_a_device_sends():
    text = "ENTRY main () {\n%s = (bf16[2,3]{1,0}, u32[], token[]) send(%a, %t), channel_id=1, "
    text += 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n}'
    assert Hlo(text).collectives() == {"between-slices": 12}
    with raises(UserError, "h100:8", "slices=2"):
        aj.devices("h100:8", slices=2)
    with raises(UserError, "slices", "0"):
        aj.devices("v5e:2x2", slices=0)
