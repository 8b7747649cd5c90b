"""A step of eight tenants with 4 rows each, against one of a tenant with 32, and training alone.

Tenants go through the engine, with its queue: `forward_backward` of each, then `optim_step`. Alone
is `make_train_step` on the same rows with one adapter. Then programs of many tenants are compiled,
and not run: their operations and memory, by the compiler of this machine.
"""

import re
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import adapters_jax as aj
from adapters_jax.distributed.devices import devices
from adapters_jax.distributed.program import Program, compile_program
from adapters_jax.finetune.models.decoder import Decoder, DecoderConfig
from adapters_jax.finetune.tenants.engine import Tenants
from adapters_jax.finetune.tenants.programs import Batch, Programs
from adapters_jax.finetune.tenants.requests import Adam, Row
from adapters_jax.training.losses import cross_entropy
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

ROWS, EIGHT, ONE, ALONE = 32, "8 tenants x 4 rows", "1 tenant x 32 rows", "alone, 32 rows"
LIMIT, CREATE = 1.05, 0.05  # of times, FLOPs and memory; seconds for a new tenant
RATE = 1e-3


def run(report: Report, quick: bool, part: str = "") -> None:
    """Runs the whole benchmark, or its part `compiled` or `cycles`; a small decoder if quick."""
    layers, length, rounds = (1, 16, 1) if quick else (8, 128, 7)
    config = DecoderConfig(8192, 576, 1536, layers, 9, 3)  # SmolLM2's layers
    base = Decoder(config, rngs=nnx.Rngs(0))
    recipe = aj.LoRA(("**/attention/*", "**/mlp/*"), rank=8)
    if part == "cycles":
        base = Decoder(replace(config, num_hidden_layers=min(layers, 2)), rngs=nnx.Rngs(0))
        _cycles(report, base, recipe, 8 if quick else 64, length)
        return
    if part:
        _many(report, base, recipe, 8 if quick else 64, length)
        return
    engine = Tenants(base, recipe, places=9, rows=ROWS, group=4, lengths=(length,))
    engine.start()
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, length + 1))
    rows = [Row(each[:-1], each[1:], {"weights": np.ones(length)}) for each in ids]
    took = [_create(engine, f"{i}", recipe, i) for i in range(9)]
    report.claim("seconds for a new tenant", Spread.of(took), CREATE)
    tenants = {EIGHT: [str(i) for i in range(8)], ONE: ["8"]}
    runs: dict[str, Any] = {
        name: lambda n=name: _step(engine, tenants[n], rows) for name in tenants
    }
    runs[ALONE], program = _alone(base, recipe, ids)
    seconds = interleave(runs, rounds)
    report.samples("a step", seconds)
    passed = engine._programs._compiled[ROWS // 4, length, True].cost_analysis()
    costs = {EIGHT: passed, ONE: passed, ALONE: program.cost_analysis()}
    for name in runs:
        cost = costs[name]
        report.add(
            f"A step, {layers} layers, {ROWS} x {length} tokens",
            what=name,
            seconds=Spread.of(seconds[name]),
            **{"GFLOP": cost["flops"] / 1e9, "GB accessed": cost["bytes accessed"] / 1e9},
        )
    engine.close()
    report.claim(f"time of {EIGHT} / {ONE}", ratio(seconds, EIGHT, ONE), LIMIT)
    report.add("Ratios", of=f"{EIGHT} / {ALONE}", seconds=ratio(seconds, EIGHT, ALONE))
    _many(report, base, recipe, 8 if quick else 64, length)


def _create(engine: Tenants, name: str, recipe: Any, seed: int) -> float:
    start = time.perf_counter()
    engine.create(name, recipe, seed)
    return time.perf_counter() - start


def _step(engine: Tenants, names: list[str], rows: list[Row]) -> None:
    """A step of some tenants, each on its part of the rows."""
    each, futures = len(rows) // len(names), []
    for i, name in enumerate(names):
        engine.forward_backward(name, rows[i * each : (i + 1) * each], "cross_entropy")
    for name in names:
        futures.append(engine.optim_step(name, Adam(RATE)))
    for future in futures:
        future.result()


def _alone(base: Any, recipe: Any, ids: np.ndarray) -> tuple[Any, Any]:
    """The step of one adapter by itself, and its program."""
    example = (jnp.zeros((1, 4), jnp.int32),)
    model = aj.adapt(base, recipe, rngs=nnx.Rngs(0), example_inputs=example)
    tx = optax.adamw(RATE, 0.9, 0.95, 1e-12, weight_decay=0.0)
    state = aj.TrainState.create(model, tx=tx, key=jax.random.key(0))

    def loss(model: Any, ids: Any, key: Any) -> Any:
        hidden, weights = model.hidden(ids[:, :-1]), jnp.ones(ids[:, 1:].shape)
        return cross_entropy(hidden, model.logits, ids[:, 1:], weights)

    step = aj.make_train_step(loss)
    program = step.jitted.lower(state.replace(base=None), state.base, ids).compile()
    now = [state]

    def go() -> None:
        now[0], metrics = step(now[0], ids)
        jax.block_until_ready(metrics["loss"])

    return go, program


def _many(report: Report, base: Any, recipe: Any, n: int, length: int) -> None:
    """Compiles a row of each of n tenants, and n rows of one, for this machine and for a TPU."""
    for device in ("this machine", *(["v5p"] if find_spec("libtpu") else [])):
        found = dict[int, Program]()
        for tenants in (n, 1):
            group = n // tenants
            engine = Tenants(base, recipe, places=n, rows=n, group=group, lengths=(length,))
            found[tenants] = program = _compiled(engine._programs, tenants, length, device)
            row = {
                "for": device,
                "tenants": tenants,
                "GFLOP": program.flops and program.flops / 1e9,
            }
            row |= {"MB": program.total / 1e6, "MB of temporaries": program.temporaries / 1e6}
            row["ms, estimated"] = program.seconds and 1e3 * program.seconds
            report.add(f"{n} rows by the compiler", **row)
        for what in ("flops", "total", "temporaries", "seconds"):
            some, one = (getattr(program, what) for program in found.values())
            if some and one:
                named = {"flops": "FLOPs", "total": "peak", "seconds": "estimated seconds"}
                case = f"{named.get(what, what)} of {n} tenants / 1 tenant, {device}"
                report.claim(case, round(some / one, 3), LIMIT)


def _cycles(report: Report, base: Decoder, recipe: Any, n: int, length: int) -> None:
    """The cycles of all operations, as a TPU's compiler estimates them for its own choices.

    Its estimate of the whole program's time is another one: by operations and bytes, as if each
    array were read and written in the memory.
    """
    found = {}
    for tenants in (n, 1):
        engine = Tenants(base, recipe, places=n, rows=n, group=n // tenants, lengths=(length,))
        program = _lowered(engine._programs, tenants, length, "v5p").compile()
        costs = program.cost_analysis()
        cycles = map(int, re.findall(r'"estimated_cycles":"(\d+)"', program.as_text()))
        found[tenants] = sum(each for each in cycles if each < 2**62)  # else it knows none
        report.add(
            f"{n} rows on a v5p, {base.config.num_hidden_layers} layers",
            tenants=tenants,
            **{"Mcycles of all operations": found[tenants] / 1e6},
            **{"ms, estimated": 1e3 * costs["optimal_seconds"]},
            **{"GB accessed": costs["bytes accessed"] / 1e9, "GFLOP": costs["flops"] / 1e9},
        )
    case = f"estimated cycles of {n} tenants / 1 tenant, all operations, v5p"
    report.claim(case, round(found[n] / found[1], 3), LIMIT)


def _compiled(programs: Programs, groups: int, length: int, device: str) -> Program:
    """The program of a batch, for a device."""
    program: Any = compile_program(_lowered(programs, groups, length, device))
    return program


def _lowered(programs: Programs, groups: int, length: int, device: str) -> Any:
    """A batch's pass with gradients, to be compiled for a device."""
    stack = jax.eval_shape(
        programs._idle, {p: np.float32(x) for p, x in programs.room.idle.items()}
    )
    batch = Batch.empty(groups, programs.each, length)
    given: Any = stack.grads, programs._base, stack.leaves, programs.tables, batch
    if device != "this machine":
        kept = jax.sharding.SingleDeviceSharding(devices(device)[0])
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=kept), given
        )
    return jax.jit(programs._backward, donate_argnums=0).lower(*given)
