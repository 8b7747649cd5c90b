"""Factors A of projections that share their input: a product for each of them, or one for all.

Queries, keys and values read one input, as gate and up do. `x [A1 A2 A3]` would read it once, where
`x A1`, `x A2` and `x A3` may read it three times; backward, the gradients of A and of the input
likewise. The projections are written by hand, behind a norm, with the gradients of the input and of
the factors. On this machine they are timed; for TPUs they are compiled, if libtpu is installed.
"""

import functools
import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.distributed.devices import devices
from adapters_jax.distributed.program import Program, compile_program
from benchmarks.harness import Spread, interleave, ratio
from benchmarks.report import Report

RANK = 8
SMOL = {"q, k, v": (4096, 576, (576, 192, 192)), "gate, up": (4096, 576, (1536, 1536))}
LLAMA = {"q, k, v": (2048, 4096, (4096, 1024, 1024)), "gate, up": (2048, 4096, (14336, 14336))}
TOY = {"q, k, v": (16, 32, (32, 16, 16))}
APART, JOINED = "a product each", "one for all"


def projected(x: Any, scale: Any, frozen: Sequence[Any], pairs: Sequence[Any], joined: bool) -> Any:
    """`x W + (x A) B` of each projection, of the normed input."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6) * scale
    x = normed.astype(x.dtype)
    small = [a.astype(x.dtype) for a, _ in pairs]
    if joined:
        thin = jnp.split(x @ jnp.concatenate(small, 1), len(pairs), 1)
    else:
        thin = [x @ a for a in small]
    return [x @ w + h @ b.astype(x.dtype) for w, h, (_, b) in zip(frozen, thin, pairs, strict=True)]


def gradients(joined: bool) -> Any:
    """The gradients of the input and of the factors, for given gradients of the outputs."""

    def run(x: Any, scale: Any, frozen: Any, pairs: Any, given: Any) -> Any:
        def of(x: Any, pairs: Any) -> Any:
            return projected(x, scale, frozen, pairs, joined)

        _, pull = jax.vjp(of, x, pairs)
        return pull(given)

    return jax.jit(run)


def shapes(rows: int, d: int, widths: Sequence[int], dtype: Any, **more: Any) -> tuple[Any, ...]:
    """The arguments as shapes; the factors are in float32."""

    def array(*shape: int, kind: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, **more)

    frozen = [array(d, n) for n in widths]
    pairs = [(array(d, RANK, kind=jnp.float32), array(RANK, n, kind=jnp.float32)) for n in widths]
    return array(rows, d), array(d), frozen, pairs, [array(rows, n) for n in widths]


def run(report: Report, quick: bool) -> None:
    """Runs the whole benchmark; at toy sizes and on this machine if quick."""
    for name, size in (TOY if quick else SMOL).items():
        timed(report, name, size, 2 if quick else 31)
    if quick or not find_spec("libtpu"):
        return
    for device, (name, size), side in itertools.product(
        ("v5p", "v5e"), LLAMA.items(), (APART, JOINED)
    ):
        kept = jax.sharding.SingleDeviceSharding(devices(device)[0])
        given = shapes(*size, jnp.bfloat16, sharding=kept)
        program: Any = compile_program(gradients(side == JOINED).lower(*given))
        _add(report, name, f"{device}, bfloat16", size, side, program)


def timed(report: Report, name: str, size: Any, rounds: int) -> None:
    """Times both on this machine, once they have the same gradients."""
    given, draw = shapes(*size, jnp.float32), np.random.default_rng(0).standard_normal
    drawn = jax.tree.map(lambda x: jnp.asarray(draw(x.shape), x.dtype), given)
    made = {side: gradients(side == JOINED).lower(*given).compile() for side in (APART, JOINED)}
    found = {side: jax.tree.leaves(program(*drawn)) for side, program in made.items()}
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(abs(one).max()))

    def go(side: str) -> None:
        jax.block_until_ready(made[side](*drawn))

    seconds = interleave({side: functools.partial(go, side) for side in made}, rounds)
    report.samples(name, seconds)
    for side, program in made.items():
        took = {"seconds": Spread.of(seconds[side]), "time / apart": ratio(seconds, side, APART)}
        _add(report, name, "this machine, float32", size, side, Program.of(program), **took)


def _add(
    report: Report, name: str, where: str, size: Any, side: str, program: Program, **timed: Any
) -> None:
    rows, d, widths = size
    row = {
        "projections": name,
        "for": where,
        "sizes": f"{rows} x {d}, {' + '.join(map(str, widths))}",
    }
    row |= {"x A": side, **timed, "GFLOP": program.flops and program.flops / 1e9}
    row |= {"MB moved": program.moved / 1e6, "MiB of temporaries": program.temporaries / 2**20}
    row["ms, estimated"] = program.seconds and 1e3 * program.seconds
    report.add("Projections that share an input", **row)
