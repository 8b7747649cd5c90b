"""Compares saving and loading an adapter with raw safetensors, and times checkpoints in training.

The adapter is LoRA of rank 32 on query and value of a BERT-base: 1,179,648 parameters in 48
tensors. Both sides write through to the disk (fsync), since a file must survive a power failure;
one row shows raw safetensors without fsync. Reading includes the checks of names, sizes and finite
values.
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax

import adapters_jax as aj
from adapters_jax.files.adapter import read_adapter
from adapters_jax.finetune.models.bert import BertClassifier, BertConfig
from adapters_jax.trees import flatten
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

BASE = BertConfig()
TOY = BertConfig(100, 64, 2, 4, 128, max_position_embeddings=64)
SLACK, BLOCKED = 2.0, 5e-3


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes if quick."""
    directory = Path(tempfile.mkdtemp(prefix="adapters-jax-benchmark-"))
    try:
        config = TOY if quick else BASE
        _files(report, directory, config, rounds=3 if quick else 31)
        _checkpoints(report, directory, config, saves=3 if quick else 15)
        _sizes(report, directory, config, rounds=1 if quick else 5)
    finally:
        shutil.rmtree(directory)


def _adapted(config: BertConfig, recipe: aj.Recipe) -> tuple[Any, Any, Any]:
    """A classifier, its parameters without adapters, and a training state."""
    model = BertClassifier(config, 2)
    ids = jnp.ones((1, 8), jnp.int32)
    base = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    adapted = aj.adapt(model, recipe)
    params = aj.init_adapters(adapted, base, jax.random.key(1), ids)
    state = aj.TrainState.create(adapted, params, tx=optax.adamw(1e-3), key=jax.random.key(2))
    return model, base, state


def _noisy(tree: Any) -> Any:
    """Random values, since zeros are faster to read and compress."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), tree)


def _files(report: Report, directory: Path, config: BertConfig, rounds: int) -> None:
    model, base, state = _adapted(config, aj.lora(32))
    state = state.replace(adapters=_noisy(state.adapters))
    tensors = flatten(state.trained)
    ours, raw = directory / "adapter", directory / "raw.safetensors"

    def raw_save(sync: bool) -> None:
        safetensors.flax.save_file(tensors, raw)
        if sync:
            _sync(raw)

    def raw_load() -> None:
        jax.block_until_ready(safetensors.flax.load_file(raw))

    def load_onto() -> None:
        ids = jnp.ones((1, 8), jnp.int32)
        jax.block_until_ready(aj.load_adapter(ours, model, base, ids)[1])

    sides: dict[str, Callable[[], Any]] = {
        "save_adapter": lambda: aj.save_adapter(ours, state),
        "raw save": lambda: raw_save(sync=False),
        "raw save, fsync": lambda: raw_save(sync=True),
        "read_adapter": lambda: jax.block_until_ready(read_adapter(ours)[1]),
        "raw load": raw_load,
        "load_adapter, onto the model": load_onto,
    }
    sides["save_adapter"](), sides["raw save"]()  # a round may start with reading
    seconds = interleave({k: (lambda f=f: f() and None) for k, f in sides.items()}, rounds)
    report.samples("files", seconds)
    against = {"save_adapter": "raw save, fsync", "read_adapter": "raw load"}
    size = sum(path.stat().st_size for path in ours.iterdir())
    values = sum(x.nbytes for x in tensors.values())
    for name in sides:
        other = against.get(name)
        report.add(
            f"An adapter file of {values // 4:,} parameters",
            what=name,
            ms=Spread.of(1e3 * s for s in seconds[name]),
            **{"times raw": ratio(seconds, name, other) if other else None},
        )
    report.add("Bytes", what="its tensors", bytes=values)
    report.add("Bytes", what="the file, both parts", bytes=size)
    for name, other in against.items():
        report.claim(f"{name} / {other}", ratio(seconds, name, other), SLACK)
    report.claim("bytes of the file / its tensors", size / values, 1.02)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _checkpoints(report: Report, directory: Path, config: BertConfig, saves: int) -> None:
    """Times how long a save blocks the training while steps run."""
    model, _, state = _adapted(config, aj.lora(32))
    ids = jax.random.randint(jax.random.key(3), (4, 32), 0, config.vocab_size)
    adapted = aj.adapt(model, state.recipe)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        return jnp.mean(adapted.apply({"params": params}, batch) ** 2)

    step, blocked, steps, saved = aj.make_train_step(loss), [], [], []
    with aj.Checkpoints(directory / "checkpoints") as checkpoints:
        for i in range(1, 1 + 4 * (saves + 1)):
            began = time.perf_counter()
            state, _ = step(state, ids)
            if i % 4 == 0:
                before = time.perf_counter()
                checkpoints.save(i, state)
                blocked.append(time.perf_counter() - before)
            jax.block_until_ready(state)
            (saved if i % 4 == 0 else steps).append(time.perf_counter() - began)
            if i % 4 == 0:
                before = time.perf_counter()
                checkpoints.wait()
                report.samples("written in", {"thread": [time.perf_counter() - before]})
    blocked, steps, saved = blocked[1:], steps[3:], saved[1:]  # the first ones compile
    report.samples("checkpoints", {"blocked": blocked, "steps": steps, "with a save": saved})
    table = "A checkpoint while training"
    report.add(table, what="save returns after", ms=Spread.of(1e3 * s for s in blocked))
    report.add(table, what="a step", ms=Spread.of(1e3 * s for s in steps))
    report.add(table, what="a step and a save's copy", ms=Spread.of(1e3 * s for s in saved))
    more = statistics.median(saved) - statistics.median(steps)
    report.claim("a save blocks the step, ms", Spread.of(1e3 * s for s in blocked), 1e3 * BLOCKED)
    report.add(table, what="difference of the two medians", ms=1e3 * more)


def _sizes(report: Report, directory: Path, config: BertConfig, rounds: int) -> None:
    """Reports the time and bytes of a checkpoint, of adapters and of the full model."""
    states = {
        "LoRA, rank 32": _adapted(config, aj.lora(32))[2],
        "full fine-tuning": _adapted(config, aj.full())[2],
    }
    seconds: dict[str, list[float]] = {name: [] for name in states}
    sizes = {}
    for i in range(rounds):
        for name, state in states.items():
            path = directory / f"{name}-{i}"
            noisy = state.replace(adapters=_noisy(state.adapters))
            with aj.Checkpoints(path) as checkpoints:
                began = time.perf_counter()
                checkpoints.save(1, noisy)
                checkpoints.wait()
                seconds[name].append(time.perf_counter() - began)
            sizes[name] = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            shutil.rmtree(path)
    report.samples("whole checkpoints", seconds)
    for name, state in states.items():
        report.add(
            "A whole checkpoint: what trains, its optimiser's state, step and key",
            recipe=name,
            parameters=sum(x.size for x in jax.tree.leaves(state.adapters)),
            bytes=sizes[name],
            seconds=Spread.of(seconds[name]),
        )
