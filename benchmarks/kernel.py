"""The kernel for weights in blocks, as libtpu schedules it: instructions against matrix cycles.

XLA takes the time of a kernel from what the kernel says of itself. The schedule does not: a core
starts one instruction a cycle, each of several operations at once, so a tile takes at least as many
cycles as its instructions, and as its products keep the matrix units busy.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from adapters_jax.weights.kernel import product, tile_of
from benchmarks.harness import ROOT
from benchmarks.report import Report

# Floating-point operations a cycle of a core: 4 matrix units of 128 x 128, and of 256 x 256 on a
# v6e. https://jax-ml.github.io/scaling-book/tpus/
MATRIX = {"v5e": 4 * 2 * 128**2, "v5p": 4 * 2 * 128**2, "v6e": 4 * 2 * 256**2}
ROWS, BLOCK = 2048, 64
SHAPES = {0: (4096, 14336), 1: (14336, 4096)}  # by the axis along which blocks are
LIMIT = 1.25
_LINE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:")


def run(report: Report, quick: bool) -> None:
    """Compiles the products of a feed-forward layer of Llama 3 8B; two of them if quick."""
    for device in ["v5p"] if quick else MATRIX:
        for qtype in ("int4", "nf4"):
            for along, contracted in [(0, 0)] if quick else [(0, 0), (0, 1), (1, 1), (1, 0)]:
                _add(report, device, qtype, along, contracted)


def _add(report: Report, device: str, qtype: str, along: int, contracted: int) -> None:
    shape = SHAPES[along]
    tile = tile_of(ROWS, shape, BLOCK, along, contracted, (16, 4))
    assert tile is not None
    cycles = 2 * tile.rows * tile.outputs * tile.inner / MATRIX[device]
    found = instructions(device, qtype, along, contracted)
    what = "x W" if contracted == along else "its gradient"
    report.add(
        f"A tile of {ROWS} x {shape[contracted]} x {shape[1 - contracted]}, blocks of {BLOCK}",
        device=device,
        weight=qtype,
        product=f"{what}, blocks along {('rows', 'columns')[along]}",
        tile=" x ".join(map(str, tile)),
        instructions=found,
        **{"cycles of the products": round(cycles)},
        ratio=round(found / cycles, 3),
    )
    case = f"instructions of a tile / cycles of its products, {device}, {qtype}"
    if (along, contracted) == (0, 0):
        report.claim(case, round(found / cycles, 3), LIMIT)


def instructions(device: str, qtype: str, along: int, contracted: int) -> int:
    """Those that libtpu schedules for a tile, without what only the first and the last one run."""
    with tempfile.TemporaryDirectory() as place:
        flags = f"--xla_jf_dump_to={place} --xla_jf_dump_llo_text=true"
        own = {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-m", "benchmarks.kernel", device, qtype, f"{along}{contracted}"]
        subprocess.run(words, check=True, env={**os.environ, **own}, cwd=ROOT)
        # Of the kernel, and of a program that stands for what runs after it.
        texts = [path.read_text() for path in Path(place).glob("*-final_bundles.txt")]
    lines = max(texts, key=len).splitlines()
    skipped = sorted(_skipped(lines))[-2:]
    return sum(bool(_LINE.match(line)) for line in lines) - sum(skipped)


def _skipped(lines: list[str]) -> Iterator[int]:
    """How many instructions each branch leaves out, up to where the next such part ends."""
    marks = [(int(m[1], 16), m[2], line) for line in lines if (m := _LINE.match(line))]
    ends = [at for at, mark, _ in marks if mark == "PF"]
    for at, _, line in marks:
        if "sbr.rel (%p" in line and (after := [end for end in ends if end > at]):
            yield after[0] - at


def _compile(device: str, qtype: str, along: int, contracted: int) -> None:
    import adapters_jax as aj

    there = jax.sharding.SingleDeviceSharding(aj.devices(device)[0])
    shape = SHAPES[along]
    numbers = jnp.uint4 if qtype == "nf4" else jnp.int4
    scales = (shape[along] // BLOCK, shape[1 - along])
    given = ((ROWS, shape[contracted]), jnp.bfloat16), (shape, numbers), (scales, jnp.float32)
    arrays = [jax.ShapeDtypeStruct(*each, sharding=there) for each in given]
    jax.jit(product, static_argnums=(3, 4, 5)).lower(*arrays, along, contracted, qtype).compile()


if __name__ == "__main__":
    _compile(*sys.argv[1:3], *map(int, sys.argv[3]))
