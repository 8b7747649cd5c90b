"""Counts what is trained and stored for GPT-3 175B and BERT-large, and compares with the papers.

Counts are audits of abstract models. The bytes of an adapter are those of a file that is written
and read back. The base is stored once, at 2 bytes for each parameter. The published figures are
from Hu et al. 2021 (sections 1, 4.2; table 4) and Houlsby et al. 2019 (table 1).
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

import adapters_jax as aj
from adapters_jax.finetune.models import FAMILIES
from adapters_jax.finetune.options.method import MethodOptions
from adapters_jax.finetune.shapes import adapted_shape
from adapters_jax.nnx import AdapterParam, recipe_of
from adapters_jax.trees import flatten, unflatten
from benchmarks.report import Report
from benchmarks.shapes import agreement

RANKS = (1, 4, 8)  # 4.7 M parameters, the checkpoint of 35 MB, and 37.7 M parameters
DTYPES = (jnp.float16, jnp.bfloat16, jnp.float32)
FEWER, MODEL_GB, ADAPTER_MB, HUNDRED_GB = 10_000, 350, 35, 354
TABLE_4 = {1: 4.7, 8: 37.7}
TASKS = 9  # the tasks of GLUE


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark, which is the same if quick."""
    counts = {rank: counted(rank) for rank in RANKS}
    fewer = {f"r={r}": c.frozen_parameters / c.trainable_parameters for r, c in counts.items()}
    for rank, found in counts.items():
        _count(report, f"GPT-3 175B, LoRA r={rank} on q, v", found)
    report.verdict(
        "LoRA trains n times fewer parameters of GPT-3 175B",
        f"{FEWER:,} times",
        f"{fewer['r=4']:,.0f} times",
        f"audit, r=4; r=1 {fewer['r=1']:,.0f} times, r=8 {fewer['r=8']:,.0f} times",
        agreement(fewer["r=4"], FEWER, more_is_fine=True),
    )
    for rank, published in TABLE_4.items():
        trainable = counts[rank].trainable_parameters
        report.verdict(
            f"trainable parameters of GPT-3 175B, LoRA r={rank} on q, v",
            f"{published} M",
            f"{trainable / 1e6:.1f} M",
            f"audit: {trainable:,}",
            agreement(trainable / 1e6, published),
        )
    title = "GPT-3 175B, LoRA on q, v: how many times fewer parameters train"
    report.panel(title, "times", fewer, ours=list(fewer), level=FEWER)
    _files(report, 2 * counts[4].frozen_parameters)
    _houlsby(report)


def counted(rank: int) -> aj.Audit:
    """Audits GPT-3 175B with LoRA; its layers are scanned, which changes no count."""
    return aj.audit(*adapted_shape("gpt3-175b", lora(rank), scan=True))


def lora(rank: int) -> MethodOptions:
    """The options of LoRA on query and value, the command line's default."""
    return MethodOptions("lora", rank=rank)


def _count(report: Report, what: str, found: aj.Audit) -> None:
    report.add(
        "Parameters",
        what=what,
        trainable=found.trainable_parameters,
        base=found.frozen_parameters,
        **{"% of the base": 100 * found.trainable_parameters / found.frozen_parameters},
    )


def adapter(rank: int) -> tuple[aj.Recipe, dict[str, np.ndarray]]:
    """The recipe, and random factors by path for each layer of GPT-3."""
    model, _ = adapted_shape("gpt3-175b", lora(rank), scan=True)
    rng, names = np.random.default_rng(0), FAMILIES["gpt2"].names
    shapes = flatten(nnx.to_pure_dict(nnx.state(model, AdapterParam)))
    factors = {path: rng.standard_normal(x.shape, np.float32) for path, x in shapes.items()}
    return recipe_of(model), flatten(aj.unstack_layers(unflatten(factors), names))


def stored(directory: Path, recipe: aj.Recipe, factors: dict[str, np.ndarray]) -> int:
    """Writes an adapter, reads it back, and returns the bytes of its two files.

    Raises:
        ValueError: the adapter that was read differs from the one that was written.
    """
    saved = aj.save_adapter(directory, unflatten(factors), recipe)
    again = flatten(aj.read_adapter(saved)[1])
    same = (np.asarray(again[path]).tobytes() == x.tobytes() for path, x in factors.items())
    if again.keys() != factors.keys() or not all(same):
        raise ValueError(f"the adapter in {directory} is not the one that was written")
    return sum(path.stat().st_size for path in saved.iterdir())


def _files(report: Report, model: int) -> None:
    """Writes the adapter of r = 4 in each dtype, and compares it with the model's bytes."""
    recipe, factors = adapter(4)
    sizes = {}
    with tempfile.TemporaryDirectory(prefix="adapters-jax-benchmark-") as directory:
        for dtype in DTYPES:
            cast = {path: x.astype(dtype) for path, x in factors.items()}
            size = sizes[dtype] = stored(Path(directory) / "adapter", recipe, cast)
            report.add(
                "The adapter's files, LoRA r=4 on q, v of GPT-3 175B",
                dtype=np.dtype(dtype).name,
                tensors=len(cast),
                parameters=sum(x.size for x in cast.values()),
                bytes=size,
                **{
                    "bytes beyond its values": size - sum(x.nbytes for x in cast.values()),
                    "times smaller than the model": model / size,
                },
            )
    half = sizes[jnp.float16]
    how = (
        f"files written in float16, {half:,} bytes ({half / 2**20:.1f} MiB), beside 2 bytes a "
        "parameter of the model"
    )
    rows = (
        ("the full model's checkpoint", MODEL_GB, model / 1e9, "GB"),
        ("the adapter's checkpoint", ADAPTER_MB, half / 1e6, "MB"),
        ("the adapter's checkpoint is smaller", FEWER, model / half, "times"),
        ("100 tasks stored, LoRA", HUNDRED_GB, (model + 100 * half) / 1e9, "GB"),
        ("100 tasks stored, full", 100 * MODEL_GB, 100 * model / 1e9, "GB"),
    )
    for what, published, ours, unit in rows:
        values = f"{published:,} {unit}", f"{ours:,.{0 if ours > 1000 else 1}f} {unit}"
        report.verdict(f"GPT-3 175B, LoRA r=4: {what}", *values, how, agreement(ours, published))


def _houlsby(report: Report) -> None:
    """Counts BERT-large with adapters of width 64 and trained layer norms, without a head."""
    houlsby = MethodOptions("houlsby", bottleneck_dim=64)
    found = aj.audit(*adapted_shape("bert-large", houlsby, scan=True))
    _count(report, "BERT-large, Houlsby m=64", found)
    base = found.trainable_parameters + found.frozen_parameters - found.adapter_parameters
    share = found.trainable_parameters / base
    tasks = 1 + TASKS * share
    how = f"audit: {found.trainable_parameters:,} of {base:,}, without pooler and head"
    rows = (
        ("parameters trained a task", "2.1 %", f"{100 * share:.2f} %", 100 * share / 2.1),
        (f"parameters of {TASKS} tasks", "1.2 times", f"{tasks:.2f} times", tasks / 1.2),
    )
    for what, published, ours, ratio in rows:
        claim = f"BERT-large, Houlsby m=64: {what}"
        report.verdict(claim, published, ours, how, agreement(ratio, 1.0))
