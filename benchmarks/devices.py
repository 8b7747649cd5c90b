"""Measures a step on many devices: FLOPs, exchanged bytes, and the speed of two processes.

FLOPs and exchanged bytes come from XLA, for steps compiled for eight CPU devices; they need no
clock. Two processes share the cores of one machine here, so they cannot be faster than one; the
row shows what joining them costs.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.harness import ROOT, Spread
from benchmarks.report import Report

MESHES = ("data=8", "fsdp=8", "data=4,model=2")
SLACK = 1.02
EXAMPLE = ROOT / "examples" / "finetune_llama_sharded.py"

COMPILED = """
import json, sys, jax, jax.numpy as jnp, optax
from flax import nnx
import adapters_jax as aj
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.distributed.plan import abstract_state
from adapters_jax.distributed.program import Hlo

layers, d, batch, length = json.loads(sys.argv[1])
config = DecoderConfig(8192, d, 4 * d, num_hidden_layers=layers, num_attention_heads=d // 64)
model = nnx.eval_shape(lambda: aj.adapt(
    Decoder(config, rngs=nnx.Rngs(0)), aj.lora(8), rngs=nnx.Rngs(1)))
ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

def loss(model, ids, key):
    return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]).mean()

step = aj.make_train_step(loss)
for mesh in json.loads(sys.argv[2]):
    state, rows = abstract_state(model, tx=optax.adamw(1e-3)), ids
    trained = 4 * sum(x.size for x in jax.tree.leaves(state.adapters))
    base = 4 * sum(x.size for x in jax.tree.leaves(state.base))
    if mesh:
        state, rows = (put(x, aj.make_mesh(mesh)) for put, x in
                       ((aj.shard, state), (aj.shard_batch, rows)))
    compiled = step.jitted.lower(state.replace(base=None), state.base, rows).compile()
    print(json.dumps([mesh, compiled.cost_analysis()["flops"], trained, base,
                      Hlo(compiled.as_text()).collectives()]), flush=True)
"""


def flops(report: Report, quick: bool) -> None:
    """Reports the FLOPs of a step on each of eight devices, and the bytes that each receives."""
    sizes = [2, 128, 16, 32] if quick else [4, 768, 64, 128]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-c", COMPILED, json.dumps(sizes), json.dumps([None, *MESHES])]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    one = None
    for line in ran.stdout.splitlines():
        mesh, work, trained, base, exchanged = json.loads(line)
        one = one or work
        report.add(
            "A step of a Llama with LoRA on each of eight devices",
            mesh=mesh or "one device",
            **{"GFLOP a device": work / 1e9, "times an eighth of one": 8 * work / one},
            **{"trained bytes": trained, "base bytes": base},
            **{f"{kind} bytes": exchanged.get(kind, 0) for kind in ("all-reduce", "all-gather")},
        )
        if mesh == "data=8":
            report.claim("FLOPs of a device of 8 / an eighth of one's", 8 * work / one, SLACK)
            sent = sum(exchanged.values())
            report.claim(
                "bytes exchanged, data=8 / trained bytes + the loss", sent / (trained + 4), 1
            )


def processes(report: Report, quick: bool) -> None:
    """Reports the tokens per second of the example script in one process and in two."""
    steps = 20 if quick else 400
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(1 if quick else 3):
        for count in found:
            found[count].append(_tokens_a_second(count, steps))
    for count, speeds in found.items():
        report.add(
            "The example's toy Llama, tokens a second, compiling included",
            processes=count,
            **{"tokens/s": Spread.of(speeds)},
        )


def _tokens_a_second(count: int, steps: int) -> float:
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
        probe.close()
        shared: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
        if count > 1:
            shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
            shared |= {"JAX_NUM_PROCESSES": str(count)}
        command = [sys.executable, str(EXAMPLE), "--run", directory, "--steps", str(steps)]
        running = [
            subprocess.Popen(
                command,
                env={**shared, **({"JAX_PROCESS_ID": str(i)} if count > 1 else {})},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        outputs = [process.communicate(timeout=600) for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(outputs[0][1][-2000:])
    match = re.search(r"([\d,]+) tokens/s", outputs[0][0])
    if match is None:
        raise RuntimeError(f"the example printed no speed: {outputs[0][0][-500:]}")
    return float(match[1].replace(",", ""))
